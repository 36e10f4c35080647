"""Types and settings that all configuration sections share."""

from typing import Annotated

from pydantic import ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
SECTION = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
