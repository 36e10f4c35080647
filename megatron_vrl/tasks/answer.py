"""Strict parser of `<think>...</think><answer>{JSON}</answer>`.

The last `<answer>...</answer>` after the last `</think>` is the answer block. A block inside the
thinking is never read. An unclosed block, as in a response cut at its length limit, is not read
either. The block holds one JSON object without repeated keys. Seconds are plain decimals, as a
string or a number; units, mm:ss, exponents, NaN and infinity are refused. Seconds are clipped to
the duration of the video; the start must then be before the end. An option is read from its letter
("B", "b", "(B)", "B."), from its text, or from both if they agree.

The parser reads more responses than those in the exact format. `template` returns the pattern of a
response in the exact format. The pattern allows white space around the response and inside the
JSON. It allows no second answer block, no tags inside the thinking and no text outside the two
blocks.

Each `read_` function returns (value, failure), where failure is "" or one sentence.
"""

import json
import math
import re
from typing import Any

from megatron_vrl.types import Interval

SECONDS = r"[0-9]+(?:\.[0-9]+)?"
MAX_INTERVALS = 100  # of one answer; one with more is unreadable
LETTER = "[A-Z]"

EMPTY_THINKING = "<think></think>"
BOX = r"\boxed{"

_NO_TAGS = r"[^<]*(?:<(?!/?(?:think|answer)>)[^<]*)*"
_NUMBER = re.compile("-?" + SECONDS)
_LETTERED = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])([.:)])?)(?:\s+(.+))?", re.DOTALL)


def answer_block(response: str) -> str:
    """Return the part of a target that follows its thinking."""
    return response.rpartition("</think>")[2].lstrip()


def template(**fields: str) -> re.Pattern[str]:
    """Return the pattern of a stripped response whose JSON has these string fields in this order.

    Values are patterns, for example `template(option="[A-Z]")`.
    """
    return _response(r"\s*,\s*".join(rf'"{key}"\s*:\s*"{value}"' for key, value in fields.items()))


def intervals_template() -> re.Pattern[str]:
    """Return the pattern of a stripped response whose JSON is {"intervals": [[s, e], ...]}."""
    pair = rf"\[\s*{SECONDS}\s*,\s*{SECONDS}\s*\]"
    return _response(rf'"intervals"\s*:\s*\[\s*{pair}(?:\s*,\s*{pair})*\s*\]')


def free_template() -> re.Pattern[str]:
    """Return the pattern of a stripped response that answers in any text: in a block or a box."""
    block, box = f"<answer>{_NO_TAGS}</answer>", rf"{_NO_TAGS}\\boxed\{{{_NO_TAGS}"
    return re.compile(rf"<think>{_NO_TAGS}</think>(?:\s*{block}|{box})")


def read_block(response: str) -> tuple[str, str]:
    """Return the stripped text of the answer block."""
    tail = response.rpartition("</think>")[2]
    if "<think>" in tail:
        return "", "the thinking is never closed"
    _, opened, block = tail.rpartition("<answer>")
    if not opened:
        return "", "no <answer> after the thinking"
    body, closed, _ = block.partition("</answer>")
    return (body.strip(), "") if closed else ("", "the answer is never closed")


def read_boxed(text: str) -> tuple[str, str]:
    """Return the content of the last \\boxed{...}, with balanced braces."""
    _, opened, rest = text.rpartition(BOX)
    if not opened:
        return "", "no <answer> and no \\boxed{} after the thinking"
    depth = 1
    for index, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if not depth:
            return rest[:index].strip(), ""
    return "", "the \\boxed{ is never closed"


def read_json(body: str) -> tuple[Any, str]:
    """Return one JSON value.

    Integers become floats, since Python refuses integers of too many digits. A number with an
    exponent becomes its text, which no field of an answer accepts.
    """
    try:
        value = json.loads(
            body,
            parse_int=float,
            parse_float=_plain_number,
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique_keys,
        )
    except (ValueError, RecursionError):  # RecursionError: too many nested "["
        return None, "the answer is not JSON"
    return value, ""


def read_fields(response: str) -> tuple[dict[str, Any], str]:
    """Return the JSON object in the answer block; {} if there is none."""
    body, failure = read_block(response)
    if failure:
        return {}, failure
    value, failure = read_json(body)
    if not failure and not isinstance(value, dict):
        failure = "the answer is not a JSON object"
    return ({}, failure) if failure else (value, "")


