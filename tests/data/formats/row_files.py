"""Rows of verl, EasyR1 and LLaMA-Factory for tests, and the files that hold them."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from megatron_vrl.config import Source
from megatron_vrl.data.formats.training import read
from megatron_vrl.types import Sample

VERL = {
    "data_source": "geo3k",
    "prompt": [{"role": "user", "content": "<image>How many sides?"}],
    "images": ["a.png"],
    "reward_model": {"style": "rule", "ground_truth": "3"},
    "extra_info": {"index": 7, "split": "train"},
}
VIDEO = VERL | {
    "prompt": [{"role": "user", "content": "A <video> first, then <image>: how many?"}],
    "images": ["x/b.png"],
    "videos": [{"video": "file:///data/a.mp4", "fps": 2.0}],
}
TEXT = {"prompt": "1 + 1?", "reward_model": {"ground_truth": 2}, "id": "sum"}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "<image>What <image>?"},
        {"from": "gpt", "value": "<think>two pictures</think><answer>cats</answer>"},
    ],
    "images": ["a.png", "b.png"],
}
OPENAI = {
    "messages": [
        {"role": "user", "content": "<video>Who walks in?"},
        {"role": "assistant", "content": "a dog"},
    ],
    "videos": ["a.mp4"],
}


def png(colour: str = "red") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(content, "PNG")
    return content.getvalue()


def write(path: Path, rows: Sequence[Any]) -> Path:
    """Write rows as the kind of file that the ending names; a folder is one of `save_to_disk`."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        parquet.write_table(table_of(rows), path)
    elif path.suffix == ".arrow":
        table = table_of(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    else:
        path.mkdir()
        half = len(rows) // 2
        names = [f"data-{number:05}-of-00002.arrow" for number in range(2)]
        for name, part in zip(names, (rows[:half], rows[half:]), strict=True):
            write(path / name, part)
        state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0"}
        (path / "state.json").write_text(json.dumps(state))
        (path / "dataset_info.json").write_text("{}")
    return path


def table_of(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Return the rows with the columns of all of them, null where a row has none."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in columns})


def samples_of(path: Path, rows: Sequence[Any], form: str = "verl", **keys: Any) -> list[Sample]:
    source = {"json_path": str(write(path, rows)), "data_folder": "/data", "format": form}
    cache = {"media_cache_dir": str(path.parent / "cache")}
    return read(Source.model_validate(source | cache | keys))
