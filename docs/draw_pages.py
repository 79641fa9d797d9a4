"""Look at the built site: pictures of some pages, light and dark, by the Chromium that is installed.

`mkdocs build --strict && python docs/draw_pages.py [PAGE ...]` needs the program `chromium` and
`plugins/metaopt-tensorboard[test]`. The pictures go to build/pages; it is an error if a page loads from elsewhere.
"""

import contextlib
import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
SITE, OUT = ROOT / "build" / "site", ROOT / "build" / "pages"
PAGES = [
    "index.html",
    "get-started.html",
    "guides/averages.html",
    "parts/lookahead.html",
    "architecture.html",
]
WIDTH, HEIGHT = 1280, 860
TALLEST = 3 * HEIGHT  # of a picture: the begin of a page, not all of a long one


class Quiet(SimpleHTTPRequestHandler):
    """Hands out files and prints nothing."""

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing."""


@contextlib.contextmanager
def served() -> Iterator[str]:
    """Yield the address of a server of the site: a browser does not search in files without one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()


def main(pages: list[str]) -> None:
    """Take a picture of each page in each theme. Exit with status 1 if a page cannot be shown without a network."""
    browser = shutil.which("chromium") or sys.exit("this needs the program chromium")
    OUT.mkdir(parents=True, exist_ok=True)
    loaded: set[str] = set()
    with served() as address, sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for theme in ("light", "dark"):
            context = chromium.new_context(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=theme)
            page = context.new_page()
            page.on("request", lambda request: loaded.add(request.url))
            for name in pages:
                page.goto(address + name)
                page.wait_for_load_state("networkidle")
                page.add_style_tag(content="* { transition: none !important }")  # the tabs fade in
                height = min(page.evaluate("document.documentElement.scrollHeight"), TALLEST)
                path = OUT / f"{name.removesuffix('.html').replace('/', '-')}-{theme}.png"
                page.screenshot(path=path, full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": height})
                wide = page.evaluate("document.documentElement.scrollWidth")
                print(f"{path}{f': {wide} pixels wide, the window has {WIDTH}' if wide > WIDTH else ''}")
        chromium.close()
    if elsewhere := sorted(url for url in loaded if not url.startswith((address, "data:", "blob:"))):
        sys.exit(f"loaded from elsewhere: {', '.join(elsewhere)}")


if __name__ == "__main__":
    main(sys.argv[1:] or PAGES)
