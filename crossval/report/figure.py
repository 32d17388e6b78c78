"""One figure of a page: a Vega-Lite specification, rendered to SVG when the page is written.

The page needs no script then, prints as it looks, and its colours follow the reader's light or dark theme: they
are variables of the page's style sheet, which SVG knows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

from crossval.errors import UnavailableError

SVG = "http://www.w3.org/2000/svg"
INK, FAINT = "var(--ink)", "var(--faint)"
_CONFIG: dict[str, Any] = {
    "background": None,
    "padding": 14,
    "font": "sans-serif",
    "view": {"stroke": None},
    "axis": {"labelColor": INK, "titleColor": INK, "domainColor": FAINT, "tickColor": FAINT, "gridColor": FAINT,
             "gridOpacity": 0.5, "titleFontWeight": 400, "titlePadding": 12, "labelLimit": 160},
    "legend": {"labelColor": INK, "titleColor": INK, "orient": "top", "title": None, "labelLimit": 300},
    "header": {"labelColor": INK, "titleColor": INK, "labelFontWeight": 600},
    "title": {"color": INK},
    "rule": {"color": INK},
    "text": {"color": INK},
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A figure of a page."""

    caption: str
    """What it shows, in a sentence or two."""
    spec: Mapping[str, Any]
    """Its Vega-Lite specification; colours are variables of the page."""


def render(figure: Figure) -> str:
    """Return a figure as an SVG element whose marks say their values when they are pointed at.

    Raises:
        UnavailableError: the renderer is not installed.
    """
    spec = {"$schema": "https://vega.github.io/schema/vega-lite/v5.json", "config": _CONFIG, **figure.spec}
    svg = ElementTree.fromstring(_renderer().vegalite_to_svg(spec, vl_version="5.20"))
    for mark in svg.iter(f"{{{SVG}}}path"):
        for needless in ("role", "aria-roledescription"):
            mark.attrib.pop(needless, None)
        text = mark.attrib.pop("aria-label", None)
        if text is not None:
            ElementTree.SubElement(mark, f"{{{SVG}}}title").text = text
    svg.set("role", "img")
    svg.set("aria-label", figure.caption)
    ElementTree.register_namespace("", SVG)
    return ElementTree.tostring(svg, encoding="unicode")


@functools.cache
def _renderer() -> ModuleType:
    try:
        import vl_convert
    except ImportError as error:
        raise UnavailableError(
            "pages need the package vl-convert-python: pip install 'bitnet-parity[report]'"
        ) from error
    return vl_convert
