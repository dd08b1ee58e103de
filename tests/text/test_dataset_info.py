"""LLaMA-Factory's registry of datasets: what is offered is read as it reads it, and the rest is
refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flame_composer.errors import ConfigError
from flame_composer.text.dataset_info import Listed, read_registry
from flame_composer.text.examples import LeftOut, conversation_of

TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "u", "assistant_tag": "a"}


def read(place: Path, **entry: Any) -> Listed:
    """The one dataset of a registry, beside which there are a few files."""
    for name in ("a.json", "b.jsonl", "more/c.jsonl"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).touch()
    (place / "dataset_info.json").write_text(json.dumps({"mine": entry, "broken": 3}))
    (found,) = read_registry(str(place), ["mine"])
    return found


def shown(found: Listed, record: dict[str, Any]) -> list[tuple[str, str]] | str:
    """The messages in a record of the dataset, or why it is left out."""
    try:
        return [(role, content) for role, content, _ in conversation_of(record, found.form)]
    except LeftOut as problem:
        return problem.reason


def said(*turns: tuple[str, str], role: str = "from", content: str = "value") -> list[Any]:
    return [{role: one, content: other} for one, other in turns]


@pytest.mark.parametrize(
    ("entry", "source", "is_hub"),
    [
        ({"file_name": "a.json"}, "{folder}/a.json", False),
        ({"file_name": "./more/../b.jsonl"}, "{folder}/b.jsonl", False),
        ({"file_name": "more"}, "{folder}/more", False),
        ({"file_name": "a.json", "split": "train"}, "{folder}/a.json", False),
        ({"file_name": "a.json", "subset": None, "ranking": False}, "{folder}/a.json", False),
        ({"cloud_file_name": "s3://bucket/a.jsonl"}, "s3://bucket/a.jsonl", False),
        # The first that is there wins, as in LLaMA-Factory
        (
            {"cloud_file_name": "gs://bucket/a", "file_name": "a.json"},
            "gs://bucket/a",
            False,
        ),
        ({"hf_hub_url": "some/set"}, "dataset:some/set?split=train", True),
        (
            {"hf_hub_url": "some/set", "ms_hub_url": "other/set", "script_url": "never.py"},
            "dataset:some/set?split=train",
            True,
        ),
        (
            {"hf_hub_url": "some/set", "subset": "de", "split": "test", "file_name": "a.json"},
            "dataset:some/set?name=de&split=test",
            True,
        ),
    ],
)
def test_where_a_dataset_is(
    tmp_path: Path, entry: dict[str, Any], source: str, is_hub: bool
) -> None:
    found = read(tmp_path, **entry)
    assert (found.name, found.is_hub) == ("mine", is_hub)
    assert found.source == source.format(folder=tmp_path)


def test_the_registry_may_be_given_itself(tmp_path: Path) -> None:
    found = read(tmp_path, file_name="a.json")
    (tmp_path / "dataset_info.json").rename(tmp_path / "own.json")
    assert read_registry(str(tmp_path / "own.json"), ["mine"]) == [found]
    assert read_registry(str(tmp_path / "own.json"), []) == []


def test_alpaca(tmp_path: Path) -> None:
    """With LLaMA-Factory's columns, of which those that are not named are not read."""
    record = {
        "instruction": "say",
        "input": "it",
        "output": "it",
        "system": "Be brief.",
        "history": [["one", "two"]],
    }
    answer = ("assistant", "it")
    plain = [("user", "say\nit"), answer]
    assert shown(read(tmp_path, file_name="a.json"), record) == plain
    assert shown(read(tmp_path, file_name="a.json", formatting="alpaca", columns={}), record) == (
        plain
    )
    named = {"prompt": "instruction", "response": "output"}
    assert shown(read(tmp_path, file_name="a.json", columns=named), record) == [
        ("user", "say"),
        answer,
    ]
    more = named | {"query": "input", "system": "system", "history": "history"}
    assert shown(read(tmp_path, file_name="a.json", columns=more), record) == [
        ("system", "Be brief."),
        ("user", "one"),
        ("assistant", "two"),
        *plain,
    ]
    own = {"prompt": "content", "response": "summary", "query": None}
    advertise = {"content": "a coat", "summary": "Warm.", "input": "never"}
    assert shown(read(tmp_path, file_name="a.json", columns=own), advertise) == [
        ("user", "a coat"),
        ("assistant", "Warm."),
    ]


