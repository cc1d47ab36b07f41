"""What tests read from the events of a run."""

from collections.abc import Iterable

from analyzers.trace import DraftTree, Event, Metric, surviving


def ids_of(events: Iterable[Event]) -> list[int]:
    """Of the tokens that no rewind undid."""
    return [token.id for token in surviving(events)]


def trees_of(events: Iterable[Event]) -> list[DraftTree]:
    return [event for event in events if isinstance(event, DraftTree)]


def mean_length(events: Iterable[Event]) -> float:
    """Tokens a pass, as the run itself told them."""
    told = (event for event in events if isinstance(event, Metric))
    return next(metric.value for metric in told if metric.name == "mean acceptance length")
