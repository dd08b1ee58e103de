"""Shard files are those that streaming's MDSWriter writes, byte for byte, and are read as its
reader reads them.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from streaming import MDSWriter
from streaming.base.format.mds.reader import MDSReader

from flame_composer.dataset.mds import HASH, ShardWriter, decode_row
from flame_composer.dataset.packing import no_pieces, pack
from flame_composer.loader.reader import OpenShards, identify
from flame_composer.storage.files import dump_json
from tests.data_fixtures import files_under


def written_by_both(
    folder: Path,
    lengths: list[list[int]],
    dtype: type[np.unsignedinteger],
    context_length: int,
    size_limit: int,
    *,
    has_loss_mask: bool = False,
) -> int:
    """The number of shards that documents of these `lengths`, a list for each call, make;
    asserts that both agree.
    """
    ours = ShardWriter(
        folder / "ours", dtype, context_length, size_limit, has_loss_mask=has_loss_mask
    )
    columns = {
        "input_ids": f"ndarray:{np.dtype(dtype).name}:{context_length}",
        "doc_lengths": "ndarray:uint32",
    }
    if has_loss_mask:
        columns["loss_mask"] = f"ndarray:uint8:{-(-context_length // 8)}"
    theirs = MDSWriter(
        columns=columns, out=str(folder / "theirs"), hashes=[HASH], size_limit=size_limit
    )
    rng = np.random.default_rng(0)
    tail = no_pieces(dtype)
    for call in lengths:
        tokens = rng.integers(0, np.iinfo(dtype).max, sum(call), dtype=dtype, endpoint=True)
        rows, tail = pack(tokens, np.array(call, np.int64), context_length, tail)
        if has_loss_mask:
            flags = rng.random(rows.input_ids.shape) < 0.5
            rows = dataclasses.replace(rows, loss_mask=flags)
        ours.write(rows)
        for number, (input_ids, doc_lengths) in enumerate(rows):
            row = {"input_ids": input_ids, "doc_lengths": doc_lengths.astype(np.uint32)}
            if rows.loss_mask is not None:
                row["loss_mask"] = np.packbits(rows.loss_mask[number])
            theirs.write(row)
    ours.flush()
    theirs.finish()
    (folder / "theirs" / "index.json").unlink()
    assert files_under(folder / "ours") == files_under(folder / "theirs")
    assert dump_json(ours.shards) == dump_json(theirs.shards)
    for shard in ours.shards:
        plain = MDSReader.from_json(str(folder / "ours"), None, shard)
        path = str(folder / "ours" / shard["raw_data"]["basename"])
        whole, opened = np.array(identify(os.stat(path)), np.uint64), OpenShards()
        for row in range(len(plain)):
            content = opened.read(path, len(plain), row, whole)
            fast = decode_row(content, np.dtype(dtype), context_length, has_loss_mask=has_loss_mask)
            for name, value in plain[row].items():
                found = fast[name]
                if name == "loss_mask":  # as flags, of which the last byte may hold fewer than 8
                    assert len(found) == context_length
                    found = np.packbits(found)
                np.testing.assert_array_equal(found, value, strict=True)
    return len(ours.shards)


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 90), max_size=20), max_size=6),
    st.sampled_from([np.uint16, np.uint32]),
    st.integers(2, 40),
    st.integers(1024 + 8 * 40, 4096),
    st.booleans(),
)
@example([], np.uint16, 2, 2048, False)
def test_bytes_are_those_of_streaming(lengths, dtype, context_length, size_limit, has_loss_mask):
    """`written_by_both` asserts it."""
    with tempfile.TemporaryDirectory() as folder:
        written_by_both(
            Path(folder), lengths, dtype, context_length, size_limit, has_loss_mask=has_loss_mask
        )


@pytest.mark.parametrize("pieces", [1, 255, 256, 65535, 65536])
def test_any_number_of_documents_in_a_row(tmp_path, pieces):
    lengths = [[1] * (pieces - 1) + [70000 - pieces + 1]] * 3
    assert written_by_both(tmp_path, lengths, np.uint16, 70000, 1 << 20) >= 1


def test_a_shard_is_full_to_the_byte(tmp_path):
    """One byte less of room, and its last row is in another shard."""
    lengths = [[16] * 10]
    whole = ShardWriter(tmp_path / "whole", np.uint16, 16, 1 << 20)
    size = 8 + len(whole.form_json) + 10 * (4 + 4 + 2 + 4 + 32)
    limit = size - len(str(1 << 20)) + len(str(size))  # which is itself in the shard
    assert [
        written_by_both(tmp_path / f"{less}", lengths, np.uint16, 16, limit - less)
        for less in (0, 1)
    ] == [1, 2]