def test_sharegpt(tmp_path: Path) -> None:
    turns = [("human", "one"), ("gpt", "two")]
    messages = [("user", "one"), ("assistant", "two")]
    found = read(tmp_path, file_name="a.json", formatting="sharegpt")
    assert shown(found, {"conversations": said(*turns), "system": "no"}) == messages
    assert shown(found, {"conversations": said(("system", "yes"), *turns)}) == [
        ("system", "yes"),
        *messages,
    ]
    assert shown(found, {"conversations": said(*turns, ("observation", "three"))}) == "roles"
    columns = {"messages": "turns", "system": "first"}
    found = read(tmp_path, file_name="a.json", formatting="sharegpt", columns=columns)
    assert shown(found, {"turns": said(*turns), "first": "yes"}) == [("system", "yes"), *messages]


@pytest.mark.parametrize("formatting", ["sharegpt", "openai"])
def test_tags(tmp_path: Path, formatting: str) -> None:
    found = read(
        tmp_path,
        file_name="a.json",
        formatting=formatting,
        columns={"messages": "messages"},
        tags=TAGS | {"system_tag": "s"},
    )
    turns = said(("s", "yes"), ("u", "one"), ("a", "two"), role="role", content="content")
    assert shown(found, {"messages": turns}) == [
        ("system", "yes"),
        ("user", "one"),
        ("assistant", "two"),
    ]
    assert shown(found, {"messages": said(("human", "one"), ("gpt", "two"))}) == "roles"


def test_openai(tmp_path: Path) -> None:
    """Without tags, LLaMA-Factory takes those of sharegpt; with some, the others are ours."""
    found = read(tmp_path, file_name="a.json", formatting="openai")
    messages = [("user", "one"), ("assistant", "two")]
    assert shown(found, {"conversations": said(("human", "one"), ("gpt", "two"))}) == messages
    found = read(
        tmp_path,
        file_name="a.json",
        formatting="openai",
        columns={"messages": "messages"},
        tags={"role_tag": "role"},
    )
    assert shown(found, {"messages": said(*messages, role="role", content="content")}) == messages


def test_a_link_to_what_lies_outside_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "data"
    inside.mkdir()
    (tmp_path / "own.jsonl").touch()
    (inside / "link.jsonl").symlink_to(tmp_path / "own.jsonl")
    with pytest.raises(ConfigError, match="must lie inside the registry's folder"):
        read(inside, file_name="link.jsonl")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("ms_hub_url", "a/b", "only files and datasets of the Hugging Face hub are read"),
        ("om_hub_url", "a/b", "only files and datasets of the Hugging Face hub are read"),
        ("script_url", "folder", "a script that comes with data is never run"),
        ("ranking", True, "preference data is not offered"),
        ("folder", "data", "it is not offered; name the files with file_name"),
        ("num_samples", 9, "it is not offered: every example is taken"),
        *(("columns", {name: "x"}, "only text is trained on") for name in ("images", "videos")),
        ("columns", {"audios": "x"}, "only text is trained on"),
        ("columns", {"tools": "x"}, "tool calls are not offered"),
        *(
            ("columns", {name: "x"}, "preference data is not offered")
            for name in ("chosen", "rejected", "kto_tag")
        ),
        *(
            ("tags", {name: "x"}, "tool calls are not offered")
            for name in ("observation_tag", "function_tag")
        ),
        ("file_nmae", "a.json", "unknown key; did you mean file_name?"),
        ("tags", {"rol_tag": "x"}, "unknown key; did you mean role_tag?"),
        ("tags", {"role": "x"}, "unknown key; did you mean role_tag?"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(
    tmp_path: Path, key: str, value: Any, reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, **{"file_name": "a.json", key: value})
    message = str(caught.value)
    assert message.startswith(f"registry: {tmp_path}/dataset_info.json: mine: {key}")
    assert message.endswith(f": {reason}")
    if isinstance(value, dict):
        assert f"{key}.{next(iter(value))}" in message
    # What is null or false asks for nothing.
    if reason.startswith("unknown"):
        return
    none = dict.fromkeys(value) if isinstance(value, dict) else None
    assert read(tmp_path, **{"file_name": "a.json", key: none}).source.endswith("a.json")
