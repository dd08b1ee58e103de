"""Tokenizers: the encoder equals Hugging Face's own, the fingerprint is the same for every copy,
errors are one line.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flame_composer.errors import ConfigError
from flame_composer.text.bpe import train_bpe
from flame_composer.text.tokenizer import build_encoder, fingerprint, load_tokenizer, token_dtype
from tests.data_fixtures import TEXTS, byte_tokenizer, llama_tokenizer

TOKENIZERS = {"byte-level": byte_tokenizer, "llama": llama_tokenizer}


def split(tokens: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("add_bos", "add_eos"), [(False, False), (False, True), (True, False), (True, True)]
)
def test_encoder_equals_hugging_face_and_its_flags_alone_add_special_tokens(name, add_bos, add_eos):
    tokenizer = TOKENIZERS[name]()
    before = [tokenizer.bos_token_id] if add_bos else []
    after = [tokenizer.eos_token_id] if add_eos else []
    tokens, lengths = build_encoder(tokenizer, add_bos=add_bos, add_eos=add_eos)(TEXTS)
    assert split(tokens, lengths) == [
        before + tokenizer(text, add_special_tokens=False).input_ids + after for text in TEXTS
    ]


def test_mirroring_the_template_equals_plain_tokenization():
    tokenizer = llama_tokenizer()
    assert tokenizer("fox").input_ids[0] == tokenizer.bos_token_id, (
        "this tokenizer's template must add bos"
    )
    tokens, lengths = build_encoder(tokenizer, add_bos=True, add_eos=False)(TEXTS)
    assert split(tokens, lengths) == [tokenizer(text).input_ids for text in TEXTS]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_encoder_equals_hugging_face_on_any_text(name, texts):
    tokenizer = TOKENIZERS[name]()
    tokens, lengths = build_encoder(tokenizer, add_bos=False, add_eos=False)(texts)
    assert split(tokens, lengths) == [
        tokenizer(text, add_special_tokens=False).input_ids for text in texts
    ]


def test_truncation_and_padding_left_on_the_tokenizer_do_not_reach_the_encoder(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    before = fingerprint(tokenizer)
    tokenizer(TEXTS, truncation=True, max_length=4, padding="max_length")
    assert json.loads(tokenizer.backend_tokenizer.to_str())["truncation"] is not None
    tokens, lengths = build_encoder(tokenizer, add_bos=False, add_eos=False)([TEXTS[-1], "a"])
    assert lengths[0] > 4
    assert (
        tokens.tolist() == byte_tokenizer()(TEXTS[-1]).input_ids + byte_tokenizer()("a").input_ids
    )
    assert fingerprint(tokenizer) == before


def test_a_special_token_that_does_not_exist_cannot_be_added():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)
    with pytest.raises(
        ConfigError, match=re.escape("add_eos: the tokenizer has no eos token; set add_eos=false")
    ):
        build_encoder(tokenizer, add_bos=False, add_eos=True)
    tokens, lengths = build_encoder(tokenizer, add_bos=False, add_eos=False)([""])
    assert (tokens.tolist(), lengths.tolist()) == ([], [0])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_fingerprint_survives_copying_and_saving_again(name, tmp_path):
    tokenizer = TOKENIZERS[name]()
    prints = [fingerprint(tokenizer)]
    for step in range(3):
        tokenizer.save_pretrained(tmp_path / f"saved{step}")
        shutil.copytree(tmp_path / f"saved{step}", tmp_path / f"copied{step}")
        tokenizer = load_tokenizer(str(tmp_path / f"copied{step}"))
        prints.append(fingerprint(tokenizer))
    assert len(set(prints)) == 1
    assert prints[0].vocab_size == len(tokenizer)
    assert prints[0].eos_token_id == tokenizer.eos_token_id


def test_fingerprint_tells_tokenizers_apart(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "a")
    merges = json.loads((tmp_path / "a" / "tokenizer.json").read_bytes())
    merges["model"]["merges"][0], merges["model"]["merges"][1] = (
        merges["model"]["merges"][1],
        merges["model"]["merges"][0],
    )
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(merges))
    prints = {
        fingerprint(tokenizer).sha256
        for tokenizer in (
            byte_tokenizer(),
            byte_tokenizer(401),
            llama_tokenizer(),
            load_tokenizer(str(tmp_path / "b")),
        )
    }
    assert len(prints) == 4


def test_old_and_new_spelling_of_merges_are_one_tokenizer(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_bytes())
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert fingerprint(load_tokenizer(str(tmp_path))) == fingerprint(byte_tokenizer())


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            lambda folder: folder.rmdir(),
            "no such folder; give a Hugging Face tokenizer folder or hub id",
        ),
        (lambda folder: None, "holds no tokenizer (tokenizer.json); give the folder or id of one"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "not a tokenizer folder: "),
        (
            lambda folder: (folder.rmdir(), folder.write_text("x")),
            "no such folder; give a Hugging Face",
        ),
    ],
    ids=["missing", "empty", "garbage", "a file"],
)
def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path, prepare, message):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(str(folder))
    assert str(caught.value).startswith(f"tokenizer: {folder}: {message}")
    assert "\n" not in str(caught.value)


def test_trained_tokenizer_is_deterministic_lossless_and_loads_anywhere(tmp_path):
    first = train_bpe(iter(TEXTS), vocab_size=300, min_frequency=1, eos_token="<|endoftext|>")
    second = train_bpe(iter(TEXTS), vocab_size=300, min_frequency=1, eos_token="<|endoftext|>")
    for name, tokenizer in (("first", first), ("second", second)):
        tokenizer.save_pretrained(tmp_path / name)
    for file in Path(tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name

    loaded = AutoTokenizer.from_pretrained(tmp_path / "first")
    assert len(loaded) == 300
    assert loaded.eos_token_id == loaded.bos_token_id == loaded.pad_token_id == 0
    unseen = "never seen: ∮ ŷ 👩‍🚀 \x00"
    assert loaded.decode(loaded(unseen).input_ids) == unseen
    assert loaded.decode(loaded(TEXTS[0]).input_ids) == TEXTS[0]


def write_settings(folder: Path, **settings) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with these in its tokenizer.json, as transformers loads it.

    Those of `model` are in its model.
    """
    byte_tokenizer().save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_bytes())
    model = content["model"] | settings.pop("model", {})
    (folder / "tokenizer.json").write_text(json.dumps({**content, **settings, "model": model}))
    return AutoTokenizer.from_pretrained(folder)


