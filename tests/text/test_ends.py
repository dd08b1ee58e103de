"""What documents began with in training goes with the tokenizer, and texts begin so everywhere."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import (
    AutoTokenizer,
    GPT2TokenizerFast,
    GPTNeoXTokenizerFast,
    PreTrainedTokenizerFast,
)

from flame_composer.config.data import DataConfig, StreamConfig
from flame_composer.errors import ConfigError
from flame_composer.loader.datasets import begin_as_documents, open_train_data
from flame_composer.text import ends as ends_module
from flame_composer.text.ends import (
    Ends,
    begin_as_in_training,
    choose_ends,
    describe_start,
    encode_prompt,
    ends_in,
    ends_of,
    note_ends,
    parse_ends,
    start_of,
    template_of,
    with_ends,
)
from flame_composer.text.steady import MARK
from flame_composer.text.tokenizer import fingerprint, load_tokenizer
from flame_composer.use.generate import encode, pad_left
from tests.data_fixtures import TEXTS, byte_tokenizer, llama_tokenizer
from tests.stack import TRANSFORMERS

EOS = "<|endoftext|>"
BOS = "ÿ"  # stands for a byte that no text has


def byte_level(
    processor: Any = None, bos: str | None = BOS, kind: Any = PreTrainedTokenizerFast
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with this template, whose bos is not its eos."""
    backend = copy.deepcopy(byte_tokenizer().backend_tokenizer)
    if processor is not None:
        backend.post_processor = processor
    return kind(tokenizer_object=backend, bos_token=bos, eos_token=EOS, unk_token=EOS)


def template(text: str) -> processors.TemplateProcessing:
    number = byte_tokenizer().convert_tokens_to_ids(BOS)
    return processors.TemplateProcessing(text, special_tokens=[(BOS, number), (EOS, 0)])


def sequence() -> Any:
    """As Llama 3 has it."""
    steps = [processors.ByteLevel(trim_offsets=False), template(f"{BOS} $A")]
    return processors.Sequence(steps)  # type: ignore[arg-type]


MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "no template": byte_level,
    "bos": lambda: byte_level(template(f"{BOS} $A")),
    "bos and eos": lambda: byte_level(template(f"{BOS} $A {EOS}")),
    "eos": lambda: byte_level(template(f"$A {EOS}")),
    "in a sequence": lambda: byte_level(sequence()),
    "as roberta": lambda: byte_level(processors.RobertaProcessing((EOS, 0), (BOS, 188))),
    "gpt2": lambda: byte_level(kind=GPT2TokenizerFast),
    "neox": lambda: byte_level(kind=GPTNeoXTokenizerFast),
    "llama": llama_tokenizer,
    "a bos that is no name": lambda: byte_level(bos="<b:0> $A"),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("ends", [Ends(False, True), Ends(True, True), Ends(True, False)], ids=str)
def test_texts_begin_as_documents_did_wherever_the_tokenizer_goes(
    name: str, ends: Ends, tmp_path: Path
) -> None:
    """And nothing is put after them; the tokenizer stays the one that datasets were made with."""
    original = MAKERS[name]()
    made = with_ends(original, ends)
    before = [original.bos_token_id] if ends.bos else []
    assert ends_of(original) is None, "is not changed itself"
    for step in range(2):
        made.save_pretrained(tmp_path / f"{step}")
        assert ends_in(str(tmp_path / f"{step}")) == ends
        ways = [load_tokenizer(str(tmp_path / f"{step}"))]
        # transformers 5 puts parts of its own in place of the file's in tokenizers of some classes
        if TRANSFORMERS < (5, 0) or name not in ("gpt2", "neox", "llama"):
            ways.append(AutoTokenizer.from_pretrained(tmp_path / f"{step}"))
        for loaded in ways:
            assert ends_of(loaded) == ends
            assert fingerprint(loaded) == fingerprint(made) == fingerprint(original)
            for text in TEXTS:
                plain = original(text, add_special_tokens=False).input_ids
                assert loaded(text).input_ids == before + plain
                assert loaded(text, add_special_tokens=False).input_ids == plain
                assert loaded.decode(plain) == original.decode(plain)
        made = loaded
    other = with_ends(made, ends._replace(bos=not ends.bos))
    assert template_of(other) == ([] if ends.bos else [original.bos_token_id], [])
    assert fingerprint(other) == fingerprint(original)


def test_a_tokenizer_that_begins_texts_so_already_stays_as_it_is(tmp_path: Path) -> None:
    for name, tokenizer in (
        ("before", byte_tokenizer()),
        ("after", with_ends(byte_tokenizer(), Ends(False, True))),
    ):
        tokenizer.save_pretrained(tmp_path / name)
    assert (tmp_path / "before/tokenizer.json").read_bytes() == (
        tmp_path / "after/tokenizer.json"
    ).read_bytes()
    before, after = (
        json.loads((tmp_path / name / "tokenizer_config.json").read_bytes())
        for name in ("before", "after")
    )
    assert after == {**before, MARK: {"documents": {"bos": False, "eos": True}}}


