"""The style sheet and the script that the HTML of this package needs."""

from pathlib import Path

_HERE = Path(__file__).parent


def css() -> str:
    """The common sheet, then one of each view that has its own."""
    own = sorted(path for path in _HERE.glob("*.css") if path.name != "style.css")
    return "\n".join(path.read_text(encoding="utf-8") for path in [_HERE / "style.css", *own])


def js() -> str:
    """A function body over `element` and `trigger` (and `watch` where there is one): the common
    listeners, then what each view draws for itself, in a function of its own so that its names stay
    inside it."""
    views = (_HERE / "tree.js", _HERE / "search_tree.js")
    own = [f"(() => {{\n{path.read_text(encoding='utf-8')}\n}})();" for path in views]
    return "\n".join([(_HERE / "view.js").read_text(encoding="utf-8"), *own])
