"""Models that leave: the card is the run's, an export is the same from one rank or two, and the
hub is asked as it must be.
"""

from __future__ import annotations

import base64
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import GenerationConfig

from flame_composer.checkpoint.find import find_checkpoint
from flame_composer.checkpoint.read import Checkpoint, read_checkpoint
from flame_composer.checkpoint.to_model import model_in
from flame_composer.config.convert import ToHfConfig
from flame_composer.config.load import load
from flame_composer.errors import ConfigError, DataError, StoreError
from flame_composer.export.card import check_hub, model_card, push_folder, read_run_config
from flame_composer.model.build import load_pretrained
from tests.runs import ROOT, Corpus, check, run_script, two_ranks
from tests.stack import interprets, reset_sessions


@pytest.fixture
def exported(undisturbed: Path, tmp_path: Path) -> Path:
    out = tmp_path / "hf"
    check(run_script("convert/to_hf.py", f"checkpoint={undisturbed / 'checkpoints'}", f"out={out}"))
    return out


def test_the_card_says_what_the_run_was(corpus: Corpus, undisturbed: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    header, body = yaml.safe_load(card.split("---\n")[1]), card.split("---\n", 2)[2]
    assert header["model_name"] == "undisturbed"
    assert header["tags"] == ["flame-composer", "gla"]
    parameters = sum(
        tensor.numel() for tensor in load_file(exported / "model.safetensors").values()
    )
    assert (
        f"# undisturbed\n\nA gla language model of {parameters:,} parameters, stored as float32,"
        " pretrained" in body
    )
    assert "- steps: 40\n- tokens: 10,240 (160 rows)\n" in body
    manifest = json.loads((corpus.train / "manifest.json").read_text())
    totals = manifest["totals"]
    assert (
        f"- data: {corpus.train}, sha256 of its index {manifest['index_sha256']}"
        f" ({totals['documents']:,} documents, {totals['tokens_out']:,} tokens in rows of 64)\n"
        in body
    )
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert (
        f"- eval_loss: {summary['eval_loss']:.4f}\n- eval_perplexity:"
        f" {summary['eval_perplexity']:.4f}\n" in body
    )
    recipe = body.split("```yaml\n")[1].split("\n```")[0]
    assert yaml.safe_load(recipe) == yaml.safe_load((undisturbed / "config.yaml").read_text())
    assert GenerationConfig.from_pretrained(exported).pad_token_id == 0


PLAIN = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
# In place of a GPU's.
from flame_composer.cpu.enable import install_stub_driver; install_stub_driver()
import fla, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("kat loman: ra miro puvel " * 20, return_tensors="pt").input_ids
with torch.no_grad():
    torch.save((ids, model(ids).logits), sys.argv[2])
assert fla.layers.gla.chunk_gla.__module__.startswith("fla.")
assert "flame_composer.model.causal_lm" not in sys.modules
"""


@pytest.mark.faults
@pytest.mark.skipif(
    "FLAME_COMPOSER_FAULTS" not in os.environ, reason="interprets kernels: make test-faults"
)
@interprets
def test_an_export_is_a_model_of_fla_and_transformers(exported: Path, tmp_path: Path) -> None:
    """A process without this package's model: fla's own kernels, interpreted. No code comes with
    the folder.
    """
    command = [sys.executable, "-c", PLAIN, str(exported), str(tmp_path / "logits.pt")]
    check(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500))
    assert not list(exported.glob("*.py"))
    assert "auto_map" not in json.loads((exported / "config.json").read_text())
    ids, logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert ids.shape[1] > 64, "so that it is the chunked kernel"
    with torch.no_grad():
        torch.testing.assert_close(
            load_pretrained(str(exported)).eval()(ids).logits, logits, rtol=1e-4, atol=1e-5
        )


def test_a_card_of_a_checkpoint_alone(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing lies beside it, and its dataset is gone: what is in it is said, and no more."""
    monkeypatch.chdir(trained.checkpoints)  # a file named without a folder
    checkpoint = Checkpoint("ba1.pt", trained.checkpoints / "ba1.pt")
    assert read_run_config(checkpoint) is None
    content = read_checkpoint(checkpoint)
    model, _ = model_in(content, checkpoint)
    card = model_card(model, content, None, dtype="bfloat16", name="tiny")
    assert "# tiny\n" in card
    assert "- steps: 1\n- tokens: 128 (4 rows)\n" in card
    assert (
        f"- data: see below, sha256 of its index {trained.order['train_data (index.json)']}\n"
        in card
    )
    assert "No config.yaml lay beside the checkpoint." in card
    assert "None" not in card
    assert "- weights" not in card

    content["state"]["algorithms"] = [("EMA", {"average": {"model.norm": 1}})]
    for which, line in (
        ("auto", "their exponential moving average, which is what was evaluated"),
        ("ema", "their exponential moving average, which is what was evaluated"),
        (
            "model",
            (
                "those that training went on with; what was evaluated is their exponential moving"
                " average"
            ),
        ),
    ):
        card = model_card(model, content, None, dtype="bfloat16", name="tiny", which=which)
        assert f"(4 rows)\n- weights: {line}\n- data" in card


WRONG_CONFIGS = {
    "a list": (b"- 1\n- 2\n", "the file must hold keys and values"),
    "a number": (b"3", "the file must hold keys and values"),
    "no YAML": (b"a: [1\nb: }", "while parsing"),
    "two documents": (b"a: 1\n---\nb: 2\n", "expected a single document"),
    "not UTF-8": (b"run_name: \xff\xfe", "'utf-8' codec can't decode"),
    "a tag": (b"a: !!python/object/apply:os.mkdir [x]", "could not determine a constructor"),
    "a number for a section": (b"model: 3\ntrain_data: 4\n", "model must hold keys and values"),
    "numbers for streams": (
        b"train_data: {streams: 4}\n",
        "train_data.streams must hold keys and values",
    ),
    "a number for a stream": (
        b"train_data: {streams: {web: 4}}\n",
        "train_data.streams.web must hold keys and values",
    ),
    "deep": (b"[" * 20000, "lists and mappings in one another, more than 100 deep"),
    "very deep": (
        b"[" * 400_000 + b"]" * 400_000,
        "lists and mappings in one another, more than 100 deep",
    ),
    "aliases": (
        (
            "a0: &a0 [x, x]\n"
            + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
            + "run_name: *a39\n"
        ).encode(),
        "expan",
    ),
    "large": (b"a: " + b"x" * 2_000_000, "has 2,000,003 bytes"),
}


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_a_file_beside_the_checkpoint_that_is_no_configuration_is_named(
    trained: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    text, reason = WRONG_CONFIGS[name]
    (tmp_path / "config.yaml").write_bytes(text)
    checkpoint = Checkpoint(str(tmp_path / "ba1.pt"), trained.checkpoints / "ba1.pt")
    assert read_run_config(checkpoint) is None
    (message,) = caplog.messages
    start = (
        f"warning: {tmp_path / 'config.yaml'}: is no configuration of a run, and left out of the"
        " model card: "
    )
    assert message.startswith(start)
    assert reason in message
    assert "\n" not in message


def test_a_folder_or_fifo_beside_the_checkpoint_is_no_configuration(
    trained: Any, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(str(tmp_path / "ba1.pt"), trained.checkpoints / "ba1.pt")
    os.mkfifo(tmp_path / "config.yaml")
    assert read_run_config(checkpoint) is None
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "config.yaml").mkdir()
    assert read_run_config(checkpoint) is None


def test_the_export_goes_on_beside_such_a_file(trained: Any, tmp_path: Path) -> None:
    checkpoints = Path(shutil.copytree(trained.checkpoints, tmp_path / "checkpoints"))
    (checkpoints / "config.yaml").write_bytes(b"\xff- 1")
    process = check(
        run_script("convert/to_hf.py", f"checkpoint={checkpoints}", f"out={tmp_path / 'hf'}")
    )
    assert "is no configuration of a run, and left out of the model card" in process.stderr
    assert "No config.yaml lay beside the checkpoint." in (tmp_path / "hf/README.md").read_text()


def test_no_name_becomes_a_line_of_the_card(trained: Any) -> None:
    checkpoint = Checkpoint("ba1.pt", trained.checkpoints / "ba1.pt")
    content = read_checkpoint(checkpoint)
    model, _ = model_in(content, checkpoint)
    bad = "x\nlicense: mit\n---\n# Other\u2028\x1b[31m"
    content["state"]["callbacks"]["TaskScores"] = {
        "last": {bad: {bad: 1.0, "text": "no number"}, "x": 3}
    }
    content["state"]["callbacks"]["SameData"] = {
        "order": {f"train_data.streams.{bad} (index.json)": bad, 3: 4}
    }
    recipe = {
        "run_name": bad,
        "model": {"pretrained": bad},
        "train_data": {"streams": {bad: {"local": bad}}},
        "note": "```\n# Other",
    }
    for run_config, name in ((yaml.dump(recipe), "tiny"), (None, bad)):
        card = model_card(model, content, run_config, dtype="float32", name=name)
        clean = "x license: mit --- # Other [31m"
        parts = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL)
        assert parts
        header, body = parts.groups()
        assert yaml.safe_load(header)["model_name"] == clean
        assert "license" not in yaml.safe_load(header)
        prose = body.partition("## Recipe")[0]
        assert [line for line in prose.splitlines() if line.startswith("# ")] == [f"# {clean}"]
        assert not any(line.startswith(("license", "---")) for line in prose.splitlines())
        assert "\x1b" not in card
        assert f"- {clean} {clean}: 1.0000\n" in body
    card = model_card(model, content, "note: |\n  ````\n  # Other", dtype="float32", name="tiny")
    assert card.endswith("`````yaml\nnote: |\n  ````\n  # Other\n`````\n")


def test_a_checkpoint_without_steps_makes_no_card(trained: Any) -> None:
    checkpoint = Checkpoint("ba1.pt", trained.checkpoints / "ba1.pt")
    content = read_checkpoint(checkpoint)
    model, _ = model_in(content, checkpoint)
    for wrong in ({}, {"Timestamp": {"batch": "x", "token": 1, "sample": 1}}, 3):
        content["state"]["timestamp"] = wrong
        with pytest.raises(DataError, match=r"^the checkpoint holds no steps and tokens of a run"):
            model_card(model, content, None, dtype="float32", name="tiny")


def test_two_ranks_export_what_one_does(corpus: Corpus, tmp_path: Path) -> None:
    """Bit for bit: of two rows with as many labels each, the order of adding does not matter,
    nor does halving.
    """
    keys = (
        "global_batch_size=2",
        "microbatch_size=1",
        "max_duration=4ba",
        "scheduler.warmup=0ba",
        "eval_data=null",
    )
    corpus.train_run(tmp_path / "one", *keys)
    two_ranks("recipes/train.py", *corpus.keys(tmp_path / "two", *keys))
    for name in ("one", "two"):
        out = f"out={tmp_path / name / 'hf'}"
        check(run_script("convert/to_hf.py", f"checkpoint={tmp_path / name / 'checkpoints'}", out))
    one, two = ((tmp_path / name / "hf/model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert "- steps: 4\n" in (tmp_path / "two/hf/README.md").read_text()


@pytest.mark.parametrize("inside", [".", "ba4"])
def test_a_sharded_checkpoint_is_refused(tmp_path: Path, inside: str) -> None:
    folder = tmp_path / "checkpoints" / inside
    folder.mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
        (folder / name).write_bytes(b"shard")
    with pytest.raises(ConfigError) as caught:
        find_checkpoint(str(tmp_path / "checkpoints"), tmp_path)
    expected = (
        "a sharded checkpoint, which cannot be read here; only those in one file can (ba*.pt)"
    )
    assert re.sub(r"/\.:", ":", str(caught.value)) == f"{folder}: {expected}"


# The hub


@dataclass
class Hub:
    """As much of the hub's API as an upload of small files takes, and what was uploaded."""

    url: str = ""
    private: bool | None = None  # of the repository, once it is there
    files: dict[str, bytes] = field(default_factory=dict)
    card: str | None = "a card"  # what it has to be, if that is known
    fails: set[str] = field(default_factory=set)  # ends of paths that are answered by an error

    def answer(self, path: str, token: str | None, body: bytes) -> tuple[int, Any]:
        if token != "Bearer hf_right":
            return 401, {"error": "Invalid user token."}
        if any(path.endswith(end) for end in self.fails):
            return 500, {"error": "out of order"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user"}
        if path == "/api/repos/create":
            if self.private is not None:
                return 409, {"error": "there is one already", "url": f"{self.url}/me/model"}
            asked = json.loads(body)  # for private, or since huggingface_hub 2 for a visibility
            self.private = asked.get("private", asked.get("visibility") == "private")
            return 200, {"url": f"{self.url}/me/model", "name": "me/model"}
        if path == "/api/validate-yaml":
            assert self.card in (None, json.loads(body)["content"])
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            return 200, {
                "files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
            }
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {
                "commitUrl": f"{self.url}/me/model/commit/1",
                "commitOid": "1",
                "success": True,
            }
        if path.startswith("/api/models/me/model"):
            return 200, {
                "id": "me/model",
                "private": self.private,
                "siblings": [],
                "tags": [],
                "sha": "0",
            }
        return 404, {"error": path}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, content = made.answer(
                self.path.partition("?")[0], self.headers.get("Authorization"), body
            )
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_port}"
        reset_sessions()  # one that was made without a network refuses to use it
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield made
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/README.md").write_text("a card")
    (tmp_path / "hf/model.safetensors").write_bytes(bytes(range(256)))
    return tmp_path / "hf"


@pytest.mark.parametrize("private", [True, False])
def test_a_folder_is_uploaded_as_it_is(hub: Hub, folder: Path, private: bool) -> None:
    check_hub("me/model")
    address = push_folder(folder, "me/model", private=private)
    assert address == f"{hub.url}/me/model/commit/1"
    assert hub.private is private
    assert hub.files == {"README.md": b"a card", "model.safetensors": bytes(range(256))}


def test_an_export_is_what_its_keys_say(hub: Hub, trained: Any, tmp_path: Path) -> None:
    main, out = runpy.run_path(str(ROOT / "convert/to_hf.py"))["main"], tmp_path / "hf"
    keys = ("dtype=bfloat16", "max_shard_size=20000", "push_to_hub=me/model", "hub_private=false")
    hub.card = None
    main(load(ToHfConfig, [f"checkpoint={trained.checkpoints}", f"out={out}", *keys]))
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 1
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {
        torch.bfloat16
    }
    assert hub.private is False
    assert {path.name for path in out.iterdir()} == set(hub.files)


def test_a_public_repository_is_no_place_for_what_is_private(hub: Hub, folder: Path) -> None:
    hub.private = False
    with pytest.raises(
        ConfigError,
        match=r"^push_to_hub=me/model: exists and is public; set hub_private=false, or name ano",
    ):
        push_folder(folder, "me/model", private=True)
    assert hub.files == {}
    push_folder(folder, "me/model", private=False)
    assert set(hub.files) == {"README.md", "model.safetensors"}


def test_a_failed_upload_leaves_the_folder_and_says_how_to_go_on(hub: Hub, folder: Path) -> None:
    hub.fails = {"/commit/main"}
    with pytest.raises(StoreError) as caught:
        push_folder(folder, "me/model", private=True)
    assert re.match("push_to_hub=me/model: (500 Server E|Server e)rror", str(caught.value))
    assert str(caught.value).endswith(f"; {folder} is whole: hf upload me/model {folder}")
    assert "\n" not in str(caught.value)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("model", "hf_right", "push_to_hub=model: must be USER/NAME or ORGANIZATION/NAME"),
        ("me/model/x", "hf_right", "push_to_hub=me/model/x: Repo id must be in the form"),
        ("me/mo del", "hf_right", "push_to_hub=me/mo del: Repo id must use alphanumeric chars"),
        (
            "me/model",
            "hf_wrong",
            "push_to_hub=me/model: http://127.0.0.1:{port} does not take the token: ",
        ),
        (
            "me/model",
            "",
            "push_to_hub=me/model: there is no token; run `hf auth login`, or set HF_TOKEN",
        ),
    ],
)
def test_what_is_wrong_with_the_hub_is_found_before_anything_is_done(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repo: str, token: str, message: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError) as caught:
        check_hub(repo)
    assert str(caught.value).startswith(message.format(port=hub.url.rpartition(":")[2]))
    assert "hf_wrong" not in str(caught.value)
    assert hub.private is None


def test_an_export_that_cannot_be_uploaded_is_not_begun(trained: Any, tmp_path: Path) -> None:
    process = run_script(
        "convert/to_hf.py",
        f"checkpoint={trained.checkpoints}",
        f"out={tmp_path / 'hf'}",
        "push_to_hub=model",
    )
    assert process.returncode == 2
    assert process.stderr == "error: push_to_hub=model: must be USER/NAME or ORGANIZATION/NAME\n"
    assert not (tmp_path / "hf").exists()
