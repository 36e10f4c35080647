#!/usr/bin/env python3
"""Convert checkpoints between Hugging Face and Megatron, or compare two of them bit for bit.

    convert_checkpoint.py hf-to-megatron SRC DST
    convert_checkpoint.py megatron-to-hf SRC DST
    convert_checkpoint.py verify A B

Runs in one process and holds one tensor at a time. A Megatron checkpoint is what training writes
(`weights/`, `published/`), so it loads in any layout. DST must not exist.
"""

import os
from pathlib import Path

from megatron_vrl.observe.progress import say_written
from megatron_vrl.process.command_line import tool_parser
from megatron_vrl.process.entry import run_program

# A tensor's memory is asked for and given back row by row; in huge pages that costs a third less
# of the whole conversion.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument(
        "direction", choices=["hf-to-megatron", "megatron-to-hf", "verify"], help="what to do"
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="a checkpoint; A of verify")
    parser.add_argument("target", type=Path, metavar="DST", help="a new directory; B of verify")
    arguments = parser.parse_args()
    from megatron_vrl.checkpoint.convert import compare, convert_to_hf, convert_to_megatron
    from megatron_vrl.models.qwen2_5_vl.hf_shapes import num_parameters

    source, target = arguments.source, arguments.target
    if arguments.direction == "verify":
        print(f"{compare(source, target)} tensors are bit-equal")
        return
    to_megatron = arguments.direction == "hf-to-megatron"
    arch = (convert_to_megatron if to_megatron else convert_to_hf)(source, target)
    print(f"{num_parameters(arch):,} parameters", flush=True)
    say_written(target)


if __name__ == "__main__":
    run_program(main)
