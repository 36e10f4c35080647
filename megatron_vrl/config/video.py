"""Section `video`: frame sampling, decoding, frame store, and handling of bad videos."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from megatron_vrl.config.base import SECTION, Fraction, Positive


class Video(BaseModel):
    """Frame sampling, decoding and storage of videos."""

    model_config = SECTION

    decoder: Literal["dali", "pyav"] = "dali"
    """Video decoder. On a CPU both give the same bytes at about the same speed."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Device that DALI decodes on; `gpu` uses NVDEC."""
    fps: Annotated[float, Field(gt=0)] = 2.0
    """Frames sampled per second of video, by the rule of qwen-vl-utils."""
    num_frames: Annotated[int, Field(ge=0)] = 0
    """Frames of every video, rounded to an even number; overrides `fps`. 0: use `fps`."""
    min_frames: Positive = 4
    max_frames: Positive = 768
    min_pixels: Positive | None = None
    """Minimum pixels of a frame after resizing. null: 128 vision tokens, as in qwen-vl-utils."""
    max_pixels: Positive | None = None
    """Maximum pixels of a frame after resizing. null: 768 vision tokens, as in qwen-vl-utils."""
    total_pixels: Positive | None = None
    """Maximum pixels of a video: temporal steps x height x width. A temporal step is two frames.
    null: 115,200 vision tokens, as in qwen-vl-utils."""
    store_mib: Positive = 256
    """Memory of the frame store (decoded frames) per rank, MiB."""
    store_dir: str = ""
    """Directory of the frame store on disk, shared by ranks and runs; empty: memory only."""
    store_disk_mib: Positive = 8192
    """Size limit of `store_dir`, MiB."""
    workers: Positive = 2
    """Decoding processes per rank; with DALI, threads of one decoding process."""
    prefetch: Annotated[int, Field(ge=0)] = 64
    """Maximum number of the next step's videos that a rank decodes during training."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Maximum decoding time of a video, seconds. After this time the decoding process is killed,
    and the attempt counts as failed."""
    retries: Annotated[int, Field(ge=0)] = 1
    """Number of further attempts after a failed one; the video is bad when all have failed."""
    max_bad_fraction: Fraction = 0.05
    """A run stops when a larger fraction of its drawn samples has bad videos. While fewer than 100
    samples are drawn, the fraction is bad samples / 100."""
    fetch_dir: str = ""
    """Directory for local copies of videos whose data folder is a URL; shared by ranks and runs."""
    fetch_mib: Positive = 65536
    """Size limit of `fetch_dir`, MiB."""
