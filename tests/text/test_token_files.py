"""Files of tokens that others have made: nothing of them is lost, and what is wrong is named."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_composer.errors import ConfigError, DataError
from flame_composer.text import megatron, token_files
from flame_composer.text.given_tokens import DTYPES, Vocabulary
from flame_composer.text.megatron import INDEX, INDEX_DTYPES
from flame_composer.text.token_files import read_tokens, slice_tokens

EOS = 3
KNOWN = Vocabulary("uint16", 1000, EOS)
DOCUMENTS = [[5, 6, 7], [], [8], list(range(10, 200))]


def write_array(
    path: Path,
    documents: Sequence[Sequence[int]],
    dtype: str = "uint16",
    *,
    header: bool = False,
    last_eos: bool = True,
) -> Path:
    tokens = [token for each in documents for token in (*each, EOS)]
    array = np.array(tokens if last_eos else tokens[:-1], DTYPES[dtype])
    if header:
        np.save(path, array)
    else:
        array.tofile(path)
    return path


def write_megatron(
    path: Path,
    documents: Sequence[Sequence[int]],
    dtype: str = "uint16",
    *,
    with_eos: bool = True,
    sequences: int = 1,
) -> Path:
    """As Megatron's IndexedDatasetBuilder does; each document is of so many sequences."""
    flat = [[*each, EOS] if with_eos else list(each) for each in documents]
    array = np.array([token for each in flat for token in each], DTYPES[dtype])
    array.tofile(path)
    parts = [len(piece) for each in flat for piece in np.array_split(each, sequences)]
    sizes = np.array(parts, "<i4")
    pointers = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype("<i8") * array.itemsize
    borders = np.arange(0, len(parts) + 1, sequences, dtype="<i8")
    number = next(number for number, name in INDEX_DTYPES.items() if name == dtype)
    head = INDEX + np.uint64(1).tobytes() + np.uint8(number).tobytes()
    counts = np.array([len(sizes), len(borders)], "<u8").tobytes()
    content = head + counts + sizes.tobytes() + pointers.tobytes() + borders.tobytes()
    path.with_suffix(".idx").write_bytes(content)
    return path


def read(path: Path, known: Vocabulary = KNOWN, max_bytes: int = 1 << 30) -> list[list[int]]:
    parts = slice_tokens([str(path)], known, max_bytes)
    return [
        document.tokens.tolist()
        for part in parts
        for document in read_tokens(part, known, fail, 1 << 30)
    ]


def fail(error: DataError) -> None:
    raise error


