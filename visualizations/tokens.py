"""The answer as HTML that grows at its end, so that only the new part travels to the page.

Each token is one span that carries its level for every signal as a class; changing the signal is
a class on the container (`by-probability`, `by-entropy`, ...) and sends nothing again. The spans
have no wrapper: a closing tag after them would make every update resend everything.
"""

from collections.abc import Iterable

from analyzers.trace import MAIN, Event, Rewind, Token
from visualizations.signals import ENTROPY, MARGIN, PROBABILITY, RANK, SURPRISAL
from visualizations.text import escape

DRAWS = (Token, Rewind)


class TokenView:
    """Folds Token and Rewind of one lane into HTML; the work of `add` is that of its events."""

    def __init__(self, lane: str = MAIN) -> None:
        self.lane = lane
        self._spans: list[tuple[int, str]] = []
        self._html = ""
        self._joined = 0  # how many of the spans are in _html

    def add(self, events: Iterable[Event]) -> str:
        """The whole HTML so far; it starts with the former value unless a Rewind came."""
        length = len(self._html)
        for event in events:
            if event.lane != self.lane:
                continue
            if isinstance(event, Token):
                self._spans.append((event.pos, span(event)))
            elif isinstance(event, Rewind):
                while self._spans and self._spans[-1][0] >= event.to:
                    _, undone = self._spans.pop()
                    if len(self._spans) < self._joined:
                        self._joined -= 1
                        length -= len(undone)
        fresh = "".join(html for _, html in self._spans[self._joined :])
        self._html = self._html[:length] + fresh
        self._joined = len(self._spans)
        return self._html


def render(events: Iterable[Event], lane: str = MAIN) -> str:
    return TokenView(lane).add(events)


def span(token: Token, extra: str = "", choosable: bool = True) -> str:
    """One token. extra: one more class. choosable: whether it can be selected.

    data-i: its position; data-v: logprob; entropy; margin; rank ("" = no value). Classes: t, a
    level per signal, o-<origin>, and one of u (inside an unfinished character, no text: it must
    stay empty, since even a box without width takes joined emoji apart), chip (special token), sp
    (spaces before it), ws (nothing but spaces). The spaces before a word stand outside of its span,
    so that neither tint nor outline hangs over at the end of a line. Line ends and tabs have an
    empty <i> before them, and more than one space a data-w with as many dots: the show-ws style
    draws them.
    """
    marks = " ".join(
        signal.mark(token) for signal in (PROBABILITY, ENTROPY, MARGIN, RANK, SURPRISAL)
    )
    word = token.text.lstrip(" ")
    spaces = len(token.text) - len(word)
    lead, dots = "", ""
    extra = f" {extra}" if extra else ""
    if not token.bytes:
        extra, word = f"{extra} chip", token.text
    elif not token.text:
        extra += " u"
    elif not word:
        extra, word = f"{extra} ws", token.text
        dots = f' data-w="{"·" * spaces}"'
    elif spaces:
        extra, lead = f"{extra} sp", " " * spaces
        dots = f' data-w="{"·" * spaces}"' if spaces > 1 else ""
    body = escape(word)
    if "\n" in body:
        body = body.replace("\n", '<i class="nl"></i>\n')
    if "\t" in body:
        body = body.replace("\t", '<i class="tb"></i>\t')
    numbers = ";".join(
        "" if value is None else f"{value:.4g}"
        for value in (token.logprob, token.entropy, token.margin)
    )
    rank = "" if token.rank is None else token.rank
    place = f' tabindex="-1" data-i="{token.pos}"' if choosable else ""
    return (
        f'{lead}<span class="t {marks} o-{token.origin}{extra}"{place}'
        f' data-v="{numbers};{rank}"{dots}>{body}</span>'
    )
