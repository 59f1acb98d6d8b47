"""Follows docs/add-an-entity.md as a reader does: makes each edit and runs each command on a copy of the repository."""

import asyncio
import json
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from functools import partial
from operator import methodcaller
from pathlib import Path

import pytest

from tests.rigs.servers import Servers
from tests.rigs.system import PATIENT, ROOT, System, eventually
from tests.rigs.tree_copy import copy_tree, edit_lines

_STEP = re.compile(
    r"^<!-- (?P<order>[a-z ]+?)(?: (?P<target>\S+))? -->\n```\w+\n(?P<block>.*?)^```$", re.DOTALL | re.MULTILINE
)
PAGE = (ROOT / "docs/add-an-entity.md").read_text()


def steps() -> Iterator[tuple[str, str, str]]:
    """(instruction, target, block), such as ("edit", "shared/entities/registry.py", "-old\\n+new\\n")."""
    for found in _STEP.finditer(PAGE):
        yield found["order"], found["target"] or "", found["block"]


async def shell(block: str, cwd: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        "sh", "-e", "-c", block, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, f"{block}\n{out.decode()}"
    return out.decode()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return copy_tree(tmp_path / "clone")


@pytest.fixture
async def copied_system(servers: Servers, copy: Path) -> AsyncIterator[System]:
    own_redis = await asyncio.to_thread(servers.extra_redis)
    system = System(servers, copy / ".local", redis=own_redis, **PATIENT)
    system.root = copy
    try:
        yield system
    finally:
        await system.down()
        await asyncio.to_thread(own_redis.discard)


@pytest.mark.slow  # it follows a page of the documentation on a copy of the tree
@pytest.mark.timeout(600)
async def test_the_tutorial_creates_an_entity_that_reaches_postgresql(copy: Path, copied_system: System) -> None:
    system, done = copied_system, []
    for order, target, block in steps():
        match order:
            case "create":
                assert not (copy / target).exists()
                (copy / target).write_text(block)
            case "append":
                (copy / target).write_text(f"{(copy / target).read_text().rstrip()}\n\n\n{block}")
            case "edit":
                edit_lines(copy / target, block)
            case "run":
                await shell(block, copy)
            case "start":
                await system.up("orders", "worker")
                demo = {"orders_url": system.urls["orders"], "tokens": system.demo["tokens"]}
                (copy / ".local/demo.json").write_text(json.dumps(demo))
            case "run until":
                await eventually(
                    partial(shell, block, copy),
                    within=60,
                    what=block,
                    until=methodcaller("__contains__", target),
                )
            case _:
                pytest.fail(f"the tutorial has an unknown instruction {order!r}")
        done.append(order)
    assert done.count("run until") == 1
    assert len(done) == PAGE.count("\n```") // 2, "a code block of the tutorial has no instruction"
    async with system.database() as connection:
        stored = await connection.fetchrow("select name, guests, version from reservations")
    assert stored is not None
    assert tuple(stored) == ("Ada", 4, 1)


async def test_the_tutorials_code_passes_the_linter(copy: Path) -> None:
    for order, target, block in steps():
        if order == "create" and target.endswith(".py"):
            (copy / target).write_text(block)
        elif order == "append":
            (copy / target).write_text(f"{(copy / target).read_text().rstrip()}\n\n\n{block}")
        elif order == "edit":
            edit_lines(copy / target, block)
    changed = sorted({target for order, target, _ in steps() if target.endswith(".py")})
    await shell(f".venv/bin/python -m ruff check {' '.join(changed)}\n.venv/bin/python -m ruff format --check .", copy)
