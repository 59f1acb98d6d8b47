"""Each class name is used once in the whole product."""

import ast
from collections import defaultdict

from tests.rigs.system import ROOT

PRODUCT = ("services", "shared", "clients", "deploy")
TWO_MODELS = {"shared/entities/order/__init__.py", "shared/entities/order/state.py"}
"""Today's model of an order and the next one, which has other fields, limits and values under the same names."""
IN_BOTH_MODELS = {"Order", "Payment", "PaymentStatus", "StockHold"}


def test_no_two_top_level_classes_have_one_name() -> None:
    places = defaultdict(list)
    for folder in PRODUCT:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(str(path.relative_to(ROOT)))
    assert places, "no classes found"
    twice = {name: found for name, found in places.items() if len(found) > 1}
    assert twice == {name: sorted(TWO_MODELS) for name in sorted(IN_BOTH_MODELS)}
