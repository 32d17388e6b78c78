"""A hook of the site (mkdocs.yml): of a link to a file outside ``docs/`` its path is shown, which no site has."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)#]+)[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace links that lead out of the site by their text and the path in the repository."""
    return OUTSIDE.sub(lambda link: f"{link[1]}" if link[2] in link[1] else f"{link[1]} (`{link[2]}`)", markdown)
