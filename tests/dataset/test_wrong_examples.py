"""What convert/to_sft.py answers to wrong inputs: one line that names the thing and the remedy."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flame_composer.config.cli import run
from flame_composer.config.convert import ConvertConfig
from flame_composer.dataset.manifest import read_manifest
from flame_composer.upstream import jinja
from tests.data_fixtures import TEXTS, byte_tokenizer, files_under, words, write_jsonl
from tests.dataset.test_convert import load_script
from tests.dataset.test_tuning import convert, example, read_lines, write_lines

ENDINGS = (
    ".jsonl, .json-lines, .ndjson, .json, .parquet (or compressed, .gz, .gzip, .zst, .zstd, .bz2,"
    " .xz)"
)
COLUMNS = "format=alpaca has the columns prompt, query, response, system, history"
REFUSED = "raise_exception('only tools are taken')"
TURN = "{% for m in messages %}"
NEXT = "{% endfor %}"
ANSWER = "{% if m.role == 'assistant' %}"
STOP = (
    "so that a model would never learn to stop; put the token that ends an answer inside"
    " {% generation %}, or take a tokenizer with eos"
)
NOTHING = "remove this folder, and check format, columns and template"


class Wrong(NamedTuple):
    """Arguments that are wrong, the exit status, and the line without `error: `.

    `prepare` writes what they need into a folder. `without` are arguments of DEFAULTS to leave out.
    """

    arguments: list[str]
    status: int
    message: str
    prepare: Callable[[Path], Any] = lambda folder: None
    without: tuple[str, ...] = ()


DEFAULTS = {
    "source": "a.jsonl",
    "format": "alpaca",
    "template": "alpaca",
    "tokenizer": "tokenizer",
    "out": "out",
    "context_length": "256",
    "num_workers": "1",
    "encoder": "hf",
}


def line(message: str, *arguments: str) -> Wrong:
    """Of a wrong value on the command line, which the message begins with."""
    return Wrong([*arguments], 2, f"command line: {message}")


def text(name: str, content: str | bytes) -> Callable[[Path], Any]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def template(content: str, problem: str) -> Wrong:
    """Of a template in a file."""
    return Wrong(
        ["template=own.jinja"], 2, f"template: own.jinja: {problem}", text("own.jinja", content)
    )


def damaged(name: str, content: str | bytes, problem: str, *arguments: str) -> Wrong:
    return Wrong([f"source={name}", *arguments], 1, f"{name}{problem}", text(name, content))


def examples(records: list[Any], problem: str, *arguments: str) -> Wrong:
    """Of examples none of which is taken."""
    return Wrong(
        ["source=b.jsonl", *arguments],
        1,
        problem,
        lambda folder: write_lines(folder / "b.jsonl", records),
    )


def entry(problem: str, **keys: Any) -> Wrong:
    """Of a dataset in a registry."""
    return registry(f"registry: r.json: mine: {problem}", {"mine": keys}, "datasets=[mine]")


def registry(message: str, content: Any, *arguments: str) -> Wrong:
    data = content if isinstance(content, str) else json.dumps(content)
    return Wrong(
        ["registry=r.json", *arguments], 2, message, text("r.json", data), ("source", "format")
    )


def linked(folder: Path) -> None:
    """A registry with a folder in which a link leads to a file elsewhere."""
    (folder / "r.json").write_text(json.dumps({"mine": {"file_name": "in"}}))
    (folder / "in").mkdir()
    (folder / "in/a.jsonl").symlink_to("/etc/hostname")


def saved(name: str, **tokens: str | None) -> Callable[[Path], Any]:
    """A tokenizer with other special tokens."""

    def prepare(folder: Path) -> None:
        tokenizer = copy.deepcopy(byte_tokenizer())
        for token, value in tokens.items():
            setattr(tokenizer, token, value)
        tokenizer.save_pretrained(folder / name)

    return prepare


def folder_of(name: str, **files: str) -> Callable[[Path], Any]:
    def prepare(folder: Path) -> None:
        (folder / name).mkdir()
        for file, content in files.items():
            (folder / name / file.replace("_", ".")).write_text(content)

    return prepare


def no_answers(answer: str) -> list[dict[str, str]]:
    return [{"instruction": words(3, i), "output": answer} for i in range(4)]


MINE = {"mine": {"file_name": "a.jsonl"}}
WRONG: dict[str, Wrong] = {
    # Keys
    "misspelt key": line("trian_on: unknown key; did you mean train_on?", "trian_on=last"),
    "cutoff_len": line("cutoff_len: unknown key; did you mean context_length?", "cutoff_len=9"),
    "neat_packing": line(
        "neat_packing: unknown key; examples are always packed, and never see one another",
        "neat_packing=true",
    ),
    "val_size": line("val_size: unknown key; did you mean val_fraction?", "val_size=0.1"),
    "max_samples": line(
        "max_samples: unknown key; every example is taken; give a smaller file", "max_samples=9"
    ),
    "mask_history": line("mask_history: unknown key; did you mean train_on?", "mask_history=true"),
    "preprocessing_num_workers": line(
        "preprocessing_num_workers: unknown key; did you mean num_workers?",
        "preprocessing_num_workers=2",
    ),
    "train_on": line(
        "train_on=first: must be one of ['all', 'last', 'prompt_too']", "train_on=first"
    ),
    "too_long": line("too_long=cut: must be one of ['fail', 'drop', 'cut_prompt']", "too_long=cut"),
    "no source": Wrong(
        [],
        2,
        "command line: source=[]: must name at least one file, folder or glob (or set registry and"
        " datasets)",
        without=("source",),
    ),
    "a source twice": line(
        "source=['a.jsonl', './a.jsonl']: must name nothing twice: a.jsonl",
        "source=[a.jsonl,./a.jsonl]",
    ),
    "no out": Wrong(
        [],
        2,
        "command line: out: must be set (Folder that the dataset is written to, local or a URL"
        " (s3://bucket/folder)); add it to the file or give out=...",
        without=("out",),
    ),
    "no format": Wrong(
        [],
        2,
        "command line: format: must say what form the examples have: alpaca, sharegpt, messages,"
        " prompt_completion",
        without=("format",),
    ),
    "unknown format": line(
        "format=alpacca: must be one of ['alpaca', 'sharegpt', 'messages', 'prompt_completion'],"
        " or null; did you mean alpaca?",
        "format=alpacca",
    ),
    "shards of less than a row": line(
        "shard_size=1000: must be at least 3328 (one row) and less than 4294967296 bytes",
        "shard_size=1000",
    ),
    "no bytes": line("max_document_bytes=0: must be more than 0 bytes", "max_document_bytes=0"),
    # Columns and tags
    "misspelt column": Wrong(
        ["columns={promt: x}"], 2, f"columns.promt: {COLUMNS}; did you mean prompt?"
    ),
    "a column of another format": Wrong(
        ["format=messages", "columns={response: x}"],
        2,
        "columns.response: format=messages has the columns messages, system",
    ),
    "no space after a colon": Wrong(
        ["columns={prompt:x}"],
        2,
        f"columns.prompt:x: {COLUMNS}; write a space after each colon, and put all between"
        " quotation marks",
    ),
    "a column that is a number": Wrong(
        ["columns={prompt: 3}"], 2, "columns.prompt=3: must be the name in the records, a text"
    ),
    "misspelt tag": Wrong(
        ["format=sharegpt", "tags={usr: x}"],
        2,
        "tags.usr: format=sharegpt has the tags role, content, user, assistant, system; did you"
        " mean user?",
    ),
    "tags of a format without": Wrong(
        ["tags={user: x}"], 2, "tags.user: format=alpaca has no tags"
    ),
    "a column that is not there": Wrong(
        ["columns={prompt: question, response: output}"],
        1,
        "a.jsonl:1: no column 'question'; its columns are: instruction, output, input (name them"
        " with columns=..., or leave such records out with on_error=skip)",
    ),
    "another format": Wrong(
        ["format=messages"],
        1,
        "a.jsonl:1: no column 'messages'; its columns are: instruction, output, input (name them"
        " with columns=..., or leave such records out with on_error=skip)",
    ),
    # Files
    "missing file": Wrong(
        ["source=nowhere.jsonl"], 2, "source: nowhere.jsonl: no such file or folder"
    ),
    "no match": Wrong(["source=*.json"], 2, "source: *.json: no file matches this pattern"),
    "a dataset's id without split": Wrong(
        ["source=some/set"],
        2,
        "source: some/set: no such file or folder; for a Hugging Face dataset give split=train as"
        " well",
    ),
    "folder without examples": Wrong(
        ["source=in"],
        2,
        f"source: in: this folder holds no file ending in {ENDINGS}; name the endings to take with"
        " suffixes=[.csv]",
        folder_of("in", a_csv="a,b\n"),
    ),
    "plain text": Wrong(
        ["source=a.txt"],
        2,
        "source: a.txt: is plain text, which holds no examples; give JSON lines, a JSON array"
        " (.json) or Parquet",
        text("a.txt", "some text\n"),
    ),
    "an object over several lines": Wrong(
        ["source=a.json"],
        2,
        "source: a.json: holds one JSON object over several lines, but must hold one per line;"
        " convert it with: jq -c . FILE > FILE.jsonl",
        text("a.json", '{\n "instruction": "a",\n "output": "b"\n}\n'),
    ),
    "empty file": damaged("e.jsonl", "", "", "source=e.jsonl")._replace(
        message=f"out: no examples for the train split (0 skipped); {NOTHING}"
    ),
    "malformed line": damaged(
        "b.jsonl",
        '{"instruction": "a", "output": "b"}\n{"instruction": \n',
        ":2: not valid JSON: Expecting value at column 17; mend or remove the line",
    ),
    "a line that is no object": damaged(
        "b.jsonl",
        '{"instruction": "a", "output": "b"}\n"text"\n',
        ":2: must be a JSON object, not a string; mend or remove the line",
    ),
    "malformed array": damaged(
        "b.json",
        '[{"instruction": "a", "output": "b"}, {"instruction": ]',
        ": not valid JSON: element 2: Expecting value: line 1 column 17 (char 16); mend the file",
    ),
    "an element that is no object": damaged(
        "b.json",
        '[{"instruction": "a", "output": "b"}, 3]',
        ": element 2: must be a JSON object, not a number; mend or remove it",
    ),
    "an element without a column": damaged(
        "b.json",
        '[{"instruction": "a", "output": "b"}, {"instruction": "c"}]',
        ": element 2: no column 'output'; its columns are: instruction (name them with"
        " columns=..., or leave such records out with on_error=skip)",
    ),
    "malformed Parquet": damaged(
        "b.parquet",
        b"PAR1\x15" + bytes(100),
        ": not a Parquet file: Parquet magic bytes not found in footer. Either the file is"
        " corrupted or this is not a parquet file; fetch the file again",
    ),
    "not UTF-8": damaged(
        "b.jsonl",
        b'{"instruction": "\xff", "output": "b"}\n',
        ":1: not valid UTF-8 at byte 17 of the line; mend or remove the line",
    ),
    "a long line": Wrong(
        ["max_document_bytes=10"],
        1,
        "a.jsonl:1: longer than max_document_bytes=10; mend or remove the line, or raise"
        " max_document_bytes",
    ),
    # Templates
    "missing template": Wrong(
        ["template=no.jinja"],
        2,
        "template: no.jinja: no such file; give chatml, alpaca, tokenizer or a .jinja file",
    ),
    "tokenizer without a template": Wrong(
        ["template=tokenizer"],
        2,
        "template: tokenizer has no chat template; set template=chatml, alpaca or a .jinja file",
    ),
    "no Jinja": template(
        f"{TURN}\n{{{{ m.content }}\n{NEXT}", "line 2: is no Jinja template: unexpected '}'"
    ),
    "template that is not UTF-8": Wrong(
        ["template=own.jinja"],
        2,
        "template: own.jinja: cannot be read: 'utf-8' codec can't decode byte 0xff in position 0:"
        " invalid start byte",
        text("own.jinja", b"\xff\xfe"),
    ),
    "template that raises": template(
        f"{{{{ {REFUSED} }}}}", "cannot render a question and its answer: only tools are taken"
    ),
    "template that fails": template(
        "{{ 1 / 0 }}", "cannot render a question and its answer: division by zero"
    ),
    "template that reaches for Python": template(
        "{{ ''.__class__.__mro__ }}",
        "cannot render a question and its answer: access to attribute '__class__' of 'str' object"
        " is unsafe",
    ),
    "template of much memory": template(
        "{{ 'x' * 10 ** 12 }}",
        "cannot render a question and its answer: a text takes more than 2,048 MiB of memory; have"
        " it write less",
    ),
    "template of a long text": template(
        "{{ 'x' * 10 ** 7 }}",
        "cannot render a question and its answer: it makes a text of 10,000,000 characters",
    ),
    "end outside of the marks": template(
        f"{TURN}{ANSWER}{{% generation %}}{{{{ m.content }}}}{{% endgeneration %}}{{{{ eos_token }}"
        f"}}{{% else %}}{{{{ m.content }}}}{{% endif %}}{NEXT}",
        "no special token ends the part of an answer that is trained on ('An answer of some"
        f" words'), {STOP}",
    ),
    "no end": template(
        f"{TURN}{{{{ m.role + ': ' + m.content + ';' }}}}{NEXT}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "no special token ends the part of an answer that is trained on ('An answer of some"
        f" words;'), {STOP}",
    ),
    "no answers": template(
        f"{TURN}{{% if m.role == 'user' %}}{{{{ m.content }}}}{{% endif %}}{NEXT}",
        "leaves out the answer of a conversation",
    ),
    "marks around nothing": template(
        f"{{% if false %}}{{% generation %}}{{% endgeneration %}}{{% endif %}}{TURN}"
        f"{{{{ m.content + eos_token }}}}{NEXT}",
        "its generation marks are around no answer",
    ),
    "answers that cannot be told": template(
        f"{TURN}{{% if loop.last %}}!{{% endif %}}{{{{ m.content + eos_token }}}}{NEXT}",
        "with add_generation_prompt, a question does not begin as the same question with its"
        " answer, so that answers cannot be told from prompts; mark them with {% generation %}",
    ),
    "token of a template": Wrong(
        ["template=chatml"],
        2,
        "template: chatml: its token <|im_start|> is not in the tokenizer tokenizer; take another"
        " template, or a tokenizer that has it",
    ),
    "default_system of another template": line(
        "default_system=x: only goes with template=chatml or alpaca; another template says it"
        " itself",
        "template=tokenizer",
        "default_system=x",
    ),
    "add_bos with another template": line(
        "add_bos=true: only goes with template=chatml or alpaca; another template says it itself",
        "template=own.jinja",
        "add_bos=true",
    ),
    # Tokenizers
    "missing tokenizer": Wrong(
        ["tokenizer=./no"],
        2,
        "tokenizer: ./no: no such folder; give a Hugging Face tokenizer folder or hub id",
    ),
    "folder without a tokenizer": Wrong(
        ["tokenizer=in"],
        2,
        "tokenizer: in: holds no tokenizer (tokenizer.json); give the folder or id of one",
        folder_of("in", a_csv="a,b\n"),
    ),
    "tokenizer without eos": Wrong(
        ["tokenizer=other"],
        2,
        "template: alpaca: ends answers with the eos token, which the tokenizer other lacks; take"
        " another template, or a tokenizer that has one",
        saved("other", eos_token=None, bos_token=None, pad_token=None),
    ),
    "tokenizer without bos": Wrong(
        ["tokenizer=other", "add_bos=true"],
        2,
        "add_bos: the tokenizer has no bos token; set add_bos=false or give it one",
        saved("other", bos_token=None),
    ),
    # Examples
    "too long": Wrong(
        ["context_length=64"],
        1,
        "a.jsonl: the example at position 0 has {number} tokens, more than context_length=64; set"
        " too_long=drop or cut_prompt, or give longer rows, and remove the unfinished out first",
    ),
    "all too long": examples(
        no_answers(words(200, 1)),
        "out: no examples for the train split (0 skipped, 4 left out: it is longer than a row;"
        f" the first: 1,122 tokens); {NOTHING}, or give longer rows",
        "too_long=drop",
    ),
    "all too long without their prompts": examples(
        no_answers(words(200, 1)),
        "out: no examples for the train split (0 skipped, 4 left out: it is longer than a row;"
        f" the first: 1,122 tokens, even with its prompts cut); {NOTHING}, or give longer rows",
        "too_long=cut_prompt",
    ),
    "all left out": examples(
        [*no_answers(""), {"instruction": "", "output": "b"}, {"instruction": "a", "output": None}],
        "out: no examples for the train split (0 skipped, 4 left out: an answer is empty, 1 left"
        f" out: a prompt is empty, 1 left out: a message is not text; the first: an"
        f" answer is null, not a string); {NOTHING}",
    ),
    "all of another role": Wrong(
        ["source=b.jsonl", "format=messages"],
        1,
        "out: no examples for the train split (0 skipped, 1 left out: its roles are out of turn;"
        f" the first: a message has the role 'human', not user, assistant, system); {NOTHING}",
        lambda folder: write_lines(
            folder / "b.jsonl", [{"messages": [{"role": "human", "content": "a"}]}]
        ),
    ),
    "all damaged": damaged("b.jsonl", "{\n[1]\n", "", "on_error=skip")._replace(
        message=f"out: no examples for the train split (2 skipped); {NOTHING}"
    ),
    # Validation
    "val_out alone": line(
        "val_out=val: must be set together with val_fraction, val_source or val_datasets",
        "val_out=val",
    ),
    "val_fraction alone": line(
        "val_out: must be set together with val_fraction, val_source or val_datasets",
        "val_fraction=0.1",
    ),
    "val_source alone": line(
        "val_out: must be set together with val_fraction, val_source or val_datasets",
        "val_source=b.jsonl",
    ),
    "all held out": line("val_fraction=1: must be in [0, 1)", "val_fraction=1", "val_out=val"),
    "two ways to hold out": line(
        "val_fraction=0.1: must be 0 with val_source or val_datasets",
        "val_fraction=0.1",
        "val_source=b.jsonl",
        "val_out=val",
    ),
    "the same file": line(
        "val_source=['./a.jsonl']: must not name what is trained on: a.jsonl",
        "val_source=./a.jsonl",
        "val_out=val",
    ),
    "missing val_source": Wrong(
        ["val_source=no.jsonl", "val_out=val"], 2, "val_source: no.jsonl: no such file or folder"
    ),
    "plain text held out": Wrong(
        ["val_source=a.txt", "val_out=val"],
        2,
        "val_source: a.txt: is plain text, which holds no examples; give JSON lines, a JSON array"
        " (.json) or Parquet",
        text("a.txt", "some text\n"),
    ),
    "val_out inside out": line(
        "val_out=out/val: must be a folder beside out=out, neither the same nor inside the other",
        "val_fraction=0.1",
        "val_out=out/val",
    ),
    "val_datasets without a registry": line(
        "val_datasets=['x']: must be set together with registry", "val_datasets=[x]", "val_out=val"
    ),
    # Workers
    "workers and a cluster": line(
        "num_workers=2: must not be set together with cluster",
        "num_workers=2",
        "cluster=tcp://127.0.0.1:1",
    ),
    "relative path and a cluster": line(
        "source=['a.jsonl']: must be absolute where there is a cluster, whose workers have working"
        " folders of their own",
        "num_workers=null",
        "cluster=tcp://127.0.0.1:1",
    ),
    # Hugging Face datasets
    "no split": line("split: must be set together with name, e.g. split=train", "name=de"),
    "suffixes of a dataset": line(
        "suffixes=['.json']: must not be set together with split", "split=train", "suffixes=[.json]"
    ),
    "missing dataset": Wrong(
        ["source=./no", "split=train"],
        2,
        "source: ./no: no such folder; with split=... it must be one, or a Hugging Face dataset id",
    ),
    # Registries
    "source and registry": line(
        "source=['a.jsonl']: must not be set together with registry, which names the files",
        "registry=r.json",
        "datasets=[mine]",
    ),
    "format and registry": Wrong(
        ["registry=r.json", "datasets=[mine]"],
        2,
        "command line: format=alpaca: must not be set together with registry, which says it",
        without=("source",),
    ),
    "datasets without a registry": line(
        "datasets=['mine']: must be set together with registry", "datasets=[mine]"
    ),
    "registry without datasets": registry(
        "command line: datasets=[]: must name at least one dataset of the registry", MINE
    ),
    "the same dataset": registry(
        "command line: val_datasets=['mine']: must not name what is trained on: mine",
        MINE,
        "datasets=[mine]",
        "val_datasets=[mine]",
        "val_out=val",
    ),
    "a dataset twice": registry(
        "command line: datasets=['mine', 'mine']: must name nothing twice: mine",
        MINE,
        "datasets=[mine,mine]",
    ),
    "missing registry": Wrong(
        ["registry=no.json", "datasets=[mine]"],
        2,
        "registry: no.json: no such file; give LLaMA-Factory's dataset_info.json, or its folder",
        without=("source", "format"),
    ),
    "registry that is no JSON": registry(
        "registry: r.json: cannot be read: Expecting property name enclosed in double quotes: line"
        " 1 column 2 (char 1)",
        "{",
        "datasets=[mine]",
    ),
    "registry that is a list": registry(
        "registry: r.json: must hold a JSON object with an entry per dataset",
        "[]",
        "datasets=[mine]",
    ),
    "dataset that is not listed": registry(
        "datasets: r.json lists no mien; did you mean mine?", MINE, "datasets=[mien]"
    ),
    "dataset that is like no other": registry(
        "datasets: r.json lists no x; there are mine", MINE, "datasets=[x]"
    ),
    "entry that is a text": registry(
        "registry: r.json: mine: must be a JSON object", {"mine": "a.jsonl"}, "datasets=[mine]"
    ),
    "misspelt key of an entry": entry(
        "file_nam: unknown key; did you mean file_name?", file_nam="a.jsonl"
    ),
    "misspelt column of an entry": entry(
        f"columns.promt: {COLUMNS}; did you mean prompt?",
        file_name="a.jsonl",
        columns={"promt": "instruction"},
    ),
    "columns that are a list": entry(
        "columns: must be a JSON object", file_name="a.jsonl", columns=["instruction"]
    ),
    "misspelt tag of an entry": entry(
        "tags.user_tg: unknown key; did you mean user_tag?",
        file_name="a.jsonl",
        formatting="sharegpt",
        tags={"user_tg": "human"},
    ),
    "a name with NUL": entry(
        "file_name=a\N{SYMBOL FOR NULL}b: is no name of a file: embedded null byte",
        file_name="a\0b",
    ),
    "half of a surrogate pair as a name": entry(
        "file_name=<U+D800>: is no name of a file: 'utf-8' codec can't encode character '\\ud800'"
        " in position {number}: surrogates not allowed",
        file_name="\ud800",
    ),
    "a link out of the registry's folder": entry("", file_name="in")._replace(
        message="registry: mine: in/a.jsonl: must lie inside the registry's folder; give what lies"
        " elsewhere as source",
        prepare=linked,
    ),
    "a tag that is a number": entry(
        "tags.user_tag=3: must be a string",
        file_name="a.jsonl",
        formatting="sharegpt",
        tags={"user_tag": 3},
    ),
    "preferences": entry(
        "ranking=true: preference data is not offered", file_name="a.jsonl", ranking=True
    ),
    "a chosen answer": entry(
        "columns.chosen=chosen: preference data is not offered",
        file_name="a.jsonl",
        columns={"prompt": "instruction", "chosen": "chosen"},
    ),
    "images": entry(
        "columns.images=images: only text is trained on",
        file_name="a.jsonl",
        columns={"images": "images"},
    ),
    "tools": entry(
        "columns.tools=tools: tool calls are not offered",
        file_name="a.jsonl",
        columns={"tools": "tools"},
    ),
    "the tag of a tool": entry(
        "tags.observation_tag=observation: tool calls are not offered",
        file_name="a.jsonl",
        formatting="sharegpt",
        tags={"observation_tag": "observation"},
    ),
    "a script": entry(
        "script_url=make.py: a script that comes with data is never run", script_url="make.py"
    ),
    "num_samples": entry(
        "num_samples=3: it is not offered: every example is taken",
        file_name="a.jsonl",
        num_samples=3,
    ),
    "another hub": entry(
        "ms_hub_url=a/b: only files and datasets of the Hugging Face hub are read", ms_hub_url="a/b"
    ),
    "a file elsewhere": entry(
        "file_name=../a.jsonl: must lie inside the registry's folder; give what lies elsewhere as"
        " source",
        file_name="../a.jsonl",
    ),
    "a path in place of a URL": entry(
        "cloud_file_name=/etc/passwd: must be a URL like s3://bucket/file; files beside the"
        " registry are file_name",
        cloud_file_name="/etc/passwd",
    ),
    "a path in place of an id": entry(
        "hf_hub_url=/etc: must be the id of a Hugging Face dataset", hf_hub_url="/etc"
    ),
    "a file that is not there": registry(
        "registry: mine: b.jsonl: no such file or folder",
        {"mine": {"file_name": "b.jsonl"}},
        "datasets=[mine]",
    ),
    "no file": entry("file_name: must be set, or hf_hub_url", formatting="alpaca"),
    "unknown formatting": entry(
        "formatting=alpacca: must be alpaca or sharegpt or openai",
        file_name="a.jsonl",
        formatting="alpacca",
    ),
    "formatting that is a list": entry(
        'formatting=["alpaca"]: must be alpaca or sharegpt or openai',
        file_name="a.jsonl",
        formatting=["alpaca"],
    ),
    "split of a file": entry(
        "split: goes with hf_hub_url; files have no split", file_name="a.jsonl", split="test"
    ),
    # Where to
    "out that is not empty": Wrong(
        ["out=in"],
        2,
        "out: in: this folder is not empty and holds no conversion; name a new one or empty it",
        folder_of("in", a_csv="a,b\n"),
    ),
    "out that is a file": Wrong(["out=a.jsonl"], 2, "out: a.jsonl: is a file; name a folder"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a tokenizer and examples."""
    monkeypatch.chdir(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    write_lines(tmp_path / "a.jsonl", [example(i) for i in range(8)])
    return tmp_path


def arguments_of(wrong: Wrong) -> list[str]:
    given = {key: value for key, value in DEFAULTS.items() if key not in wrong.without}
    return [f"{key}={value}" for key, value in given.items()] + wrong.arguments


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_input_is_one_line(folder: Path, monkeypatch, capsys, name: str) -> None:
    """And nothing is published, nor is a file changed that was there."""
    wrong = WRONG[name]
    wrong.prepare(folder)
    before = files_under(folder)
    assert convert(monkeypatch, *arguments_of(wrong)) == wrong.status
    out, err = capsys.readouterr()
    pattern = re.escape(f"error: {wrong.message}\n").replace(r"\{number\}", r"[\d,]+")
    assert re.fullmatch(pattern, err), err
    assert out == ""
    after = files_under(folder)
    assert before.items() <= after.items()
    made = {file.partition("/")[0] for file in after.keys() - before.keys()}
    assert made <= ({"out"} if wrong.status == 1 else set()), "a wrong key leaves nothing behind"
    assert "out/index.json" not in after


def test_what_out_holds_already(folder: Path, monkeypatch, capsys) -> None:
    """A dataset of text, another conversion of examples, finished or not."""
    write_jsonl(folder / "text.jsonl", TEXTS)
    monkeypatch.setattr(
        "sys.argv",
        ["to_mds.py", "source=text.jsonl", "out=text", "tokenizer=tokenizer", "context_length=64"],
    )
    assert run(load_script("to_mds").main, ConvertConfig) == 0
    assert convert(monkeypatch, *arguments_of(Wrong([], 0, ""))) == 0
    write_lines(folder / "b.jsonl", [example(i) for i in range(20, 28)])
    capsys.readouterr()
    before = files_under(folder)
    for arguments, message in (
        (["out=text"], "text: holds a conversion of another kind (text there, sft now)"),
        (
            ["train_on=last"],
            'out: holds a conversion with other settings: train_on ("all" there, "last" now)',
        ),
        (
            ["source=b.jsonl", "columns={prompt: instruction, response: instruction}"],
            "out: holds a conversion with other settings: datasets (",
        ),
    ):
        assert convert(monkeypatch, *arguments_of(Wrong(arguments, 0, ""))) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"error: out: {message}")
        assert err.endswith("; name another out, or remove this folder\n")
        assert err.count("\n") == 1
        assert out == ""
        assert files_under(folder) == before


