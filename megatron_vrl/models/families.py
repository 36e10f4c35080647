"""Registry of model families. A row is the `model_type` of config.json and the folder's name.

A new family is a new folder `models/<family>/` whose `family.py` defines `FAMILY`, and a row here.
`tests/models/test_families.py` runs over every row. A family is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_vrl.models.architecture import Architecture
    from megatron_vrl.models.family import Family

FAMILIES = ("qwen2_5_vl", "qwen3_vl")


def family_named(name: str) -> "Family":
    """Return the family of a row of `FAMILIES`."""
    assert name in FAMILIES, name
    family: Family = import_module(f"megatron_vrl.models.{name}.family").FAMILY
    return family


def family_of(arch: "Architecture") -> "Family":
    """Return the family of a model; `read_architecture` gives the model of a checkpoint."""
    return family_named(arch.family)
