"""What the tabs share: the runner and store for all visitors, the running run of each visitor."""

from dataclasses import dataclass, field

from app.runner import ModelChoice, Run, Runner
from sessions.store import Store


@dataclass
class PageContext:
    """model: what the page runs. `active`: session of a visitor -> the run it follows."""

    runner: Runner
    store: Store
    model: ModelChoice
    active: dict[str, Run] = field(default_factory=dict)

    def stop(self, session: str | None, reason: str) -> None:
        """Stop what this visitor has going on, if anything."""
        run = self.active.pop(session or "", None)
        if run:
            run.stop(reason)
