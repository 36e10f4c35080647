"""Source: one annotation file of `data.train`, `data.sft` or a split of `data.evaluation`."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from megatron_vrl.config.base import SECTION, Positive

COLUMN_KEYS = ("prompt_key", "answer_key", "image_key", "video_key")
ROW_KEYS = ("task", *COLUMN_KEYS, "ignore_system")  # of formats whose rows name no task


class Source(BaseModel):
    """One annotation file and the folder of its videos and images."""

    model_config = SECTION

    json_path: str
    """Annotation file: .json, .jsonl, .parquet or .arrow, or a folder of .parquet or .arrow files;
    mvbench, tempcompass and mlvu also accept a folder of .json files."""
    data_folder: str
    """Folder of the videos and images."""
    format: Literal[
        "charades_sta",
        "next_gqa",
        "multiple_choice",
        "temporal_r1",
        "generic",
        "tvgbench",
        "activitynet_rtl",
        "mvbench",
        "tempcompass",
        "video_mme",
        "mmvu",
        "timelens_bench",
        "timelens",
        "qvhighlights",
        "lvbench",
        "mlvu",
        "video_mme_subtitles",
        "verl",
        "hf",
        "llamafactory",
    ] = "temporal_r1"
    """Format of the annotation file; see docs/tasks.md."""
    sampling_strategy: str = "all"
    """all | first:N | end:N | random:N; N is a number or a percentage."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Number of times that a sample occurs per epoch. 2: each sample twice; 0.5: half of the
    samples, in turn."""
    multi_segment: bool = False
    """Ask the temporal_grounding questions of this source for every interval: they become the task
    multi_segment_grounding, whose answer is {"intervals": [[s, e], ...]}."""
    task: str = "short_answer"
    """Task of the rows of the formats verl, hf and llamafactory; docs/your-data.md says what their
    answer must hold for each task."""
    prompt_key: str = "prompt"
    """Column of verl and hf with the prompt: a text or a list of messages. EasyR1's: problem."""
    answer_key: str = ""
    """Column of verl and hf with the right answer; a dot leads into a column of objects. Empty:
    reward_model.ground_truth (verl) or answer (hf)."""
    image_key: str = "images"
    """Column of verl and hf with the images: paths or embedded bytes, one or a list."""
    video_key: str = "videos"
    """Column of verl and hf with the videos."""
    ignore_system: bool = False
    """Leave out the system messages of the rows of verl, hf and llamafactory; the only system
    message is then that of `data.system_prompt`. false: a row with one is refused."""
    media_cache_dir: str = ""
    """Folder for embedded images and videos, which are written there once and named by a digest.
    Empty: ~/.cache/megatron_vrl/media."""
    media_cache_mib: Positive = 65536
    """Size limit of `media_cache_dir`, MiB. A row beyond is refused; nothing is evicted."""

    @model_validator(mode="after")
    def _rows_have_columns(self) -> "Source":
        """Refuse keys that the format of the source does not read."""
        unread = {"verl": (), "hf": (), "llamafactory": COLUMN_KEYS}.get(self.format, ROW_KEYS)
        given, fields = self.model_dump(), Source.model_fields
        for key in unread:
            if given[key] != fields[key].default:
                raise ValueError(f"format {self.format} does not read the key {key}: remove it")
        return self
