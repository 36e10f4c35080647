"""Exact match: 1 if the answered text or number equals the true one.

Two numbers are compared as exact fractions: 0.5, .50, 1/2 and \\frac{1}{2} are equal, 1,000 and
1000 too. A number has at most MAX_DIGITS digits, no exponent and no unit: "50%" is a text. Other
texts are compared after Unicode normalisation (NFC), without case, math delimiters ($, \\( \\),
\\[ \\]), \\text{...}, spacing commands, a final period, white space beside punctuation and repeated
white space.

Not compared: formulas that are equal by algebra, such as 2x + 2 and 2(x + 1).
"""

import re
import unicodedata
from fractions import Fraction

from megatron_vrl.types import Parsed, Sample

MAX_DIGITS = 40
_NUMBER = r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?"
_FRACTION = re.compile(rf"([+-]?)\\frac\{{({_NUMBER})\}}\{{({_NUMBER})\}}|({_NUMBER})/({_NUMBER})")
_DELIMITED = re.compile(r"\$\$(.*)\$\$|\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}")
_AROUND = re.compile(r" ?([^\w ]) ?")
_SPACING = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[,!;: ]")


def score(sample: Sample, parsed: Parsed) -> float:
    """Return 1 for an answer that equals `sample.truth.answer`, else 0."""
    return 0.0 if parsed.value is None else float(equal(parsed.value, sample.truth.answer))


def equal(left: str, right: str) -> bool:
    """Return whether two answers are the same text or the same number."""
    left, right = normalised(left), normalised(right)
    if left == right:
        return True
    number = _number(left)
    return number is not None and number == _number(right)


def normalised(text: str) -> str:
    """Return the text in the form in which answers are compared."""
    text = unicodedata.normalize("NFC", text).replace("\N{MINUS SIGN}", "-").strip()
    text = text.removesuffix(".").strip()
    if match := _DELIMITED.fullmatch(text):
        text = next(group for group in match.groups() if group is not None)
    text = _SPACING.sub("", _TEXT.sub(r"\1", text))
    text = text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    return _AROUND.sub(r"\1", " ".join(text.casefold().split()))


def _number(text: str) -> Fraction | None:
    """Return the number that a normalised text is; None if it is another text."""
    if match := _FRACTION.fullmatch(text):
        sign, *parts = match.groups()
        above, below = (_decimal(part) for part in parts if part is not None)
        if above is None or not below:
            return None
        return -above / below if sign == "-" else above / below
    return _decimal(text)


def _decimal(text: str) -> Fraction | None:
    """Return a decimal number; None for another text, or for one of more than MAX_DIGITS digits."""
    digits = sum(character.isdigit() for character in text)
    if not (0 < digits <= MAX_DIGITS and text.isascii() and re.fullmatch(_NUMBER, text)):
        return None
    return Fraction(text.replace(",", "").removesuffix("."))
