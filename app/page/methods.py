"""What the page says of a method."""

from analyzers import registry
from analyzers.registry import Method
from visualizations.text import escape


def title(name: str) -> str:
    """What people call it; a method that is no longer there keeps its name."""
    known = registry.methods()
    return known[name].card.title if name in known else name


def about(method: Method) -> str:
    """Its one sentence as HTML, the source in the hover text."""
    head = method.about.splitlines()[0].partition(": ")[2]
    return (
        f'<p class="candor-about" title="Source: {escape(method.card.source)}">'
        f"{escape(head[:1].upper() + head[1:])}</p>"
    )
