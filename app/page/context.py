"""What the tabs share: the runner and store for all visitors; of each visitor, what goes on and
which model was chosen."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from app.estimate import Paces, known_of
from app.runner import Loading, ModelChoice, Runner, Work
from sessions.store import Store


@dataclass
class PageContext:
    """model: what a visitor's runs use at first. By session of a visitor: `active`, the run that is
    followed, or several together; `loading`, the model that is being loaded; `chosen`, the model of
    the next run."""

    runner: Runner
    store: Store
    model: ModelChoice
    active: dict[str, Work] = field(default_factory=dict)
    loading: dict[str, Loading] = field(default_factory=dict)
    chosen: dict[str, ModelChoice] = field(default_factory=dict)
    paces: Paces = field(init=False)
    _files: TemporaryDirectory[str] = field(
        default_factory=lambda: TemporaryDirectory(prefix="candor-")
    )

    def __post_init__(self) -> None:
        self.paces = Paces(self.store)

    @property
    def files(self) -> Path:
        """A folder for what is handed out as a download; it goes when Candor ends."""
        return Path(self._files.name)

    def choice(self, session: str | None) -> ModelChoice:
        """What this visitor's runs use."""
        return self.chosen.get(session or "", self.model)

    def model_of(self, session: str | None) -> Mapping[str, Any]:
        """What is known of the model of this visitor's runs: all facts once it is loaded."""
        choice = self.choice(session)
        return self.runner.model_facts(choice) or known_of(choice)

    def stop(self, session: str | None, reason: str) -> None:
        """Stop the run that this visitor has going on, if any."""
        run = self.active.pop(session or "", None)
        if run:
            run.stop(reason)

    def cancel(self, session: str | None) -> None:
        """Stop the loading that this visitor asked for, if any."""
        loading = self.loading.pop(session or "", None)
        if loading:
            loading.stop()

    def leave(self, session: str | None, reason: str) -> None:
        """The visitor is gone: stop and forget."""
        self.stop(session, reason)
        self.cancel(session)
        self.chosen.pop(session or "", None)
