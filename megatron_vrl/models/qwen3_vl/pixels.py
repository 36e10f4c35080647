"""Patches of Qwen3-VL, and constants of its image and video processors."""

from megatron_vrl.video.rules import PixelRules

PIXELS = PixelRules(
    patch=16,
    merge=2,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    image_min_pixels=256 * 256,  # of the released preprocessor_config.json, as the maximum
    image_max_pixels=4096 * 4096,
)
