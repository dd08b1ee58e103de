"""Ranks share the work of finding a checkpoint in pieces, and each reads no more than it needs."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flame_composer.checkpoint import ranges
from flame_composer.checkpoint.look import own_pieces
from flame_composer.checkpoint.pieces import all_pieces
from flame_composer.checkpoint.ranges import ALIGNMENT, GAP, RUN, read_rows
from flame_composer.checkpoint.read import Checkpoint, read_checkpoint
from flame_composer.checkpoint.sharded import HEAD, name_of, weights
from flame_composer.errors import StoreError
from flame_composer.storage import files
from flame_composer.storage.s3 import PIECE
from tests.proxy import Proxy, proxy
from tests.runs import ROOT, Corpus, Ranks, Script, meeting
from tests.s3 import S3

# Large enough that what a rank needs is much more than the gaps that it may fetch along
SHARDED = (
    "model.config.hidden_size=128",
    "model.config.num_hidden_layers=4",
    "parallelism.fsdp.state_dict_type=sharded",
    "parallelism.cpu_fsdp=true",
    "microbatch_size=1",
    "max_duration=2ba",
    "scheduler.warmup=1ba",
    "save_interval=1ba",
    "eval_interval=100ba",
)
UNSHARDED = ("parallelism.fsdp=null",)
HYBRID = ("parallelism.fsdp.sharding_strategy=HYBRID_SHARD", "parallelism.fsdp.replicas=2")


class Saved(NamedTuple):
    """A run on two ranks in the store, and a local copy of its newest checkpoint."""

    run: Path
    keys: list[str]
    newest: Path

    def whole(self) -> dict[str, torch.Tensor]:
        """Every tensor of the newest checkpoint, put together from all of its pieces."""
        pieces = read_checkpoint(Checkpoint(str(self.newest), self.newest / HEAD))["pieces"]
        states = [piece["optimizers"]["AdamW"]["state"] for piece in pieces]
        moments = weights(
            [
                {"model": {f"{name}.{key}": each[name][key] for name in each for key in each[name]}}
                for each in states
            ]
        )
        return {
            **{f"model.{name}": tensor for name, tensor in weights(pieces).items()},
            **{f"state.{name}": tensor for name, tensor in moments.items()},
        }


@pytest.fixture(scope="module")
def saved(corpus: Corpus, s3_server: S3, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    run = tmp_path_factory.mktemp("runs") / "shared_out"
    keys = corpus.keys(run, *SHARDED, f"save_folder=s3://data/{run.name}")
    Ranks(2, *keys, env=s3_server.env).finish()
    newest = run / "ba2"
    newest.mkdir()
    for name in (HEAD, name_of(0), name_of(1)):
        (newest / name).write_bytes(s3_server.read(f"{run.name}/ba2/{name}"))
    return Saved(run, keys, newest)


class Resumed(NamedTuple):
    """What ranks that resume a run come to: their output, what they loaded, and their lines."""

    stdout: list[str]
    stderr: list[str]
    codes: list[int]
    loaded: list[dict[str, tuple[int, torch.Tensor]]]
    lines: list[Proxy]

    def gets(self, rank: int, name: str) -> tuple[int, int]:
        """How often a rank asked for parts of a file, and how many bytes it got."""
        line = self.lines[rank]
        keys = [key for key in line.requests if key.startswith("GET") and key.endswith(name)]
        return sum(line.requests[key] for key in keys), sum(line.num_bytes[key] for key in keys)

    def num_requests(self, rank: int) -> int:
        return sum(self.lines[rank].requests.values())

    def share(self, rank: int) -> int:
        """The bytes that a rank needs: its rows of what is divided among pieces, the tied weights
        once.
        """
        return sum(
            rows.numel() * rows.element_size()
            for name, (_, rows) in self.loaded[rank].items()
            if rows.ndim and name != "model.model.lm_head.weight"
        )


def resume(
    s3: S3,
    keys: list[str],
    folder: Path,
    number: int,
    envs: dict[int, dict[str, str]] | None = None,
) -> Resumed:
    """Let `number` ranks resume a run, as if each had a machine, and a line to the store, alone."""
    folder.mkdir()
    meets = meeting(number)
    with contextlib.ExitStack() as lines:
        proxies = [lines.enter_context(proxy(s3.endpoint, rate=0)) for _ in range(number)]
        scripts = [
            Script(
                ROOT / "tests/resumed.py",
                folder,
                *keys,
                f"log_folder={folder}/log{rank}",
                env={
                    **s3.env,
                    **meets,
                    "RANK": f"{rank}",
                    "LOCAL_RANK": "0",
                    "LOCAL_WORLD_SIZE": "1",
                    "NODE_RANK": f"{rank}",
                    "S3_ENDPOINT_URL": line.endpoint,
                    "GAP": "0",
                    **(envs or {}).get(rank, {}),
                },
            )
            for rank, line in enumerate(proxies)
        ]
        ended = [script.wait() for script in scripts]
    written = [folder / f"rank{rank}.pt" for rank in range(number)]
    return Resumed(
        [each.stdout for each in ended],
        [each.stderr for each in ended],
        [each.returncode for each in ended],
        [torch.load(file) for file in written if file.exists()],
        proxies,
    )


def assert_loaded(resumed: Resumed, whole: dict[str, torch.Tensor]) -> None:
    """Every rank has its rows of the whole, bit for bit, and all of them together have all."""
    assert resumed.codes == [0] * len(resumed.codes), resumed.stderr
    seen: Counter[str] = Counter()
    for loaded in resumed.loaded:
        assert loaded.keys() == whole.keys()
        for name, (start, rows) in loaded.items():
            expected = whole[name][start : start + len(rows)] if rows.ndim else whole[name]
            assert torch.equal(rows, expected), name
            seen[name] += len(rows) if rows.ndim else 1
    for name, tensor in whole.items():
        assert seen[name] >= (len(tensor) if tensor.ndim else 1), name


# By rank, the pieces that it fetches as a whole, to check them, and those that it loads rows from
# over its line. 2 requests of those for a piece do not ask for bytes but for its size and version.
@pytest.mark.parametrize(
    ("number", "keys", "checks", "loads"),
    [
        (2, (), {0: [0], 1: [1]}, {}),
        (4, (), {0: [0], 2: [1]}, {1: [0], 3: [1]}),
        (1, (), {0: [0, 1]}, {}),
        (4, HYBRID, {0: [0], 1: [1]}, {}),
        (2, UNSHARDED, {0: [0], 1: [1]}, {0: [1]}),
    ],
    ids=["same", "more", "fewer", "replicas", "unsharded"],
)
def test_each_piece_is_checked_once_and_each_rank_reads_its_rows(
    saved: Saved,
    s3_server: S3,
    tmp_path: Path,
    number: int,
    keys: tuple[str, ...],
    checks: dict[int, list[int]],
    loads: dict[int, list[int]],
) -> None:
    resumed = resume(s3_server, [*saved.keys, *keys], tmp_path / "resumed", number)
    assert_loaded(resumed, saved.whole())
    assert resumed.stdout[0].splitlines()[-1] == f"resumed from s3://data/{saved.run.name}/ba2"
    for rank in range(number):
        for piece in range(2):
            num_gets, num_bytes = resumed.gets(rank, f"ba2/{name_of(piece)}")
            size = (saved.newest / name_of(piece)).stat().st_size
            if piece in checks.get(rank, ()):
                assert (num_gets, num_bytes) == (-(-size // PIECE), size)
            elif piece in loads.get(rank, ()):
                needed = resumed.share(rank) // (2 if keys == UNSHARDED else 1)
                assert needed <= num_bytes <= needed + ALIGNMENT * num_gets
                assert num_gets <= len(resumed.loaded[rank])
            else:
                assert num_gets == 0
        head = (saved.newest / HEAD).stat().st_size
        assert resumed.gets(rank, f"ba2/{HEAD}") == (1, head)
        assert resumed.gets(rank, f"ba1/{HEAD}") == (0, 0)
        assert resumed.num_requests(rank) <= most_requests(
            saved, is_first=rank == 0, checks=checks.get(rank, []), loads=loads.get(rank, [])
        )


def most_requests(saved: Saved, *, is_first: bool, checks: list[int], loads: list[int]) -> int:
    """The most requests of a rank, as docs/reliability.md states them."""
    sizes = [(saved.newest / name_of(piece)).stat().st_size for piece in range(2)]
    head = -(-(saved.newest / HEAD).stat().st_size // PIECE)
    return (
        1
        + (3 if is_first else 0)  # a listing, and two checkpoints
        + 2
        + head
        + sum(2 + -(-sizes[piece] // PIECE) for piece in checks)
        + sum(8 + len(saved.whole()) + sizes[piece] // (RUN // 2) + 1 for piece in loads)
    )


def test_rows_that_lie_near_are_fetched_by_one_request(
    saved: Saved, s3_server: S3, tmp_path: Path
) -> None:
    """What lies between them, too, up to GAP bytes."""
    envs = {rank: {"GAP": f"{GAP}"} for rank in range(4)}
    resumed = resume(s3_server, saved.keys, tmp_path / "resumed", 4, envs)
    assert_loaded(resumed, saved.whole())
    size = (saved.newest / name_of(0)).stat().st_size
    num_gets, num_bytes = resumed.gets(1, f"ba2/{name_of(0)}")
    assert resumed.share(1) < num_bytes < size
    assert num_gets <= 1 + size // GAP + 2 * size // RUN


def test_what_one_rank_finds_damaged_no_rank_takes(
    saved: Saved, s3_server: S3, tmp_path: Path
) -> None:
    """The rank that checks the piece is the only one to see it."""
    s3, name = s3_server, f"{saved.run.name}_damaged"
    for key in s3.keys(saved.run.name):
        s3.client.put_object(
            Bucket="data", Key=f"{name}/{key}", Body=s3.read(f"{saved.run.name}/{key}")
        )
    place, piece = f"s3://data/{name}", bytearray(s3.read(f"{name}/ba2/piece1.pt"))
    piece[len(piece) // 2] ^= 1
    s3.client.put_object(Bucket="data", Key=f"{name}/ba2/piece1.pt", Body=bytes(piece))
    resumed = resume(s3, [*saved.keys, f"save_folder={place}"], tmp_path / "resumed", 2)
    assert resumed.codes == [0, 0], resumed.stderr
    assert [each.splitlines()[-1] for each in resumed.stdout] == [f"resumed from {place}/ba1"] * 2
    assert f"warning: {place}/ba2/piece1.pt: damaged checkpoint: " in resumed.stderr[0]
    assert resumed.stderr[1] == ""
    assert resumed.gets(0, "ba2/piece1.pt") == (0, 0)
    for rank in range(2):
        left = sorted(path.name for path in (tmp_path / f"resumed/log{rank}/staging").iterdir())
        assert left == ["ba1"], "the copy of the damaged one leaves room"


def test_an_error_of_one_rank_ends_all(saved: Saved, s3_server: S3, tmp_path: Path) -> None:
    """One that no other checkpoint could mend: nobody waits for the rank that has it."""
    wrong = {1: {"AWS_SECRET_ACCESS_KEY": "mistyped"}}
    resumed = resume(s3_server, saved.keys, tmp_path / "resumed", 2, wrong)
    assert resumed.codes == [2, 2]
    assert "access denied" in resumed.stderr[0], "though it is the other rank's"
    assert resumed.stderr[1] == "", "the first rank tells it for all"
    assert resumed.loaded == []


def test_a_piece_that_was_replaced_since_it_was_checked_is_not_read(
    saved: Saved, s3: S3, tmp_path: Path
) -> None:
    known = all_pieces(Checkpoint(str(saved.newest), saved.newest / HEAD))
    place = f"s3://data/{saved.run.name}_replaced"
    pieces = known._replace(
        each=tuple(
            piece._replace(place=f"{place}/{name_of(number)}", version=None)
            for number, piece in enumerate(known.each)
        )
    )
    for number in range(2):
        files.put(saved.newest / name_of(number), pieces.each[number].place)
    checked = [files.stat(piece.place) for piece in pieces.each]
    pieces = pieces._replace(
        each=tuple(
            piece._replace(version=stat and stat.version)
            for piece, stat in zip(pieces.each, checked, strict=True)
        )
    )
    whole = saved.whole()
    name = "model.model.lm_head.weight"
    out = torch.zeros_like(whole[name])
    read_rows({name: out}, pieces, tmp_path)
    assert torch.equal(out, whole[name])
    s3.client.put_object(Bucket="data", Key=pieces.each[1].place[10:], Body=b"another")
    with pytest.raises(StoreError, match=r"piece1\.pt: has been replaced since it was looked at"):
        read_rows({name: out}, pieces, tmp_path)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3))
def test_every_piece_has_one_rank_that_checks_it(pieces: int, shards: int, replicas: int) -> None:
    seen = [
        piece for rank in range(shards * replicas) for piece in own_pieces(pieces, rank, shards)
    ]
    assert seen == list(range(pieces))


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=5),
    st.integers(0, 40),
    st.integers(1, 200),
    st.booleans(),
)
def test_any_pieces_are_read_by_any_requests(
    lengths: list[int], gap: int, run: int, transposed: bool
) -> None:
    """Also parts that do not lie in the order of their rows."""
    num_rows = sum(lengths)
    whole = {
        "wide": torch.randn(num_rows, 3, 2),
        "flat": torch.randn(num_rows),
        "half": torch.randn(num_rows, 5).bfloat16(),
    }
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        for number, length in enumerate(lengths):
            start = sum(lengths[:number])
            model = {}
            for key, tensor in whole.items():
                part = tensor[start : start + length].clone()
                if transposed:
                    part = part.transpose(0, -1).contiguous().transpose(0, -1)
                model[key] = {"shape": list(tensor.shape), "start": start, "part": part}
            torch.save({"model": model, "optimizers": {}}, folder / name_of(number))
        torch.save({"state": {}, "pieces": len(lengths)}, folder / HEAD)
        pieces = all_pieces(Checkpoint(name, folder / HEAD))
        patch.setattr(ranges, "GAP", gap)
        patch.setattr(ranges, "RUN", run)
        out = {f"model.{key}": torch.zeros_like(tensor) for key, tensor in whole.items()}
        read_rows(out, pieces, folder)
    for key, tensor in whole.items():
        assert torch.equal(out[f"model.{key}"], tensor)
