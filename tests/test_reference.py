"""docs/configuration.md is what the code says, and the tests that docs name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flame_composer.config.extensions import OFFERED
from flame_composer.config.fields import fields_of
from flame_composer.config.train import TrainConfig
from flame_composer.reference import PAGE, UPSTREAM_PAGE, page, scripts, upstream_page

ROOT = Path(__file__).parent.parent


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"


def test_the_page_of_patches_is_current():
    assert UPSTREAM_PAGE.read_text(encoding="utf-8") == upstream_page(), "run `make docs`"


def test_every_key_and_every_name_is_on_it():
    text = page()
    assert [name for name, cls in scripts() if cls is TrainConfig] == ["recipes/train.py"]
    assert len(list(scripts())) >= 11
    for name, cls in scripts():
        part = text.partition(f"## {name}\n")[2].partition("\n## ")[0]
        assert set(re.findall(r"^\| `([^`]+)` \| `", part, re.MULTILINE)) == {
            key for key, _, _, _ in fields_of(cls)
        }
    for section, names in OFFERED.items():
        for name in names:
            assert text.count(f"| `{section}.{name}` |") == 1


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_every_test_that_the_docs_name_is_there(path):
    sources = {
        file.name: file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py")
    }
    for file, test in re.findall(
        r"`(?:(test_\w+\.py))?(?:::)?(test_\w+)?`", path.read_text(encoding="utf-8")
    ):
        assert not file or file in sources, file
        held = sources[file] if file else "\n".join(sources.values())
        assert not test or re.search(rf"def {test}\b", held), f"{file}::{test}"
