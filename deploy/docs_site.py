"""Checks the documentation site that `make docs` built: every file and anchor that a page refers to must exist, and no
page may load anything from another host.

    python -m deploy.docs_site FOLDER

Prints a line for each problem. Exits with 1 if there is one.
"""

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# The attributes whose URL a browser loads when it shows a page. It loads the URL of `a` only after a click.
_LOADED_ATTRIBUTES = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "img": "src",
    "link": "href",
    "object": "data",
    "script": "src",
    "source": "src",
    "video": "src",
}


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        if "id" in values:
            self.ids.add(values["id"])
        if (url := values.get(_LOADED_ATTRIBUTES.get(tag, ""))) is not None:
            self.loads.append(url)
        if tag == "a" and (url := values.get("href")) is not None:
            self.links.append(url)


def problems(folder: Path) -> Iterator[str]:
    """Yields one line for each problem of the site in `folder`."""
    pages = {path.resolve(): _Page(path.read_text()) for path in sorted(folder.rglob("*.html"))}
    if not pages:
        yield f"{folder} has no pages"
    for path, page in pages.items():
        name = path.relative_to(folder.resolve())
        for url in page.loads:
            parts = urlsplit(url)
            if parts.scheme not in ("", "data") or parts.netloc:
                yield f"{name} loads {url} from another host"
        for url in (*page.loads, *page.links):
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                yield f"{name} refers to {url}, which is missing"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                yield f"{name} refers to {url}, whose anchor is missing"
    for path in sorted(folder.rglob("*.css")):
        text = path.read_text()
        for marker in (
            "@import url(http",
            "@import 'http",
            '@import "http',
            "url(http",
            "url('http",
            'url("http',
            "url(//",
        ):
            if marker in text:
                yield f"{path.relative_to(folder)} contains {marker}, which loads from another host"


def main() -> int:
    found = list(problems(Path(sys.argv[1])))
    for problem in found:
        print(f"ticketrail: {problem}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
