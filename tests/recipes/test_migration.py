"""docs/migrating-from-flame.md: every key of ours in it exists, every key of theirs is in it,
and its commands are taken.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from composer.cli import launcher
from torch.distributed.run import get_args_parser

from flame_composer.config.convert import ConvertConfig, FromLlamaConfig
from flame_composer.config.fields import fields_of
from flame_composer.config.load import load
from flame_composer.config.rules import ScriptConfig
from flame_composer.config.train import TrainConfig
from flame_composer.errors import ConfigError
from tests.data_fixtures import llama_tokenizer, streaming_dataset, words, write_jsonl
from tests.runs import check, run_script

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/migrating-from-flame.md").read_text()
SCRIPTS: dict[str, type[ScriptConfig]] = {
    "convert/to_mds.py": ConvertConfig,
    "recipes/train.py": TrainConfig,
    "convert/from_llama.py": FromLlamaConfig,
}
# The legacy scripts' own lists.
PREPROCESS = (
    "dataset name split seed output tokenizer num_proc batch_size seq_len ctx_len return_offsets"
    " context_length model"
)
TRAIN = (
    "model tokenizer data name cache varlen seed context steps epochs save limit preprocessing"
    " workers prefetch logging config lr scheduler optim decay beta1 beta2 norm batch update warmup"
    " path checkpoint project type nodes node gpus rank ip port"
)


def tables() -> list[tuple[type[ScriptConfig], list[list[str]]]]:
    """Of each table, the configuration its second column is about, and its rows as cells."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE):
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
        ]
        script = rows[0][1].removeprefix("here: ")
        found.append((SCRIPTS[script], rows[2:]))
    return found


def keys_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_key_of_ours_exists() -> None:
    seen = 0
    for cls, rows in tables():
        known = {name for name, _, _, _ in fields_of(cls)}
        for _, ours, *_ in rows:
            assert set(keys_in(ours)) <= known, ours
            seen += len(keys_in(ours))
    assert seen > 70


def test_every_key_of_the_legacy_scripts_is_there() -> None:
    preprocess, train, _ = (
        {key.partition("=")[0] for row in rows for key in keys_in(row[0])} for _, rows in tables()
    )
    assert set(PREPROCESS.split()) == preprocess
    assert set(TRAIN.split()) <= train
    assert train - set(TRAIN.split()) == {"bf16"}


def their_keys() -> list[tuple[type[ScriptConfig], str, list[str]]]:
    """Each key of theirs that ours have not, with what the table says of it."""
    found = []
    for cls, rows in tables():
        known = {name for name, _, _, _ in fields_of(cls)}
        for theirs, ours, *_ in rows:
            first = keys_in(theirs)[0]
            for key in keys_in(theirs):
                section = first.rpartition(".")[0] if "." not in key else ""
                name = f"{section}.{key.partition('=')[0]}".lstrip(".")
                if name not in known and "flame." not in name:
                    found.append((cls, name, keys_in(ours)))
    return found


@pytest.mark.parametrize(
    ("cls", "theirs", "ours"),
    their_keys(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_their_keys_are_answered_with_ours(
    cls: type[ScriptConfig], theirs: str, ours: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(cls, [f"{theirs}=1"])
    message = str(caught.value)
    assert message.startswith(f"command line: {theirs.partition('.')[0]}")
    assert ": unknown key; " in message
    if ours:
        named = set(re.findall(r"[a-z_.]+", message.partition("unknown key")[2]))
        assert {*ours, *(key.rpartition(".")[0] for key in ours)} & named, message
    else:
        assert "did you mean" not in message
        assert "--help" not in message


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    names = {"NODE": "1", "ADDRESS": "10.0.0.1", "FILE.yaml": "yamls/gla_340m.yaml"}
    return [
        [
            names.get(word, word)
            for word in shlex.split(line.replace("NODE_RANK=NODE", "NODE_RANK=1"))
        ]
        for line in lines
    ]


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command)[:40])
def test_commands_are_taken(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    while "=" in command[0]:
        name, _, value = command.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    script = next(i for i, word in enumerate(command) if word in SCRIPTS)
    program, flags, (name, *arguments) = command[0], command[1:script], command[script:]
    if program == "composer":
        monkeypatch.setattr(sys, "argv", [program, *flags, name])
        asked = launcher._parse_args()
        assert asked.training_script == name
        if flags:
            assert (asked.nproc, asked.world_size, asked.base_rank, asked.master_addr) == (
                8,
                16,
                8,
                "10.0.0.1",
            )
    elif program == "torchrun":
        args = get_args_parser().parse_args([*flags, name])
        assert (args.nnodes, args.nproc_per_node, args.node_rank, args.master_addr) == (
            "2",
            "8",
            1,
            "10.0.0.1",
        )
    else:
        assert (program, flags) == ("python", [])
    load(SCRIPTS[name], arguments)


def test_documents_are_as_flame_makes_them(tmp_path: Path) -> None:
    """The command's own, on other text: end to end what `tokenizer(text)` gives, whose template
    puts a bos before.
    """
    texts = [words(5 + 13 * i % 40, i) for i in range(30)]
    tokenizer = llama_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = next(command for command in commands() if "convert/to_mds.py" in command)
    other = {
        "source": write_jsonl(tmp_path / "text.jsonl", texts),
        "tokenizer": tmp_path / "tokenizer",
        "context_length": 64,
        "out": tmp_path / "out",
        "val_out": tmp_path / "val",
        "num_workers": 1,
    }
    given = [
        word for word in command[2:] if word.partition("=")[0] not in {"name", "split", *other}
    ]
    check(
        run_script(
            "convert/to_mds.py",
            *given,
            *(f"{key}={value}" for key, value in other.items()),
            "val_fraction=0.0",
            "val_out=null",
        )
    )
    theirs = [token for text in texts for token in tokenizer(text)["input_ids"]]
    rows = [row["input_ids"].tolist() for row in streaming_dataset(tmp_path / "out")]
    assert [token for row in rows for token in row] == theirs[: len(theirs) // 64 * 64]
    assert theirs.count(tokenizer.bos_token_id) == len(texts)


def test_the_recipes_that_stand_for_flames_commands() -> None:
    """`lr=3e-4 steps=20480 batch=8 update=4 warmup=1024 context=2048`, and the continual one, on
    eight GPUs.
    """
    recipes = ("gla_340m", 3e-4, 20480, 8, 4, 1024), ("gla_7b_continual", 3e-5, 10240, 4, 8, 512)
    for file, lr, steps, batch, update, warmup in recipes:
        config = load(TrainConfig, [f"{ROOT}/yamls/{file}.yaml"])
        plan = config.plan(epoch_batches=10**9)
        assert (plan.total, plan.warmup, config.context_length, config.optimizer.lr) == (
            steps,
            warmup,
            2048,
            lr,
        )
        assert (config.microbatch_size, config.global_batch_size) == (batch, batch * update * 8)
