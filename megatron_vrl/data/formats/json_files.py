"""Parser of JSON annotation files, used by training, dry run and tools/check_data.py.

  - Files are UTF-8, with or without a byte-order mark.
  - A .jsonl file has one record per line. A line ends at the byte LF; a CR before it is ignored.
    Other line separators (U+2028, NEL) may occur inside strings. Blank lines are skipped.
  - Duplicate keys in an object are an error.
  - An integer of more than 18 digits is read as a float.
  - NaN and infinity are parsed. Fields that must be finite reject them later.

List files are read in blocks, so memory does not grow with the size of the file.
"""

import gc
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, TextIO

from megatron_vrl.errors import DataError

BLOCK_BYTES = 4 << 20
BOM = b"\xef\xbb\xbf"
BLANK = " \t\r\n"  # JSON's white space
LONGEST_INTEGER = 18  # digits that fit 64 bits
CUT_TOKEN = 16  # a parse error this close to the end of a block may come from a token cut there
OTHER_KINDS = {  # first bytes -> kind of file and advice
    b"\x1f\x8b": "compressed with gzip: unpack it",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"PAR1": "a parquet table: name it .parquet, and give a format that is a list, such as verl",
    b"\xff\xfe": "in UTF-16: save it as UTF-8",
    b"\xfe\xff": "in UTF-16: save it as UTF-8",
}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # escape of one half of a surrogate pair


class LocatedRecord(NamedTuple):
    """One record of a list and its location in the file."""

    record: Any
    start: int  # offset of its first byte
    stop: int  # offset after its last byte
    line: int  # counted from 1; 0 in a .json file


@contextmanager
def without_collector() -> Iterator[None]:
    """Disable the garbage collector while records are read.

    Records have no cycles. With the collector on, most of the time of reading half a million
    records is spent in repeated traversals of them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def is_lines(path: str) -> bool:
    """Return whether the file is a .jsonl file."""
    return path.lower().endswith(".jsonl")


def parse(content: bytes) -> Any:
    """Return the JSON value in `content`. Raises ValueError."""
    try:
        text = content.decode("utf-8")
        value = _DECODER.decode(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair, such as \\ud83d alone") from None
    return value


def load(path: str) -> Any:
    """Return the value of a whole file. Raises DataError naming the file and the location."""
    if is_lines(path):
        return [entry.record for entry in records(path)]
    with _opened(path) as file:
        content = file.read()
    if not content.strip():
        raise DataError(f"{path} is empty; give the annotations.")
    try:
        return parse(content)
    except ValueError as error:
        raise _refused(path, content, error) from None


def load_by_file(json_path: str) -> Any:
    """Return {file name without ending: content} of a folder's .json files, or of one file."""
    path = Path(json_path)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"The folder {json_path} holds no .json file; give the annotations.")
    return {file.stem: load(str(file)) for file in files}


def records(path: str) -> Iterator[LocatedRecord]:
    """Yield the records of a .jsonl file, or of a .json file with one list. Reads in blocks.

    Raises DataError naming the file and the line.
    """
    return _lines(path) if is_lines(path) else _elements(path)


