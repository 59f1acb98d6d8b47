"""No decision compares the clocks of two machines: the rail, the mirror and its writer do not compare the wall clock.

A time in a change or in a store comes from another machine, whose clock may be wrong by hours. Code that needs an order
uses versions, log offsets, the clock of the one Redis server, or stamps that the claim orders. Durations use a
monotonic clock.
"""

import ast
from collections.abc import Iterator

import pytest

from tests.rigs.system import ROOT

FOLDERS = ("shared/rail", "shared/mirror", "services/sync/mirror")
WALL_CLOCKS = {"now", "utcnow", "time_ns"}
ALLOWED = {
    "shared/rail/head.py _in_window": "days, and only while PostgreSQL is unavailable: a wrong answer is a conflict",
    "services/sync/mirror/full_sync.py difference": "the window is days long; the guard decides what a repair writes",
    "services/sync/mirror/full_sync.py _compare_stored": "leaves out what is in flight; the next full sync sees it",
    "services/sync/mirror/warm_up.py stamp": "the later of two clocks, so that a number prefix lasts long enough",
    "services/sync/mirror/mirror_writer.py _trace": "the times of a span, for people",
}


def reads_clock(node: ast.AST, tainted: set[str]) -> bool:
    """Returns whether an expression contains the wall clock, or a name in `tainted`."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id in tainted:
            return True
        if isinstance(part, ast.Call):
            called = part.func.attr if isinstance(part.func, ast.Attribute) else getattr(part.func, "id", "")
            is_time = isinstance(part.func, ast.Attribute) and ast.unparse(part.func) == "time.time"
            if called in WALL_CLOCKS or is_time:
                return True
    return False


def comparisons(function: ast.AST) -> Iterator[int]:
    """Yields the line of each comparison, `min` or `max` that involves the wall clock, also through a variable."""
    tainted: set[str] = set()
    assigned = [node for node in ast.walk(function) if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr))]
    for _ in assigned:
        for node in assigned:
            if node.value is not None and reads_clock(node.value, tainted):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                tainted |= {part.id for one in targets for part in ast.walk(one) if isinstance(part, ast.Name)}
    for found in ast.walk(function):
        chooses = isinstance(found, ast.Call) and isinstance(found.func, ast.Name) and found.func.id in ("min", "max")
        if isinstance(found, ast.expr) and (chooses or isinstance(found, ast.Compare)) and reads_clock(found, tainted):
            yield found.lineno


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_wall_clock_is_compared_only_where_a_wrong_clock_is_harmless() -> None:
    found = {
        f"{path.relative_to(ROOT)} {function.name}": line
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for function in functions(ast.parse(path.read_text()))
        for line in comparisons(function)
    }
    assert set(found) - set(ALLOWED) == set(), "compare stamps, versions or offsets, or a monotonic clock"
    assert set(ALLOWED) - set(found) == set(), "remove the entries that are not needed any more"


@pytest.mark.parametrize(
    ("source", "compared"),
    [
        ("def f(x): return now() > x", True),
        ("def f(x): return x.at < now() - x.window", True),
        ("def f(x):\n before = now() - x\n limit = before\n return x.at <= limit", True),
        ("def f(x): return max(now(), x.updated_at)", True),
        ("def f(x): return time.time() - x > 5", True),
        ("def f(x): return self._clock() > x", False),
        ("def f(x): x.note(now())", False),
        ("def f(x):\n at = now()\n return x.replace(at=at)", False),
    ],
)
def test_check_finds_comparisons_of_the_wall_clock(source: str, compared: bool) -> None:
    (function,) = functions(ast.parse(source))
    assert bool(list(comparisons(function))) is compared
