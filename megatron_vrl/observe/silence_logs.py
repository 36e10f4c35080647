"""Silences warnings of libraries that do not concern the user of a run.

Megatron warns about packages missing on a CPU machine, torch about deprecated names used by
Megatron. vLLM resets Python's registry of shown warnings, so each would repeat at every step.
Warnings of this package, errors of any library, and tests (which show everything) are unaffected.
"""

import logging
import os
import warnings


def silence_libraries() -> None:
    """Set the filters. Call it before importing the libraries, since some warn at import."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # vLLM's warning about NUMA nodes
    os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # its advertisement
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|megatron\.")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.|megatron\.")
    logging.getLogger("torch._library.triton").setLevel(
        logging.ERROR
    )  # missing triton is not needed