LEFT_ON = {
    "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 3000},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    },
}


@pytest.mark.parametrize("dropout", [0.1, 0.9])
def test_what_draws_lots_is_switched_off_and_said(tmp_path, caplog, dropout):
    """The tokens are those of the same tokenizer without it; it stays the one that datasets were
    made with.
    """
    kept = write_settings(tmp_path / "a", model={"dropout": dropout})
    text = TEXTS[-1]
    assert len({tuple(kept(text).input_ids) for _ in range(20)}) > 1, "a draw every time"
    loaded = load_tokenizer(str(tmp_path / "a"))
    assert caplog.messages == [
        f"warning: tokenizer: {tmp_path / 'a'}: its tokenizer.json has dropout of merges (BPE:"
        " other tokens for the same text each time) switched on, which is switched off here"
    ]
    for tokens in (
        loaded(text).input_ids,
        loaded.encode(text),
        build_encoder(loaded, add_bos=False, add_eos=False)([text])[0],
    ):
        assert list(tokens) == byte_tokenizer()(text).input_ids
    assert fingerprint(loaded) == fingerprint(kept) != fingerprint(byte_tokenizer())
    caplog.clear()
    loaded.save_pretrained(tmp_path / "b")
    again = load_tokenizer(str(tmp_path / "b"))
    assert caplog.messages == []
    assert json.loads((tmp_path / "b/tokenizer.json").read_bytes())["model"]["dropout"] is None
    assert fingerprint(again) == fingerprint(kept)


def test_truncation_and_padding_that_were_left_on_are_switched_off_and_said(tmp_path, caplog):
    kept = write_settings(tmp_path / "a", **LEFT_ON, model={"dropout": 0.5})
    loaded = load_tokenizer(str(tmp_path / "a"))
    assert caplog.messages == [
        f"warning: tokenizer: {tmp_path / 'a'}: its tokenizer.json has dropout of merges (BPE:"
        " other tokens for the same text each time) and truncation to 4 tokens and padding"
        " switched on, which are switched off here"
    ]
    assert fingerprint(loaded) == fingerprint(kept)
    loaded.save_pretrained(tmp_path / "b")
    for backend in (
        loaded.backend_tokenizer,
        Tokenizer.from_file(str(tmp_path / "b/tokenizer.json")),
    ):
        assert backend.encode(TEXTS[-1]).ids == byte_tokenizer()(TEXTS[-1]).input_ids
    caplog.clear()
    write_settings(tmp_path / "c", truncation=LEFT_ON["truncation"])
    load_tokenizer(str(tmp_path / "c"))
    assert caplog.messages == [
        f"warning: tokenizer: {tmp_path / 'c'}: its tokenizer.json has truncation to 4 tokens"
        " switched on, which is switched off here"
    ]


@pytest.mark.parametrize("model", [{"dropout": 0.0}, {"dropout": 1.0}, {}])
def test_what_leaves_nothing_to_chance_stays(tmp_path, caplog, model):
    """At 1 all merges are left out, always."""
    kept = write_settings(tmp_path, model=model)
    loaded = load_tokenizer(str(tmp_path))
    assert caplog.messages == []
    assert loaded.backend_tokenizer.to_str() == kept.backend_tokenizer.to_str()
    assert len({tuple(loaded(TEXTS[-1]).input_ids) for _ in range(20)}) == 1


def test_no_other_setting_of_tokenizers_draws_lots():
    """Of the models that tokenizers has, one can: what a new release adds has to be looked at."""
    from tokenizers import models

    settings = {
        name: set(json.loads(Tokenizer(model).to_str())["model"])
        for name, model in (
            ("BPE", models.BPE()),
            ("Unigram", models.Unigram()),
            ("WordLevel", models.WordLevel(vocab={}, unk_token="")),
            ("WordPiece", models.WordPiece(vocab={}, unk_token="")),
        )
    }
    assert settings == {
        "BPE": {
            "type",
            "dropout",
            "unk_token",
            "continuing_subword_prefix",
            "end_of_word_suffix",
            "fuse_unk",
            "byte_fallback",
            "ignore_merges",
            "vocab",
            "merges",
        },
        "Unigram": {"type", "unk_id", "vocab", "byte_fallback"},
        "WordLevel": {"type", "vocab", "unk_token"},
        "WordPiece": {
            "type",
            "unk_token",
            "continuing_subword_prefix",
            "max_input_chars_per_word",
            "vocab",
        },
    }
    known = {"BPE", "Unigram", "WordLevel", "WordPiece", "Model"}
    assert {name for name in vars(models) if name[0].isupper()} == known


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(1, np.uint16), (65536, np.uint16), (65537, np.uint32)]
)
def test_token_dtype(vocab_size, dtype):
    assert token_dtype(vocab_size) is dtype
