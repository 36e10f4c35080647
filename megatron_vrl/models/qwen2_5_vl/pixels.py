"""Patches of Qwen2.5-VL, and constants of its image and video processors."""

from megatron_vrl.video.rules import PixelRules

PIXELS = PixelRules(
    patch=14,
    merge=2,
    mean=(0.48145466, 0.4578275, 0.40821073),  # of OpenAI CLIP, as the deviation
    std=(0.26862954, 0.26130258, 0.27577711),
    image_min_pixels=56 * 56,  # of Qwen2VLImageProcessor, as the maximum
    image_max_pixels=14 * 14 * 4 * 1280,
)
