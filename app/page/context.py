"""What the tabs share: the runner and store for all visitors, the running run of each visitor."""

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from app.runner import ModelChoice, Run, Runner
from sessions.store import Store


@dataclass
class PageContext:
    """model: what the page runs. `active`: session of a visitor -> the run it follows."""

    runner: Runner
    store: Store
    model: ModelChoice
    active: dict[str, Run] = field(default_factory=dict)
    _files: TemporaryDirectory[str] = field(
        default_factory=lambda: TemporaryDirectory(prefix="candor-")
    )

    @property
    def files(self) -> Path:
        """A folder for what is handed out as a download; it goes when Candor ends."""
        return Path(self._files.name)

    def stop(self, session: str | None, reason: str) -> None:
        """Stop what this visitor has going on, if anything."""
        run = self.active.pop(session or "", None)
        if run:
            run.stop(reason)
