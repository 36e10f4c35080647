"""Section `model.lora` of the config: low-rank adapters (arXiv 2106.09685)."""

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, Field

from megatron_vrl.config.base import SECTION

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Lora(BaseModel):
    model_config = SECTION

    rank: Annotated[int, Field(ge=0)] = 0
    """Rank of the adapters. 0: no adapters; every weight that is not frozen is trained."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """An adapter adds alpha / rank times its product to the output of its linear layer."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    targets: Literal["all-linear"] | Annotated[tuple[Target, ...], Field(min_length=1)] = (
        "all-linear"
    )
    """Linear layers of the language model with an adapter, by their names in transformers.
    all-linear: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj."""
    merger: bool = False
    """Adapters for the linear layers of the patch mergers, too."""
    adapter: str = ""
    """Folder of a PEFT adapter with these settings to start from. Empty: the product of a new
    adapter is 0."""

    @property
    def scale(self) -> float:
        """Return the factor of an adapter's product."""
        return float(self.alpha / (self.rank**0.5 if self.use_rslora else self.rank))

    @property
    def target_names(self) -> tuple[str, ...]:
        """Return the names of the targeted linear layers of a language layer."""
        return get_args(Target) if self.targets == "all-linear" else self.targets
