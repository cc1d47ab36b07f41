"""The style sheet and the script that the HTML of this package needs."""

from pathlib import Path

_HERE = Path(__file__).parent


def css() -> str:
    """The common sheet, then one of each view that has its own."""
    own = sorted(path for path in _HERE.glob("*.css") if path.name != "style.css")
    return "\n".join(path.read_text(encoding="utf-8") for path in [_HERE / "style.css", *own])


def js() -> str:
    """A function body over `element` and `trigger` (and `watch` where there is one): the common
    listeners, then a block of each view that draws for itself. Strict, because only then does a
    function of such a block stay inside it."""
    parts = [_HERE / "view.js", _HERE / "tree.js", _HERE / "search_tree.js"]
    return "\n".join(["'use strict';", *(path.read_text(encoding="utf-8") for path in parts)])
