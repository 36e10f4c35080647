"""Video decoding: files in, EncodedVideo out. Start at `reader.py`."""

from megatron_vrl.video.encode import DECODERS
from megatron_vrl.video.reader import SAMPLING_KEYS, VideoReader

__all__ = ["DECODERS", "SAMPLING_KEYS", "VideoReader"]
