"""Long lists in JSON, read piece by piece, and shards in arrays."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_composer.dataset import long_json
from flame_composer.dataset.index import read_without
from flame_composer.dataset.long_json import LongJson
from flame_composer.dataset.mds import ShardFile
from flame_composer.dataset.table import ShardTable
from flame_composer.errors import DataError

VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def read(text: str, *, block: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    items: list[Any] = []
    monkeypatch.setattr(long_json, "BLOCK", block)
    return LongJson(io.BytesIO(text.encode()), "long", items.append).rest, items


@given(
    st.dictionaries(st.text(), VALUES),
    st.lists(VALUES, max_size=8),
    st.integers(1, 40),
    st.sampled_from([None, 1, "\t"]),
    st.booleans(),
)
def test_a_long_list_is_read_as_json_reads_it(
    others: dict[str, Any], items: list[Any], block: int, indent: Any, ascii_only: bool
) -> None:
    """Wherever the file is cut into blocks: also in the middle of numbers and characters."""
    for content in ({**others, "long": items}, {"long": items, **others}):
        text = json.dumps(content, indent=indent, ensure_ascii=ascii_only)
        if not ascii_only and any(0xD800 <= ord(each) < 0xE000 for each in text):
            continue
        with pytest.MonkeyPatch.context() as patch:
            rest, found = read(text, block=block, monkeypatch=patch)
        expected = content["long"]
        assert (rest, found) == ({**content, "long": []}, expected)


@pytest.mark.parametrize("value", [3, None, "text", {"long": [1]}, 1.5e3])
def test_what_is_no_list_is_kept(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps({"long": value, "a": 12345})
    assert read(text, block=3, monkeypatch=monkeypatch) == ({"long": value, "a": 12345}, [])
    assert read("{}", block=3, monkeypatch=monkeypatch) == ({}, [])
    assert read(' { "long" : [ ] } ', block=3, monkeypatch=monkeypatch) == ({"long": []}, [])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[3]",
        "3",
        '{"long": [1]',
        '{"long": [1}',
        '{"long": [1,]}',
        '{"long": [1] "a": 2}',
        '{"long" [1]}',
        '{"long": [1]} x',
        '{"long": [1], "long": [2]}',
        '{"long": [1], }',
        "{3: 4}",
        '{"long": [[[}',
        '{"a": ' + "[" * 10**5,
    ],
)
def test_what_is_no_json_is_refused(text: str, tmp_path: Path) -> None:
    place = tmp_path / "file.json"
    place.write_text(text)
    with pytest.raises(DataError, match=f"^{place}: damaged: not valid JSON: [^\n]+$"):
        read_without(str(place), "long")
    place.write_bytes(b'{"long": ["\xff"]}')
    with pytest.raises(DataError, match=f"^{place}: damaged: not valid JSON: [^\n]+$"):
        read_without(str(place), "long")


def test_a_long_list_takes_no_memory(tmp_path: Path) -> None:
    place = tmp_path / "file.json"
    place.write_text(json.dumps({"a": 1, "long": [{"name": "x" * 100}] * 200_000, "z": 2}))
    tracemalloc.start()
    assert read_without(str(place), "long") == {"a": 1, "long": [], "z": 2}
    assert tracemalloc.get_traced_memory()[1] < 16 << 20 < place.stat().st_size
    tracemalloc.stop()


# Shards


FILES = [
    ShardFile(f"units/{'x' * number}/shard.{number}.mds", 1000 + number, f"{number:016x}", number)
    for number in range(1, 1500)
]


def test_a_table_holds_shards_as_they_are(tmp_path: Path) -> None:
    table = ShardTable.of(FILES)
    table.save(tmp_path)
    for each in (table, ShardTable.load(tmp_path)):
        assert len(each) == len(FILES)
        assert list(each) == FILES
        assert (each[-1], each[7], each[3:9:2]) == (FILES[-1], FILES[7], FILES[3:9:2])
        assert each.rows.tolist() == [file.rows for file in FILES]
        assert each.bytes.tolist() == [file.bytes for file in FILES]
        assert each.find_twice() is None
        with pytest.raises(IndexError):
            each[len(FILES)]
    assert ShardTable.of([*FILES, FILES[77]]).find_twice() == FILES[77].basename
    assert len(ShardTable.of([])) == 0
    ShardTable.of([]).save(tmp_path)
    assert list(ShardTable.load(tmp_path)) == []
    assert not np.asarray(ShardTable.of(FILES).rows).flags.owndata
