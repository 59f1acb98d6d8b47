"""Chooses the system that the command line connects to, and adds the settings that `make run` wrote for this system to
the environment, before a command reads its settings."""

import os

import click

from shared.local_systems import CHECKOUT, Chosen, NoSystem, choose_system
from shared.settings import Settings
from shared.settings_loading import read_env_file

ASKS_FOR_HELP = "ticketrail.asks_for_help"
"""The key in the context's `meta` that is true if the command only prints its help."""
_COMMANDS_WITHOUT_SYSTEM = ("asyncapi",)


def follow_system(context: click.Context, requested: str | None) -> None:
    """Adds the settings of the chosen system to the environment until the command ends. `requested`: the value of
    `--system`. If it is given, the settings of that system override the environment; otherwise variables that are
    already set stay. The settings of a system always override `.env`."""
    if context.invoked_subcommand in _COMMANDS_WITHOUT_SYSTEM or context.meta.get(ASKS_FOR_HELP):
        return
    Settings.load()  # reports a wrong setting before the choice of a system depends on it
    try:
        chosen = choose_system(requested, os.environ, env_file=read_env_file(Settings), checkout=CHECKOUT)
    except NoSystem as error:
        raise click.ClickException(str(error)) from error
    context.obj = chosen
    before = {name: os.environ.get(name) for name in chosen.environment}
    for name, value in chosen.environment.items():
        if chosen.overrides or name not in os.environ:
            os.environ[name] = value
    context.call_on_close(lambda: _restore(before))


def system_label() -> str:
    """Returns the name of the chosen system, which `status` and error messages show."""
    context = click.get_current_context(silent=True)
    found = context.find_object(Chosen) if context else None
    return found.label if found else "the settings of this process"


def _restore(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
