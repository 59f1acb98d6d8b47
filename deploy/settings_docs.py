"""`make settings`: writes `.env.example` and `docs/settings.md` from the declarations of the settings.

A test compares both files with this output, so they are always up to date.
"""

import json
import re
import textwrap
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from pydantic.fields import FieldInfo

from deploy.local.local_settings import ROOT, LocalSettings
from shared.setting_fields import Described, allowed_values, description_of, variable
from shared.settings_loading import OTHER_NAMES

_LINE_CHARS = 118


def main() -> None:
    for path, text in documents().items():
        (ROOT / path).write_text(text)
        print(f"wrote {path}")


def documents() -> dict[str, str]:
    """Returns the text of each document by its path in the repository."""
    return {".env.example": env_example(), "docs/settings.md": page()}


def env_example() -> str:
    parts = [
        "# Every setting with its default. `make settings` writes this file from shared/settings.py.\n"
        "# Copy it to `.env`, and remove the `#` before each setting that you change.\n"
    ]
    for described, fields in _groups():
        title = f"# -- {described.group} "
        parts.append(f"\n\n{title}{'-' * (_LINE_CHARS - len(title))}\n{_comment(described.about)}")
        for name, field in fields:
            description = description_of(field)
            notes = [f"Unit: {description.unit}."] if description.unit else []
            notes += [f"Default: {description.default_text}."] if description.default_text else []
            sentence = " ".join([description.sentence, *notes, f"Allowed: {allowed_values(field)}."])
            parts.append(f"\n{_comment(sentence)}#{variable(name)}={_quoted(_default(field))}\n")
    return "".join(parts)


def page() -> str:
    parts = [
        "# Settings\n\n"
        "Each process reads its settings from environment variables, then from `.env` in its working directory, then "
        "from files in\n`/run/secrets` (`ticketrail_jwt_secret` for `TICKETRAIL_JWT_SECRET`), then takes the default. "
        "`.env.example` lists them all:\ncopy it to `.env`, and remove the `#` before each setting that you change.\n\n"
        "A process with a wrong value, or with an unknown name that begins with `TICKETRAIL_`, does not start. It "
        "prints the setting,\nits value (except that of a secret) and what is allowed, or the nearest known name.\n\n"
        "On Kubernetes set `enableServiceLinks: false`: a Service named `ticketrail-orders` otherwise puts variables "
        "such as\n`TICKETRAIL_ORDERS_PORT=tcp://10.0.0.7:8001` into every container.\n\n"
        "`make settings` writes this page from `shared/settings.py`.\n"
    ]
    for described, fields in _groups():
        parts.append(f"\n## {described.group}\n\n{described.about}\n\n")
        parts.append("| setting | default | unit | allowed | what it does |\n|---|---|---|---|---|\n")
        for name, field in fields:
            description = description_of(field)
            default = description.default_text or (f"`{_default(field)}`" if _default(field) else "empty")
            row = (f"`{variable(name)}`", default, description.unit, allowed_values(field), description.sentence)
            parts.append(f"| {' | '.join(row)} |\n".replace("|  |", "| |"))
    parts.append(
        "\n## Other names\n\n"
        "These names are not settings of a service. They may stand in the same environment or `.env`.\n\n"
        "| name | read by |\n|---|---|\n"
    )
    parts += [f"| `{name}` | {reader} |\n" for name, reader in OTHER_NAMES.items()]
    return "".join(parts)


def _groups() -> Iterator[tuple[Described, list[tuple[str, FieldInfo]]]]:
    fields = LocalSettings.model_fields.items()
    for _, members in groupby(fields, key=lambda field: description_of(field[1]).group):
        found = list(members)
        yield description_of(found[0][1]), found


def _default(field: FieldInfo) -> str:
    """Returns the default as the text of an environment variable."""
    value: Any = field.get_default(call_default_factory=True, validated_data={"environment": "development"})
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if value < 1e6 else str(value)
    return json.dumps(value) if isinstance(value, tuple | dict) else str(value)


def _quoted(text: str) -> str:
    return f"'{text}'" if re.search(r"[\s#\"]", text) else text


def _comment(text: str) -> str:
    return textwrap.indent(textwrap.fill(text, _LINE_CHARS - 2, break_on_hyphens=False) + "\n", "# ")


if __name__ == "__main__":
    main()