def version(path: str) -> tuple[int, int]:
    """Return the modification time (ns) and the size (bytes) of a file."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"Cannot read the annotations {path}: {error.strerror}.") from None
    return status.st_mtime_ns, status.st_size


def begins_a_list(path: str) -> bool:
    """Return whether a .json file contains a list. Raises DataError if the file cannot be read."""
    with _opened(path) as file:
        while block := file.read(BLOCK_BYTES):
            if begin := block.lstrip():
                return begin.startswith(b"[")
    return False


def _opened(path: str) -> BinaryIO:
    """Return the open file, positioned after the byte-order mark. The caller closes it."""
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed by the caller)
        start = file.read(4)
    except OSError as error:
        raise DataError(f"Cannot read the annotations {path}: {error.strerror}.") from None
    except ValueError as error:  # a NUL in the name
        raise DataError(f"Cannot read the annotations {path!r}: {error}.") from None
    for magic, kind in OTHER_KINDS.items():
        if start.startswith(magic):
            file.close()
            raise DataError(f"{path} is {kind}.")
    file.seek(len(BOM) if start.startswith(BOM) else 0)
    return file


def _lines(path: str) -> Iterator[LocatedRecord]:
    """Yield the records of a .jsonl file."""
    with _opened(path) as file:
        stop = file.tell()
        for number, line in enumerate(file, start=1):
            start, stop = stop, stop + len(line)
            if not line.strip():
                continue
            try:
                record = parse(line)
            except ValueError as error:
                raise _refused_line(path, number, line, error) from None
            yield LocatedRecord(record, start, stop, number)


def _elements(path: str) -> Iterator[LocatedRecord]:
    """Yield the records of a JSON list.

    The file is decoded as Latin-1, in which a character is a byte, so positions in the text are
    byte offsets. Elements that are not ASCII are parsed again as UTF-8.
    """
    with _opened(path) as opened:
        begin = opened.tell()
    with open(path, encoding="latin-1", newline="") as file:
        file.seek(begin)
        for start, stop, text, record in _spans(file, begin, path):
            content = text.encode("latin-1")
            try:
                if not text.isascii() or _SURROGATE.search(text):
                    record = parse(content)
            except ValueError as error:
                _refuse_at(path, start, content, error)
            yield LocatedRecord(record, start, stop, 0)


def _spans(file: TextIO, before: int, path: str) -> Iterator[tuple[int, int, str, Any]]:
    """Yield (start, stop, text, value) of each list element of a Latin-1 text; offsets in bytes.

    `before` is the offset at which reading starts.
    """
    parse_at = _DECODER.raw_decode
    text = file.read(BLOCK_BYTES)
    is_last = not text
    at = _skip(text, 0)
    while at == len(text) and not is_last:
        before, text = before + len(text), file.read(BLOCK_BYTES)
        at, is_last = _skip(text, 0), not text
    if text[at : at + 1] != "[":
        raise DataError(f"{path} is no list of records.")
    at, comma = at + 1, False
    while True:
        at = _skip(text, at)
        if text[at : at + 1] == "]" and not comma:
            break
        try:
            value, stop = parse_at(text, at)
            after = _skip(text, stop)
            if after == len(text):
                raise json.JSONDecodeError("The list does not end", text, after)
            if text[after] not in ",]":
                is_last = True
                raise json.JSONDecodeError("Expecting ',' delimiter", text, after)
        except RecursionError:
            _refuse_at(path, before + at, b"", ValueError("it is nested too deeply"))
        except json.JSONDecodeError as error:
            if is_last or not _may_go_on(error, len(text)):
                _refuse_at(path, before + error.pos, b"", error)
            block = file.read(BLOCK_BYTES)
            is_last = not block
            text, before, at = text[at:] + block, before + at, 0
            continue
        except ValueError as error:  # a duplicate key
            _refuse_at(path, before + at, b"", error)
        yield before + at, before + stop, text[at:stop], value
        comma = text[after] == ","
        at = after + comma
    _check_end(file, path, before + at + 1, text[at + 1 :])


def _may_go_on(error: json.JSONDecodeError, size: int) -> bool:
    """Return whether the parse error may only be due to the end of a block of `size` characters."""
    return error.msg.startswith("Unterminated string") or error.pos + CUT_TOKEN > size


def _check_end(file: TextIO, path: str, before: int, text: str) -> None:
    """Raise DataError if anything but white space follows the list.

    `text` is already read; its first byte is at offset `before`.
    """
    while True:
        if (at := _skip(text, 0)) < len(text):
            _refuse_at(path, before + at, b"", ValueError("Extra data"))
        before, text = before + len(text), file.read(BLOCK_BYTES)
        if not text:
            return


def _skip(text: str, at: int) -> int:
    """Return the position of the first character at or after `at` that is not white space."""
    while at < len(text) and text[at] in BLANK:
        at += 1
    return at


def _refused(path: str, content: bytes, error: ValueError) -> DataError:
    """Return the error for a whole .json file that cannot be parsed."""
    if isinstance(error, UnicodeDecodeError):
        return _not_utf8(path, content.count(b"\n", 0, error.start) + 1)
    many = "; a file with one record a line is named .jsonl" if _is_extra(error) else ""
    return DataError(f"{path} is not JSON: {error}{many}.")


def _refused_line(path: str, number: int, line: bytes, error: ValueError) -> DataError:
    """Return the error for a line of a .jsonl file that cannot be parsed."""
    if isinstance(error, UnicodeDecodeError):
        return _not_utf8(path, number)
    what = str(error)
    if isinstance(error, json.JSONDecodeError):
        what = f"{_parser_message(error)} at column {error.pos + 1}"
    listed = "; a file that holds one list is named .json" if line.lstrip()[:1] in b"[]" else ""
    return DataError(f"{path}, line {number} is not JSON: {what}{listed}.")


def _refuse_at(path: str, byte: int, content: bytes, error: ValueError) -> NoReturn:
    """Raise DataError for an error at offset `byte`, or in `content`, which begins there."""
    if isinstance(error, UnicodeDecodeError):
        byte += error.start
    elif content and isinstance(error, json.JSONDecodeError):
        byte += error.pos
    with open(path, "rb") as file:
        left, line = byte, 1
        while left and (block := file.read(min(left, BLOCK_BYTES))):
            left, line = left - len(block), line + block.count(b"\n")
    if isinstance(error, UnicodeDecodeError):
        raise _not_utf8(path, line)
    many = "; a file with one record a line is named .jsonl" if _is_extra(error) else ""
    what = _parser_message(error) if isinstance(error, json.JSONDecodeError) else str(error)
    raise DataError(f"{path}, line {line} is not JSON: {what}{many}.")


def _parser_message(error: json.JSONDecodeError) -> str:
    """Return the message of the JSON parser."""
    return error.msg.removesuffix(" starting at")


def _is_extra(error: ValueError) -> bool:
    """Return whether the error is content after the end of the value."""
    return str(error).startswith("Extra data")


def _not_utf8(path: str, line: int) -> DataError:
    """Return the error for a file that is not UTF-8."""
    return DataError(f"{path}, line {line} is not UTF-8: save the file as UTF-8.")


def _integer(digits: str) -> int | float:
    """Parse an integer, as a float if 64 bits do not hold it."""
    return int(digits) if len(digits) <= LONGEST_INTEGER else float(digits)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object. Raises ValueError for a duplicate key."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in record if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.80} occurs twice in one object")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_int=_integer)
