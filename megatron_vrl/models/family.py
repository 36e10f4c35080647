"""Interface of a model family: all that the program asks about a family of vision-language models.

`models/<family>/family.py` defines one `FAMILY` with these parts. Importing it must not import
megatron.core or vllm, since decoding processes and engines read it too; `Family.parts` imports the
modules of the model when a trainer builds it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from re import Pattern
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.models.architecture import Architecture, VisionArchitecture
from megatron_vrl.types import EncodedVideo, Visual, VisualInput
from megatron_vrl.video.rules import PixelRules

if TYPE_CHECKING:
    from megatron_vrl.config import Model
    from megatron_vrl.models.activations import Kernels, Layer
    from megatron_vrl.models.chunk import Chunk
    from megatron_vrl.models.model_parts import ModelParts
    from megatron_vrl.models.weight_layouts import Row

Shape = tuple[int, ...]
Tokenize = Callable[[str], list[int]]  # plain text -> token ids, without special tokens


def visual_part(visual: Visual) -> list[dict[str, str]]:
    """Return the part of a chat message that shows a visual as one vision block."""
    return [{"type": "video" if isinstance(visual, EncodedVideo) else "image"}]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptForm:
    """Tokens and positions of a prompt with videos and images."""

    structure_tokens: tuple[str, ...]  # turn and vision tokens, special in every tokenizer file
    stop_tokens: tuple[str, ...]  # they end an answer; the first ends a turn
    expand: Callable[[Sequence[int], Sequence[Visual], Architecture, Tokenize], list[int]]
    """Return the trainer's token ids, with one pad token per vision token, of the rendered ids,
    which have one pad token per vision block. `visuals` are in the order of their pad tokens."""
    positions: Callable[[NDArray[np.int64], Sequence[Visual], Architecture], NDArray[np.int64]]
    """Return M-RoPE positions [3, P] of expanded token ids [P]. Raise ValueError if the pad tokens
    and the visuals' grids differ in number."""
    parts: Callable[[Visual], Iterable[dict[str, str]]] = visual_part
    """Return the parts of a chat message that show a visual: a block each, and text between."""
    explanation: str = ""  # text before the question of a sample
    step_blocks: bool = False  # a temporal step of a video is a vision block of its own
    step_text: int = 0  # text tokens of a temporal step, in a video shorter than 1000 s


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInputs:
    """Inputs of vLLM: what its processor is told, and what it derives."""

    model_class: str  # "module:class" in vLLM
    processor_kwargs: Mapping[str, Any]  # frames arrive resized: nothing is resized or sampled
    not_quantised: tuple[str, ...]  # patterns of modules that stay in the trainer's dtype
    video_metadata: Callable[[VisualInput], dict[str, Any]]
    """Return the metadata of a video's frames, which make vLLM's processor take all frames."""
    embeddings: Callable[[Sequence[VisualInput]], dict[str, Any]]
    """Return the multi-modal data of videos with embeddings instead of frames."""
    derived: Callable[[Mapping[str, Any]], tuple[Any, ...]]
    """Return grid and times that vLLM derived, from a video's processed item."""
    expected: Callable[[VisualInput], tuple[Any, ...]]
    """Return what `derived` must return."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMap:
    """Hugging Face tensors of a checkpoint, and the Megatron parameters that hold them."""

    rows: "Callable[[Architecture, Chunk], list[Row]]"
    """Return the rows of every parameter of one chunk of layers."""
    shapes: Callable[[Architecture], dict[str, Shape]]
    """Return tensor shapes by released name. A tied head has no tensor of its own."""
    released_prefixes: Mapping[str, str]
    """Prefix of a name in the memory of transformers or vLLM -> prefix in released checkpoints."""
    embedding: str  # released names
    head: str
    language_matrices: Pattern[str]  # released names that FP8 of rollouts quantises


def released_name(weights: WeightMap, name: str) -> str:
    """Return the name in released checkpoints of a tensor that may have an in-memory name of
    transformers or vLLM."""
    for prefix, released in weights.released_prefixes.items():
        if name.startswith(prefix):
            return released + name.removeprefix(prefix)
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerArithmetic:
    """Sizes of the vision tower for FLOP counts, activation memory and the pipeline split."""

    tower_weights: Callable[[VisionArchitecture], int]
    """Return the elements of the matrices that apply to every patch: all but the mergers'."""
    merger_weights: Callable[[Architecture], int]
    """Return the elements of the mergers' matrices, which apply to every vision token."""
    attention_pairs: Callable[[VisionArchitecture, int, int], int]
    """Return the pairs of a temporal step of (height, width) patches that attend to each other,
    summed over all blocks."""
    block: "Callable[[Architecture, Model, int, Kernels], Layer]"
    """Return the sizes of a block on a rank with so many patches."""
    merger_saved: "Callable[[Architecture, Layer], int]"
    """Return the bytes that trained mergers save for the patches of `block`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family of vision-language models."""

    name: str  # `model_type` of config.json, and the folder's name
    title: str  # in messages, for example "Qwen2.5-VL"
    parse_config: Callable[[Mapping[str, Any]], Architecture]
    """Return the Architecture of a parsed config.json. Raise KeyError if a key is missing."""
    pixels: PixelRules
    prompt: PromptForm
    interleaved_prompt: PromptForm  # with `data.timestamps: interleaved`
    engine: EngineInputs
    weights: WeightMap
    tower: TowerArithmetic
    parts: "Callable[[], ModelParts]"
    """Return the modules of the model. Import megatron.core."""


def prompt_form(family: Family, timestamps: str) -> PromptForm:
    """Return the form of prompts with a value of `data.timestamps`."""
    return family.interleaved_prompt if timestamps == "interleaved" else family.prompt
