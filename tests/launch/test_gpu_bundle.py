"""launch/gpu_bundle.sh: what it packs comes out again, in pieces that may travel."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "launch" / "gpu_bundle.sh"
PIECE = 60 * 2**20


def bash(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of two wheels, one larger than a piece, and of stored rollouts."""
    wheels, replay = tmp_path / "wheels", tmp_path / "replay"
    (replay / "rollouts").mkdir(parents=True)
    (replay / "rollouts" / "rank-0000.jsonl.zst").write_bytes(b"rollouts")
    wheels.mkdir()
    with (wheels / "large-1-py3-none-any.whl").open("wb") as file:
        file.write(b"begin")
        file.truncate(PIECE + 100)  # zeros that take no room
    (wheels / "small-1-py3-none-any.whl").write_bytes(os.urandom(1000))
    done = bash(BUNDLE, tmp_path / "out", "--wheels", wheels, "--replay", replay)
    assert done.returncode == 0, done.stderr
    return tmp_path / "out"


def test_pieces_joined_are_what_was_packed(bundle: Path, tmp_path: Path) -> None:
    pieces = sorted(bundle.glob("piece-*"))
    assert len(pieces) == 2 and max(piece.stat().st_size for piece in pieces) <= PIECE
    done = bash(bundle / "join.sh", tmp_path / "there")
    assert done.returncode == 0, done.stderr
    for kind in ("wheels", "replay"):
        packed = [file for file in (tmp_path / kind).rglob("*") if file.is_file()]
        assert packed
        for file in packed:
            assert (tmp_path / "there" / file.relative_to(tmp_path)).read_bytes() == (
                file.read_bytes()
            )
    assert os.access(tmp_path / "there" / "repository" / "launch" / "gpu_check.sh", os.X_OK)


def test_a_damaged_piece_is_refused(bundle: Path, tmp_path: Path) -> None:
    last = max(bundle.glob("piece-*"))
    last.write_bytes(last.read_bytes()[:-1] + b"x")
    done = bash(bundle / "join.sh", tmp_path / "there")
    assert done.returncode == 2 and f"{last.name}: FAILED" in done.stdout + done.stderr
    assert "join: a piece is missing or damaged" in done.stderr
    assert not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "name the folder to write"),
        (("out", "--wheel", "x"), "unknown option '--wheel'"),
        (("out", "--wheels", "/proc/self"), "/proc/self holds no wheel"),
        (("out", "--replay", "/proc/self"), "/proc/self holds no rollouts"),
    ],
)
def test_wrong_calls_end_with_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    done = bash(BUNDLE, *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and sentence in done.stderr
