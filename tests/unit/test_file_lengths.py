"""No file of the product grows so long that a reader loses the overview."""

from tests.rigs.system import ROOT

PRODUCT = ("services", "shared", "clients", "deploy")
MAX_LINES = 450


def test_no_product_file_has_more_than_450_lines() -> None:
    lengths = {
        str(path.relative_to(ROOT)): path.read_text().count("\n")
        for folder in PRODUCT
        for path in (ROOT / folder).rglob("*.py")
    }
    assert lengths, "no files found"
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}, "split the file by noun"
