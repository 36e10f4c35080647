"""Clips of the synthetic set: content, pixels and annotations. See make_synthetic.py."""
