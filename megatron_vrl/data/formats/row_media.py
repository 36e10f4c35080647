"""Images and videos of a row, and their places in its text.

A column holds one file or a list. A file is a path in the data folder, the bytes of the file, or an
object with one of the fields of FILE_FIELDS, as verl, EasyR1, Hugging Face datasets and
qwen-vl-utils write them. `<image>` and `<video>` in a text are the places of the next image and the
next video, as in verl, EasyR1 and LLaMA-Factory, which refuse other numbers of places as well.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_vrl.config import Source
from megatron_vrl.data.formats.embedded import cache_dir, write_image, write_video
from megatron_vrl.data.formats.records import video_path
from megatron_vrl.data.formats.validation import short_repr
from megatron_vrl.errors import DataError, counted
from megatron_vrl.types import MEDIA_PLACE, ImageFile, Media, VideoClip

FILE_FIELDS = ("bytes", "path", "image", "image_url", "video")  # the first one with a value counts
WINDOW_FIELDS = ("video_start", "video_end", "start", "end")  # of qwen-vl-utils and the hub
_PLACE = re.compile("<(image|video)>")

Embed = Callable[[bytes, str, str], str]  # content, name, place in the file -> path


def row_images(column: Any, source: Source, where: str) -> list[ImageFile]:
    """Return the images of a column. Raises DataError beginning with `where`."""

    def embed(content: bytes, name: str, there: str) -> str:
        return write_image(content, source, there)

    return [ImageFile(*file) for file in _files(column, source, where, embed)]


def row_videos(column: Any, source: Source, where: str) -> list[VideoClip]:
    """Return the videos of a column. Raises DataError beginning with `where`."""

    def embed(content: bytes, name: str, there: str) -> str:
        return write_video(content, name, source, there)

    files = _files(column, source, where, embed)
    return [VideoClip(path, folder=folder) for path, folder in files]


def placed(
    text: str,
    images: Sequence[ImageFile],
    videos: Sequence[VideoClip],
    where: str,
    must_have_places: bool = True,
) -> tuple[str, tuple[Media, ...]]:
    """Return the text with MEDIA_PLACE for each place, and the media in the order of their places.

    Without any place the videos come before the images and both before the text, unless
    `must_have_places`. Raises DataError if the numbers of places and files differ.
    """
    kinds = _PLACE.findall(text)
    if not kinds and not must_have_places:
        return text.replace(MEDIA_PLACE, ""), (*videos, *images)
    for kind, files in (("image", images), ("video", videos)):
        if kinds.count(kind) != len(files):
            raise DataError(
                f"{where} has {counted(kinds.count(kind), 'place')} <{kind}> in its text and "
                f"{counted(len(files), kind)}; expected equal numbers."
            )
    rest: dict[str, Iterator[Media]] = {"image": iter(images), "video": iter(videos)}
    media = tuple(next(rest[kind]) for kind in kinds)
    return _PLACE.sub(MEDIA_PLACE, text.replace(MEDIA_PLACE, "")), media


def _files(column: Any, source: Source, where: str, embed: Embed) -> list[tuple[str, str]]:
    """Return (path, folder that must contain the file) of each file of a column.

    The folder is "" for a path, which the data folder must contain.
    """
    if column is None:
        return []
    entries = column if isinstance(column, list) else [column]
    return [
        _file(entry, source, f"{where}[{index}]" if entries is column else where, embed)
        for index, entry in enumerate(entries)
    ]


def _file(entry: Any, source: Source, where: str, embed: Embed) -> tuple[str, str]:
    """Return (path, folder) of one file."""
    name = entry.get("path") if isinstance(entry, dict) else ""
    if isinstance(entry, dict):
        _refuse_window(entry, where)
        given = [entry[field] for field in FILE_FIELDS if entry.get(field) is not None]
        file = given[0] if given else None
    else:
        file = entry
    if isinstance(file, bytes):
        return embed(file, name if isinstance(name, str) else "", where), cache_dir(source)
    if not isinstance(file, str) or not file:
        raise DataError(
            f"{where} is {short_repr(entry)}, expected the path of a file, or an object with "
            "'path' or 'bytes'."
        )
    return _path(file.removeprefix("file://"), source, where), ""


def _path(name: str, source: Source, where: str) -> str:
    """Return the path of a file in the data folder. An absolute path must lead there."""
    folder = source.data_folder
    if os.path.isabs(name) and "://" not in folder and "\0" not in name:
        within = os.path.relpath(name, folder)
        if not within.startswith(os.pardir):
            name = within
    try:
        return video_path(name, source, where)
    except DataError:
        raise DataError(
            f"{where} is {short_repr(name)}, which is no path inside the data folder {folder!r}."
        ) from None


def _refuse_window(entry: dict[str, Any], where: str) -> None:
    """Raise DataError if only a part of a video is meant."""
    for field in WINDOW_FIELDS:
        if entry.get(field) is not None:
            raise DataError(
                f"{where}.{field} is {short_repr(entry[field])}: parts of videos are not read; "
                "cut the file, or use the format generic with 'clip'."
            )
