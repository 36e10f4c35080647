"""Prompts with every mixture of media, for the tests of engine against trainer."""

from collections.abc import Callable

from megatron_vrl.data.prompt import PromptEncoder
from megatron_vrl.types import EncodedImage, EncodedVideo, Prompt, Visual


def mixed_prompts(
    encoder: PromptEncoder,
    video: Callable[..., EncodedVideo],
    image: Callable[..., EncodedImage],
) -> list[Prompt]:
    """Return prompts with text alone, images, videos, and both between texts."""
    one, two = image((4, 6), 21), image((8, 2), 22)
    short, long = video((1, 4, 2), 0.4, 23), video((3, 2, 4), 1.1, 24)
    contents: dict[str, tuple[str | Visual, ...]] = {
        "text": ("When is it visible?",),
        "image": (one, "What is it?"),
        "two images": (one, two, "What is it?"),
        "two videos": (short, long, "When?"),
        "interleaved": ("Is ", one, " in ", long, " or in ", short, " beside ", two, "?"),
        "image last": ("What is it?", two),
    }
    return [encoder.encode(name, None, content) for name, content in contents.items()]
