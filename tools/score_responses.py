#!/usr/bin/env python3
"""Write the log-prob of every token of given responses: compare layouts, engines and checkpoints.

    score_responses.py --checkpoint DIR --samples IN.jsonl --out OUT.jsonl [section.key=value ...]

One process alone, or any layout under torchrun:

    torchrun --nproc-per-node 4 tools/score_responses.py ... parallel.tensor=2 parallel.pipeline=2

A sample is one line of IN:

    {"id": "a", "system": null, "videos": ["clip.mp4"], "images": [], "question": "...",
     "response": "..."}

"id", "question" and "response" must be there. "system" null or absent is the chat template's own
default. The prompt shows the videos, then the images, then the question. Paths count from the
working directory. The stop token <|im_end|> is appended to the response and scored, as the trainer
trains on it; do not write it yourself.

A result is one line of OUT, in the order of IN:

    {"id", "prompt_token_ids", "response_token_ids", "positions", "logprobs"}

One pad token stands for each vision cell in prompt_token_ids. "positions" are three lists, time,
height and width, over prompt_token_ids and then response_token_ids. "logprobs" has one number, in
nats, for each of response_token_ids: temperature 1, no token banned.

The export of a run brings its video rules and max_prompt_tokens (its inference.yaml). A special
token that is spelled in a text is scored as its letters.

Overrides are keys of the sections model, parallel, video and batch, and data.max_prompt_tokens
(docs/config.md). The model computes in the type that the checkpoint's config.json names, else
float32; model.dtype overrides it. OUT takes its name when it is whole. A mistake is one sentence
and exit code 2.
"""

import os
from pathlib import Path

from megatron_vrl.observe.progress import log_written
from megatron_vrl.observe.silence_logs import silence_libraries
from megatron_vrl.process.command_line import tool_parser
from megatron_vrl.process.entry import run_program, told_if_interrupted


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="Hugging Face or Megatron checkpoint"
    )
    parser.add_argument("--samples", required=True, type=Path, metavar="FILE", help="JSON lines")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSON lines")
    parser.add_overrides()
    arguments = parser.parse_intermixed_args()
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
