"""The style sheet and the script that the HTML of this package needs."""

from pathlib import Path

_HERE = Path(__file__).parent


def css() -> str:
    return (_HERE / "style.css").read_text(encoding="utf-8")


def js() -> str:
    """A function body over `element` and `trigger` (and `watch` where there is one)."""
    return (_HERE / "view.js").read_text(encoding="utf-8")
