"""Names of the files of a checkpoint, shared by training, the tools and the converter."""

from pathlib import Path

from megatron_vrl.errors import CheckpointError
from megatron_vrl.models.architecture import Architecture, read_architecture
from megatron_vrl.models.families import family_of
from megatron_vrl.video.rules import PixelRules

STATE = "state.json"
WEIGHTS = "weights"  # torch_dist files of a Megatron checkpoint
HF = "huggingface"  # config, tokenizer and processor files of a Megatron checkpoint
_OLD_HF = "published"


def is_megatron(checkpoint: Path) -> bool:
    """Return whether a checkpoint is Megatron's, and not Hugging Face's."""
    return (checkpoint / WEIGHTS).is_dir()


def hf_dir_of(checkpoint: str | Path) -> Path:
    """Return the folder with the config, tokenizer and processor files of a checkpoint.

    Raises CheckpointError if the folder has the name that it had in older checkpoints.
    """
    refuse_old_name(Path(checkpoint))
    inner = Path(checkpoint) / HF
    return inner if inner.is_dir() else Path(checkpoint)


def architecture_of(checkpoint: str, architecture: str = "") -> Architecture:
    """Return the sizes of a checkpoint's model; those of the file `architecture` where the
    checkpoint is absent.

    Raises CheckpointError if neither can be read.
    """
    directory = hf_dir_of(checkpoint)
    if (directory / "config.json").exists() or not architecture:
        return read_architecture(directory)
    return read_architecture(architecture)


def pixels_of(checkpoint: str) -> PixelRules:
    """Return the pixel rules of a checkpoint's family. Raises CheckpointError."""
    return family_of(architecture_of(checkpoint)).pixels


def refuse_old_name(checkpoint: Path) -> None:
    """Raises CheckpointError if a Megatron checkpoint has a folder `published/`."""
    if is_megatron(checkpoint) and (checkpoint / _OLD_HF).is_dir():
        raise CheckpointError(
            f"{checkpoint} has the folder {_OLD_HF}, which is called {HF} now: rename it, there "
            f"and in CHECKSUMS (cd {checkpoint} && mv {_OLD_HF} {HF} && "
            f"sed -i 's#  {_OLD_HF}/#  {HF}/#' CHECKSUMS)."
        )
