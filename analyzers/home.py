"""Where models and runs live: one place for both, `CANDOR_HOME` over the platform's folders."""

import os
from pathlib import Path

import platformdirs


def models_folder() -> Path:
    """Converted models; safe to delete, they are fetched again."""
    return (_home() or Path(platformdirs.user_cache_dir("candor"))) / "models"


def database_path() -> Path:
    """The SQLite file with every recorded run."""
    folder = _home() or Path(platformdirs.user_data_dir("candor"))
    return folder / "runs.db"


def _home() -> Path | None:
    value = os.environ.get("CANDOR_HOME")
    return Path(value).expanduser() if value else None
