"""Documents from the .csv.gz beside an array of tokens: all of them, and what is wrong is named."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import re
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_composer.errors import ConfigError, DataError, StoreError
from flame_composer.text import borders, given_tokens
from flame_composer.text.given_tokens import Vocabulary
from flame_composer.text.token_files import read_tokens, slice_tokens
from tests.text import time_tokens
from tests.text.test_token_files import DOCUMENTS, EOS, KNOWN, fail, write_array

ID = "2b7f6a"
SOURCE = "s3://ai2-llm/pretraining-data/sources/dclm/documents/a.jsonl.zst"


def table(lengths: Sequence[int], ids: Sequence[str] = ()) -> str:
    """The rows that Dolma's MemmapWriter writes for documents of these lengths."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    ends = np.cumsum(lengths).tolist()
    for number, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        name = ids[number] if ids else f"{ID}{number}"
        writer.writerow((end - length, end, name, SOURCE, number))
    return text.getvalue()


def write_borders(path: Path, text: str | bytes) -> Path:
    data = text.encode() if isinstance(text, str) else text
    Path(str(path).replace(".npy", ".csv.gz")).write_bytes(gzip.compress(data))
    return path


def write_bordered(
    path: Path,
    documents: Sequence[Sequence[int]],
    dtype: str = "uint16",
    *,
    header: bool = False,
    ids: Sequence[str] = (),
) -> Path:
    write_array(path, documents, dtype, header=header)
    return write_borders(path, table([len(each) + 1 for each in documents], ids))


def read(
    path: Path,
    kind: Any = "csv",
    known: Vocabulary = KNOWN,
    max_bytes: int = 1 << 30,
) -> list[tuple[list[int], int]]:
    parts = slice_tokens([str(path)], known, max_bytes, kind)
    return [
        (document.tokens.tolist(), document.position)
        for part in parts
        for document in read_tokens(part, known, fail, 1 << 30)
    ]


