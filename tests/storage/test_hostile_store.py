"""What is said, and when, where a store redirects, hangs, or is named together with credentials."""

from __future__ import annotations

import re
import time
from functools import partial
from typing import Any

import pytest

from flame_composer.checkpoint import upload
from flame_composer.errors import ConfigError, DataError, StoreError
from flame_composer.storage import files, plain_http, s3_client
from tests.data_fixtures import byte_tokenizer
from tests.dataset.test_convert import run_here
from tests.dataset.test_object_store import without_a_pool  # noqa: F401 - a fixture
from tests.hostile import Hostile, holds, hostile, lists_only, respond, silence

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
        for use in (files.stat, lambda place: files.put(tmp_path / "file", place)):
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


@pytest.mark.parametrize("use", [files.stat, files.read, files.delete, files.ls])
def test_a_store_that_begins_to_redirect(monkeypatch, use):
    with hostile(lists_only(silence)) as server:
        point_to(server, monkeypatch)
        s3_client.connect("data")
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
        assert files.stat("s3://data/file") is None
        assert any("/eu-west-1/s3/" in request for request in server.requests)


# Servers that take their time: with 0.2 s where there are 30


@pytest.fixture
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(s3_client, "READ_SECONDS", 0.2)
    monkeypatch.setattr(s3_client, "ATTEMPTS", 3)
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
        "write": lambda place: files.write(place, b"x"),
        "put": lambda place: files.put(tmp_path / "file", place),
        "download": lambda place: files.download(place, tmp_path / "copy"),
    }
    with hostile(lists_only(lambda connection, request: None)) as server:
        point_to(server, monkeypatch)
        s3_client.connect("data")
        server.answer, server.requests = answer, []
        with pytest.raises(
            StoreError, match=r"^s3://data/file: http://127.* cannot be reached: Read timeout"
        ):
            uses.get(name, getattr(files, name))("s3://data/file")
        assert len(server.requests) == s3_client.ATTEMPTS
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("name", ["read", "download"])
def test_a_store_that_hangs_in_its_answer(impatient, monkeypatch, tmp_path, name):
    # In 0.2 s not even the head of it comes on a busy machine
    monkeypatch.setattr(s3_client, "READ_SECONDS", 1)
    with hostile(lists_only(stuck_in_its_answer)) as server:
        point_to(server, monkeypatch)
        began = time.monotonic()
        take = {"read": files.read, "download": partial(files.download, local=tmp_path / "copy")}
        with pytest.raises(StoreError, match=r"^s3://data/file: "):
            take[name]("s3://data/file")
        assert (
            len([request for request in server.requests if request.startswith("GET /data/file")])
            <= s3_client.ATTEMPTS
        )
        assert time.monotonic() - began < 10
    assert not (tmp_path / "copy").exists()


def test_a_checkpoint_is_not_uploaded_for_longer_than_is_said(
    impatient, monkeypatch, tmp_path, caplog
):
    """docs/reliability.md: about four minutes, and up to seven where the store hangs."""
    attempt = 5 * 30 + 15  # seconds: what botocore waits between its attempts is 15 at most
    assert (s3_client.CONNECT_SECONDS, sum(upload.UPLOAD_WAITS)) == (5, 252)
    assert upload.UPLOAD_SECONDS + attempt <= 7.1 * 60
    with hostile(silence) as server:
        with monkeypatch.context() as patch:
            patch.setattr(server, "answer", lists_only(silence))
            point_to(server, monkeypatch)
            s3_client.connect("data")
        server.requests = []
        monkeypatch.setattr(upload, "UPLOAD_WAITS", (0.1, 0.2, 0.4, 9))
        monkeypatch.setattr(upload, "UPLOAD_SECONDS", 3)
        began = time.monotonic()
        with pytest.raises(
            StoreError, match=r"^s3://data/ba1.pt: http://127.* cannot be reached: Read timeout"
        ):
            upload.upload_file(tmp_path / "file", "s3://data/ba1.pt")
        assert time.monotonic() - began < 8
        assert len(server.requests) <= 4 * s3_client.ATTEMPTS
    assert len(caplog.messages) >= 2


