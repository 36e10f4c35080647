"""Sampling answers with vLLM, and handing it the trainer's weights."""