def test_a_chat_template_comes_along() -> None:
    tokenizer = byte_level(template(f"{BOS} $A"))
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    chat = [{"role": "user", "content": "hello"}]
    assert with_ends(tokenizer, Ends(False, True)).apply_chat_template(
        chat
    ) == tokenizer.apply_chat_template(chat)


@pytest.mark.parametrize(
    "content",
    [
        None,
        1,
        "yes",
        [],
        {},
        {"bos": True},
        {"bos": 1, "eos": True},
        {"bos": None, "eos": None},
        {"bos": [], "eos": {}},
    ],
    ids=str,
)
def test_what_says_something_else_says_nothing(content: Any, tmp_path: Path) -> None:
    assert parse_ends(content) is None
    for mark in (content, {"documents": content}, {"tokenizer_json": content}):
        byte_tokenizer().save_pretrained(tmp_path)
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_bytes()), MARK: mark}))
        loaded = load_tokenizer(str(tmp_path))
        assert ends_of(loaded) is None
        assert ends_in(str(tmp_path)) is None
        assert fingerprint(loaded) == fingerprint(byte_tokenizer())
        assert ends_of(with_ends(loaded, Ends(True, True))) == Ends(True, True)


def test_where_there_is_no_tokenizer_nothing_is_said(tmp_path: Path) -> None:
    assert ends_in(str(tmp_path)) is None
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert ends_in(str(tmp_path)) is None
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    assert ends_in(str(tmp_path)) is None


def test_prompts_begin_as_documents_did() -> None:
    """The first token of a document is predicted from bos, or from the eos of the document
    before it.
    """
    plain = byte_level(template(f"{BOS} $A {EOS}"))
    bos, eos = plain.bos_token_id, plain.eos_token_id
    ids = plain("fox", add_special_tokens=False).input_ids
    assert bos != eos
    for ends, text, empty in (
        (None, ids, [bos]),
        (Ends(False, True), ids, [eos]),
        (Ends(True, True), [bos, *ids], [bos]),
        (Ends(True, False), [bos, *ids], [bos]),
        (Ends(False, False), ids, [bos]),
    ):
        tokenizer = plain if ends is None else with_ends(plain, ends)
        assert encode_prompt(tokenizer, "fox") == text
        assert encode_prompt(tokenizer, "") == empty
        assert start_of(tokenizer) == (empty[0])
    assert encode_prompt(with_ends(plain, Ends(True, True)), f"{BOS}fox")[:2] != [
        bos,
        bos,
    ], "it has one already"


def test_a_tokenizer_that_has_no_special_tokens() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)
    ids, mask = pad_left(encode(bare, ["fox", "the fox"]), 0)
    assert mask[0].tolist()[:1] == [0]
    assert ids[0].tolist()[-mask[0].sum() :] == bare("fox").input_ids
    with pytest.raises(
        ConfigError,
        match=r"^prompt: is empty, and the tokenizer has neither bos nor eos to begin with; give",
    ):
        encode(bare, [""])
    with pytest.raises(
        ConfigError,
        match=r"^add_bos: the tokenizer has no bos token; set add_bos=false or give it one$",
    ):
        begin_as_in_training(bare, "m", add_bos=True, otherwise="")


# What is said


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, ends_module.__name__)

    def take() -> list[str]:
        messages = list(caplog.messages)
        caplog.clear()
        return messages

    return take


def test_what_is_not_known_or_contradicts_is_said_in_a_line(said: Callable[[], list[str]]) -> None:
    plain = byte_level(template(f"{BOS} $A"))
    bos = plain.bos_token_id

    def begun(tokenizer: PreTrainedTokenizerFast, add_bos: bool | None) -> list[int]:
        made = begin_as_in_training(tokenizer, "runs/x", add_bos=add_bos, otherwise="so it goes")
        return template_of(made)[0]

    assert begun(plain, None) == [bos]
    assert said() == [
        "warning: runs/x: does not say what documents began with in training; so it goes; its"
        f" tokenizer's template puts {BOS} before a text; set add_bos=true or add_bos=false to"
        " say it"
    ]
    assert begun(plain, False) == []
    assert begun(plain, True) == [bos]
    assert said() == []
    without, after = with_ends(plain, Ends(False, True)), with_ends(plain, Ends(True, False))
    assert begun(without, None) == begun(without, False) == []
    assert begun(after, None) == begun(after, True) == [bos]
    assert said() == []
    assert begun(without, True) == [bos]
    assert said() == [
        "warning: add_bos=true: runs/x was trained on documents that begin without bos and end"
        " with eos"
    ]
    assert begun(after, False) == []
    assert said() == [
        "warning: add_bos=false: runs/x was trained on documents that begin with bos and end"
        " without eos"
    ]
    note_ends(plain, Ends(False, True))  # as in a folder that somebody has edited
    assert begun(plain, None) == []
    assert said() == [
        f"warning: runs/x: the tokenizer's template puts {BOS} before a text and nothing after it,"
        " but documents in training begin without bos and end with eos: texts begin as they did"
    ]