def test_the_waits_are_those_of_the_docs():
    assert (s3_client.ATTEMPTS, s3_client.READ_SECONDS) == (5, 30)
    assert s3_client.MOST_ANSWER == 64 << 20


# Servers that send something else than what was asked for


DATA = bytes(range(256)) * 400


def change(pattern: bytes, to: bytes) -> Any:
    """What is wrong with every range but the first."""

    def spoil(method: str, key: str, start: int, right: bytes) -> bytes | None:
        return re.sub(pattern, to, right, count=1, flags=re.DOTALL) if start > 0 else None

    return spoil


EMPTY = respond("206 Partial", "Content-Range: bytes 50000-102399/102400")
WRONG_RANGES = {
    "empty": (lambda _m, _k, start, _: EMPTY if start > 0 else None, "sends 0 bytes, must be 52,4"),
    "empty and unnamed": (
        lambda _m, _k, start, _: respond("206 Partial") if start > 0 else None,
        "does not say which bytes it sends, of 50000-102399",
    ),
    "unnamed": (
        change(rb"Content-Range[^\n]*\n", b""),
        "does not say which bytes it sends, of 50000-102399",
    ),
    "another": (
        change(rb"bytes 50000", b"bytes 49999"),
        "sends bytes 49999-102399/102400, must be bytes 50000-102399 of 102,400",
    ),
    "of another file": (
        change(rb"/102400", b"/102401"),
        "sends bytes 50000-102399/102401, must be bytes 50000-102399 of 102,400",
    ),
    "short": (
        change(rb"Content-Length: 52400(.*).{400}$", rb"Content-Length: 52000\1"),
        "sends 52,000 bytes, must be 52,400",
    ),
    "long": (
        change(rb"Content-Length: 52400(.*)$", rb"Content-Length: 52401\1x"),
        "sends 52,401 bytes, must be 52,400",
    ),
    "long in chunks": (
        change(
            rb"Content-Length: 52400(.*?\r\n\r\n)(.*)$",
            rb"Transfer-Encoding: chunked\1" + b"ccb1\r\n" + rb"\2x" + b"\r\n0\r\n\r\n",
        ),
        "sends more than 52,400 bytes, must be as many",
    ),
    "short in chunks": (
        change(
            rb"Content-Length: 52400(.*?\r\n\r\n)(.*).$",
            rb"Transfer-Encoding: chunked\1" + b"ccaf\r\n" + rb"\2" + b"\r\n0\r\n\r\n",
        ),
        "sends 52,399 bytes, must be 52,400",
    ),
}


@pytest.mark.parametrize("name", WRONG_RANGES)
def test_a_range_is_just_what_was_asked_for(monkeypatch, name):
    """It was taken for the end of the file where it was empty, and for the right one else."""
    spoil, problem = WRONG_RANGES[name]
    with hostile(holds({"file": DATA})) as server:
        point_to(server, monkeypatch)
        with files.open_file("s3://data/file", block_size=0) as file:
            assert file.read(50_000) == DATA[:50_000]
            assert file.read() == DATA[50_000:]
            file.seek(50_000)
            server.answer, server.requests = holds({"file": DATA}, spoil), []
            with pytest.raises(StoreError) as caught:
                file.read(1 << 20)
            assert len(server.requests) == s3_client.ATTEMPTS
        assert (
            str(caught.value) == f"s3://data/file: {server.endpoint} {problem}"
            f" (asked {s3_client.ATTEMPTS} times); put the file there again, or use a server that"
            " answers as S3 does"
        ) or name == "empty"
        assert problem in str(caught.value)


