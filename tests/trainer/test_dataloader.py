"""Bad videos: replaced by the next samples, the same on all ranks and after a restart."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.running import run_python
from tests.trainer.dataloader_worker import BAD, BAD_IMAGE, NUM_FILES, WITH_IMAGE, check
from tests.video.conftest import write_clip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import make_tiny_model

    directory = tmp_path_factory.mktemp("draw") / "hf"
    make_tiny_model.main(["--out", str(directory)])
    return directory


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty clips and two images: one missing, two empty, one a link to another folder."""
    folder = tmp_path / "videos"
    folder.mkdir()
    write_clip(str(tmp_path / "source.mp4"), num_frames=8, size=(56, 56))
    for number in range(NUM_FILES):
        shutil.copy(tmp_path / "source.mp4", folder / f"{number}.mp4")
    missing, *empty, outside = sorted(BAD)
    (folder / f"{missing}.mp4").unlink()
    for number in WITH_IMAGE:
        Image.new("RGB", (60, 40)).save(folder / f"{number}.png")
    for number in empty:
        name = f"{number}.png" if number == BAD_IMAGE else f"{number}.mp4"
        (folder / name).write_bytes(b"")
    (folder / f"{outside}.mp4").unlink()
    (folder / f"{outside}.mp4").symlink_to(tmp_path / "source.mp4")
    return folder


def test_bad_videos_are_replaced_in_order(folder: Path, published: Path) -> None:
    check(folder, published)


@pytest.mark.slow
def test_two_ranks_replace_alike(folder: Path, published: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    done = run_python(*launch, "-m", "tests.trainer.dataloader_main", folder, published)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("in step") == 2