def test_one_rank_says_it(said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    begin_as_in_training(byte_level(), "runs/x", add_bos=None, otherwise="")
    assert said() == []


def test_datasets_that_differ(said: Callable[[], list[str]]) -> None:
    without, after, none = Ends(False, True), Ends(True, True), None
    assert choose_ends({"a": without, "b": without}, {"m": without, "n": None}) == without
    assert said() == []
    assert choose_ends({"a": without, "b": after}, {}) == without
    assert said() == [
        "warning: b: its documents begin with bos and end with eos, those of a begin without bos"
        " and end with eos; texts of tasks and prompts will begin as in a"
    ]
    assert choose_ends({"a": none}, {"m": after}) is None
    (message,) = said()
    assert message.startswith(
        "warning: a: its manifest does not say what documents begin and end with; the tokenizer"
        " is saved as it is"
    )
    assert choose_ends({"a": without}, {"model.pretrained=m": after}) == without
    assert said() == [
        "warning: model.pretrained=m: was trained on documents that begin with bos and end with"
        " eos; those of a begin without bos and end with eos"
    ]


def test_what_texts_begin_with_for_people() -> None:
    plain = byte_level(template(f"{BOS} $A"))
    assert describe_start(plain) == f"texts begin with {BOS}, as the tokenizer's template has it"
    assert (
        describe_start(with_ends(plain, Ends(True, True)))
        == f"texts begin with {BOS}, as documents in training did"
    )
    assert (
        describe_start(with_ends(plain, Ends(False, True)))
        == "texts begin with nothing, as documents in training did"
    )
    assert describe_start(plain, True) == f"texts begin with {BOS}, as add_bos=true says"
    odd = with_ends(byte_level(bos="\x1b[2J"), Ends(True, True))
    assert describe_start(odd) == r"texts begin with '\x1b[2J', as documents in training did"


# Of datasets


def says(folder: Path, **config: Any) -> str:
    """The dataset with this in its manifest's settings."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_bytes())
    file.write_text(json.dumps({**manifest, "config": {**manifest["config"], **config}}))
    return str(folder)


def test_what_a_manifest_says_goes_into_the_tokenizer(
    dataset: Path,
    eval_dataset: Path,
    copy_of: Callable[[Path], Path],
    said: Callable[[], list[str]],
) -> None:
    """Of the only dataset, of every stream of a mixture, and of none: then it stays as it is."""
    tokenizer = byte_tokenizer()

    def begun(**streams: str) -> PreTrainedTokenizerFast:
        named = {
            name: StreamConfig(local=place) for name, place in streams.items() if name != "only"
        }
        config = DataConfig(local=streams.get("only"), streams=named)
        return begin_as_documents(tokenizer, open_train_data(config, tokenizer=tokenizer))

    old = str(copy_of(dataset))
    assert begun(only=old) is tokenizer
    (message,) = said()
    assert message.startswith("warning: train_data: its manifest does not say what documents begin")
    web = says(copy_of(dataset), add_bos=True, add_eos=False)
    assert ends_of(begun(only=web)) == Ends(True, False)
    assert begun(only=web)("fox").input_ids == [0, *tokenizer("fox").input_ids]
    same = says(copy_of(eval_dataset), add_bos=True, add_eos=False)
    assert ends_of(begun(web=web, code=same)) == Ends(True, False)
    assert said() == []
    other = says(copy_of(eval_dataset), add_bos=False, add_eos=True)
    assert ends_of(begun(web=web, code=other)) == Ends(True, False)
    assert said() == [
        "warning: train_data.streams.code: its documents begin without bos and end with eos, those "
        "of train_data.streams.web begin with bos and end without eos; texts of tasks and prompts "
        "will begin as in train_data.streams.web"
    ]
    for value in (None, 1, "true"):  # a manifest is not trusted
        assert begun(only=says(copy_of(dataset), add_bos=value, add_eos=True)) is tokenizer
        assert len(said()) == 1


def test_weights_that_were_trained_on_something_else(
    dataset: Path, copy_of: Callable[[Path], Path], said: Callable[[], list[str]], tmp_path: Path
) -> None:
    with_ends(byte_tokenizer(), Ends(True, True)).save_pretrained(tmp_path / "hf")
    place = says(copy_of(dataset), add_bos=False, add_eos=True)
    datasets = open_train_data(DataConfig(local=place), tokenizer=byte_tokenizer())
    made = begin_as_documents(byte_tokenizer(), datasets, pretrained=str(tmp_path / "hf"))
    assert ends_of(made) == Ends(False, True)
    expected = (
        f"warning: model.pretrained={tmp_path / 'hf'}: was trained on documents that begin with bos"
        " and end with eos; those of train_data begin without bos and end with eos"
    )
    assert said() == [expected]
    tokenizer = load_tokenizer(str(tmp_path / "hf"))  # and so it is where it comes as `tokenizer`
    open_train_data(DataConfig(local=place), tokenizer=tokenizer)
    assert said() == [
        f"warning: {place}: its documents begin without bos and end with eos; those that "
        f"{tmp_path / 'hf'} was trained on begin with bos and end with eos"
    ]
