"""What the tint of the tokens means, for one signal."""

from visualizations.signals import LEVELS, Signal
from visualizations.text import escape


def render(signal: Signal) -> str:
    """The six steps with their limits, drawn with the same classes as the tokens themselves."""
    below = signal.higher_is == "sure"
    steps = "".join(
        f'<li><span class="t {signal.letter}{level}">{_limit(signal, level)}</span></li>'
        for level in range(LEVELS)
    )
    unit = f" in {signal.unit}" if signal.unit else ""
    turn = "below" if below else "from"
    return (
        f'<div class="candor candor-legend by-{signal.name}">'
        f'<div class="scale"><span class="end">sure</span><ol>{steps}</ol>'
        '<span class="end">unsure</span></div>'
        f"<p><b>{signal.label}</b>{unit}: {escape(signal.formula)} · tint {turn} "
        f"{signal.steps[0]:g}, and a stronger underline with every step that is less sure</p>"
        "</div>"
    )


def _limit(signal: Signal, level: int) -> str:
    if signal.higher_is == "sure":
        return f"≥ {signal.steps[0]:g}" if level == 0 else f"&lt; {signal.steps[level - 1]:g}"
    return f"&lt; {signal.steps[0]:g}" if level == 0 else f"≥ {signal.steps[level - 1]:g}"
