"""No link of the documentation to a page, a section or a file here is dead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.pages import PAGES, ROOT, anchors_of, blocks_of


def dead_links(path: Path, text: str) -> list[str]:
    dead: list[str] = []
    for block in blocks_of(text):
        for link in block.links:
            if re.match(r"\w+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            if not target.exists():
                dead.append(f"line {block.line}: there is no {name}")
            elif anchor and anchor not in anchors_of(target.read_text(encoding="utf-8")):
                dead.append(f"line {block.line}: {link}: no heading has this anchor")
    return dead


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_link_is_dead(path):
    assert dead_links(path, path.read_text(encoding="utf-8")) == []


def test_dead_links_are_found():
    text = "[a](docs/nowhere.md), [b](README.md#nowhere),\n[c](docs/gpu.md#make-gpu) and [d](.)"
    assert dead_links(ROOT / "README.md", text) == [
        "line 1: there is no docs/nowhere.md",
        "line 1: README.md#nowhere: no heading has this anchor",
    ]