@given(
    documents=st.lists(st.lists(st.integers(4, 999), max_size=30), min_size=2, max_size=30),
    max_bytes=st.integers(1, 200),
    header=st.booleans(),
    dtype=st.sampled_from(["uint16", "uint32"]),
    block=st.integers(1, 300),
    ids=st.lists(st.text(alphabet='ab,"\n\r\0é', max_size=9), min_size=30, max_size=30),
)
def test_the_documents_that_eos_ends(
    documents: list[list[int]],
    max_bytes: int,
    header: bool,
    dtype: str,
    block: int,
    ids: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """In slices and blocks of any size, whatever the ids are."""
    known = KNOWN._replace(dtype=dtype)
    folder = tmp_path_factory.mktemp("tokens")
    path = write_bordered(folder / "a.npy", documents, dtype, header=header, ids=ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(borders, "BLOCK", block)
        patch.setattr(borders, "PACKED_BLOCK", block)
        patch.setattr(given_tokens, "BLOCK", block)
        assert read(path, "csv", known, max_bytes) == read(path, "eos", known)


def test_many_files_are_in_their_order(tmp_path: Path) -> None:
    """They are looked at many at a time, and the first one that is wrong is named."""
    paths = [
        str(write_bordered(tmp_path / f"{number}.npy", [[5, 10 + number]] * 2000))
        for number in range(20)
    ]
    parts = slice_tokens(paths, KNOWN, 2000, "csv")
    assert [part.path for part in parts[:: len(parts) // 20]] == paths
    tokens = [
        document.tokens.tolist()
        for part in parts
        for document in read_tokens(part, KNOWN, fail, 1 << 20)
    ]
    assert tokens == [[5, 10 + number] for number in range(20) for _ in range(2000)]
    for number in (7, 13):
        write_borders(Path(paths[number]), "0,9\n")
    with pytest.raises(DataError, match=r"/7\.csv\.gz: row 1: is the last one and ends at token 9"):
        slice_tokens(paths, KNOWN, 2000, "csv")


def test_documents_need_no_eos(tmp_path: Path) -> None:
    """Nor is an eos within one its end, and one may have no tokens."""
    documents = [[5, 6], [7, EOS, 8], [], [EOS], [9, 9, EOS], list(range(10, 60))]
    tokens = [token for each in documents for token in each]
    np.array(tokens, "<u2").tofile(tmp_path / "a.npy")
    write_borders(tmp_path / "a.npy", table([len(each) for each in documents]))
    expected = [[5, 6], [7, EOS, 8], [], [], [9, 9], documents[-1]]
    for max_bytes in (1, 7, 1 << 20):
        found = read(tmp_path / "a.npy", max_bytes=max_bytes)
        assert [each for each, _ in found] == expected
        assert [position for _, position in found] == [0, 2, 5, 5, 6, 9]


def test_rows_of_two_columns_are_enough(tmp_path: Path) -> None:
    """OLMo-core's write_document_indices writes no more, and ends lines as Unix does."""
    path = write_array(tmp_path / "a.npy", DOCUMENTS)
    for text in ("0,4\n4,5\n5,7\n7,198\n", "0,4\n4,5\n5,7\n7,198"):
        write_borders(path, text)
        assert read(path) == read(path, "eos")


def test_several_streams_are_one_file(tmp_path: Path) -> None:
    """As `cat a.csv.gz b.csv.gz` makes it, with the padding that some writers leave."""
    path = write_array(tmp_path / "a.npy", DOCUMENTS)
    streams = [gzip.compress(part) for part in (b"0,4\n4,", b"", b"5\n5,7\n7,198\n")]
    (tmp_path / "a.csv.gz").write_bytes(b"\0\0".join(streams) + b"\0" * 512)
    assert read(path) == read(path, max_bytes=7) == read(path, "eos")


def test_a_document_that_is_too_long_is_left_out(tmp_path: Path) -> None:
    documents = [*DOCUMENTS, [5, 6], list(range(10, 200)), [7]]
    path = write_bordered(tmp_path / "a.npy", documents)
    (part,) = slice_tokens([str(path)], KNOWN, 1 << 20, "csv")
    damage: list[DataError] = []
    found = [each.tokens.tolist() for each in read_tokens(part, KNOWN, damage.append, 100)]
    assert found == [*DOCUMENTS[:3], [5, 6], [7]]
    assert [
        f"document from token {number} on has 191" in str(damage[i])
        for i, number in enumerate((7, 201))
    ] == [True, True]


def packed(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Changes the packed file."""

    def do(folder: Path) -> None:
        path = folder / "a.csv.gz"
        path.write_bytes(change(path.read_bytes()))

    return do


def rows(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    """Changes the rows in it."""

    def do(folder: Path) -> None:
        lines = gzip.decompress((folder / "a.csv.gz").read_bytes()).decode().splitlines(True)
        write_borders(folder / "a.npy", "".join(change(lines)))

    return do


def row(number: int, text: str) -> Callable[[Path], None]:
    return rows(lambda lines: [*lines[: number - 1], f"{text}\r\n", *lines[number:]])


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "none": (
        lambda folder: (folder / "a.csv.gz").unlink(),
        "token_borders=csv: .*a.npy: there is no .*a.csv.gz, which says where documents begin",
    ),
    "empty": (packed(lambda _: b""), "a.csv.gz: damaged: it is empty; fetch the file again"),
    "not packed": (
        packed(gzip.decompress),
        "a.csv.gz: damaged: Error -3 while decompressing data: incorrect header check; fetch the",
    ),
    "half": (packed(lambda data: data[: len(data) // 2]), "it ends in the middle of a stream"),
    "without its checksum": (packed(lambda data: data[:-8]), "it ends in the middle of a stream"),
    "a wrong checksum": (
        packed(lambda data: data[:-8] + b"1234" + data[-4:]),
        "a.csv.gz: damaged: Error -3 while decompressing data: incorrect data check",
    ),
    "rubbish behind it": (packed(lambda data: data + b"rubbish"), "incorrect header check"),
    "no rows": (
        rows(lambda _: []),
        "a.csv.gz: has no rows, but .*a.npy has 198 tokens of uint16; fetch both again, give",
    ),
    "a row less": (
        rows(lambda lines: lines[:-1]),
        "row 3: is the last one and ends at token 7, but .*a.npy has 198 tokens of uint16; fetch",
    ),
    "a row more": (
        rows(lambda lines: [*lines, "198,199,x,y,1\r\n"]),
        "a.csv.gz: row 5: ends at token 199, and there are 198; fetch it and .*a.npy again",
    ),
    "another file's": (row(4, "7,300,x,y,1"), "row 4: ends at token 300, and there are 198"),
    "a gap": (row(2, "5,5,x,y,1"), "row 2: begins at token 5, and must where the one before it"),
    "an overlap": (row(3, "4,7,x,y,1"), "row 3: begins at token 4, and must where .* ends, 5"),
    "another order": (rows(lambda lines: lines[::-1]), "row 1: begins at token 7, and must where"),
    "an end before its start": (row(2, "4,3,x,y,1"), "row 2: begins at token 4 and ends before it"),
    "a header": (
        rows(lambda lines: ["start,end,id,src,loc\r\n", *lines]),
        "row 1: begins with 'start,end,id,src,loc', and must with the numbers of a first token and",
    ),
    "one column": (row(2, "4"), "row 2: begins with '4', and must with the numbers"),
    "no end": (row(2, "4,,x,y,1"), "row 2: begins with '4,,x,y,1', and must"),
    "an empty row": (row(2, ""), "row 2: begins with '', and must"),
    "another separator": (row(2, "4;5;x;y;1"), "row 2: begins with '4;5;x;y;1', and must"),
    "a negative number": (row(1, "-1,4,x,y,1"), "row 1: begins with '-1,4,x,y,1', and must"),
    "a fraction": (row(2, "4.0,5.0,x,y,1"), "row 2: begins with '4.0,5.0,x,y,1', and must"),
    "a huge number": (row(4, "7,9223372036854775808,x,y,1"), "row 4: begins with '7,9223372036854"),
    "a huger number": (row(4, f"7,{'9' * 5000}"), "row 4: begins with '7,99999999999999999999999"),
    "the largest number": (row(4, "7,999999999999999999"), "ends at token 999,999,999,999,999,999"),
    "numbers in quotes": (row(2, '"4","5",x,y,1'), 'row 2: begins with \'"4","5",x,y,1\', and'),
    "an open quote": (row(3, '5,7,"x,y,1'), "row 3: has a quote that is not closed"),
    "UTF-16": (
        lambda folder: write_borders(folder / "a.npy", "0,4\n4,5\n".encode("utf-16")),
        r"row 1: begins with '\\xff\\xfe0\\x00,",
    ),
    "a line that is too long": (
        row(2, "4,5," + "x" * 70_000),
        "row 2: is longer than 65,536 bytes",
    ),
    "more rows than tokens": (
        rows(lambda lines: ["0,0\n"] * 300 + lines),
        "row 199: is one more than there are tokens, 198",
    ),
    "columns as in older files": (
        row(1, f"{ID},{SOURCE},0,0,4"),
        f"row 1: begins with '{ID},{SOURCE[:20]}",
    ),
    "another type of tokens": (
        lambda folder: np.fromfile(folder / "a.npy", "<u2").astype("<u4").tofile(folder / "a.npy"),
        "token_dtype: .*a.npy: its first 198 tokens are uint32 and not uint16: read as that, every"
        " second one would be 0; set token_dtype=uint32",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_before_anything_runs(name: str, tmp_path: Path) -> None:
    change, message = WRONG[name]
    path = write_bordered(tmp_path / "a.npy", DOCUMENTS)
    assert len(slice_tokens([str(path)], KNOWN, 1 << 20, "csv")) == 1
    change(tmp_path)
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        slice_tokens([str(path)], KNOWN, 1 << 20, "csv")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


BOMBS = {
    "zeros": (b"\0", 4 << 30, "row 1: is longer than 65,536 bytes"),
    "in quotes": (b'0,0,"\n\n', 4 << 30, "row 1: has a quote|row 1: is longer than"),
    "empty rows": (b"0,0\n", 1 << 30, "row 1,001: is one more than there are tokens, 1,000"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_little_memory(name: str, tmp_path: Path) -> None:
    """Gigabytes in a few megabytes; what is unpacked is not kept."""
    unit, size, message = BOMBS[name]
    path = write_array(tmp_path / "a.npy", [[5] * 9] * 100)
    packer = zlib.compressobj(9, wbits=31)
    block = packer.compress(unit + (unit[-1:] if name == "in quotes" else unit) * 1000)
    with (tmp_path / "a.csv.gz").open("wb") as file:
        file.write(block)
        more = (b"\n" if name == "in quotes" else unit) * (1 << 20)
        for _ in range(size // len(more) // 64):
            file.write(packer.compress(more))
        file.write(packer.flush())
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message):
            slice_tokens([str(path)], KNOWN, 1 << 20, "csv")
        assert tracemalloc.get_traced_memory()[1] < 60 << 20
    finally:
        tracemalloc.stop()


def test_many_borders_take_little_memory(tmp_path: Path) -> None:
    """A unit keeps a block of its rows, and the plan keeps its slices."""
    count = 1_000_000
    ends = np.arange(1, count + 1) * 10
    tokens = np.full(count * 10, 5, "<u2")
    tokens[9::10] = EOS
    tokens.tofile(tmp_path / "a.npy")
    text = "".join(f"{end - 10},{end},{ID},{SOURCE},1\r\n" for end in ends.tolist())
    packer = zlib.compressobj(1, wbits=31)
    packed = packer.compress(text.encode()) + packer.flush()
    (tmp_path / "a.csv.gz").write_bytes(packed)
    tracemalloc.start()
    try:
        parts = slice_tokens([str(tmp_path / "a.npy")], KNOWN, 2 << 20, "csv")
        found = sum(1 for _ in read_tokens(parts[5], KNOWN, fail, 1 << 20))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == parts[5].num_bytes // 20
    assert len(parts) == 10
    assert sum(part.num_bytes for part in parts) == 20 * count
    assert peak < 25 << 20, "eight bytes a border would be 8 MB, and an object 32 MB"


def test_a_unit_goes_on_unpacking_where_the_last_one_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a file of many units would be unpacked as many times."""
    monkeypatch.setattr(borders, "BLOCK", 1 << 12)
    monkeypatch.setattr(borders, "PACKED_BLOCK", 1 << 10)
    path = write_bordered(tmp_path / "a.npy", [[5] * 9] * 20_000)
    parts = slice_tokens([str(path)], KNOWN, 10_000, "csv")
    unpacked = []
    plain = borders._unpack

    def counted(*args: Any) -> Any:
        for place, block in plain(*args):
            unpacked.append(len(block))
            yield place, block

    monkeypatch.setattr(borders, "_unpack", counted)
    for part in parts:
        assert len(list(read_tokens(part, KNOWN, fail, 1 << 20))) == part.num_bytes // 20
    size = len(table([10] * 20_000))
    assert len(parts) == 40
    assert size <= sum(unpacked) < 1.5 * size
    read_part = list(read_tokens(parts[3], KNOWN, fail, 1 << 20))
    assert read_part[0].position == 15_000, "and backwards"


@pytest.mark.parametrize(
    "change",
    [
        rows(lambda lines: lines[:2]),
        rows(lambda lines: lines[1:]),
        rows(lambda lines: [line.replace("4,", "3,") for line in lines]),
        rows(lambda lines: [f"x{line}" for line in lines]),
        row(4, "7,199,2b7f6a3,x"),
        row(4, "7,197,2b7f6a3,x"),
        packed(lambda _: gzip.compress(b"")),
    ],
)
def test_borders_that_change_are_an_error(tmp_path: Path, change: Any) -> None:
    path = write_bordered(tmp_path / "a.npy", DOCUMENTS)
    parts = slice_tokens([str(path)], KNOWN, 7, "csv")
    change(tmp_path)
    with pytest.raises(DataError, match="was changed while it was read"):
        [list(read_tokens(part, KNOWN, fail, 1 << 20)) for part in parts]


def test_an_array_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = write_bordered(tmp_path / "a.npy", DOCUMENTS)
    (part,) = slice_tokens([str(path)], KNOWN, 1 << 20, "csv")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match="was changed while it was read"):
        list(read_tokens(part, KNOWN, fail, 1 << 20))


class Web(SimpleHTTPRequestHandler):
    """A web server that answers ranges, as OLMo's does, or ignores them."""

    ranges = True

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        content = path.read_bytes()
        size, part = len(content), content
        if self.ranges and asked:
            part = content[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206 if part is not content else 200)
        if part is not content:
            self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{size}")
        self.end(part, zlib.crc32(content))
        if self.command == "GET":
            self.wfile.write(part)

    do_HEAD = do_GET

    def end(self, part: bytes, tag: int) -> None:
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{tag:x}"')
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize("ranges", [True, False])
def test_from_a_web_server(tmp_path: Path, ranges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As OLMo publishes its files; the .csv.gz that was looked at is the one that is read."""
    monkeypatch.setattr(Web, "ranges", ranges)
    # fsspec takes a small file whole
    documents = [[5] * 9] * 10_000 if ranges else [[5] * 999] * 4000
    path = write_bordered(tmp_path / "a.npy", documents)
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Web, directory=str(tmp_path))
    ) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        try:
            place: Any = "http://{}:{}/a.npy".format(*server.server_address)
            parts = slice_tokens([place], KNOWN, 50_000, "csv")
            if not ranges:
                with pytest.raises(DataError, match="its server ignores ranges; copy the file"):
                    [list(read_tokens(part, KNOWN, fail, 1 << 20)) for part in parts]
                return
            assert read(place, max_bytes=50_000) == read(path)
            write_borders(path, table([9, *[10] * 9998, 11]))
            with pytest.raises(StoreError, match=r"a\.csv\.gz: has been replaced since"):
                list(read_tokens(parts[0], KNOWN, fail, 1 << 20))
        finally:
            server.shutdown()
            thread.join()


def test_what_reading_takes_can_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/benchmarks.md names the command."""
    found = time_tokens.main(0.2, 1)
    assert list(found) == ["ours eos", "ours csv", "theirs eos", "theirs csv"]
    assert capsys.readouterr().out.count("million tokens per CPU-second") == 4


def test_borders_are_not_for_megatrons_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"token_borders=csv: .*a\.bin: the borders of a \.bin"):
        slice_tokens([str(tmp_path / "a.bin")], KNOWN, 1 << 20, "csv")
