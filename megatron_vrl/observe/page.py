"""Renders single-file HTML pages from the jinja templates in this folder.

All templates include style.css.j2.
"""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """Return HTML without references to other files. Values are escaped."""
    loader = PackageLoader("megatron_vrl", "observe")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template(template).render(**values)
