"""The orders of rows that runs had up to 2026-11-30, which those runs go on with."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flame_composer.upstream.streaming import StreamingOrder

SHARDS = [[50, 50, 50, 31], [40, 40, 7], [64, 64, 64, 64, 64, 3]]

# What the version before laid out: the batches of an epoch, and the hash of the row ids of the
# epochs 0 and 1, and 1 from its batch 5 on. One stream by algorithm, as it is and in two nodes:
ONE_STREAM = {
    "py1e": [(11, "e0c03702ef171783"), (11, "99c2ea277d8c59f7")],
    "py1br": [(11, "64cc3253dd7d6cbb"), (11, "2fd63c6cb8bb2a1c")],
    "py1s": [(11, "719391ce58972fa8"), (11, "aa6f99b15a082044")],
    "py2s": [(11, "326a70f85863bfbc"), (11, "847dfdf0a7a3dc92")],
    "naive": [(11, "53ab65141dcefd6c"), (11, "836f59b93ea7039d")],
}
NODES: list[dict[str, Any]] = [{}, {"nodes": 2, "block_size": 64}]
# Three streams by batching method, with each of the weights
WEIGHTS: list[dict[str, Any]] = [
    {"kind": "proportion", "values": [0.5, 0.2, 0.3]},
    {"kind": "repeat", "values": [0.7, 2.5, 1]},
    {"kind": "choose", "values": [100, 60, 200]},
    {},
    {
        "kind": "proportion",
        "values": [0.5, 0.2, 0.3],
        "nodes": 4,
        "block_size": 100,
        "algo": "py1br",
    },
]
THREE_STREAMS = {
    "random": [
        (36, "ab65daaa64b53969"),
        (41, "4cd859d00b432eac"),
        (22, "40e039320d4097eb"),
        (36, "d9352b48bd534e58"),
        (36, "3e91d54cf066ae3f"),
    ],
    "stratified": [
        (35, "4a351ca307fb2ae4"),
        (40, "154ecee282dd99e8"),
        (20, "e41eecd85266b925"),
        (35, "ef69e850c77fd462"),
        (36, "833b90bfed4217b0"),
    ],
    "per_stream": [
        (36, "de11815ef61d6035"),
        (40, "8e0be5e92dcf2561"),
        (21, "ad6e0048074a9b51"),
        (36, "c7bbf697e2d6f4be"),
        (36, "e27d67547d4474e5"),
    ],
}
BEFORE: list[tuple[dict[str, Any], int, str]] = [
    *(
        ({"streams": 1, "algo": algo, **nodes}, *seen)
        for algo, all_seen in ONE_STREAM.items()
        for nodes, seen in zip(NODES, all_seen, strict=True)
    ),
    *(
        ({"streams": 3, "method": method, **weights}, *seen)
        for method, all_seen in THREE_STREAMS.items()
        for weights, seen in zip(WEIGHTS, all_seen, strict=True)
    ),
    ({"streams": 1, "shuffle": False}, 11, "6bf8e5170fbdd151"),
    (
        {"streams": 2, "shuffle": False, "nodes": 3, "kind": "repeat", "values": [1.5, 0.5]},
        19,
        "60786fce853d1d42",
    ),
]


def order_of(case: dict[str, Any]) -> StreamingOrder:
    values = case.get("values", [None] * case["streams"])
    return StreamingOrder(
        [np.array(rows) for rows in SHARDS[: case["streams"]]],
        [{} if value is None else {case["kind"]: value} for value in values],
        global_batch_size=16,
        batching_method=case.get("method", "random"),
        algo=case.get("algo", "py1e"),
        seed=11,
        block_size=case.get("block_size"),
        nodes=case.get("nodes", 1),
        shuffle=case.get("shuffle", True),
    )


@pytest.mark.filterwarnings("ignore:Shuffle block size was smaller")
@pytest.mark.parametrize(("case", "num_batches", "digest"), BEFORE)
def test_an_order_is_what_it_was(case: dict[str, Any], num_batches: int, digest: str) -> None:
    order = order_of(case)
    assert order.num_batches == num_batches
    found = hashlib.sha256()
    for epoch, first in ((0, 0), (1, 0), (1, 5)):
        for ids in order.batches(epoch, first):
            found.update(np.ascontiguousarray(ids, "<i8").tobytes())
    assert found.hexdigest()[:16] == digest


def test_processes_that_share_a_folder_lay_out_an_epoch_once(tmp_path: Path) -> None:
    case = {"streams": 3, "method": "stratified"}
    alone = [ids.tolist() for ids in order_of(case).batches(1, 3)]
    laid_out = []
    for place in range(2):
        order = order_of(case)
        lay_out = order.lay_out
        order.lay_out = lambda *where, lay_out=lay_out: laid_out.append(where) or lay_out(*where)
        order.folder = tmp_path
        found = [ids.tolist() for ids in order.batches(1, 3, place=place, places=2)]
        assert found == [ids[place::2] for ids in alone]
        assert list(order.batches(1, order.num_batches)) == []
    assert laid_out == [(1, 3)]


def test_a_stream_that_is_too_small_is_an_error() -> None:
    for method in ("stratified", "per_stream"):
        case = {"streams": 2, "method": method, "kind": "proportion", "values": [0.97, 0.03]}
        with pytest.raises(ValueError, match=r"[Ss]tream .*1"):
            order_of(case)
