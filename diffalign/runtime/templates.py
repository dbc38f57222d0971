"""Fill in the jinja2 templates of the package: pages, model cards, dataset cards."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


@lru_cache(maxsize=1)
def environment() -> Environment:
    """Make the jinja2 environment of the package's templates.

    Templates are named by their path inside the package. Values are escaped in pages
    and pictures (``.html``, ``.svg``), so a prompt with ``<script>`` in it shows as
    text. Markdown is left as it is.

    Returns:
        The environment. A template that uses a value it was not given raises
        `jinja2.UndefinedError`.
    """
    # Imported here because `import diffalign` and `diffalign --help` must stay quick.
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    return Environment(
        loader=PackageLoader("diffalign", ""),
        autoescape=select_autoescape(("html", "svg"), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(name: str, **values: Any) -> str:
    """Fill in one template.

    Args:
        name (`str`): path inside the package, such as
            ``evaluation/templates/report.html``.
        values: what the template uses, by name.

    Returns:
        The text.

    Raises:
        jinja2.TemplateNotFound: there is no such template.
        jinja2.UndefinedError: the template uses a value that is missing.
    """
    return environment().get_template(name).render(**values)
