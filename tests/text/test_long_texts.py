"""Long texts in pieces: the tokens of the whole, for every kind of tokenizer that is cut, and
the others left whole.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from flame_composer.text import long_texts
from flame_composer.text.tokenizer import bare, build_encoder
from tests.data_fixtures import TEXTS, byte_tokenizer, llama_tokenizer
from tests.text.test_encoder import mistral_tokenizer

LEARNT = [
    *TEXTS,
    "the end\nof the line\n\n  next\n\nThe  \n\n\n x 12345\n67 it's\n'tis .\nA ,\n\nB",
] * 3
GPT_2 = long_texts.PATTERNS[-1]


def trained(model, *steps, normalizer=None, **settings) -> PreTrainedTokenizerFast:
    """A tokenizer that merges as much as it can, line breaks with one another and with what is
    beside them, too.
    """
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if steps else None
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, show_progress=False, initial_alphabet=alphabet, special_tokens=["<s>"]
    )
    tokenizer.train_from_iterator(LEARNT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def by_pattern(pattern: str, **more) -> PreTrainedTokenizerFast:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return trained(
        models.BPE(),
        split,
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        **more,
    )


def with_metaspace(scheme: str, split: bool) -> PreTrainedTokenizerFast:
    tokenizer = llama_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["normalizer"] = None
    state["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": scheme,
        "split": split,
    }
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


CUT = {
    "gpt2": byte_tokenizer,
    "gpt2 by its pattern": lambda: by_pattern(GPT_2),
    "llama 3": lambda: by_pattern(long_texts.PATTERNS[0]),
    "qwen 2": lambda: by_pattern(long_texts.PATTERNS[1], normalizer=normalizers.NFC()),
    "digits": lambda: trained(
        models.BPE(), pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    ),
    "llama": llama_tokenizer,
    "mistral": mistral_tokenizer,
    "metaspace first": lambda: with_metaspace("first", False),
    "metaspace always": lambda: with_metaspace("always", True),
}
MADE: dict[str, tuple] = {}
PARTS = [
    *TEXTS,
    "\n",
    "\n\n",
    " ",
    "  \n",
    "\r\n",
    "'",
    "'s",
    ".",
    "é",
    "e\u0301",
    "\u0301",
    "数",
    "\u3000",
    "1",
    "_",
    "<s>",
    "\n<s>",
    "a",
    "B",
    "\u1161",
    "\x1c",
    "\x85",
    "\u180e",
    "\u200b",
    "▁",
    "<0x0A>",
    "\U00032974",
]


def encoders(name: str):
    if name not in MADE:
        tokenizer = CUT[name]()
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        MADE[name] = (
            bare(tokenizer),
            build_encoder(tokenizer, add_bos=False, add_eos=False),
            backend,
        )
    return MADE[name]


@pytest.mark.parametrize("name", CUT)
@given(
    parts=st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=8)), max_size=40),
    piece=st.integers(1, 30),
)
@settings(max_examples=60, deadline=None)
def test_pieces_have_the_tokens_of_the_whole(name, parts, piece):
    serialized, encode, backend = encoders(name)
    assert long_texts.can_be_cut(serialized.serialized)
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_texts, "PIECE", piece)
        assert "".join(long_texts.cut(text)) == text
        tokens, lengths = encode([text, "x", text])
    expected = [backend.encode(each, add_special_tokens=False).ids for each in (text, "x", text)]
    assert lengths.tolist() == list(map(len, expected))
    assert tokens.tolist() == [token for ids in expected for token in ids]


@pytest.mark.parametrize("name", CUT)
def test_a_text_of_many_lines_is_cut_and_the_same(name):
    _, encode, backend = encoders(name)
    text = "".join(f"Line {i}, it's {i * i} long\nand\n\n  so on.\n" for i in range(150))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_texts, "PIECE", 100)
        assert 30 < len(long_texts.cut(text)) < 75
        tokens, _ = encode([text])
    assert np.array_equal(tokens, backend.encode(text, add_special_tokens=False).ids)


def with_token(**options) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(byte_tokenizer())  # which other tests share
    tokenizer.add_tokens(AddedToken(**options))
    return tokenizer


@pytest.mark.parametrize(
    "make",
    [
        lambda: by_pattern(r"[^\n]*\n\w*"),
        lambda: by_pattern(
            long_texts.PATTERNS[0], normalizer=normalizers.Replace(Regex(r"\n\w"), " ")
        ),
        lambda: trained(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda: trained(models.BPE()),  # merges line breaks with letters
        lambda: with_token(content="<mask>", lstrip=True, normalized=False),
        lambda: with_token(content="<mask>", single_word=True),
        lambda: with_token(content="a\nb"),
    ],
    ids=["pattern", "normalizer", "prefix space", "merges", "lstrip", "single word", "line break"],
)
def test_where_a_cut_would_not_be_exact_texts_stay_whole(make):
    tokenizer = make()
    assert not long_texts.can_be_cut(bare(tokenizer).serialized)
    text = "one\ntwo\n<mask>\na\nb\n" * 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_texts, "PIECE", 3)
        tokens, _ = build_encoder(tokenizer, add_bos=False, add_eos=False)([text])
    assert tokens.tolist() == tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
