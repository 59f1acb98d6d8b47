"""Checks the home directory of a process before anything starts."""

import os
from pathlib import Path

from shared.setting_fields import allowed_values, variable
from shared.settings import Settings
from shared.settings_loading import SettingsError


def require_home(settings: Settings, *folders: Path) -> None:
    """Creates the folders of the home that a process writes. Raises SettingsError if the home or one of the folders
    cannot be used. In containers the home itself is read-only and only the folders can be written, so this function
    does not write the home."""
    if os.path.exists(settings.home) and not settings.home.is_dir():  # noqa: PTH110  (it raises no PermissionError)
        raise _refused(settings, f"{settings.home} is not a directory")
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _refused(settings, f"{folder} cannot be created: {error.strerror}") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise _refused(settings, f"{folder} cannot be written")


def require_home_of_traces(settings: Settings) -> None:
    """Checks the home of a service that keeps only traces there. The folder is needed only for the lease of a number:
    a service with a fixed number runs without trace files and reports that. Raises SettingsError."""
    require_home(settings, *([settings.traces_path] if settings.instance == "auto" else []))


def _refused(settings: Settings, why: str) -> SettingsError:
    allowed = allowed_values(Settings.model_fields["home"])
    return SettingsError(
        f"{variable('home')} is {str(settings.home)!r}, which is not allowed: it must be {allowed} ({why})"
    )
