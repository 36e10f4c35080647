"""Rows of parquet and Arrow tables, and of folders of them.

  FILE.parquet          a parquet file, as verl, EasyR1 and the Hugging Face hub keep data
  FILE.arrow            an Arrow file or stream
  FOLDER                a folder that `Dataset.save_to_disk` wrote, or one with .parquet or .arrow
                        files, which are read in the order of their names

Rows are read in small batches. A field without a value (null) is left out of its row, as in JSON.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vrl.data.formats.json_files import LocatedRecord, version
from megatron_vrl.errors import DataError

SUFFIXES = (".parquet", ".arrow")
ROWS_AT_A_TIME = 16  # a row may hold a whole video
_DICT_FILE, _STATE_FILE = "dataset_dict.json", "state.json"  # of `save_to_disk`


def is_table(path: str) -> bool:
    """Return whether the path is a table or a folder of tables."""
    if path.lower().endswith(SUFFIXES):
        return True
    folder = Path(path)
    return folder.is_dir() and ((folder / _DICT_FILE).is_file() or bool(_shards(folder)))


def table_records(path: str) -> Iterator[LocatedRecord]:
    """Yield the rows of a table or of a folder of tables. Raises DataError naming the file."""
    for file in _files(path):
        version(str(file))  # refuses a missing file
        try:
            for batch in _batches(file):
                for row in batch.to_pylist():
                    yield LocatedRecord(_without_nulls(row), 0, 0, 0)
        except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's errors are both
            reason = " ".join(str(error).split())
            raise DataError(f"{file} is no readable table ({reason:.200}): replace it.") from None


def _files(path: str) -> list[Path]:
    """Return the files of a table in order."""
    folder = Path(path)
    if not folder.is_dir():
        return [folder]
    if (folder / _DICT_FILE).is_file():
        splits = _json_object(folder / _DICT_FILE).get("splits")
        named = ", ".join(map(str, splits)) if isinstance(splits, list) else "none"
        raise DataError(f"{path} holds several splits ({named}): give the folder of one of them.")
    if not (folder / _STATE_FILE).is_file():
        return _shards(folder)
    listed = _json_object(folder / _STATE_FILE).get("_data_files")
    entries = listed if isinstance(listed, list) else []
    names = [
        str(entry["filename"])
        for entry in entries
        if isinstance(entry, dict) and "filename" in entry
    ]
    if not names:
        raise DataError(f"{folder / _STATE_FILE} lists no data files: save the dataset again.")
    return [folder / Path(name).name for name in names]


def _shards(folder: Path) -> list[Path]:
    """Return the tables in a folder, sorted by name."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def _json_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file that `save_to_disk` wrote."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}): save the dataset again.") from None
    return content if isinstance(content, dict) else {}


def _batches(file: Path) -> Iterator[Any]:
    """Yield record batches of one file."""
    if file.suffix.lower() == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(file) as table:
            yield from table.iter_batches(ROWS_AT_A_TIME)
        return
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        for batch in _arrow_batches(source):
            for start in range(0, batch.num_rows, ROWS_AT_A_TIME):
                yield batch.slice(start, ROWS_AT_A_TIME)


def _arrow_batches(source: Any) -> Iterator[Any]:
    """Yield the record batches of an Arrow file, or of an Arrow stream, as `datasets` writes."""
    from pyarrow import ArrowInvalid, ipc

    try:
        reader = ipc.open_file(source)
    except ArrowInvalid:
        source.seek(0)
        yield from ipc.open_stream(source)
        return
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row without the columns that have no value in it."""
    return {name: value for name, value in row.items() if value is not None}
