"""Checkpoints in a real S3 server: whole, found by looking, rotated there, and never mistaken for a local copy."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from flame_composer import checkpoint
from flame_composer.config import ConfigError
from tests.runs import Corpus, Script, check, read_log, run_script
from tests.s3 import S3
from tests.test_resume import assert_same_run


def final_run(s3: S3, run: Path) -> Path:
    """The run with the checkpoint it ended with where a local run has it."""
    (run / "checkpoints").mkdir()
    (run / "checkpoints/ba40.pt").write_bytes(s3.read(f"{run.name}/ba40.pt"))
    return run


def test_a_run_that_saves_in_s3_survives_all_there_is(
    corpus: Corpus, undisturbed: Path, s3_server: S3, tmp_path: Path
) -> None:
    """Killed, stopped, its newest checkpoint cut short there, and a newer one of somebody else's in its local folder."""
    s3, run = s3_server, tmp_path / "in_s3"
    keys = (f"save_folder=s3://data/{run.name}", "save_num_checkpoints_to_keep=2")
    corpus.killed_run(run, *keys, after_step=13, env=s3.env)
    assert set(s3.keys(run.name)) == {"config.yaml", "ba5.pt", "ba10.pt"}
    assert b"context_length: 64" in s3.read(f"{run.name}/config.yaml")

    process = corpus.stopped_run(run, *keys, after_step=17, env=s3.env)
    assert process.returncode == 143, process.stderr
    assert f"resuming from s3://data/{run.name}/ba10.pt: step 10" in process.stdout
    step = len(read_log(run))
    assert f"stopped after step {step}; saved s3://data/{run.name}/ba{step}.pt" in process.stderr
    kept = {f"ba{step}.pt", f"ba{(step - 1) // 5 * 5}.pt"}  # rotation goes on where the killed run left off
    assert set(s3.keys(run.name)) == {"config.yaml", *kept}
    assert list((run / "staging").glob("*.pt")) == [], "what was copied is cleared away"

    newest = f"{run.name}/ba{step}.pt"
    s3.client.put_object(Bucket="data", Key=newest, Body=s3.read(newest)[:-1000])
    (run / "staging/ba39.pt").write_bytes(b"from another life")
    process = check(Script("recipes/train.py", *corpus.keys(run, *keys), env=s3.env).wait())
    assert f"warning: s3://data/{newest}: not a whole checkpoint" in process.stderr
    assert f"resuming from s3://data/{run.name}/ba{(step - 1) // 5 * 5}.pt" in process.stdout
    assert set(s3.keys(run.name)) == {"config.yaml", "ba35.pt", "ba40.pt"}
    assert_same_run(final_run(s3, run), undisturbed)
    assert not list(Path.cwd().glob("s3:*"))

    out = tmp_path / "hf"
    exported = check(run_script("convert/to_hf.py", f"checkpoint=s3://data/{run.name}", f"out={out}", env=s3.env))
    assert exported.stdout.startswith(f"s3://data/{run.name}/ba40.pt -> {out}: ")
    local = tmp_path / "local"
    check(run_script("convert/to_hf.py", f"checkpoint={undisturbed}/checkpoints", f"out={local}"))
    assert (out / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()


def test_an_upload_is_tried_again_until_the_store_takes_it(s3: S3, tmp_path: Path, monkeypatch, caplog) -> None:
    """The bucket is made while the upload waits; one that never comes is an error in the end."""
    (tmp_path / "file").write_bytes(b"weights")
    monkeypatch.setattr(checkpoint, "UPLOAD_WAITS", (0.5,) * 60)
    timer = threading.Timer(0.7, lambda: s3.client.create_bucket(Bucket="made-later"))
    timer.start()
    checkpoint._upload(tmp_path / "file", "s3://made-later/ba1.pt")
    timer.join()
    assert s3.client.get_object(Bucket="made-later", Key="ba1.pt")["Body"].read() == b"weights"
    assert caplog.messages[0].startswith("warning: s3://made-later/ba1.pt: not saved yet: s3://made-later: there is no bucket")
    monkeypatch.setattr(checkpoint, "UPLOAD_WAITS", (0.1,))
    with pytest.raises(ConfigError, match=r"^s3://never-made: there is no bucket"):
        checkpoint._upload(tmp_path / "file", "s3://never-made/ba1.pt")


def test_a_store_that_lets_nothing_be_deleted_keeps_old_checkpoints(s3: S3, tmp_path: Path, monkeypatch, caplog) -> None:
    for name in ("ba1.pt", "ba2.pt", "ba3.pt"):
        s3.client.put_object(Bucket="data", Key=f"kept/{name}", Body=b"x")

    def deny(place: str) -> None:
        raise ConfigError(f"{place}: access denied")

    saver = checkpoint.SaveCheckpoints("s3://data/kept", tmp_path, batches=1, num_to_keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.storage, "delete", deny)
        saver._rotate()
    assert [message.split(": ", 2)[:2] for message in caplog.messages] == [
        ["warning", "s3://data/kept/ba2.pt"], ["warning", "s3://data/kept/ba1.pt"],
    ]  # fmt: skip
    assert set(s3.keys("kept")) == {"ba1.pt", "ba2.pt", "ba3.pt"}
    saver._rotate()
    assert set(s3.keys("kept")) == {"ba3.pt"}


@pytest.mark.parametrize(
    ("folder", "env", "message"),
    [
        ("s3://no-such-bucket/run", {}, "no-such-bucket"),
        ("s3://data/run", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "denied"),
        ("s3://data/run", {"S3_ENDPOINT_URL": "http://127.0.0.1:9"}, "127.0.0.1:9"),
    ],
)
def test_a_store_that_cannot_be_used_is_named_before_anything_starts(
    corpus: Corpus, s3_server: S3, tmp_path: Path, folder: str, env: dict[str, str], message: str
) -> None:
    run = tmp_path / "run"
    process = run_script("recipes/train.py", *corpus.keys(run, f"save_folder={folder}"), env=s3_server.env | env)
    assert process.returncode == 2, process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"error: {folder.removesuffix('/run')}")
    assert message in line
    assert not run.exists()
