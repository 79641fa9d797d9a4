"""The page of the architecture shows the code as it is."""

import importlib.util
import sys
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_picture_is_drawn_from_the_code() -> None:
    spec = importlib.util.spec_from_file_location("draw_architecture", DOCS / "draw_architecture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    page = (DOCS / "architecture.md").read_text()
    assert module.page() == page, "run: python docs/draw_architecture.py"
    assert "flowchart" in page and "engine_averages --> engine_views" in page
