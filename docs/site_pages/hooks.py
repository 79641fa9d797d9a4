"""What MkDocs calls while it builds the site: pages from the code are added, what is not there yet is left out."""

import logging
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # this checkout, not another one that is installed

from mkdocs.structure.files import File  # noqa: E402

from site_pages import architecture, links, pages, tables  # noqa: E402

log = logging.getLogger("mkdocs.hooks.metaopt")
GENERATED: dict[str, str] = {}


def on_config(config: Any) -> Any:
    """Make the pages that come from the code, and the navigation."""
    GENERATED.clear()
    GENERATED.update(pages.generated())
    present = {str(file.relative_to(ROOT / "docs")) for file in (ROOT / "docs").rglob("*.md")} | GENERATED.keys()
    config.nav = _present(config.nav, present)
    for section in config.nav:
        if "Parts" in section:
            section["Parts"] += pages.navigation_of_parts()
    return config


def on_files(files: Any, config: Any) -> Any:
    """Hand the generated pages to MkDocs, in place of those that a reader of the repository finds there."""
    for path, text in GENERATED.items():
        if (there := files.get_file_from_path(path)) is not None:
            files.remove(there)
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Draw what the page holds as a Mermaid diagram, which would need a script from elsewhere."""
    if page.parent is None:  # it stands alone: a column with nothing but its own title would make the text narrow
        page.meta.setdefault("hide", ["navigation"])
    return architecture.with_drawings(markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show specs in tables as they are written, and options on one line."""
    return tables.with_whole_words(tables.with_pipes(html))


def on_post_build(config: Any) -> None:
    """Check every link of the pages as they were written: parts of them do not come from Markdown."""
    for problem in links.problems(Path(config.site_dir)):
        log.warning(problem)


def _present(entries: list[Any], present: set[str]) -> list[Any]:
    """Return the entries of the navigation whose pages exist."""
    found: list[Any] = []
    for entry in entries:
        if isinstance(entry, str):
            found += [entry] if entry in present else []
            continue
        ((title, inside),) = entry.items()
        if isinstance(inside, str):
            found += [entry] if inside in present else []
        elif members := _present(inside, present):
            found.append({title: members})
    return found