def test_a_template_that_does_not_end(folder: Path, monkeypatch, capsys) -> None:
    """A range of 90,000 is allowed, and another one within it."""
    monkeypatch.setattr(jinja, "TEMPLATE_SECONDS", 0.3)
    loops = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    (folder / "own.jinja").write_text(loops)
    assert convert(monkeypatch, *arguments_of(Wrong(["template=own.jinja"], 0, ""))) == 2
    problem = "a text takes more than 0.3 seconds; have it loop over less"
    assert capsys.readouterr().err == (
        f"error: template: own.jinja: cannot render a question and its answer: {problem}\n"
    )
    assert not (folder / "out").exists()


def test_a_template_that_refuses_some_examples(folder: Path, monkeypatch) -> None:
    """They are left out with its reason, and the others are taken."""
    (folder / "own.jinja").write_text(
        f"{TURN}{{% if 'number 3' in m.content %}}{{{{ raise_exception('no threes') }}}}"
        f"{{% endif %}}{{{{ m.content + eos_token }}}}{NEXT}"
    )
    records = [{"instruction": f"number {i}", "output": "yes"} for i in range(5)]
    write_lines(folder / "b.jsonl", records)
    wrong = Wrong(["source=b.jsonl", "template=own.jinja"], 0, "")
    assert convert(monkeypatch, *arguments_of(wrong)) == 0
    (left_out,) = read_lines(folder / "out/left_out.jsonl")
    assert (left_out["reason"], left_out["detail"]) == ("template", "no threes")
    assert left_out["begins"] == json.dumps(records[3])
    assert read_manifest("out").totals.documents == 4


def test_there_are_enough_of_them() -> None:
    assert len(WRONG) > 100
    assert len({(*each.arguments, each.message) for each in WRONG.values()}) == len(WRONG)
