"""The picture, pixel by pixel: what was drawn, who wrote each pixel, and how sure the model was."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analyzers.trace import MAIN, DraftTree, Event, Rewind, RunStarted, Token, surviving
from visualizations.signals import PROBABILITY
from visualizations.text import counted, escape, number, percent

TITLE = "The picture, pixel by pixel"
DRAWS: tuple[type[Event], ...] = (RunStarted,)
GROWS = True

_MOST = 64  # pixels in a row or column; a picture of more would be no picture in this size
# How a pixel came to be -> what the key says, and its mark besides the colour.
_WRITERS = {
    "sampled": ("sampled", ""),
    "drafted": ("drafted and accepted; the next step has the other tint", ""),
    "corrected": ("corrected: a draft was refused", "×"),
    "bonus": ("bonus: behind all drafts", "+"),
    "given": ("given", "·"),
}


@dataclass(frozen=True)
class _Frame:
    """What the model calls a picture. levels: shades; the id of a shade is its level."""

    width: int
    height: int
    levels: int
    about: str


@dataclass(frozen=True)
class _Pixel:
    """level: 0 = paper. token: None where the prompt gave it. step: pixels of one step of
    speculative decoding have the same number, counted from 1 over all pixels."""

    level: int
    token: Token | None
    step: int

    @property
    def writer(self) -> str:
        origin = self.token.origin if self.token else "given"
        return origin if origin in _WRITERS else "given"


def fits(events: Sequence[Event]) -> bool:
    return _frame(events) is not None


def render(events: Sequence[Event]) -> str:
    """Three grids of the same pixels, of which those that were written carry data-go; pixels that
    are still to come are empty. "" before the first one."""
    frame = _frame(events)
    pixels = _pixels(events, frame) if frame else []
    if frame is None or not pixels:
        return ""
    shades = [f'style="--shade:{100 * p.level / (frame.levels - 1):.0f}%"' for p in pixels]
    writers = [f'class="w-{p.writer}{" odd" if p.step % 2 else ""}"' for p in pixels]
    sure = [f'class="{PROBABILITY.mark(p.token) if p.token else "w-given"}"' for p in pixels]
    about = f'<p class="about">{escape(frame.about)}</p>' if frame.about else ""
    return (
        '<div class="candor x-picture"><div class="grids">'
        f"{_figure('As it was drawn', _grid(frame, pixels, shades), _progress(frame, pixels))}"
        f"{_figure('Who wrote each pixel', _grid(frame, pixels, writers, True), _key(pixels))}"
        f"{_figure('How sure the model was', _grid(frame, pixels, sure), _scale(pixels))}"
        f"</div>{about}</div>"
    )


def _frame(events: Sequence[Event]) -> _Frame | None:
    """None for a run of a model that writes no pictures, or says of them what makes no sense."""
    started = next((event for event in events if isinstance(event, RunStarted)), None)
    said: Any = started.model.get("picture") if started else None
    if not isinstance(said, Mapping):
        return None
    sizes: list[Any] = [said.get(name) for name in ("width", "height", "levels")]
    if not all(type(size) is int and size > 0 for size in sizes):
        return None
    width, height, levels = sizes
    if max(width, height) > _MOST or levels < 2:
        return None
    return _Frame(width, height, levels, str(said.get("about", "")))


def _pixels(events: Sequence[Event], frame: _Frame) -> list[_Pixel]:
    """Of the main lane, in the order of the picture; what is no shade is left out."""
    started = next(event for event in events if isinstance(event, RunStarted))
    found = [_Pixel(id, None, 0) for id in started.prompt_ids or () if id < frame.levels]
    steps, before = _steps(events), object()
    for token in surviving(events):
        if token.id >= frame.levels:
            continue
        step = steps.get(token.pos, token)  # a plain step is a token of its own
        count = found[-1].step if found else 0
        found.append(_Pixel(token.id, token, count + (step is not before)))
        before = step
    return found[: frame.width * frame.height]


def _steps(events: Sequence[Event]) -> dict[int, DraftTree]:
    """The step of speculative decoding that wrote each position and was not undone."""
    found: dict[int, DraftTree] = {}
    for event in events:
        if isinstance(event, DraftTree) and event.lane == MAIN:
            wrote = len(event.accepted) + (event.extra is not None)
            found |= dict.fromkeys(range(event.pos, event.pos + wrote), event)
        elif isinstance(event, Rewind) and event.lane == MAIN:
            found = {pos: step for pos, step in found.items() if pos < event.to}
    return found


def _figure(title: str, grid: str, caption: str) -> str:
    return f"<figure><h4>{title}</h4>{grid}<figcaption>{caption}</figcaption></figure>"


def _grid(
    frame: _Frame, pixels: Sequence[_Pixel], looks: Sequence[str], steps: bool = False
) -> str:
    """looks: an attribute of each pixel. steps: draw marks, and lines where the step changes."""
    places = range(frame.width * frame.height)
    cells = "".join(
        _cell(frame, place, pixels[place], looks[place])
        if place < len(pixels)
        else f'<rect class="empty" {_at(frame, place)}></rect>'
        for place in places
    )
    more = ""
    if steps:
        marks = ((place, _WRITERS[pixel.writer][1]) for place, pixel in enumerate(pixels))
        more = "".join(
            f'<text x="{place % frame.width + 0.5:g}" y="{place // frame.width + 0.72:g}">'
            f"{mark}</text>"
            for place, mark in marks
            if mark
        )
        more += f'<path d="{"".join(_borders(frame, pixels))}"></path>'
    size = f"0 0 {frame.width} {frame.height}"
    return f'<svg viewBox="{size}" role="group">{cells}{more}</svg>'


def _cell(frame: _Frame, place: int, pixel: _Pixel, look: str) -> str:
    go = f' data-go="{pixel.token.pos}"' if pixel.token else ""
    return (
        f"<rect {look}{go} {_at(frame, place)}><title>{_said(frame, place, pixel)}</title></rect>"
    )


def _at(frame: _Frame, place: int) -> str:
    row, column = divmod(place, frame.width)
    return f'x="{column}" y="{row}" width="1" height="1"'


def _said(frame: _Frame, place: int, pixel: _Pixel) -> str:
    row, column = divmod(place, frame.width)
    parts = [f"row {row + 1}, column {column + 1}", f"shade {pixel.level} of {frame.levels - 1}"]
    if pixel.token is None:
        return ", ".join([*parts, "given"])
    p = PROBABILITY.value(pixel.token)
    if p is not None:
        parts.append(f"probability {percent(p)}")
    return ", ".join([*parts, f"{pixel.writer} in step {pixel.step}"])


def _borders(frame: _Frame, pixels: Sequence[_Pixel]) -> Iterator[str]:
    """A line along every side of a pixel where another step, or none, is on the other side."""
    for place, pixel in enumerate(pixels):
        row, column = divmod(place, frame.width)
        around = (
            (column > 0, place - 1, f"M{column} {row}v1"),
            (column < frame.width - 1, place + 1, f"M{column + 1} {row}v1"),
            (row > 0, place - frame.width, f"M{column} {row}h1"),
            (row < frame.height - 1, place + frame.width, f"M{column} {row + 1}h1"),
        )
        for inside, other, line in around:
            same = inside and other < len(pixels) and pixels[other].step == pixel.step
            if not same:
                yield line


def _progress(frame: _Frame, pixels: Sequence[_Pixel]) -> str:
    whole = frame.width * frame.height
    done = f"{whole}" if len(pixels) == whole else f"{len(pixels)} of {whole}"
    return f"{done} pixels, written row by row, each in one of {frame.levels} shades."


def _key(pixels: Sequence[_Pixel]) -> str:
    written = [pixel for pixel in pixels if pixel.token]
    found = {pixel.writer for pixel in pixels}
    key = "".join(
        f'<li><i class="w-{writer}">{mark}</i>{said}</li>'
        for writer, (said, mark) in _WRITERS.items()
        if writer in found
    )
    steps = len({pixel.step for pixel in written})
    each = f", {number(len(written) / steps, 1)} a step" if steps else ""
    rate = f"{counted(len(written), 'pixel')} in {counted(steps, 'step')}{each}"
    return f"<b>{rate}</b>; a line surrounds each step.<ul>{key}</ul>"


def _scale(pixels: Sequence[_Pixel]) -> str:
    logprobs = [p.token.logprob for p in pixels if p.token and p.token.logprob is not None]
    mean = ""
    if logprobs:
        nats = number(sum(logprobs) / len(logprobs))
        mean = f"; mean log-probability <b>{nats} nats</b>"
    limits = PROBABILITY.steps
    names = [f"≥ {limits[0]:g}", *(f"&lt; {limit:g}" for limit in limits)]
    key = "".join(f'<li><i class="p{level}"></i>{name}</li>' for level, name in enumerate(names))
    return f"Probability of each pixel at temperature 1{mean}.<ul>{key}</ul>"
