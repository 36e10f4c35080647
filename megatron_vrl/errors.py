"""Errors a user can cause. Each message says what is wrong, the value seen, and what to do.

Every program prints the message alone, without a traceback, and exits with `EXIT_CODE`
(program.py). Anything else that is raised is our bug and keeps its traceback.
"""

EXIT_CODE = 2


def counted(number: int, noun: str) -> str:
    """Return the number and the noun in its regular plural: "1 video", "2 processes"."""
    ending = "es" if noun.endswith(("s", "ch", "x")) else "s"
    return f"{number} {noun}" + ("" if number == 1 else ending)


class UserError(Exception):
    """Base of every error whose cause lies in the user's input or machine."""


class ConfigError(UserError):
    """A config value, a command-line override, or a layout that does not divide."""


class DataError(UserError):
    """An annotation file or record; names the file and the record."""


class VideoError(UserError):
    """A video that is missing or cannot be read; names the file.

    `kind` sums errors up: missing, empty, outside, unreadable, no_pictures, cut_off, no_duration,
    too_large, window, damaged, hung or crashed.
    """

    def __init__(self, sentence: str, kind: str = "damaged"):
        super().__init__(sentence)
        self.kind = kind


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another shape; names file and tensor."""


class RolloutError(UserError):
    """The rollout engine refused to start or answered something impossible."""


class RunInUse(UserError):
    """Another run holds the run directory; names its host and process."""


class StopRequested(UserError):
    """Not a mistake: the run was asked to stop, and did so between two steps on all ranks."""
