"""Convert checkpoints between Hugging Face and Megatron, or compare two of them bit for bit.

    mvrl convert hf-to-megatron SRC DST
    mvrl convert megatron-to-hf SRC DST      # adapters are merged into their base
    mvrl convert megatron-to-peft SRC DST    # of a checkpoint of adapters
    mvrl convert verify A B

The conversion runs in one process and holds one tensor at a time. A Megatron checkpoint has the
format that training writes, so it loads in any parallel layout. DST must not exist.
"""

import os
from pathlib import Path

from megatron_vrl.process.command_line import OverrideParser, tool_parser
from megatron_vrl.process.entry import run_program

DIRECTIONS = ("hf-to-megatron", "megatron-to-hf", "megatron-to-peft", "verify")


def make_parser() -> OverrideParser:
    parser = tool_parser(__doc__)
    parser.add_argument("direction", choices=DIRECTIONS, help="direction, or verify to compare")
    parser.add_argument("source", type=Path, metavar="SRC", help="a checkpoint; A of verify")
    parser.add_argument("target", type=Path, metavar="DST", help="a new directory; B of verify")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    # torch allocates and frees a tensor row by row here. Huge pages save a third of the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from megatron_vrl.checkpoint.convert import (
        compare,
        convert_to_hf,
        convert_to_megatron,
        convert_to_peft,
    )
    from megatron_vrl.models.weight_map import num_parameters
    from megatron_vrl.observe.progress import log_written

    source, target = arguments.source, arguments.target
    if arguments.direction == "verify":
        print(f"{compare(source, target)} tensors are bit-equal")
        return
    convert = {
        "hf-to-megatron": convert_to_megatron,
        "megatron-to-hf": convert_to_hf,
        "megatron-to-peft": convert_to_peft,
    }
    arch = convert[arguments.direction](source, target)
    print(f"{num_parameters(arch):,} parameters", flush=True)
    log_written(target)


if __name__ == "__main__":
    run_program(main)
