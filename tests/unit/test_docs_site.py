"""The check of the documentation site, on small made-up sites."""

from pathlib import Path

import pytest

from deploy.docs_site import problems


def site(folder: Path, body: str, css: str = "") -> list[str]:
    (folder / "index.html").write_text(
        f"<html><head><link rel='stylesheet' href='style.css'></head><body>{body}</body></html>"
    )
    (folder / "page.html").write_text("<html><body><h2 id='known'>A page</h2></body></html>")
    (folder / "style.css").write_text(css)
    return list(problems(folder))


def test_a_site_with_valid_links_has_no_problems(tmp_path: Path) -> None:
    body = "<a href='page.html#known'>x</a><a href='https://example.com/'>y</a><img src='data:image/png;base64,AA=='>"
    assert site(tmp_path, body) == []


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("<a href='gone.html'>x</a>", "index.html refers to gone.html, which is missing"),
        ("<a href='page.html#gone'>x</a>", "index.html refers to page.html#gone, whose anchor is missing"),
        ("<a href='#gone'>x</a>", "index.html refers to #gone, whose anchor is missing"),
        ("<img src='gone.svg'>", "index.html refers to gone.svg, which is missing"),
        (
            "<script src='https://cdn.example/x.js'></script>",
            "index.html loads https://cdn.example/x.js from another host",
        ),
        ("<script src='//cdn.example/x.js'></script>", "index.html loads //cdn.example/x.js from another host"),
    ],
)
def test_a_missing_target_or_a_foreign_host_is_named(tmp_path: Path, body: str, problem: str) -> None:
    assert site(tmp_path, body) == [problem]


def test_a_style_sheet_that_loads_from_another_host_is_named(tmp_path: Path) -> None:
    found = site(tmp_path, "", css="@font-face { src: url('https://fonts.example/a.woff') }")
    assert found == ["style.css contains url('http, which loads from another host"]


def test_an_empty_folder_is_a_problem(tmp_path: Path) -> None:
    assert len(list(problems(tmp_path))) == 1
