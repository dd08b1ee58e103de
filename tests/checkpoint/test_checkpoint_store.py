"""Checkpoints in a real S3 server: whole, found by looking, rotated there, and never mistaken
for a local copy.
"""

from __future__ import annotations

import http.server
import shutil
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from flame_composer.checkpoint import upload
from flame_composer.checkpoint.find import find_newest
from flame_composer.checkpoint.read import read_checkpoint
from flame_composer.checkpoint.save import SaveCheckpoints
from flame_composer.errors import ConfigError, DataError
from flame_composer.storage import files
from tests.conftest import Run
from tests.runs import Corpus, Script, check, read_log, run_script
from tests.s3 import S3
from tests.train.test_parallelism import as_pieces
from tests.train.test_resume import assert_same_run


def final_run(s3: S3, run: Path) -> Path:
    """The run with the checkpoint it ended with where a local run has it."""
    (run / "checkpoints").mkdir()
    (run / "checkpoints/ba40.pt").write_bytes(s3.read(f"{run.name}/ba40.pt"))
    return run


def test_a_run_that_saves_in_s3_survives_all_there_is(
    corpus: Corpus, undisturbed: Path, s3_server: S3, tmp_path: Path
) -> None:
    """Killed, stopped, its newest checkpoint cut short there, and a newer one of somebody else's
    in its local folder.
    """
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
    # Rotation goes on where the killed run left off
    kept = {f"ba{step}.pt", f"ba{(step - 1) // 5 * 5}.pt"}
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
    exported = check(
        run_script("convert/to_hf.py", f"checkpoint=s3://data/{run.name}", f"out={out}", env=s3.env)
    )
    assert exported.stdout.startswith(f"s3://data/{run.name}/ba40.pt -> {out}: ")
    local = tmp_path / "local"
    check(run_script("convert/to_hf.py", f"checkpoint={undisturbed}/checkpoints", f"out={local}"))
    assert (out / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()


def test_an_upload_is_tried_again_until_the_store_takes_it(
    s3: S3, tmp_path: Path, monkeypatch, caplog
) -> None:
    """The bucket is made while the upload waits; one that never comes is an error in the end."""
    (tmp_path / "file").write_bytes(b"weights")
    monkeypatch.setattr(upload, "UPLOAD_WAITS", (0.5,) * 60)

    def make_bucket_once_it_is_missed() -> None:
        while not caplog.messages:
            time.sleep(0.01)
        s3.client.create_bucket(Bucket="made-later")

    maker = threading.Thread(target=make_bucket_once_it_is_missed, daemon=True)
    maker.start()
    upload.upload_file(tmp_path / "file", "s3://made-later/ba1.pt")
    maker.join()
    assert s3.client.get_object(Bucket="made-later", Key="ba1.pt")["Body"].read() == b"weights"
    assert caplog.messages[0].startswith(
        "warning: s3://made-later/ba1.pt: not saved yet: s3://made-later: there is no bucket"
    )
    monkeypatch.setattr(upload, "UPLOAD_WAITS", (0.1,))
    with pytest.raises(ConfigError, match=r"^s3://never-made: there is no bucket"):
        upload.upload_file(tmp_path / "file", "s3://never-made/ba1.pt")


def test_a_store_that_lets_nothing_be_deleted_keeps_old_checkpoints(
    s3: S3, trained: Run, tmp_path: Path, monkeypatch, caplog
) -> None:
    s3.upload(trained.checkpoints, "kept")

    def deny(place: str) -> None:
        raise ConfigError(f"{place}: access denied")

    saver = SaveCheckpoints("s3://data/kept", tmp_path, batches=1, num_to_keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(files, "delete", deny)
        saver.kept.delete_old()
    assert [message.split(": ", 2)[:2] for message in caplog.messages] == [
        ["warning", "s3://data/kept/ba2.pt"],
        ["warning", "s3://data/kept/ba1.pt"],
    ]
    assert set(s3.keys("kept")) == {"ba1.pt", "ba2.pt", "ba3.pt"}
    saver = SaveCheckpoints("s3://data/kept", tmp_path, batches=1, num_to_keep=1)
    saver.kept.delete_old()
    assert set(s3.keys("kept")) == {"ba3.pt"}


def test_damaged_checkpoints_in_a_store_delete_no_good_one(
    s3: S3, trained: Run, tmp_path: Path, caplog
) -> None:
    """Those that are newer stay where they are, and one that is in the way is set aside."""
    s3.upload(trained.checkpoints, "damaged-run")
    whole = s3.read("damaged-run/ba3.pt")
    for name in ("ba4.pt", "ba9.pt", "ba10.pt"):
        s3.client.put_object(Bucket="data", Key=f"damaged-run/{name}", Body=whole[:-700])
    s3.client.put_object(Bucket="data", Key="damaged-run/ba2.pt", Body=b"")
    s3.client.put_object(Bucket="data", Key="damaged-run/ba8/state.pt", Body=b"no head")
    place, staging = "s3://data/damaged-run", tmp_path / "staging"
    start = find_newest(place, staging)
    assert start is not None
    assert start.place == f"{place}/ba3.pt"
    assert start.file.read_bytes() == whole
    assert [Path(each).name for each in start.passed_over] == ["ba10.pt", "ba9.pt", "ba8", "ba4.pt"]
    saver = SaveCheckpoints(place, staging, batches=1, num_to_keep=2, start=start)
    saver.fit_start(None, None)  # pyright: ignore
    state, before = trained.trainer.state, trained.trainer.state.timestamp
    try:
        for step in (4, 5, 6):
            state.timestamp = before.copy(batch=step)
            saver.save(state)
            newest = find_newest(place, tmp_path / "other")
            assert newest is not None
            assert newest.place == f"{place}/ba{step}.pt"
    finally:
        state.timestamp = before
    damaged = {"ba9.pt", "ba10.pt", "ba8/state.pt", "aside-ba4.pt"}
    assert set(s3.keys("damaged-run")) == {"ba5.pt", "ba6.pt", *damaged}
    assert list(staging.iterdir()) == []
    assert f"warning: {place}/ba4.pt: was not a checkpoint of this run" in caplog.text


def test_old_checkpoints_in_a_store_count_only_if_they_are_whole(
    s3: S3, trained: Run, tmp_path: Path
) -> None:
    s3.upload(trained.checkpoints, "counted")
    s3.client.put_object(Bucket="data", Key="counted/ba2.pt", Body=s3.read("counted/ba2.pt")[:-700])
    SaveCheckpoints(
        "s3://data/counted", tmp_path / "staging", batches=1, num_to_keep=2
    ).kept.delete_old()
    assert set(s3.keys("counted")) == {"ba1.pt", "ba2.pt", "ba3.pt"}
    assert list((tmp_path / "staging").iterdir()) == []


def test_copies_of_damaged_checkpoints_leave_room_for_the_next(
    s3: S3, trained: Run, tmp_path: Path
) -> None:
    s3.upload(trained.checkpoints, "room")
    for name in ("room/ba3.pt", "room/ba7.pt"):
        s3.client.put_object(Bucket="data", Key=name, Body=s3.read("room/ba2.pt")[:-700])
    s3.client.put_object(Bucket="data", Key="room/ba8/state.pt", Body=b"no head")
    start = find_newest("s3://data/room", tmp_path / "staging")
    assert start is not None
    assert start.place == "s3://data/room/ba2.pt"
    assert [path.name for path in (tmp_path / "staging").iterdir()] == ["ba2.pt"]


def test_pieces_without_a_head_in_a_store_are_deleted(s3: S3, trained: Run, tmp_path: Path) -> None:
    """As a kill in an upload leaves them, where the restart saved another step."""
    s3.upload(trained.checkpoints, "torsos")
    for name in ("ba1/piece0.pt", "ba1/piece1.pt", "ba4/piece0.pt", "ba0/thesis.tex"):
        s3.client.put_object(Bucket="data", Key=f"torsos/{name}", Body=b"half")
    SaveCheckpoints(
        "s3://data/torsos", tmp_path / "staging", batches=1, num_to_keep=2
    ).kept.delete_old()
    assert set(s3.keys("torsos")) == {"ba2.pt", "ba3.pt", "ba4/piece0.pt", "ba0/thesis.tex"}


class Hostile(http.server.BaseHTTPRequestHandler):
    """An S3 server that lists, beside the pieces of a checkpoint, names that lead out of its
    folder.
    """

    objects: ClassVar[dict[str, bytes]] = {}

    def log_message(self, *message: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(self.objects.get(self.path.split("?")[0]))

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        asked = urllib.parse.parse_qs(query)
        if "list-type" not in asked:
            self.answer(self.objects.get(urllib.parse.unquote(path)))
            return
        bucket, prefix = path.strip("/"), asked.get("prefix", [""])[0]
        names = [key.removeprefix(f"/{bucket}/") for key in self.objects]
        listed = [name for name in names if name.startswith(prefix)]
        if asked.get("delimiter"):
            folders = sorted(
                {
                    prefix + name[len(prefix) :].split("/")[0] + "/"
                    for name in listed
                    if "/" in name[len(prefix) :]
                }
            )
            listed = [name for name in listed if "/" not in name[len(prefix) :]]
            listed += [
                name
                for name in names
                if ".." in name and name.startswith(prefix) and prefix + "ba3/" not in name
            ]
        else:
            folders = []
        body = "".join(
            f"<Contents><Key>{name}</Key><Size>9</Size>"
            "<LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
            for name in listed
        )
        body += "".join(
            f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>" for name in folders
        )
        count = f"<KeyCount>{len(listed)}</KeyCount>"
        self.answer(f"<ListBucketResult>{count}{body}</ListBucketResult>".encode())

    def answer(self, body: bytes | None) -> None:
        self.send_response(200 if body is not None else 404)
        self.send_header("Content-Length", str(len(body or b"")))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body or b"")


@pytest.fixture
def hostile(s3: S3, monkeypatch) -> Iterator[dict[str, bytes]]:
    """What such a server holds, by its path; this process's environment points to it."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(Hostile, "objects", {})
        yield Hostile.objects
        server.shutdown()


@pytest.mark.parametrize(
    "name", ["../../../evil.pt", "../ba2.pt", "..", "more/../../../../evil.pt"]
)
def test_a_store_that_lists_other_names_writes_nowhere_else(
    hostile: dict[str, bytes], trained: Run, tmp_path: Path, name: str
) -> None:
    """The names of pieces are those that pieces have; nothing that is listed becomes a path."""
    pieces = as_pieces(Path(shutil.copy(trained.checkpoints / "ba3.pt", tmp_path)))
    staging = tmp_path / "log/staging"
    for file in pieces.iterdir():
        hostile[f"/data/run/ba3/{file.name}"] = file.read_bytes()
    hostile[f"/data/run/ba3/{name}"] = b"evil"
    before = set(tmp_path.rglob("*"))
    found = find_newest("s3://data/run", staging)
    assert found is not None
    assert found.file == staging / "ba3/state.pt"
    written = {
        str(path.relative_to(staging))
        for path in set(tmp_path.rglob("*")) - before
        if path.is_file()
    }
    assert written == {"ba3/state.pt", "ba3/piece0.pt", "ba3/piece1.pt"}
    assert read_checkpoint(found)["state"]["run_name"] == "tiny"


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "a\\b"])
def test_a_listing_with_names_that_are_none_is_refused(
    hostile: dict[str, bytes], name: str
) -> None:
    hostile[f"/data/run/{name}"] = b"evil"
    hostile["/data/run/good"] = b"good"
    with pytest.raises(
        DataError,
        match=r"^data/run: the store lists '.*' there, which is not the name of a file in it",
    ):
        files.ls("s3://data/run")
    if ".." in name:
        with pytest.raises(
            DataError,
            match=r"^data/run: the store lists '.*' there, which is not the name of a file in it",
        ):
            files.find("s3://data/run")


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
    process = run_script(
        "recipes/train.py", *corpus.keys(run, f"save_folder={folder}"), env=s3_server.env | env
    )
    assert process.returncode == 2, process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"error: {folder.removesuffix('/run')}")
    assert message in line
    assert not run.exists()
