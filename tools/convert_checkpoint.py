"""Convert checkpoints between Hugging Face and Megatron, or compare two of them bit for bit.

    convert_checkpoint.py hf-to-megatron SRC DST
    convert_checkpoint.py megatron-to-hf SRC DST
    convert_checkpoint.py verify A B

Runs in one process and holds one tensor at a time. A Megatron checkpoint is what training writes
(`weights/`, `published/`), so it loads in any layout. DST must not exist.
"""

import argparse
import os
import sys
from pathlib import Path

from megatron_vrl.errors import EXIT_CODE, UserError

# A tensor's memory is asked for and given back row by row; in huge pages that costs a third less
# of the whole conversion.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("direction", choices=["hf-to-megatron", "megatron-to-hf", "verify"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    from megatron_vrl.training.convert import compare, convert_to_megatron, convert_to_published

    source, target = arguments.source, arguments.target
    try:
        if arguments.direction == "verify":
            print(f"{compare(source, target)} tensors are bit-equal")
            return 0
        to_megatron = arguments.direction == "hf-to-megatron"
        arch = (convert_to_megatron if to_megatron else convert_to_published)(source, target)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    print(f"{target}: {arch.num_parameters:,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
