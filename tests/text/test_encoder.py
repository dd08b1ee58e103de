"""The fast encoder: equal to the tokenizer's own on any text, left alone where it is not, and
never trusted.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from flame_composer.bench import conversions
from flame_composer.dataset import convert
from flame_composer.dataset.manifest import read_manifest
from flame_composer.errors import ConfigError
from flame_composer.text import encoder
from flame_composer.text.encoder import HF, build_fast_encoder, choose_encoder, require_installed
from flame_composer.text.tokenizer import build_encoder, load_tokenizer
from tests.data_fixtures import (
    TEXTS,
    byte_tokenizer,
    files_under,
    llama_tokenizer,
    words,
    write_jsonl,
)
from tests.dataset.test_convert import run_here

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gigatoken") is None, reason="gigatoken is not installed"
)

NEW = "\U00032974'sthe"  # begins with a letter of Unicode 17


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Mistral-7B's."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return load_tokenizer(str(conversions.mistral_tokenizer(Path(folder, "mistral"))))
        except ConfigError as error:
            pytest.skip(str(error))


TOKENIZERS = {"byte-level": byte_tokenizer, "llama": llama_tokenizer, "mistral": mistral_tokenizer}
MADE: dict[str, tuple] = {}


def encoders(name: str) -> tuple:
    """The fast one and the tokenizer's own, made once."""
    if name not in MADE:
        tokenizer = TOKENIZERS[name]()
        chosen = choose_encoder("gigatoken", tokenizer)
        assert re.fullmatch(r"gigatoken [\d.]+", chosen)
        ends = {"add_bos": True, "add_eos": True}
        exact = build_encoder(tokenizer, **ends)
        MADE[name] = build_fast_encoder(tokenizer, exact, **ends), exact
    return MADE[name]


def check_equal(name: str, texts: list[str]) -> None:
    (tokens, lengths), (expected, expected_lengths) = (encode(texts) for encode in encoders(name))
    assert tokens.dtype == expected.dtype
    assert np.array_equal(tokens, expected)
    assert np.array_equal(lengths, expected_lengths)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_gigatoken_equals_tokenizers(name):
    check_equal(name, [*TEXTS, NEW, "a" + NEW, *encoder.PROBES])
    check_equal(name, [])


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    texts=st.lists(
        st.one_of(st.text(max_size=60), st.lists(st.sampled_from(TEXTS)).map("".join)), max_size=6
    )
)
@settings(max_examples=100, deadline=None)
def test_gigatoken_equals_tokenizers_on_any_text(name, texts):
    check_equal(name, texts)


def test_characters_that_are_new_are_all_that_differ_in_a_plain_tokenizer():
    """Every code point but those, and whether those still differ: if not, there is no need to
    leave them out any more.
    """
    tokenizer = byte_tokenizer()
    fast = encoder._gigatoken(tokenizer)
    new = [chr(c) for c in range(0x110000) if encoder.NEW_CHARACTERS.match(chr(c))]
    assert len(new) > 4600
    differ = [
        c
        for c in new[::25]
        if fast(f"{c}'sthe").tolist() != tokenizer(f"{c}'sthe", add_special_tokens=False).input_ids
    ]
    assert len(differ) > 0.9 * len(new[::25])
    assert {c.encode()[:1] for c in new} == set(encoder.NEW_BYTES)
    assert all(encoder.NEW_STARTS.match(c.encode()) for c in new)
    assert not encoder._may_be_new("é数한नไ🔥".encode())


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=100, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def test_what_is_chosen(monkeypatch):
    tokenizer = byte_tokenizer()
    installed = choose_encoder("auto", tokenizer)
    assert installed.startswith("gigatoken ")
    assert choose_encoder("hf", tokenizer, begun=installed) == HF
    assert choose_encoder("auto", tokenizer, begun=HF) == HF, (
        "a conversion goes on with what it was begun with"
    )
    assert choose_encoder("auto", tokenizer, begun="gigatoken 0.0.1") == "gigatoken 0.0.1"
    with pytest.raises(
        ConfigError,
        match=r"^encoder: this conversion was begun with gigatoken 0\.0\.1, and gigatoken .* is "
        r"installed; pip install gigatoken==0\.0\.1, or remove the folder$",
    ):
        require_installed("gigatoken 0.0.1")

    unigram = unigram_tokenizer()
    assert choose_encoder("auto", unigram) == HF
    with pytest.raises(
        ConfigError,
        match=r"^encoder: gigatoken(.s tokens of| does not handle) .*; set encoder=hf, or",
    ):
        choose_encoder("gigatoken", unigram)

    monkeypatch.setattr(encoder, "_installed", lambda: None)
    assert choose_encoder("auto", tokenizer) == HF
    with pytest.raises(
        ConfigError,
        match=r"^encoder: gigatoken is not installed; pip install 'flame-composer\[fast\]', or ",
    ):
        choose_encoder("gigatoken", tokenizer)


