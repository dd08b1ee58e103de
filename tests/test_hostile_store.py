"""What is said, and when, where a store redirects, hangs, or is named together with credentials."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from flame_composer.checkpoint import save as checkpoint
from flame_composer.errors import ConfigError, StoreError
from flame_composer.storage import files as storage
from flame_composer.storage import s3 as s3_module
from tests.hostile import Hostile, hostile, lists_only, respond, silence

ELSEWHERE = "http://169.254.169.254/\x1b[2J?X-Amz-Signature="
SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfi"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path) -> None:
    variables = {
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "testtest",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": str(tmp_path),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "file").write_bytes(b"weights")


def point_to(server: Hostile, monkeypatch: Any) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", server.endpoint)


# Redirects


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary", "308 Gone"])
@pytest.mark.parametrize("target", ["itself", f"{ELSEWHERE}abc", None])
def test_a_store_that_redirects_is_not_followed(monkeypatch, tmp_path, status, target):
    """Nor are the credentials taken there."""

    def redirect(connection: Any, request: str) -> None:
        location = (
            []
            if target is None
            else [f"Location: {server.endpoint + '/x' if target == 'itself' else target}"]
        )
        connection.sendall(respond(status, *location))

    with hostile(redirect) as server:
        point_to(server, monkeypatch)
        for use in (storage.stat, lambda place: storage.put(tmp_path / "file", place)):
            with pytest.raises(ConfigError) as caught:
                use("s3://data/file")
            where = {"itself": f" to {server.endpoint}/x", None: ""}.get(
                target, f" to {ELSEWHERE}***"
            )
            assert (
                str(caught.value)
                == f"s3://data: {server.endpoint} redirects{where}, and is not followed there with "
                "credentials; set S3_ENDPOINT_URL to the address that answers, or "
                "AWS_DEFAULT_REGION to the bucket's region"
            )
        assert len(server.requests) <= 4


@pytest.mark.parametrize("use", [storage.stat, storage.read, storage.delete, storage.ls])
def test_a_store_that_begins_to_redirect(monkeypatch, use):
    with hostile(lists_only(silence)) as server:
        point_to(server, monkeypatch)
        s3_module._connect("data")
        redirect = respond("307 Elsewhere", "Location: http://there/")
        server.answer = lambda connection, request: connection.sendall(redirect)
        with pytest.raises(
            ConfigError,
            match=r"^s3://data/file: http://127.* redirects to http://there/, and is not followed",
        ):
            use("s3://data/file")
        assert len(server.requests) < 6


def test_a_bucket_of_another_region_is_found_as_before(monkeypatch):
    """What S3 itself redirects for: it names the region, and the request is signed anew for
    that.
    """

    def answer(connection: Any, request: str) -> None:
        if "/eu-west-1/s3/" in request:
            lists_only(lambda connection, request: connection.sendall(respond("404 Not Found")))(
                connection, request
            )
        else:
            connection.sendall(respond("301 Moved Permanently", "x-amz-bucket-region: eu-west-1"))

    with hostile(answer) as server:
        point_to(server, monkeypatch)
        assert storage.stat("s3://data/file") is None
        assert any("/eu-west-1/s3/" in request for request in server.requests)


# Servers that take their time: with 0.2 s where there are 30


@pytest.fixture
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(s3_module, "READ_SECONDS", 0.2)
    monkeypatch.setattr(s3_module, "ATTEMPTS", 3)
    monkeypatch.setattr(
        "botocore.retries.standard.ExponentialBackoff._MAX_BACKOFF", 0.01, raising=False
    )
    monkeypatch.setattr(
        "botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01
    )


def trickle(connection: Any, request: str) -> None:
    """A byte after longer than is waited for one, as `a byte a minute`."""
    for byte in b"HTTP/1.1 200 OK\r\n":
        connection.sendall(bytes([byte]))
        time.sleep(0.4)


def stuck_in_its_answer(connection: Any, request: str) -> None:
    connection.sendall(
        b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\nETag: "a"\r\n'
        b"Last-Modified: Sat, 01 Jan 2022 00:00:00 GMT\r\n\r\n"
    )
    if not request.startswith("HEAD"):
        time.sleep(30)


@pytest.mark.parametrize("answer", [silence, trickle])
@pytest.mark.parametrize("name", ["stat", "read", "write", "put", "download", "delete"])
def test_a_store_that_hangs_is_asked_as_often_as_is_said(
    impatient, monkeypatch, tmp_path, name, answer
):
    uses = {
        "write": lambda place: storage.write(place, b"x"),
        "put": lambda place: storage.put(tmp_path / "file", place),
        "download": lambda place: storage.download(place, tmp_path / "copy"),
    }
    with hostile(lists_only(lambda connection, request: None)) as server:
        point_to(server, monkeypatch)
        s3_module._connect("data")
        server.answer, server.requests = answer, []
        with pytest.raises(
            StoreError, match=r"^s3://data/file: http://127.* cannot be reached: Read timeout"
        ):
            uses.get(name, getattr(storage, name))("s3://data/file")
        assert len(server.requests) == s3_module.ATTEMPTS
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("name", ["read", "download"])
def test_a_store_that_hangs_in_its_answer(impatient, monkeypatch, tmp_path, name):
    # In 0.2 s not even the head of it comes on a busy machine
    monkeypatch.setattr(s3_module, "READ_SECONDS", 1)
    with hostile(lists_only(stuck_in_its_answer)) as server:
        point_to(server, monkeypatch)
        began = time.monotonic()
        with pytest.raises(StoreError, match=r"^s3://data/file: "):
            (
                storage.read("s3://data/file")
                if name == "read"
                else storage.download("s3://data/file", tmp_path / "copy")
            )
        assert (
            len([request for request in server.requests if request.startswith("GET /data/file")])
            <= s3_module.ATTEMPTS
        )
        assert time.monotonic() - began < 10
    assert not (tmp_path / "copy").exists()


def test_a_checkpoint_is_not_uploaded_for_longer_than_is_said(
    impatient, monkeypatch, tmp_path, caplog
):
    """docs/reliability.md: about four minutes, and up to seven where the store hangs."""
    attempt = 5 * 30 + 15  # seconds: what botocore waits between its attempts is 15 at most
    assert (s3_module.CONNECT_SECONDS, sum(checkpoint.UPLOAD_WAITS)) == (5, 252)
    assert checkpoint.UPLOAD_SECONDS + attempt <= 7.1 * 60
    with hostile(silence) as server:
        with monkeypatch.context() as patch:
            patch.setattr(server, "answer", lists_only(silence))
            point_to(server, monkeypatch)
            s3_module._connect("data")
        server.requests = []
        monkeypatch.setattr(checkpoint, "UPLOAD_WAITS", (0.1, 0.2, 0.4, 9))
        monkeypatch.setattr(checkpoint, "UPLOAD_SECONDS", 3)
        began = time.monotonic()
        with pytest.raises(
            StoreError, match=r"^s3://data/ba1.pt: http://127.* cannot be reached: Read timeout"
        ):
            checkpoint._upload(tmp_path / "file", "s3://data/ba1.pt")
        assert time.monotonic() - began < 8
        assert len(server.requests) <= 4 * s3_module.ATTEMPTS
    assert len(caplog.messages) >= 2


def test_the_waits_are_those_of_the_docs():
    assert (s3_module.ATTEMPTS, s3_module.READ_SECONDS) == (5, 30)


# Addresses


@pytest.mark.parametrize(
    "place",
    [f"s3://AKIAIOSFODNN7EXAMPLE:{SECRET}@data/x", f"s3://key:{SECRET}", "s3://user@data/x"],
)
def test_credentials_in_a_buckets_place_are_not_told(place):
    with pytest.raises(ConfigError) as caught:
        storage.stat(place)
    assert (
        str(caught.value)
        == "s3://***: must be s3://bucket/path, without credentials or a server; set"
        " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and S3_ENDPOINT_URL"
    )


def test_colons_and_ats_in_a_key_are_part_of_it(monkeypatch):
    with hostile(
        lists_only(lambda connection, request: connection.sendall(respond("404 Not Found")))
    ) as server:
        point_to(server, monkeypatch)
        assert storage.stat("s3://data/a:b@c") is None
        assert any(
            "GET /data" in request or "HEAD /data/a" in request for request in server.requests
        )


OPEN = [
    "http://store.example:9000",
    "http://127.0.0.1.example",
    "http://10.0.0.7",
    "http://u:pa55@10.0.0.8",
]
CLOSED = [
    "http://127.0.0.1:9000",
    "http://localhost:1",
    "http://[::1]:9",
    "http://127.9.9.9",
    "https://x.example",
    "",
]


def test_a_server_without_encryption_is_warned_of_once(monkeypatch, caplog):
    monkeypatch.setattr(s3_module, "_warned_of", set())
    for _ in range(2):
        for server in OPEN + CLOSED:
            s3_module.warn_if_readable(server)
    assert len(caplog.messages) == 4
    assert (
        caplog.messages[0]
        == "warning: http://store.example:9000: is not encrypted: what is sent and fetched can be"
        " read and changed on the way; use an https:// address"
    )


def test_the_warning_comes_from_the_first_request(monkeypatch, caplog):
    monkeypatch.setattr(s3_module, "_warned_of", set())
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://no.such.host.invalid")
    for _ in range(2):
        with pytest.raises(ConfigError, match="cannot be reached"):
            storage.stat("s3://data/x")
    assert [
        message
        for message in caplog.messages
        if re.match("warning: http://no.such.host.invalid: is not enc", message)
    ]
    assert len(caplog.messages) == 1


def test_loader_processes_and_other_ranks_do_not_repeat_it(monkeypatch, caplog):
    monkeypatch.setattr(s3_module, "_warned_of", set())
    monkeypatch.setenv("RANK", "1")
    s3_module.warn_if_readable("http://store.example")
    assert caplog.messages == []
