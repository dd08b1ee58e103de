"""Small tokenizers and corpora that several test modules use."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from streaming import StreamingDataset
from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast

from flame_composer.dataset.mds import ShardView
from flame_composer.dataset.open import open_dataset
from flame_composer.text.bpe import train_bpe

TEXTS = [
    "def gate(x):\n    return x.sigmoid()\n",
    "Ein Satz mit Umlauten: äöüß — und einem Gedankenstrich.\n",
    "数据 在 磁盘 上。 🔥🔥 zero\u200bwidth",
    "tabs\tand   runs of     spaces\r\n\r\n",
    "a literal <|endoftext|> inside the text, and </s> too",
    " leading space, trailing space ",
    "",
    "\x00\x01 control \x7f characters",
    "x" * 3000,
    "The quick brown fox jumps over the lazy dog. " * 40,
]


@functools.cache
def byte_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; bos and eos are the same token, 0."""
    return train_bpe(TEXTS * 3, vocab_size=vocab_size, min_frequency=2, eos_token="<|endoftext|>")


@functools.cache
def llama_tokenizer() -> LlamaTokenizerFast:
    """A SentencePiece-style BPE tokenizer with byte fallback, whose own template puts <s> before
    a text.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts = [word for text in TEXTS for word in text.split()]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    )
    return LlamaTokenizerFast(
        tokenizer_object=tokenizer, add_bos_token=True, add_eos_token=False, legacy=False
    )


def words(count: int, seed: int) -> str:
    """`count` words that look like text, always the same."""
    letters = hashlib.shake_128(f"{seed}".encode()).hexdigest(count * 3)
    return " ".join(letters[i : i + 2 + int(letters[i], 16) % 5] for i in range(0, count * 6, 6))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text(
        "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))
    )
    return path


def write_configurations(folder: Path, **texts: list[str]) -> None:
    """A Hugging Face dataset with a configuration for each of `texts`; none of them is the
    default.
    """
    folder.mkdir()
    for name, each in texts.items():
        write_jsonl(folder / f"{name}.jsonl", each)
    listed = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in texts)
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")


def files_under(folder: Path) -> dict[str, bytes]:
    """Every file in a folder with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def streaming_dataset(local: Path | str, **options: Any) -> StreamingDataset:
    """Streaming's own view of a dataset, in order. Two made at once can take the same name for
    their shared memory: hence the lock. (`rows.Rows` has numbers of its own.)
    """
    with FileLock(Path(tempfile.gettempdir(), "flame_composer.lock")):
        return StreamingDataset(local=str(local), shuffle=False, batch_size=1, **options)


def rows_in(place: Path) -> Iterator[tuple[ShardView, int]]:
    """This package's view of each row's shard, and the row's number in it, in order. Unlike
    Streaming's view, it keeps no files open.
    """
    dataset = open_dataset(str(place))
    manifest = dataset.manifest
    for file in dataset.files:
        view = ShardView(
            place / file.basename,
            num_rows=file.rows,
            context_length=manifest.context_length,
            token_dtype=manifest.token_dtype,
            has_loss_mask=manifest.kind == "sft",
        )
        for number in range(file.rows):
            yield view, number


# What a foreign file may hold in place of what belongs there
WRONG: list[Any] = [None, True, -1, 0, 3, 1.5, 10**30, "", "text", "64mb", [], [1], {}, {"a": 1}]


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value of JSON is; of a list, in its first item."""
    inner = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content[:1])
        if isinstance(content, list)
        else ()
    )
    return [
        *([path] if path else []),
        *(place for key, value in inner for place in places(value, (*path, key))),
    ]


def altered(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of JSON `content` with another value at `path`, or without it for `...`."""
    content = json.loads(json.dumps(content))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content
