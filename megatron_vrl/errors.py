"""Exceptions for mistakes in the user's input or machine, as opposed to bugs.

Each message states what is wrong, the offending value, and what to do. Every command prints the
message without a traceback and exits with `EXIT_CODE` (`megatron_vrl/process/entry.py`). Any other
exception is a bug of this package and keeps its traceback.
"""

EXIT_CODE = 2


def counted(number: int, noun: str) -> str:
    """Return the number and the noun, in the regular plural if needed: "1 video", "2 processes"."""
    ending = "es" if noun.endswith(("s", "ch", "x")) else "s"
    return f"{number} {noun}" + ("" if number == 1 else ending)


class UserError(Exception):
    """Base class of errors caused by the user's input or machine."""


class ConfigError(UserError):
    """Invalid config value or command-line override, or layout sizes that do not divide."""


class DataError(UserError):
    """Invalid annotation file or record. The message names the file and the record."""


class VideoError(UserError):
    """A video or an image that is missing or cannot be decoded. The message names the file.

    `path` is the file, where it is known. `kind` is the category that summaries count: missing,
    empty, outside, unreadable, no_pictures, cut_off, no_duration, too_large, window, damaged, hung
    or crashed (table in docs/video.md).
    """

    def __init__(self, sentence: str, kind: str = "damaged", path: str = ""):
        super().__init__(sentence)
        self.kind, self.path = kind, path


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or has unexpected shapes.

    The message names file and tensor.
    """


class RolloutError(UserError):
    """The rollout engine failed to start or returned an invalid result."""


class RunInUse(UserError):
    """Another process owns the run directory. The message names its host and process."""


class StopRequested(UserError):
    """The run was asked to stop and stopped between two steps on all ranks. Not a failure."""
