"""What every section of the configuration is made of."""

from typing import Annotated

from pydantic import ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
SECTION = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
