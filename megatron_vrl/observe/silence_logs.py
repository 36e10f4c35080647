"""Keeps what libraries say to each other off the screen of a run.

Megatron warns of what a CPU machine lacks, torch of its own old names in Megatron; vLLM resets
Python's memory of what was said already, so that both would come again at every step. Our own
warnings, errors of all, and tests (which show everything) are untouched.
"""

import logging
import os
import warnings


def silence_libraries() -> None:
    """Call it before the libraries are imported; some speak while they load."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # vLLM's word about NUMA nodes
    os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # its advertisement
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|megatron\.")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.|megatron\.")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # absent, and not missed
