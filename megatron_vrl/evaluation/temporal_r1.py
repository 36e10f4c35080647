"""Answer parsers of the released Temporal-R1 evaluation (arXiv 2506.01908), faults included.

The release is a fork of lmms-eval: `qwen2_5_vl_r1.py` extracts the times or the option from a
response, and the scripts of the tasks parse the extracted text. Times may be anywhere in the
response. Reversed times are swapped, and times are never clipped. A response in another format
counts as 0.0 to 0.0. An option is read from the first answer block, else from the whole response,
where any single letter A to E counts, also the article "a".

Left out: the release parses untrained models by keywords in free text. Here all models have one
parser.
"""

import re

from megatron_vrl.types import Interval

TIMES = re.compile(
    r'<think>.*?</think>\s*<answer>\s*{\s*"start_time"\s*:\s*"([\d.]+)"\s*,'
    r'\s*"end_time"\s*:\s*"([\d.]+)"\s*}\s*</answer>',
    re.DOTALL,
)
BLOCK = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
QUOTED = re.compile(r'"\((.*?)\)"|"([A-Z])"')
RANGE = re.compile(r"(\d+\.*\d*)\s*-\s*(\d+\.*\d*)")
LETTER = re.compile(r"\b([A-E])\b", re.IGNORECASE)
LETTER_AND_TEXT = re.compile(r"^([A-E])\.\s*(.+)$", re.IGNORECASE)
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def read_interval(response: str) -> tuple[Interval, str]:
    """Return the interval in seconds and a failure ("" if there is none).

    A response without times in the released format gives 0.0 to 0.0.
    """
    match = TIMES.search(response)
    try:
        text = f"{float(match[1])}-{float(match[2])}" if match else ""
    except ValueError:  # "1.2.3"
        text = ""
    ranges = RANGE.findall(text)
    if not ranges:
        return (0.0, 0.0), "no times in the released format"
    first, second = map(float, ranges[0])
    return (min(first, second), max(first, second)), ""


def hull_iou(left: Interval, right: Interval) -> float:
    """Return overlap / hull of two intervals; 0 for an empty hull."""
    hull = max(left[1], right[1]) - min(left[0], right[0])
    overlap = max(min(left[1], right[1]) - max(left[0], right[0]), 0.0)
    return overlap / hull if hull > 0 else 0.0


def read_option(response: str) -> tuple[str, str]:
    """Return the letter and a failure. Without a letter from A to E the letter is ""."""
    block = BLOCK.search(response)
    quoted = QUOTED.search(block[1]) if block else None
    text = (quoted[1] or quoted[2]) if quoted else response
    match = LETTER_AND_TEXT.match((text or "").strip()) or LETTER.search(_plain(text or ""))
    return (match[1].upper(), "") if match else ("", "no letter from A to E")


def _plain(text: str) -> str:
    """Return the text without punctuation, in lower case, as the release normalizes it."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    joined = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text)
        joined = joined.replace(mark, "" if beside_space else " ")
    return re.sub(r"\.(?!\d)", "", joined).strip("'\"()").strip().lower()