@given(
    documents=st.lists(st.lists(st.integers(4, 999), max_size=30), min_size=1, max_size=30),
    max_bytes=st.integers(1, 200),
    kind=st.sampled_from(["raw", "numpy", "megatron"]),
    dtype=st.sampled_from(["uint16", "int32", "uint32"]),
    block=st.integers(4, 64),
)
def test_each_document_is_in_one_slice(
    documents: list[list[int]],
    max_bytes: int,
    kind: str,
    dtype: str,
    block: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    known = KNOWN._replace(dtype=dtype)
    if kind == "megatron":
        if dtype == "uint32":
            return  # Megatron has no such type
        path = write_megatron(folder / "a.bin", documents, dtype)
    else:
        path = write_array(folder / "a.npy", documents, dtype, header=kind == "numpy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "BLOCK", block)
        assert read(path, known, max_bytes) == documents


@pytest.mark.parametrize("header", [False, True])
def test_the_end_of_a_file_is_a_document_too(tmp_path: Path, header: bool) -> None:
    path = write_array(tmp_path / "a.npy", DOCUMENTS, header=header, last_eos=False)
    assert read(path) == read(path, max_bytes=7) == DOCUMENTS


def test_documents_of_megatron_need_no_eos(tmp_path: Path) -> None:
    """Its index says where they are; of several sequences, too."""
    path = write_megatron(tmp_path / "a.bin", DOCUMENTS, with_eos=False)
    assert read(path) == read(path, max_bytes=7) == DOCUMENTS
    longer = [each for each in DOCUMENTS if len(each) > 1]
    assert read(write_megatron(tmp_path / "b.bin", longer, sequences=2)) == longer


def test_positions_are_those_of_the_first_token(tmp_path: Path) -> None:
    for path in (
        write_array(tmp_path / "a.npy", DOCUMENTS, header=True),
        write_megatron(tmp_path / "a.bin", DOCUMENTS),
    ):
        parts = slice_tokens([str(path)], KNOWN, 6)
        found = [each for part in parts for each in read_tokens(part, KNOWN, fail, 1 << 30)]
        assert [each.position for each in found] == [0, 4, 5, 7]


def test_a_document_that_is_too_long_is_left_out(tmp_path: Path) -> None:
    for path in (
        write_array(tmp_path / "a.npy", DOCUMENTS),
        write_megatron(tmp_path / "a.bin", DOCUMENTS),
    ):
        (part,) = slice_tokens([str(path)], KNOWN, 1 << 20)
        damage: list[DataError] = []
        found = read_tokens(part, KNOWN, damage.append, 100)
        assert [each.tokens.tolist() for each in found] == DOCUMENTS[:3]
        (error,) = damage
        assert f"{path}: the document from token 7 on has 19" in str(error)


def changed(path: Path, change: Any) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


WRONG: dict[str, tuple[Any, str]] = {
    "empty": (lambda f: changed(write_array(f / "a.npy", DOCUMENTS), lambda _: b""), "it is empty"),
    "odd": (
        lambda f: changed(write_array(f / "a.npy", DOCUMENTS), lambda data: data + b"x"),
        "token_dtype: .*a.npy: its 397 bytes are no whole number of uint16 tokens",
    ),
    "unknown": (
        lambda f: write_array(f / "a.npy", [[5, 1000, 6]]),
        "tokenizer: .*a.npy: token 1 is 1000, and the tokenizer has 1,000; give the tokenizer and",
    ),
    "negative": (
        lambda f: write_megatron(f / "a.bin", [[5, 64000, 6]]),
        "tokenizer: .*a.bin: token 1 is 64000, and",
    ),
    "no eos": (
        lambda f: write_array(f / "a.npy", [[5] * (1 << 20)]),
        r"none of its first 1,048,576 tokens is eos \(3\), which ends documents",
    ),
    "a little without eos": (
        lambda f: changed(write_array(f / "a.npy", [[5, 6, 7]]), lambda data: data[:-2]),
        r"tokenizer: .*a.npy: none of its first 3 tokens is eos \(3\)",
    ),
    "another name": (
        lambda f: write_array(f / "a.npy.gz", DOCUMENTS),
        "source: .*a.npy.gz: with token_dtype, names must end in .npy or .bin; unpack it first",
    ),
    "no tokens": (lambda f: write_array(f / "a.npy", [], header=True), "none of its first 0 tok"),
    "no tokens in megatron's": (
        lambda f: changed(write_megatron(f / "a.bin", DOCUMENTS), lambda _: b""),
        "a.bin: damaged: it is empty; fetch the file again, or remove it",
    ),
    "all eos": (
        lambda f: write_array(f / "a.npy", [[5], []] * 900),
        r"token_dtype: .*: 67% of its first 2,700 tokens are eos \(3\)",
    ),
    "another type": (
        lambda f: write_array(f / "a.npy", DOCUMENTS, "uint32", header=True),
        "token_dtype: .*: is an array of uint32 with shape .198,. by its header, and must be one",
    ),
    "cut": (
        lambda f: changed(write_array(f / "a.npy", DOCUMENTS, header=True), lambda d: d[:-2]),
        "damaged: it has 522 bytes, and must have 524 by its header; fetch the file again",
    ),
    "no header": (
        lambda f: changed(
            write_array(f / "a.npy", DOCUMENTS, header=True), lambda d: d[:10] + b"\xff" * 200
        ),
        "damaged: its NumPy header cannot be read",
    ),
    **{
        f"a header of {name}": (
            lambda f, text=text: changed(
                write_array(f / "a.npy", DOCUMENTS, header=True),
                lambda d: d[:8] + len(text).to_bytes(2, "little") + text + d[128:],
            ),
            "damaged: its NumPy header cannot be read, or is not that of numbers: ",
        )
        for name, text in {
            "brackets": b"[" * 9000,
            "signs": b"-" * 9000 + b"1",
            "sums": b"1j+" * 3000 + b"1",
            "a list as a key": b"{[]: 1}",
            "an open string": b"{'descr':'''",
            "spaces": b" " * 60_000,
            "objects": b"{'descr': '|O', 'fortran_order': False, 'shape': (198,), }",
            "fields": b"{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (198,), }",
            "fewer than none": b"{'descr': '<u2', 'fortran_order': False, 'shape': (-198,), }",
        }.items()
    },
    "a header that is cut": (
        lambda f: changed(write_array(f / "a.npy", DOCUMENTS), lambda _: b"\x93NUMPY"),
        "damaged: its NumPy header cannot be read",
    ),
    "a header of another order": (
        lambda f: (np.save(f / "a.npy", np.arange(9, dtype=">u2")), f / "a.npy")[1],
        "is an array of >u2 with shape .9,. by its header, and must be one of uint16",
    ),
    "two dimensions": (
        lambda f: (np.save(f / "a.npy", np.ones((3, 3), "<u2")), f / "a.npy")[1],
        "is an array of uint16 with shape .3, 3. by its header, and must be one of uint16 with one",
    ),
    "big-endian": (
        lambda f: changed(
            write_array(f / "a.npy", DOCUMENTS), lambda d: np.frombuffer(d, ">u2").astype("<u2")
        ),
        "token_dtype: .*a.npy: its tokens are big-endian, and must be little-endian; write",
    ),
    "too wide": (
        lambda f: write_array(f / "a.npy", DOCUMENTS, "uint32"),
        "token_dtype: .*a.npy: its first 198 tokens are uint32 and not uint16: read as that, every"
        " second one would be 0; set token_dtype=uint32",
    ),
    "a pointer": (
        lambda f: changed(
            write_array(f / "a.npy", DOCUMENTS),
            lambda _: (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
            ),
        ),
        "damaged: it is a pointer that git-lfs left",
    ),
    "no index": (
        lambda f: (write_megatron(f / "a.bin", DOCUMENTS), (f / "a.idx").unlink())[0],
        "source: .*a.bin: there is no .*a.idx, which says where documents begin; a raw file whose",
    ),
    "no index of its": (
        lambda f: (write_megatron(f / "a.bin", DOCUMENTS), (f / "a.idx").write_text("x" * 99))[0],
        "a.idx: damaged: it is no index of Megatron's; fetch the file again",
    ),
    "half an index": (
        lambda f: (
            write_megatron(f / "a.bin", DOCUMENTS),
            changed(f / "a.idx", lambda data: data[:-8]),
        )[0],
        "a.idx: damaged: it has 114 bytes, and must have 122",
    ),
    "another index": (
        lambda f: (
            write_megatron(f / "b.bin", DOCUMENTS[:2]),
            write_megatron(f / "a.bin", DOCUMENTS),
            (f / "b.idx").rename(f / "a.idx"),
        )[1],
        "a.idx: damaged: its documents are not the 396 bytes of .*a.bin; fetch",
    ),
    "another type of index": (
        lambda f: write_megatron(f / "a.bin", DOCUMENTS, "int32"),
        "token_dtype: .*a.bin: is of int32 by its index, and not of uint16",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_before_anything_runs(name: str, tmp_path: Path) -> None:
    make, message = WRONG[name]
    path = make(tmp_path)
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        slice_tokens([str(path)], KNOWN, 1 << 20)
    assert "\n" not in str(caught.value)


def test_a_token_that_does_not_exist_is_named_wherever_it_is(tmp_path: Path) -> None:
    """Also behind what is looked at before anything runs."""
    documents = [[5] * 9] * 200_000
    path = write_array(tmp_path / "a.npy", [*documents, [1000]])
    (part,) = slice_tokens([str(path)], KNOWN, 1 << 30)
    with pytest.raises(ConfigError, match="token 2,000,000 is 1000, and the tokenizer has 1,000"):
        list(read_tokens(part, KNOWN, fail, 1 << 20))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:40],
        lambda data: data[:18] + b"\xff" * 16 + data[34:],
        lambda data: data[:18] + b"\xff" * 7 + b"\x0f" + data[26:],
        lambda data: data[:-16] + b"\xff" * 16,
        lambda data: data[:34] + b"\xff" * 16 + data[50:],
        lambda data: data[:34] + data[38:42] + data[34:38] + data[42:],
    ],
)
def test_an_index_that_changes_is_an_error(tmp_path: Path, change: Any) -> None:
    path = write_megatron(tmp_path / "a.bin", DOCUMENTS)
    parts = slice_tokens([str(path)], KNOWN, 7)
    changed(path.with_suffix(".idx"), change)
    with pytest.raises(DataError, match="was changed while it was read"):
        [list(read_tokens(part, KNOWN, fail, 1 << 20)) for part in parts]


def test_only_a_share_of_an_index_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file with many documents, a unit reads its own."""
    path = write_megatron(tmp_path / "a.bin", [[5] * 9] * 100_000)
    part = slice_tokens([str(path)], KNOWN, 20_000)[50]
    read = []
    opened = megatron.open_input

    @contextlib.contextmanager
    def counted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with opened(*args, **kwargs) as file:
            yield SimpleNamespace(seek=file.seek, read=lambda n: read.append(n) or file.read(n))

    monkeypatch.setattr(megatron, "open_input", counted)
    assert len(list(read_tokens(part, KNOWN, fail, 1 << 20))) == 1000
    assert sum(read) < 20_000 + 13_000


def test_an_index_is_read_in_blocks(tmp_path: Path) -> None:
    """That of 50 million documents, a gigabyte, takes 15 MB."""
    count = 1_000_000
    path = write_megatron(tmp_path / "a.bin", DOCUMENTS)
    content = path.with_suffix(".idx").read_bytes()
    sizes, numbers = np.full(count, 1000, "<i4"), np.arange(count + 1, dtype="<i8")
    counts = np.array([count, count + 1], "<u8").tobytes()
    parts = (content[:18], counts, sizes.tobytes(), (numbers[:-1] * 2000).tobytes())
    path.with_suffix(".idx").write_bytes(b"".join((*parts, numbers.tobytes())))
    with path.open("wb") as file:
        file.truncate(count * 2000)  # without taking space on a disk
    tracemalloc.start()
    try:
        found = slice_tokens([str(path)], KNOWN, 64 << 20)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert sum(part.end - part.start for part in found) == count
    assert len(found) == -(-count // ((64 << 20) // 2000))


@given(
    lengths=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=40),
    at_a_time=st.integers(1, 9),
    max_bytes=st.integers(1, 60),
)
def test_an_index_in_blocks_of_any_size(
    lengths: list[list[int]],
    at_a_time: int,
    max_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Documents of any number of sequences, which may be empty, as may be the documents."""
    folder = tmp_path_factory.mktemp("index")
    sizes = np.array([size for each in lengths for size in each], "<i4")
    tokens = np.arange(10, 10 + sizes.sum(), dtype="<u2")
    if len(tokens) == 0:
        return
    tokens.tofile(folder / "a.bin")
    pointers = (np.cumsum(sizes) - sizes).astype("<i8") * 2
    borders = np.cumsum([0, *map(len, lengths)]).astype("<i8")
    counts = np.array([len(sizes), len(borders)], "<u8")
    parts = (np.uint64(1), np.uint8(8), counts, sizes, pointers, borders)
    (folder / "a.idx").write_bytes(INDEX + b"".join(part.tobytes() for part in parts))
    expected = np.split(tokens, np.cumsum([sum(each) for each in lengths])[:-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron, "AT_A_TIME", at_a_time)
        found = read(folder / "a.bin", max_bytes=max_bytes)
        assert found == [each.tolist() for each in expected]
        index = (folder / "a.idx").read_bytes()
        end = len(index)
        for change in (borders[-1] + 1, borders[-1] - 1, -1):
            wrong = index[: end - 8] + np.int64(change).tobytes()
            (folder / "a.idx").write_bytes(wrong)
            with pytest.raises(DataError, match="damaged: its documents are not the"):
                slice_tokens([str(folder / "a.bin")], KNOWN, max_bytes)


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = write_array(tmp_path / "a.npy", DOCUMENTS)
    (part,) = slice_tokens([str(path)], KNOWN, 1 << 20)
    changed(path, lambda data: data[:20])
    with pytest.raises(DataError, match="was changed while it was read"):
        list(read_tokens(part, KNOWN, fail, 1 << 20))