def test_a_range_that_is_said_to_go_beyond_the_end_is_taken_up_to_it(monkeypatch):
    """As some servers say it; what is sent is what there is."""
    beyond = change(rb"bytes 50000-102399/", b"bytes 50000-999999/")
    with hostile(holds({"file": DATA}, beyond)) as server:
        point_to(server, monkeypatch)
        with files.open_file("s3://data/file", block_size=0) as file:
            file.seek(50_000)
            assert file.read(1 << 20) == DATA[50_000:]


def test_a_wrong_range_is_asked_for_again(monkeypatch):
    answers = iter([EMPTY, EMPTY, None])
    with hostile(holds({"file": DATA}, lambda m, *_: next(answers) if m == "GET" else None)) as s:
        point_to(s, monkeypatch)
        with files.open_file("s3://data/file", block_size=0) as file:
            file.seek(50_000)
            assert file.read(1 << 20) == DATA[50_000:]


def test_a_server_that_ignores_ranges_is_named_at_once(monkeypatch):
    whole = respond("200 OK", body=DATA)
    answer = holds({"file": DATA}, lambda m, k, *_: whole if m == "GET" and k else None)
    with hostile(answer) as server:
        point_to(server, monkeypatch)
        with files.open_file("s3://data/file") as file:
            assert file.read(len(DATA)) == DATA, "the range is the whole file"
            file.seek(50_000)
            server.requests = []
            for use in (
                lambda: file.read(1000),
                lambda: files.read_start("s3://data/file", 1000),
            ):
                with pytest.raises(
                    StoreError,
                    match=r"^s3://data/file: the server ignores ranges: it sends the whole file"
                    r" where bytes \d+-\d+ were asked for; use one that answers them as S3 does",
                ):
                    use()
        assert len(server.requests) == 2
        assert files.read_start("s3://data/file", len(DATA) + 1) == DATA


def test_a_server_without_conditions_does_not_mix_two_versions(monkeypatch):
    with hostile(holds({"file": DATA})) as server:
        point_to(server, monkeypatch)
        with files.open_file("s3://data/file", block_size=0) as file:
            assert file.read(10) == DATA[:10]
            server.answer = holds({"file": DATA[::-1]})
            with pytest.raises(
                StoreError, match=r"^s3://data/file: was replaced while it was read"
            ):
                file.read(10)


