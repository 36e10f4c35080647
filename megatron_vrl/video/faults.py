"""Faults of a file as VideoError: nothing that a file holds may end a run.

PyAV and FFmpeg answer damaged files with more than their own errors: UnicodeDecodeError of a tag,
AttributeError of a stream without a decoder, ValueError of a size. A list of these would miss the
next one. A mistake of this package looks the same here; a run then ends by
`video.max_bad_fraction`, with the name of the exception in the sentence.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_vrl.errors import UserError, VideoError

MAX_REASON = 200  # characters


@contextmanager
def faults_of_file(sentence: str, kind: str) -> Iterator[None]:
    """Raise VideoError "`sentence` (reason); replace it." for every exception but UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        reason = " ".join(str(reason).split())[:MAX_REASON]
        raise VideoError(f"{sentence} ({reason}); replace it.", kind) from error
