"""Reader of answers in free text, as models without format training write them.

The text after the thinking is read, and of it the last answer block if there is one. Times are, in
this order: two clock times ("1:05 - 1:20", "0:01:05"), a range ("6.0 - 15.0", else "6.0 to 15.0"),
the first two numbers. These are the rules of TimeLens (5d90c06, `extract_time`).

An option is, in this order: the whole text, a marked letter at its start ("B. dog"), a letter after
the word answer, option or choice, a letter in parentheses, a letter at the end. The last of several
counts. lmms-eval (75571cf, `extract_mcq_answer`) also takes any other capital, such as the article.
"""

import re

from megatron_vrl.types import Interval

_CLOCK = re.compile(r"\b(?:(\d{1,2}):)?(\d{1,2}):(\d{2}(?:\.\d+)?)\b")
_RANGES = (
    re.compile(r"(\d+\.?\d*)\s*-\s*(\d+\.?\d*)"),
    re.compile(r"(\d+\.?\d*)\s+to\s+(\d+\.?\d*)", re.IGNORECASE),
)
_NUMBER = re.compile(r"\b(?:\d+\.\d+|\d+)\b")
_BLOCK = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
_OPTIONS = (
    re.compile(r"^\(?([A-Za-z])\)?[.:]?$"),
    re.compile(r"^([A-Z])[).:]"),
    re.compile(r"(?i:\b(?:answer|option|choice))(?i:\s+is)?\s*:?\s*[*\"']*\(?([A-Z])\b"),
    re.compile(r"\(([A-Z])\)"),
    re.compile(r"\b([A-Z])[*\"'.)]*$"),
)


def read_interval(response: str) -> tuple[Interval | None, str]:
    """Return two times in seconds in the order of the text, and a failure ("" if there is none)."""
    text = _answer(response)
    times = [_seconds(*match) for match in _CLOCK.findall(text)]
    if len(times) < 2:
        found = next((match for one in _RANGES if (match := one.search(text))), None)
        times = [float(group) for group in found.groups()] if found else []
    if len(times) < 2:
        times = [float(number) for number in _NUMBER.findall(text)]
    return ((times[0], times[1]), "") if len(times) > 1 else (None, "no two times in the text")


def read_option(response: str, count: int) -> tuple[str, str]:
    """Return the letter of one of `count` options and a failure; without a letter it is ""."""
    text = _answer(response)
    for pattern in _OPTIONS:
        letters = [match.upper() for match in pattern.findall(text)]
        named = [letter for letter in letters if ord(letter) - ord("A") < count]
        if named:
            return named[-1], ""
    return "", f"no letter of one of {count} options in the text"


def _answer(response: str) -> str:
    """Return the text after the thinking; its last answer block if there is one."""
    text = response.rpartition("</think>")[2]
    blocks = _BLOCK.findall(text)
    return str(blocks[-1] if blocks else text).strip()


def _seconds(hours: str, minutes: str, seconds: str) -> float:
    """Return a clock time in seconds."""
    return 3600 * int(hours or 0) + 60 * int(minutes) + float(seconds)
