"""One line about where a run is: waiting, loading, writing, replaying, ended, or what was wrong."""

from collections.abc import Sequence

from analyzers.trace import Event, Note, RunEnded, RunStarted
from visualizations.text import counted, duration, escape

_SAID = {"done": "✓ Done", "stopped": "■ Stopped", "failed": "✕ Failed"}
_REASONS = {"max_new reached": "limit of new tokens reached"}


def reason(ended: RunEnded) -> str:
    """Why a run ended, in words; its status where no reason is known."""
    return _REASONS.get(ended.reason, ended.reason or ended.status)


def waiting(ahead: int) -> str:
    """ahead: runs and loadings before this one in the queue."""
    if not ahead:
        return _line("busy", "Starting …")
    return _line("busy", f"Waiting for {'the one' if ahead == 1 else ahead} before yours.")


def doing(what: str, share: float) -> str:
    """share: how much is done, of 1."""
    bar = f'<span class="bar"><u style="width:{100 * min(max(share, 0), 1):.0f}%"></u></span>'
    return _line("busy", f"{escape(what)} {bar}")


def writing(tokens: int, seconds: float, seed: int) -> str:
    rate = f" · {tokens / seconds:.1f} tokens/s" if seconds > 0 and tokens else ""
    return _line("busy", f"{tokens:,} tokens{rate} · seed {seed}")


def comparing(going: int, all: int) -> str:
    return _line("busy", f"{going} of {all} answers still being written, in turns")


def compared(statuses: Sequence[str]) -> str:
    """How several runs ended; nothing where none did."""
    counts = [(name, statuses.count(name)) for name in dict.fromkeys(statuses)]
    said = " · ".join(f"{_SAID[name]}: {counted(count, 'run')}" for name, count in counts)
    return _line("done", f"{said} · each saved as a run of its own") if said else ""


def replaying(shown: int, total: int, speed: float) -> str:
    return _line("busy", f"Replaying at {speed:g}× · {shown:,} of {total:,} events")


def ended(events: Sequence[Event], run_id: str, unsaved: str | None = None) -> str:
    """How it ended, with the notes of the method; an unfinished recording says so."""
    started = next((e for e in events if isinstance(e, RunStarted)), None)
    end = next((e for e in reversed(events) if isinstance(e, RunEnded)), None)
    notes = "".join(_line("note", escape(e.text)) for e in events if isinstance(e, Note))
    seed = f" · seed {started.seed}" if started else ""
    short = f'<span title="{escape(run_id)}">{escape(run_id[:10])}…</span>'
    saved = f"run {short} saved" if not unsaved else "not saved yet"
    if end is None:
        said = f"↯ Interrupted: the recording stops here{seed} · {saved}"
        return _line("failed", said) + notes
    rate = f", {end.tokens / end.seconds:.1f} a second" if end.seconds and end.tokens else ""
    count = f"{end.tokens:,} tokens in {duration(end.seconds)}{rate}"
    said = f"{_SAID[end.status]}: {escape(reason(end))} · {count}{seed} · {saved}"
    warning = problem(unsaved) if unsaved else ""
    return _line(end.status, said) + notes + warning


def problem(sentence: str) -> str:
    """What was wrong with the input, or could not be done; nothing was lost."""
    return f'<p class="candor-status problem" role="alert">{escape(sentence)}</p>'


def _line(kind: str, html: str) -> str:
    return f'<p class="candor-status {kind}" role="status">{html}</p>'