def read_interval(fields: dict[str, Any], duration_s: float) -> tuple[Interval | None, str]:
    """Return (`start_time`, `end_time`), clipped to [0, duration_s]; None if unreadable."""
    return _read_pair({key: fields.get(key) for key in ("start_time", "end_time")}, duration_s)


def read_intervals(fields: dict[str, Any], duration_s: float) -> tuple[tuple[Interval, ...], str]:
    """Return the pairs [start, end] of `intervals`, each as `read_interval` reads one.

    They are ordered by start and may overlap. One unreadable pair makes the answer unreadable: ().
    """
    pairs = fields.get("intervals")
    if not isinstance(pairs, list) or not pairs:
        return (), f"intervals {pairs!r:.40} is not a list of [start, end]"
    if len(pairs) > MAX_INTERVALS:
        return (), f"the answer has {len(pairs)} intervals, more than {MAX_INTERVALS}"
    intervals_s = []
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            return (), f"{pair!r:.40} is not [start, end]"
        interval_s, failure = _read_pair({"start": pair[0], "end": pair[1]}, duration_s)
        if interval_s is None:
            return (), failure
        intervals_s.append(interval_s)
    return tuple(sorted(intervals_s)), ""


def read_option(text: Any, options: tuple[str, ...]) -> tuple[str, str]:
    """Return the letter of the one option that `text` names; "" if it names none or several.

    A single letter is always read as a letter. The text of an option is unknown if the string in
    `options` is empty or the option's own letter ("B", "(B)", "B."). Any text may then follow the
    letter in `text` if the letter is marked, as in "(B) text" and "B. text".
    """
    if not isinstance(text, str):
        return "", f"option {text!r:.40} is not a letter"
    text = text.strip()
    named = {letter for letter, option in lettered(options) if _equal_texts(option, text)}
    match = _LETTERED.fullmatch(text)
    if match:
        letter, marked, rest = (match[1] or match[2]).upper(), match[1] or match[3], match[4]
        option = dict(lettered(options)).get(letter)
        if rest is None:
            named = {letter} if option is not None else set()
        elif option is not None and (
            (marked and _is_bare(option, letter)) or _equal_texts(option, rest)
        ):
            named.add(letter)
    if len(named) != 1:
        return "", f"option {text!r:.40} does not name one of {len(options)} options"
    return named.pop(), ""


def lettered(options: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return [("A", first option), ("B", second option), ...]."""
    return [(chr(ord("A") + index), option) for index, option in enumerate(options)]


def _read_pair(times: dict[str, Any], duration_s: float) -> tuple[Interval | None, str]:
    """Return start and end, clipped to [0, duration_s]. `times`: name -> value of each."""
    clipped_s = []
    for name, value in times.items():
        time_s = _seconds(value)
        if time_s is None:
            return None, f"{name} {value!r:.40} is not a number of seconds"
        clipped_s.append(min(max(time_s, 0.0), duration_s))
    start_s, end_s = clipped_s
    if not start_s < end_s:
        return None, f"no part of the video lies between {start_s:g} s and {end_s:g} s"
    return (start_s, end_s), ""


def _response(body: str) -> re.Pattern[str]:
    """Return the pattern of a stripped response whose JSON object has this pattern inside."""
    return re.compile(rf"<think>{_NO_TAGS}</think>\s*<answer>\s*\{{\s*{body}\s*\}}\s*</answer>")


def _seconds(value: Any) -> float | None:
    """Return a plain decimal, given as text or number; None for anything else."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    return value if isinstance(value, float) and math.isfinite(value) else None


def _is_bare(option: str, letter: str) -> bool:
    """Return whether an option is empty, or nothing but its own letter."""
    return option.strip("(). :").upper() in ("", letter)


def _equal_texts(left: str, right: str) -> bool:
    """Return whether two texts are equal up to case, surrounding space and a final period."""
    return left.strip().rstrip(".").casefold() == right.strip().rstrip(".").casefold()


def _plain_number(literal: str) -> float | str:
    """Return the number; the text itself if it has an exponent."""
    return literal if "e" in literal.lower() else float(literal)


def _refuse_constant(constant: str) -> float:
    """Raise ValueError: NaN, Infinity and -Infinity are not JSON."""
    raise ValueError(constant)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object. Raises ValueError if a key is repeated."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("repeated key")
    return fields
