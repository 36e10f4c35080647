"""CHECKSUMS: a 128-bit XXH3 hash of every file of a checkpoint, to detect damage.

XXH3 is as fast as memory (7 GiB/s on one core, SHA-256 reaches 1). It does not detect a forged
checkpoint; `safe_pickle.py` restricts what a forged one can do. Writers hash a file while they
write it or right after. Readers hash each file once, and each rank hashes a shard of the files.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import xxhash

from megatron_vrl.errors import CheckpointError
from megatron_vrl.parallel.mesh import Mesh, raise_on_all_ranks, shard, world_axis

NAME = "CHECKSUMS"
READ_BYTES = 2**22
Sums = dict[str, str]  # path relative to the checkpoint -> hex digest


class HashingFile:
    """Binary file whose content is hashed while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest = file, xxhash.xxh3_128()

    def write(self, content: memoryview | bytes) -> int:
        self._digest.update(content)
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> str:
        """Close the file and return the hex digest of its content."""
        self._file.close()
        return self._digest.hexdigest()


def file_sum(path: Path) -> str:
    """Return the hex digest of a file."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while content := file.read(READ_BYTES):
            digest.update(content)
    return digest.hexdigest()


def write_sums(checkpoint: Path, known: Mapping[str, str]) -> None:
    """Write CHECKSUMS. Files that are not in `known` are hashed here."""
    sums = dict(known)
    for path in sorted(checkpoint.rglob("*")):
        name = str(path.relative_to(checkpoint))
        if path.is_file() and name != NAME and name not in sums:
            sums[name] = file_sum(path)
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    (checkpoint / NAME).write_text("".join(lines))


def read_sums(checkpoint: Path) -> Sums:
    """Return the content of CHECKSUMS. Raises CheckpointError if it cannot be read."""
    try:
        lines = (checkpoint / NAME).read_text().splitlines()
        return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint / NAME} cannot be read ({error}): restore it, or convert the model again."
        ) from None


class ChecksumVerifier:
    """Compares checkpoints with their CHECKSUMS, each checkpoint once in the object's life."""

    def __init__(self) -> None:
        self._verified: set[tuple[Path, int]] = set()  # checkpoint, mtime of its CHECKSUMS

    def check(self, checkpoint: Path, mesh: Mesh) -> None:
        """Compare every file of `checkpoint` with CHECKSUMS. Every rank calls it.

        Raises CheckpointError on every rank, naming the first file that is missing or differs.
        """
        with raise_on_all_ranks(mesh):
            sums = read_sums(checkpoint)
            key = (checkpoint.resolve(), (checkpoint / NAME).stat().st_mtime_ns)
            if key not in self._verified:
                _check(checkpoint, sums, shard(sorted(sums), world_axis(mesh)))
        self._verified.add(key)


def check_sums_alone(checkpoint: Path, num_threads: int = 2) -> None:
    """Compare every file of `checkpoint` with CHECKSUMS in a process without a mesh.

    Raises CheckpointError, naming the first file that is missing or differs.
    """
    sums = read_sums(checkpoint)
    shards = [sorted(sums)[i::num_threads] for i in range(num_threads)]
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(lambda names: _check(checkpoint, sums, names), shards))


def _check(checkpoint: Path, sums: Sums, names: Sequence[str]) -> None:
    for name in names:
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though {NAME} lists it: restore it.")
        if file_sum(path) != sums[name]:
            raise CheckpointError(f"{path} is damaged, it differs from {NAME}: restore it.")
