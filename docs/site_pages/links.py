"""Whether every link of the built site leads somewhere, and nothing is loaded from elsewhere."""

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# what a browser fetches by itself when it opens a page
LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src")}
LOADED_LINKS = {"stylesheet", "icon", "preload", "preconnect", "modulepreload"}


class _Page(HTMLParser):
    """Collects the links, the anchors and what is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        for name, value in given.items():
            if (tag, name) in LOADED:
                self.loaded.append(value)
        if tag == "link" and "href" in given and set(given.get("rel", "").split()) & LOADED_LINKS:
            self.loaded.append(given["href"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])


def problems(site: Path) -> Iterator[str]:
    """Yield a sentence for each link that leads nowhere and for each file that comes from elsewhere."""
    pages: dict[Path, _Page] = {}
    for file in sorted(site.rglob("*.html")):
        pages[file] = _Page()
        pages[file].feed(file.read_text(encoding="utf-8"))
    for file, page in pages.items():
        where = file.relative_to(site)
        if where.name == "404.html":  # its links begin at the root of a server
            continue
        for address in page.loaded:
            if urlsplit(address).scheme in ("http", "https") or address.startswith("//"):
                yield f"{where} loads {address}, which is not part of the site"
        for address in (*page.links, *page.loaded):
            parts = urlsplit(address)
            if parts.scheme or address.startswith("//"):
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                yield f"{where} links to {address}, which does not exist"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{where} links to {address}, which has no such anchor"
