"""docs/your-data.md: its files are read, with its config, as the page says."""

import json
import re
from pathlib import Path

import pytest
import yaml

from megatron_vrl.config import Rewards, Source
from megatron_vrl.data.formats.records import VIDEO_SUFFIXES
from megatron_vrl.data.formats.training import read
from megatron_vrl.rewards.weights import reward_weights
from megatron_vrl.tasks import TASKS
from tests.running import ROOT

PAGE = (ROOT / "docs" / "your-data.md").read_text()


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    grounding, choice, segments = re.findall(r"```json\n(.*?)```", PAGE, re.S)
    (config,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    (tmp_path / "grounding.json").write_text(grounding)
    (tmp_path / "choice.json").write_text(choice)
    (tmp_path / "segments.json").write_text(segments)
    read_config = yaml.safe_load(config)
    reward_weights(Rewards(**read_config["rewards"]))
    train = read_config["data"]["train"]
    return [
        Source(**source | {"json_path": str(tmp_path / source["json_path"])}) for source in train
    ]


def test_all_files_are_read(sources: list[Source]) -> None:
    first, second, chosen, several = [sample for source in sources for sample in read(source)]
    assert first.query == "a man opens the door" and first.intervals_s == ((3.2, 7.8),)
    assert second.intervals_s == ((12.0, 15.5),)
    assert (chosen.task, chosen.options, chosen.option) == (
        "multiple_choice",
        ("a dog", "a cat"),
        "A",
    )
    assert several.task == "multi_segment_grounding"
    assert several.intervals_s == ((3.2, 7.8), (20.0, 24.5))
    assert '{"intervals": [[3.2, 7.8], [20.0, 24.5]]}' in TASKS[several.task].target(several)
    assert '{"intervals": [[3.2, 7.8], [20.0, 24.5]]}' in PAGE


def test_the_same_list_with_intervals_is_grounded_qa(sources: list[Source], tmp_path: Path) -> None:
    (record,) = json.loads((tmp_path / "choice.json").read_text())
    (tmp_path / "glue.json").write_text(json.dumps([record | {"glue": [[3.2, 7.8]]}]))
    source = sources[1].model_copy(
        update={"json_path": str(tmp_path / "glue.json"), "format": "next_gqa"}
    )
    (sample,) = read(source)
    assert (sample.task, sample.intervals_s) == ("grounded_qa", ((3.2, 7.8),))


def test_the_endings_are_known_to_the_reader() -> None:
    endings = set(re.findall(r"`(\.\w+)`", PAGE))
    assert len(endings) > 5 and endings <= set(VIDEO_SUFFIXES)
