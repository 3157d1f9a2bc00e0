"""A Markdown fence that turns Mermaid into inline SVG while the site is built, so that pages need no script and no network.

It runs in the docs environment, which has mermaidx: Mermaid itself in an embedded JavaScript engine.
"""

from __future__ import annotations

import hashlib
from typing import Any

import mermaidx


def fence(source: str, language: str, css_class: str, options: dict[str, Any], md: Any, **_: Any) -> str:
    """The diagram as a figure (the signature is that of pymdownx.superfences formatters).

    Raises:
        Exception: Mermaid does not understand the source; the strict build fails.
    """
    svg = mermaidx.render(source).svg()
    # Styles inside of the SVG are scoped by its id, and a page may have several diagrams.
    name = "diagram-" + hashlib.sha256(source.encode()).hexdigest()[:12]
    return f'<figure class="diagram">{svg.replace("mermaid-svg", name).replace("my-svg", name)}</figure>'
