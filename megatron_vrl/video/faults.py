"""Turns any exception that a file causes into a VideoError, so that no file can end a run.

For damaged files, PyAV and FFmpeg raise more than their own error types: UnicodeDecodeError for a
tag, AttributeError for a stream without a decoder, ValueError for a size. Every exception is caught
because a list of types would miss the next one. A bug of this package is caught here too. Such a
run ends by `video.max_bad_fraction`, with the name of the exception in the message.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_vrl.errors import UserError, VideoError

MAX_REASON = 200  # characters


@contextmanager
def as_video_error(sentence: str, kind: str) -> Iterator[None]:
    """Raise VideoError "`sentence` (reason); replace it." for any exception except UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        reason = " ".join(str(reason).split())[:MAX_REASON]
        raise VideoError(f"{sentence} ({reason}); replace it.", kind) from error
