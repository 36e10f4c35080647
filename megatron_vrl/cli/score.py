"""Write the log-prob of every token of given responses, to compare layouts, engines, checkpoints.

    mvrl score --checkpoint DIR --samples IN.jsonl --out OUT.jsonl [section.key=value ...]

It runs as one process, or in any parallel layout under torchrun:

    torchrun --nproc-per-node 4 -m megatron_vrl score ... parallel.tensor=2 parallel.pipeline=2

A sample is one line of IN:

    {"id": "a", "system": null, "videos": ["clip.mp4"], "images": [], "question": "...",
     "response": "..."}

"id", "question" and "response" are required. "system" null or absent is the default of the chat
template. The prompt shows the videos, then the images, then the question. Relative paths start at
the working directory. The stop token <|im_end|> is appended to the response and scored, since the
trainer trains on it; do not write it yourself.

A result is one line of OUT, in the order of IN:

    {"id", "prompt_token_ids", "response_token_ids", "positions", "logprobs"}

prompt_token_ids has one pad token for each vision cell. "positions" has three lists, time, height
and width, over prompt_token_ids followed by response_token_ids. "logprobs" has one value in nats
for each of response_token_ids: temperature 1, no token banned.

A checkpoint exported by a run sets the video keys and max_prompt_tokens by its inference.yaml. A
special token that is spelled in a text is scored as its letters.

Overrides are keys of the sections model, parallel, video and batch, and data.max_prompt_tokens
(docs/config.md). The model computes in the dtype of the checkpoint's config.json, else in float32;
model.dtype overrides it. OUT appears when it is complete. A mistake is one sentence and exit
code 2.
"""

import os
from pathlib import Path

from megatron_vrl.process.command_line import OverrideParser, tool_parser
from megatron_vrl.process.entry import run_program, told_if_interrupted


def make_parser() -> OverrideParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="Hugging Face or Megatron checkpoint")
    add("--samples", required=True, type=Path, metavar="FILE", help="JSON lines to read")
    add("--out", required=True, type=Path, metavar="FILE", help="JSON lines to write")
    parser.add_overrides()
    return parser


def main() -> None:
    arguments = make_parser().parse_intermixed_args()
    from megatron_vrl.observe.progress import log_written
    from megatron_vrl.observe.silence_logs import silence_libraries

    silence_libraries()
    from megatron_vrl.evaluation.logprobs import score_config, score_file

    cfg = score_config(arguments.checkpoint, arguments.overrides)
    kept = f"{arguments.out} is as it was before; the same command begins again."
    with told_if_interrupted(lambda: kept):
        summary = score_file(cfg, arguments.samples, arguments.out)
    if os.environ.get("RANK", "0") == "0":
        print(summary, flush=True)
        log_written(arguments.out)


if __name__ == "__main__":
    run_program(main)
