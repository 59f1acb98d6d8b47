"""A name that begins with an underscore belongs to its module: no other file imports or replaces it.

`ruff` refuses private attributes (SLF001). This test refuses the other ways to reach a private name: an import, and a
name in a string, as in `monkeypatch.setattr(module, "_LIMIT", 3)`.
"""

import ast
from collections.abc import Iterator

import pytest

from tests.rigs.system import ROOT

OURS = ("services", "shared", "clients", "deploy", "benchmarks", "tests")
BY_NAME = {"setattr", "delattr", "getattr", "patch", "object"}
"""Functions that take the name of an attribute as a string: builtins, and those of monkeypatch and of unittest.mock."""
INSTEAD = (
    "Test what callers see. If a test needs another limit, pause, clock or part, make it an argument with the"
    " production default. If a rule needs a test of its own, make it a public function."
)


def private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def found_in(source: str) -> Iterator[tuple[int, str]]:
    """Yields (line, private name) of each use."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] in OURS):
            for alias in node.names:
                if private(f"{node.module}.{alias.name}"):
                    yield node.lineno, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in OURS and private(alias.name):
                    yield node.lineno, alias.name
        elif isinstance(node, ast.Call):
            function = node.func
            called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            for argument in node.args[:2] if called in BY_NAME else ():
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str) and private(argument.value):
                    yield node.lineno, argument.value


def test_no_file_uses_a_private_name_of_another_one() -> None:
    paths = [path for folder in OURS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 200
    uses = [f"{path.relative_to(ROOT)}:{line} {name}" for path in paths for line, name in found_in(path.read_text())]
    assert not uses, "\n".join([*uses, INSTEAD])


@pytest.mark.parametrize(
    "source",
    [
        "from shared.rail.commit import _PAUSE",
        "from shared.rail import journal, _hidden",
        "from shared._hidden import thing",
        "import shared._hidden",
        "monkeypatch.setattr(commit, '_PAUSE', 0)",
        "monkeypatch.setattr('shared.rail.commit._PAUSE', 0)",
        "monkeypatch.delattr(rail, '_tracer')",
        "setattr(rail, '_tracer', None)",
        "getattr(rail, '_tracer')",
        "mock.patch('shared.rail.commit._PAUSE')",
        "mock.patch.object(commit, '_PAUSE')",
    ],
)
def test_each_way_to_reach_a_private_name_is_found(source: str) -> None:
    assert len(list(found_in(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from __future__ import annotations",
        "from os import _exit",
        "from shared.rail.commit import Rail as _Rail",
        "monkeypatch.setattr(commit, 'PAUSE', 0)",
        "monkeypatch.setattr(Rail, '__init__', made)",
        "getattr(rail, name)",
    ],
)
def test_public_names_and_names_of_others_are_allowed(source: str) -> None:
    assert not list(found_in(source))
