"""Each class name is used once in the whole product."""

import ast
from collections import defaultdict

from tests.rigs.system import ROOT

PRODUCT = ("services", "shared", "clients", "deploy")


def test_no_two_top_level_classes_have_one_name() -> None:
    places = defaultdict(list)
    for folder in PRODUCT:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert places, "no classes found"
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
