"""Reader of NExT-GQA in its released files: NAME.csv with gsub_NAME.json beside it.

  NAME.csv              video_id, question, answer (its text), qid, type, a0 .. a4, and video sizes
  gsub_NAME.json        {video_id: {duration, location {qid: [[s, e], ...]}, fps}}
  map_vid_vidorID.json  {video_id: folder/video_id}; if missing, all videos are in one folder

Source: https://github.com/doc-doc/NExT-GQA, datasets/nextgqa. The result has the records of the
format `next_gqa` (training.py) with ids VIDEO_QID. A question without a location has no interval.
train.csv is rejected because it has no gsub file.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vrl.data.formats.json_files import load
from megatron_vrl.data.formats.records import video_file
from megatron_vrl.data.formats.validation import short_repr
from megatron_vrl.errors import DataError

LETTERS = "ABCDE"
MAP = "map_vid_vidorID.json"


def load_csv(json_path: str) -> list[dict[str, Any]]:
    """Return the records of a CSV file. Raises DataError naming file, line and field."""
    path = Path(json_path)
    located = _json(path.with_name(f"gsub_{path.stem}.json"))
    folders = _json(path.with_name(MAP)) if path.with_name(MAP).exists() else {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            return [_record(row, rows.line_num, json_path, located, folders) for row in rows]
    except OSError as error:
        raise DataError(f"Cannot read the annotations {json_path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise DataError(f"{json_path} is not UTF-8: save the file as UTF-8.") from None
    except csv.Error as error:
        raise DataError(f"{json_path} is not CSV: {error}.") from None


def _record(
    row: Mapping[str, str | None],
    line: int,
    json_path: str,
    located: Mapping[str, Any],
    folders: Mapping[str, str],
) -> dict[str, Any]:
    """Return one CSV row as a next_gqa record."""
    where = f"{json_path}, line {line}"
    names = ("video_id", "qid", "question", "answer", *(f"a{i}" for i in range(len(LETTERS))))
    missing = [name for name in names if row.get(name) is None]
    if missing:
        raise DataError(f"{where}: no field {missing[0]!r}; give NExT-GQA's CSV as released.")
    field = {name: value or "" for name, value in row.items()}
    video, answer = field["video_id"], field["answer"]
    options = [field[f"a{i}"] for i in range(len(LETTERS))]
    if answer not in options:
        raise DataError(
            f"{where}: field 'answer' is {answer!r:.80}, expected the text of a0 to a4."
        )
    if video not in located:
        raise DataError(f"{where}: gsub_{Path(json_path).stem}.json has no video {video!r}.")
    of_video = located[video] if isinstance(located[video], dict) else {}
    of_question = of_video.get("location", {})
    if not isinstance(of_question, dict) or "duration" not in of_video:
        raise DataError(
            f"{where}: gsub_{Path(json_path).stem}.json: video {video!r} is "
            f"{short_repr(located[video])}, expected an object of duration and location."
        )
    return {
        "id": f"{video}_{field['qid']}",
        "video": video_file(folders.get(video, video)),
        "question": field["question"],
        "options": [f"({x}) {text}" for x, text in zip(LETTERS, options, strict=True)],
        "duration": of_video["duration"],
        "glue": of_question.get(field["qid"], []),
        "type": field.get("type", ""),
        "answer": f"({LETTERS[options.index(answer)]})",
    }


def _json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file beside the CSV. Raises DataError."""
    if not path.is_file():
        raise DataError(
            f"{path} is missing: NExT-GQA's CSV needs this file with the intervals beside it."
        )
    content = load(str(path))
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, expected an object by video id.")
    return content