def test_a_mismatch_is_found_on_a_sample_and_the_unit_done_again(tmp_path, monkeypatch, capsys):
    """A true difference, let through to the check: every unit's first document is checked."""
    monkeypatch.chdir(tmp_path)
    byte_tokenizer().save_pretrained("tokenizer")
    write_jsonl(tmp_path / "a.jsonl", [NEW, *(words(40, i) for i in range(30))])
    arguments = ["source=a.jsonl", "tokenizer=tokenizer", "context_length=64"]
    assert run_here(monkeypatch, "to_mds", *arguments, "encoder=hf", "out=hf") == 0
    assert run_here(monkeypatch, "to_mds", *arguments, "out=fast") == 0
    assert [unit.encoder for unit in read_manifest("hf").units] == [HF, None]
    assert [unit.encoder for unit in read_manifest("fast").units] == [
        choose_encoder("auto", byte_tokenizer()),
        None,
    ]
    assert capsys.readouterr().err == ""

    monkeypatch.setattr(encoder, "NEW_CHARACTERS", re.compile("(?!)"))
    name = choose_encoder("auto", byte_tokenizer())
    assert run_here(monkeypatch, "to_mds", *arguments, "encoder=gigatoken", "out=strict") == 1
    message = (
        f"a.jsonl, unit 000000: token 5 of the document that begins {NEW!r} differs between"
        f" {name} and hf; "
    )
    assert capsys.readouterr().err == f"error: {message}set encoder=auto or hf\n"
    assert not (tmp_path / "strict" / "index.json").exists()
    assert not [
        *(tmp_path / "strict" / "units").iterdir(),
        *(tmp_path / "strict" / "tmp").iterdir(),
    ]

    assert run_here(monkeypatch, "to_mds", *arguments, "out=auto") == 0
    out, err = capsys.readouterr()
    assert err == f"warning: {message}this unit was encoded with hf\n"
    assert f"{read_manifest('hf').totals.tokens_in:,} tokens in " in out, (
        "tokens of the first attempt are not counted"
    )
    assert [unit.encoder for unit in read_manifest("auto").units] == [HF, None]
    shards = [
        {
            path: data
            for path, data in files_under(tmp_path / out).items()
            if path.endswith((".mds", ".npy"))
        }
        for out in ("hf", "fast", "auto")
    ]
    assert shards[0] == shards[1] == shards[2]


def test_what_is_checked_does_not_depend_on_what_is_committed(tmp_path, monkeypatch):
    """Or a validation split made again alone would say another encoder than one made together
    with the other split.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(convert, "SAMPLE", 2)
    monkeypatch.setattr(encoder, "NEW_CHARACTERS", re.compile("(?!)"))
    byte_tokenizer().save_pretrained("tokenizer")
    write_jsonl(
        tmp_path / "a.jsonl", [*(words(40, i) for i in range(30)), *(NEW * i for i in range(1, 9))]
    )
    arguments = [
        "source=a.jsonl",
        "tokenizer=tokenizer",
        "context_length=64",
        "val_fraction=0.2",
        "out=train",
    ]
    assert run_here(monkeypatch, "to_mds", *arguments, "val_out=val") == 0
    whole = files_under(tmp_path / "val")
    assert [unit.encoder for unit in read_manifest("val").units] == [HF, None]
    assert run_here(monkeypatch, "to_mds", *arguments, "val_out=again") == 0
    assert files_under(tmp_path / "again") == whole


def test_a_conversion_goes_on_with_the_encoder_it_was_begun_with(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    byte_tokenizer().save_pretrained("tokenizer")
    write_jsonl(tmp_path / "a.jsonl", [words(40, i) for i in range(30)])
    arguments = ["source=a.jsonl", "tokenizer=tokenizer", "context_length=64", "out=out"]
    assert run_here(monkeypatch, "to_mds", *arguments, "encoder=hf") == 0
    assert run_here(monkeypatch, "to_mds", *arguments) == 0
    assert "already finished" in capsys.readouterr().out
    assert run_here(monkeypatch, "to_mds", *arguments, "encoder=gigatoken") == 2
    assert re.search(
        r'other settings: encoder \("hf" there, "gigatoken [\d.]+" now\)', capsys.readouterr().err
    )
