"""CHECKSUMS: a 128-bit hash of every file of a checkpoint, against damage.

XXH3, since it keeps up with memory (7 GiB/s on one core here, SHA-256 one); it does not stop a
forger, against whom `pickles.py` stands. Writers hash what they write, while or right after they
write it; readers hash each file once per process, each rank a share of them.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import xxhash

from megatron_vrl.errors import CheckpointError
from megatron_vrl.parallel.mesh import Mesh, raise_on_all_ranks

NAME = "CHECKSUMS"
READ_BYTES = 2**22
Sums = dict[str, str]  # path relative to the checkpoint -> hex digest
_seen: set[tuple[Path, int]] = set()  # CHECKSUMS files that this process has gone through


class HashingFile:
    """A binary file that is hashed as it is written."""

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
        """Hex digest of all that was written."""
        self._file.close()
        return self._digest.hexdigest()


def file_sum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while content := file.read(READ_BYTES):
            digest.update(content)
    return digest.hexdigest()


def write_sums(checkpoint: Path, known: Mapping[str, str]) -> None:
    """Write CHECKSUMS; files that are not `known` yet are hashed here."""
    sums = dict(known)
    for path in sorted(checkpoint.rglob("*")):
        name = str(path.relative_to(checkpoint))
        if path.is_file() and name != NAME and name not in sums:
            sums[name] = file_sum(path)
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    (checkpoint / NAME).write_text("".join(lines))


def read_sums(checkpoint: Path) -> Sums:
    try:
        lines = (checkpoint / NAME).read_text().splitlines()
        return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint / NAME} cannot be read ({error}): restore it, or convert the model again."
        ) from None


def check_sums(checkpoint: Path, mesh: Mesh) -> None:
    """Compare every file with CHECKSUMS, once per process. Every rank calls it.

    Raises CheckpointError on every rank, naming the first file that is missing or differs.
    """
    with raise_on_all_ranks(mesh):
        sums = read_sums(checkpoint)
        key = (checkpoint.resolve(), (checkpoint / NAME).stat().st_mtime_ns)
        if key not in _seen:
            _check(checkpoint, sums, sorted(sums)[mesh.rank :: mesh.world])
    _seen.add(key)


def check_sums_alone(checkpoint: Path, num_threads: int = 2) -> None:
    """The same in a process without a mesh."""
    sums = read_sums(checkpoint)
    shares = [sorted(sums)[i::num_threads] for i in range(num_threads)]
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(lambda names: _check(checkpoint, sums, names), shares))


def _check(checkpoint: Path, sums: Sums, names: Sequence[str]) -> None:
    for name in names:
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though {NAME} lists it: restore it.")
        if file_sum(path) != sums[name]:
            raise CheckpointError(f"{path} is damaged, it differs from {NAME}: restore it.")
