"""Which system the command line talks to: the settings that `make run` wrote for it, before a command reads them."""

import os

import click

from shared.local_systems import CHECKOUT, Chosen, NoSystem, choose
from shared.settings import Settings

ASKS_FOR_HELP = "ticketrail.asks_for_help"
"""In the context's `meta`: the command only prints its help."""
_NEED_NO_SYSTEM = ("asyncapi",)


def follow_system(context: click.Context, wanted: str | None) -> None:
    """Adds the settings of the chosen system to the environment as long as the command runs. `wanted` replaces what the
    environment says; without it, what the environment says wins."""
    if context.invoked_subcommand in _NEED_NO_SYSTEM or context.meta.get(ASKS_FOR_HELP):
        return
    settings = Settings.load()
    configured = settings.home if "home" in settings.model_fields_set else None
    try:
        chosen = choose(wanted, os.environ, checkout=CHECKOUT, configured_home=configured)
    except NoSystem as error:
        raise click.ClickException(str(error)) from error
    context.obj = chosen
    before = {name: os.environ.get(name) for name in chosen.environment}
    for name, value in chosen.environment.items():
        if chosen.overrides or name not in os.environ:
            os.environ[name] = value
    context.call_on_close(lambda: _restore(before))


def system_label() -> str:
    """Returns the name of the chosen system, for the first line of `status` and for errors."""
    context = click.get_current_context(silent=True)
    found = context.find_object(Chosen) if context else None
    return found.label if found else "the settings of this process"


def _restore(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
