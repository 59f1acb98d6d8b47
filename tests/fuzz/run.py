"""One run tests the document of one service with the token of one role. The running service supplies the document."""

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

import msgspec
from msgspec import Struct

from tests.fuzz.known_entities import prepare
from tests.rigs.system import PATIENT, ROOT, System

# Environment variables that name the files which hooks.py reads and writes, in the process of schemathesis.
KNOWN_ENTITIES_VARIABLE = "TICKETRAIL_FUZZ_KNOWN_ENTITIES"
COUNTS_VARIABLE = "TICKETRAIL_FUZZ_COUNTS"

RUNS: list[tuple[str, str | None]] = [
    ("orders", "admin"),
    ("orders", "staff"),
    ("orders", "customer"),
    ("orders", None),
    ("sync", "admin"),
    ("sync", None),
    ("notifier", "admin"),
    ("notifier", "customer"),
    ("notifier", None),
]
"""(service, role); role None means no token."""


def fuzz_settings() -> dict[str, Any]:
    """Returns settings that let a system accept all requests of a run."""
    return {
        **PATIENT,
        "sign_in_failures_per_account_and_address": 1_000_000,
        "sign_in_failures_per_account": 1_000_000,
        "sign_in_failures_per_address": 1_000_000,
        "account_changes_per_address": 1_000_000,
        "table_sessions_per_table_and_address": 1_000_000,
    }


class Outcome(Struct, frozen=True):
    passed: bool
    output: str
    counted: dict[str, int]
    """Operation and status, such as `POST /api/orders 201` -> number of replies."""

    def reached(self, status: str) -> set[str]:
        """Returns the operations with at least one reply whose HTTP status begins with `status`, such as `2`."""
        return {label for label, _, found in (one.rpartition(" ") for one in self.counted) if found.startswith(status)}


async def fuzz(system: System, service: str, role: str | None, *arguments: str) -> Outcome:
    """Runs `schemathesis run` with `arguments` and a token of `role`; None means no token."""
    entities = await prepare(system)
    folder = system.directory / f"fuzz-{service}-{role}"
    folder.mkdir(exist_ok=True)
    config, known, counted = folder / "schemathesis.toml", folder / "entities.json", folder / "counted.json"
    config.write_text(_config(entities.tokens.get(role or ""), entities.sync_token, service))
    known.write_bytes(msgspec.json.encode(entities))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "schemathesis.cli",
        "--config-file",
        str(config),
        "run",
        f"{system.urls[service]}/api-docs/openapi.json",
        *arguments,
        cwd=ROOT,
        env={**os.environ, KNOWN_ENTITIES_VARIABLE: str(known), COUNTS_VARIABLE: str(counted)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    return Outcome(process.returncode == 0, out.decode(), json.loads(counted.read_text()) if counted.exists() else {})


def _config(token: str | None, sync_token: str, service: str) -> str:
    """Returns the configuration as TOML. Its strings are written as JSON strings, which are valid TOML."""
    lines = [
        'hooks = "tests.fuzz.hooks"',
        "continue-on-failure = true",
        "request-timeout = 30",
        "max-stream-events = 1",  # an event stream never ends, and its first event `connected` comes at once
        "[cache]",
        "enabled = false",
        "[auth]",
        "auto-signup = false",
        "[checks]",
        # A valid request may still name a missing entity or break a rule that no schema can express.
        'positive_data_acceptance.expected-statuses = ["2xx", 304, 401, 403, 404, 409, 422, 429]',
    ]
    if token is not None:
        lines += ["[auth.openapi.bearer]", f"bearer = {json.dumps(token)}"]
    if service == "sync":
        lines += ["[auth.openapi.sync_token]", f"api_key = {json.dumps(sync_token)}"]
    return "\n".join(lines) + "\n"