@pytest.mark.usefixtures("without_a_pool")
@pytest.mark.parametrize("script", ["to_mds", "train_tokenizer"])
@pytest.mark.parametrize("kind", ["empty", "ignored"])
def test_no_document_is_lost_to_wrong_ranges(monkeypatch, tmp_path, capsys, script, kind):
    lines = b"".join(b'{"text": "document number %d"}\n' % number for number in range(9000))
    objects = {"src/a.jsonl": lines}

    def spoil(method: str, key: str, start: int, right: bytes) -> bytes | None:
        if method != "GET" or not key or start < 0:
            return None
        if kind == "ignored":
            return respond("200 OK", body=lines)
        return respond("206 Partial") if len(right) > 100_000 else None  # not the first look

    more = {
        "to_mds": ["tokenizer=tokenizer", "context_length=64", "unit_size=100000", "num_workers=1"],
        "train_tokenizer": ["vocab_size=300"],
    }[script]
    monkeypatch.chdir(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with hostile(holds(objects, spoil)) as server:
        point_to(server, monkeypatch)
        status = run_here(monkeypatch, script, "source=s3://data/src", "out=out", *more)
    error = capsys.readouterr().err.splitlines()[-1]
    assert status == 1, error
    assert re.match(r"error: s3://data/src/a.jsonl: ", error)
    assert ("ignores ranges" if kind == "ignored" else "does not say which bytes") in error
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("size", [5, 9 << 20])
def test_no_more_is_taken_than_was_announced(monkeypatch, tmp_path, size):
    """The disk was filled."""
    sent: list[int] = []

    def answer(connection: Any, request: str) -> None:
        if request.startswith("GET /data/file"):
            connection.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Length: 1099511627776\r\n"
                b"Last-Modified: Sat, 01 Jan 2022 00:00:00 GMT\r\n\r\n"
            )
            while True:
                sent.append(connection.send(b" " * (1 << 16)))
        holds({"file": b"x" * size})(connection, request)

    with hostile(answer) as server:
        point_to(server, monkeypatch)
        with pytest.raises(StoreError) as caught:
            files.download("s3://data/file", tmp_path / "copy")
        problem = (
            f"{server.endpoint} sends 1,099,511,627,776 bytes, must be 5 (asked 5 times); put"
            if size == 5
            else "the server ignores ranges: it sends the whole file"
        )
        assert str(caught.value).startswith(f"s3://data/file: {problem}")
        with pytest.raises(
            StoreError,
            match=r"^s3://data/file: has more than 1,073,741,824 bytes, which no such file has; put"
            " the right one there$",
        ):
            files.read("s3://data/file")
    assert sum(sent) < 300 << 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_what_comes_in_chunks_without_end_is_not_read_to_it(monkeypatch, tmp_path):
    def answer(connection: Any, request: str) -> None:
        if request.startswith("GET /data/file"):
            connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                connection.sendall(b"10000\r\n" + b" " * (1 << 16) + b"\r\n")
        holds({"file": b"12345"})(connection, request)

    with hostile(answer) as server:
        point_to(server, monkeypatch)
        with pytest.raises(StoreError, match=r"sends more than 5 bytes, must be as many \(asked 5"):
            files.download("s3://data/file", tmp_path / "copy")
        with pytest.raises(
            StoreError, match=r"^s3://data/file: has more than 1,000,000 bytes, whi"
        ):
            files.read("s3://data/file", 1_000_000)
        with pytest.raises(StoreError, match=r"^s3://data/file: the server ignores ranges"):
            files.read_start("s3://data/file", 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found", "503 Slow Down"])
@pytest.mark.parametrize("which", ["listing", "file", "every"])
def test_an_answer_without_end_is_not_read_to_it(monkeypatch, status, which):
    """Listings and errors are read whole, and the system ended the process."""
    sent: list[int] = []

    def endless(connection: Any, request: str) -> None:
        connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 1099511627776\r\n\r\n".encode())
        while True:
            connection.sendall(b" " * (1 << 16))
            sent.append(1 << 16)

    answer = holds({"file": b"12345"})

    def sometimes(connection: Any, request: str) -> None:
        is_listing = "list-type=2" in request.split("\r\n")[0]
        is_file = request.startswith("GET /data/file")
        if which == "every" or (is_listing and which == "listing") or (is_file and which == "file"):
            endless(connection, request)
        answer(connection, request)

    monkeypatch.setattr(s3_client, "MOST_ANSWER", 1 << 20)
    monkeypatch.setattr(s3_client, "ATTEMPTS", 2)
    with hostile(sometimes) as server:
        point_to(server, monkeypatch)
        with pytest.raises((ConfigError, StoreError), match=r"^s3://data\S*: .*"):
            files.read("s3://data/file")
    assert sum(sent) < 200 << 20


def test_what_does_not_fit_on_the_disk_is_not_begun(monkeypatch, tmp_path):
    def petabyte(method: str, key: str, start: int, right: bytes) -> bytes | None:
        return right.replace(b"Content-Length: 1\r", b"Content-Length: %d\r" % 10**15)

    with hostile(holds({"file": b"x"}, petabyte)) as server:
        point_to(server, monkeypatch)
        with pytest.raises(
            StoreError,
            match=r"^s3://data/file: its 1,000,000,000,000,000 bytes do not fit into .*, where"
            r" [\d,]+ are free; make room there$",
        ):
            files.download("s3://data/file", tmp_path / "copy")
        with pytest.raises(StoreError, match=r"^s3://data/file: has more than 999 bytes"):
            files.download("s3://data/file", tmp_path / "copy", most=999)
        assert not any(request.startswith("GET /data/file") for request in server.requests)


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (2 << 20) + 1])
def test_a_download_is_the_object(monkeypatch, tmp_path, size):
    monkeypatch.setattr("flame_composer.storage.s3.PIECE", 1 << 20)
    data = (DATA * 21)[:size]
    assert len(data) == size
    with hostile(holds({"file": data})) as server:
        point_to(server, monkeypatch)
        files.download("s3://data/file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data


def test_nothing_of_more_than_a_gigabyte_is_read_from_a_folder(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"/file: has more than 1,000 bytes, which no such file"):
        files.read(str(tmp_path / "file"), 1000)
    assert files.MOST_READ == 1 << 30


def test_another_store_that_sends_more_or_less_than_it_told(monkeypatch, tmp_path):
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe_file("/hostile/file", b"12345")
    files.download("memory://hostile/file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == files.read("memory://hostile/file") == b"12345"
    with pytest.raises(DataError, match=r"^memory://hostile/file: has more than 4 bytes, which no"):
        files.read("memory://hostile/file", 4)
    with pytest.raises(StoreError, match=r"^memory://hostile/file: 5 bytes long, must be 4 at mo"):
        files.download("memory://hostile/file", tmp_path / "copy", most=4)
    info = type(store).info
    for told, problem in (
        (4, "sends more than the 4 bytes it announced"),
        (6, "sends 5 bytes, must"),
    ):
        with monkeypatch.context() as patch:
            lie = {"size": told}
            patch.setattr(type(store), "info", lambda *a, lie=lie, **o: info(*a, **o) | lie)
            with pytest.raises(StoreError, match=f"memory://hostile/file: the store {problem}"):
                files.download("memory://hostile/file", tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "file"]
    store.rm("/hostile", recursive=True)


# Listings


def page(token: str, names: list[str]) -> bytes:
    listed = "".join(
        f"<Contents><Key>src/{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        "<Size>1</Size></Contents>"
        for name in names
    )
    more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>"
    body = f"<ListBucketResult>{more if token else ''}{listed}</ListBucketResult>"
    return respond("200 OK", body=body.encode())


@pytest.mark.parametrize(
    ("kind", "use"),
    [
        ("empty", files.find),
        ("the same", files.ls),
        ("new", files.find),
        ("one token", files.ls),
    ],
)
def test_a_listing_without_end_is_given_up(monkeypatch, kind, use):
    monkeypatch.setattr("flame_composer.storage.s3.MOST_PAGES", 300)
    count = iter(range(10**9))

    def answer(connection: Any, request: str) -> None:
        if "prefix=&" in request or "prefix=src" not in request:
            return holds({})(connection, request)
        number = next(count)
        names = {"empty": [], "the same": ["a", "b"]}.get(kind, [f"{number:09}"])
        return connection.sendall(page("token" if kind == "one token" else str(number), names))

    with hostile(answer) as server:
        point_to(server, monkeypatch)
        what = {
            "empty": "has nothing new in 100 pages",
            "the same": "has nothing new in 100 pages",
            "new": "goes on after 300 pages with 300 names",
            "one token": "repeats a page",
        }[kind]
        with pytest.raises(StoreError) as caught:
            use("s3://data/src")
        assert str(caught.value) == (
            f"s3://data/src: the listing of {server.endpoint} {what}, and does not end; name a"
            " folder with fewer files, or use a server that lists as S3 does"
        )


def test_pages_without_names_are_passed_over(monkeypatch):
    pages = iter([*([[]] * 60), ["a"], *([[]] * 60), ["b"]])

    def answer(connection: Any, request: str) -> None:
        if "prefix=src" not in request:
            return holds({})(connection, request)
        names = next(pages)
        return connection.sendall(page("" if names == ["b"] else f"{time.monotonic_ns()}", names))

    with hostile(answer) as server:
        point_to(server, monkeypatch)
        assert list(files.find("s3://data/src")) == ["a", "b"]


@pytest.mark.parametrize(
    ("taken_out", "put_in", "message"),
    [
        (rb"<Size>\d+</Size>", b"", "does not report its size, as S3 does; check S3_ENDPOINT_URL"),
        (rb"<Size>", b"<Size>-", "does not report its size, as S3 does; check S3_ENDPOINT_URL"),
        (rb"<LastModified>.*</LastModified>", b"", "does not report its date, as S3 does"),
        (rb"<Size>\d+", b"<Size>many", "does not answer as S3 does: "),
        (rb"<LastModified>2026", b"<LastModified>no", "does not answer as S3 does: "),
        (rb"<Key>.*</Key>", b"", "does not answer as S3 does: "),
    ],
)
def test_a_listing_that_lacks_something_is_told_clearly(monkeypatch, taken_out, put_in, message):
    def spoil(method: str, key: str, start: int, right: bytes) -> bytes | None:
        _, _, body = right.partition(b"\r\n\r\n")
        if key or b"<Contents>" not in body:
            return None
        return respond("200 OK", body=re.sub(taken_out, put_in, body))

    with hostile(holds({"src/a": b"x"}, spoil)) as server:
        point_to(server, monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(server, "answer", holds({}))
            s3_client.connect("data")
        with pytest.raises(StoreError) as caught:
            files.find("s3://data/src")
    assert re.match(r"s3://data/src(/a)?: (the store|http://[\d.:]+) ", str(caught.value))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("taken_out", "message"),
    [
        (b"Content-Length: 1\r\n", "the store does not report its size, as S3 does"),
        (
            b"Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n",
            "the store does not report its date, as S3 does",
        ),
    ],
)
def test_an_object_without_size_or_date(monkeypatch, taken_out, message):
    with hostile(holds({"a": b"x"}, lambda *a: a[3].replace(taken_out, b""))) as server:
        point_to(server, monkeypatch)
        with pytest.raises(StoreError, match=f"^s3://data/a: {message}; check S3_ENDPOINT_URL$"):
            files.stat("s3://data/a")


@pytest.mark.parametrize(
    "scheme", ["dir", "generic", "reference", "simplecache", "filecache", "zip", "tar", "data"]
)
def test_a_scheme_that_is_no_object_store(scheme):
    for use in (files.stat, files.find, files.ls, files.read):
        with pytest.raises(ConfigError) as caught:
            use(f"{scheme}://source/a")
        assert str(caught.value) == (
            f"{scheme}://source/a: {scheme}:// is not an object store; give a path, or the URL of"
            " an object store (s3://, gs://, az://, hdfs://, https:// and others)"
        )


# Addresses


@pytest.mark.parametrize(
    "place",
    [f"s3://AKIAIOSFODNN7EXAMPLE:{SECRET}@data/x", f"s3://key:{SECRET}", "s3://user@data/x"],
)
def test_credentials_in_a_buckets_place_are_not_told(place):
    with pytest.raises(ConfigError) as caught:
        files.stat(place)
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
        assert files.stat("s3://data/a:b@c") is None
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
    monkeypatch.setattr(plain_http, "_warned_of", set())
    for _ in range(2):
        for server in OPEN + CLOSED:
            plain_http.warn_if_readable(server)
    assert len(caplog.messages) == 4
    assert (
        caplog.messages[0]
        == "warning: http://store.example:9000: is not encrypted: what is sent and fetched can be"
        " read and changed on the way; use an https:// address"
    )


def test_the_warning_comes_from_the_first_request(monkeypatch, caplog):
    monkeypatch.setattr(plain_http, "_warned_of", set())
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://no.such.host.invalid")
    for _ in range(2):
        with pytest.raises(ConfigError, match="cannot be reached"):
            files.stat("s3://data/x")
    assert [
        message
        for message in caplog.messages
        if re.match("warning: http://no.such.host.invalid: is not enc", message)
    ]
    assert len(caplog.messages) == 1


def test_loader_processes_and_other_ranks_do_not_repeat_it(monkeypatch, caplog):
    monkeypatch.setattr(plain_http, "_warned_of", set())
    monkeypatch.setenv("RANK", "1")
    plain_http.warn_if_readable("http://store.example")
    assert caplog.messages == []
