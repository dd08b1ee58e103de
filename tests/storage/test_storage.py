"""The same functions on a folder and on a real S3 server, and what is said when a store cannot
be used.
"""

from __future__ import annotations

import io
import random
import socket
import time
from pathlib import Path

import pytest

from flame_composer.errors import ConfigError, StoreError
from flame_composer.storage import files, s3_client
from flame_composer.storage.filesystems import is_url
from tests.s3 import BUCKET, Relay

FIRST_SECONDS = s3_client.FIRST_SECONDS


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path) -> str:
    """An empty folder, and one in an object store."""
    if request.param == "folder":
        return str(tmp_path)
    request.getfixturevalue("s3")
    return f"s3://{BUCKET}/{tmp_path.name}"


def fill(place: str, tmp_path: Path, **contents: bytes) -> None:
    for name, data in contents.items():
        (tmp_path / "file").write_bytes(data)
        files.put(tmp_path / "file", files.join(place, *name.split("__")))
    (tmp_path / "file").unlink()


def test_files_and_folders(place, tmp_path):
    assert (files.find(place), files.ls(place), files.stat(files.join(place, "a"))) == (
        {},
        [],
        None,
    )
    fill(place, tmp_path, a=b"1", sub__b=b"22", sub__deep__c=b"333")
    assert {name: stat.size for name, stat in files.find(place).items()} == {
        "a": 1,
        "sub/b": 2,
        "sub/deep/c": 3,
    }
    assert files.ls(place) == ["a", "sub"]
    assert files.ls(files.join(place, "sub")) == ["b", "deep"]
    assert files.find(files.join(place, "su")) == {}, "a prefix of a name is no folder"
    stat = files.stat(files.join(place, "a"))
    assert stat is not None
    assert stat.size == 1
    assert abs(stat.modified - time.time()) < 60
    assert files.stat(files.join(place, "sub")) is None, "a folder is no file"
    files.delete(files.join(place, "a"))
    files.delete(files.join(place, "a"))
    files.delete_folder(files.join(place, "sub"))
    assert files.find(place) == {}
    files.delete_folder(files.join(place, "sub"))


def test_links_in_a_circle_lead_nowhere(tmp_path):
    """Each of two links to the folder itself would be followed in the other, forty deep; so
    would links to further links.
    """
    for name in ("a/b", "c", "d", "e"):
        (tmp_path / "folder" / name).mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("folder/a/b/file", "folder/c/file", "other/file"):
        (tmp_path / name).write_bytes(b"x")
    for name, target in (
        ("up", "."),
        ("again", "."),
        ("a/up", "../../folder"),
        ("a/c", "../c"),
        ("linked", "../other"),
        ("c/down", "../d"),
        ("c/same", "../d"),
        ("d/down", "../e"),
        ("d/same", "../e"),
    ):
        (tmp_path / "folder" / name).symlink_to(target)
    assert list(files.find(str(tmp_path / "folder"))) == [
        "a/b/file",
        "a/c/file",
        "c/file",
        "linked/file",
    ]


def test_what_is_written_is_read(place, tmp_path):
    data = random.Random(0).randbytes(100_000)
    address = files.join(place, "a file with spaces & ümlauts")
    files.write(address, b"old")
    files.write(address, data)
    assert files.read(address) == data
    files.download(address, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    with files.open_file(address, block_size=4096) as file:
        assert (file.seek(50_000), file.read(3), file.tell()) == (
            50_000,
            data[50_000:50_003],
            50_003,
        )
        assert file.seek(-10, io.SEEK_END) == len(data) - 10
        assert (file.read(), file.read()) == (data[-10:], b"")
        file.seek(0)
        assert b"".join(file) == data
    with files.open_file(address, block_size=0) as file:
        assert (file.read(7), file.read(5)) == (data[:7], data[7:12])
    for read in (
        files.read,
        files.open_file,
        lambda name: files.download(name, tmp_path / "copy"),
    ):
        with pytest.raises(FileNotFoundError):
            read(files.join(place, "missing"))
    assert (tmp_path / "copy").read_bytes() == data
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_folder_appears_with_its_last_file(place, tmp_path):
    (tmp_path / "made").mkdir()
    for name in ("a", "last", "z"):
        (tmp_path / "made" / name).write_text(name)
    target = files.join(place, "target")
    order: list[str] = []
    put = files.put

    def spy(local, name):
        order.append(Path(name).name)
        put(local, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "put", spy)
        files.put_folder(tmp_path / "made", target, "last")
    assert order == (["a", "z", "last"] if is_url(place) else []), "a local folder is renamed"
    assert sorted(files.find(target)) == ["a", "last", "z"]
    assert not (tmp_path / "made").exists()


def test_a_version_is_that_of_the_content(s3, tmp_path):
    address = f"s3://{BUCKET}/{tmp_path.name}/file"
    files.write(address, b"one" * 1000)
    first = files.stat(address)
    files.write(address, b"one" * 1000)
    assert files.stat(address).version == first.version
    with files.open_file(address, first.version, block_size=100) as file:
        assert file.read(3) == b"one"
        files.write(address, b"two" * 1000)
        with pytest.raises(StoreError, match=r"/file: was replaced while it was read$"):
            file.read()
    with pytest.raises(StoreError, match=r"/file: has been replaced since it was looked at$"):
        files.open_file(address, first.version)


def test_globs(s3, tmp_path):
    root = f"s3://{BUCKET}/{tmp_path.name}"
    fill(root, tmp_path, x__1=b"", x__2=b"", x__y__1=b"", z__1=b"")
    assert files.glob(f"{root}/x/*") == [f"{root}/x/1", f"{root}/x/2"]
    assert files.glob(f"{root}/*/1") == [f"{root}/x/1", f"{root}/z/1"]
    assert files.glob(f"{root}/**/1") == [f"{root}/x/1", f"{root}/x/y/1", f"{root}/z/1"]
    assert files.glob(f"{root}/none*") == []


def test_large_files_go_in_parts_and_what_is_left_of_a_killed_one_is_removed(
    s3, tmp_path, monkeypatch
):
    monkeypatch.setattr("flame_composer.storage.s3.SINGLE_PUT", 6 << 20)
    monkeypatch.setattr("flame_composer.storage.s3.PART", 5 << 20)
    data = random.Random(1).randbytes(11 << 20)
    (tmp_path / "file").write_bytes(data)
    address = f"s3://{BUCKET}/{tmp_path.name}/file"
    files.put(tmp_path / "file", address)
    assert files.read(address) == data
    key = f"{tmp_path.name}/killed"
    begun = s3.client.create_multipart_upload(Bucket=BUCKET, Key=key)
    s3.client.upload_part(
        Bucket=BUCKET, Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=b"x" * (5 << 20)
    )

    def uploads():
        return s3.client.list_multipart_uploads(Bucket=BUCKET, Prefix=tmp_path.name).get(
            "Uploads", []
        )

    assert [upload["Key"] for upload in uploads()] == [key]
    files.abort_uploads(f"s3://{BUCKET}/{tmp_path.name}")
    assert uploads() == []
    assert files.ls(f"s3://{BUCKET}/{tmp_path.name}") == ["file"]


# What the user has to put right is said in one line, in time.


@pytest.mark.parametrize(
    ("environment", "bucket", "message"),
    [
        (
            {"AWS_SECRET_ACCESS_KEY": "wrong"},
            BUCKET,
            r"access denied by http://.* \(SignatureDoesNotMatch\); check the cred",
        ),
        (
            {"AWS_ACCESS_KEY_ID": "wrong"},
            BUCKET,
            r"access denied by http://.* \(InvalidAccessKeyId\); check the credentials",
        ),
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
            BUCKET,
            r"no credentials; set AWS_ACCESS_KEY_ID and AWS_SEC",
        ),
        ({"AWS_PROFILE": "nobody"}, BUCKET, r"The config profile \(nobody\) could not be found"),
        (
            {},
            "nowhere",
            r"there is no bucket 'nowhere' at http://127.*; check its name, or create it",
        ),
        (
            {},
            "not_a_bucket!",
            r"Parameter validation failed: Invalid bucket name \"not_a_bucket!\"",
        ),
        (
            {"S3_ENDPOINT_URL": "http://127.0.0.1:1"},
            BUCKET,
            r"http://127.0.0.1:1 cannot be reached: .*; check the network",
        ),
        (
            {"S3_ENDPOINT_URL": "http://no.such.host.invalid"},
            BUCKET,
            r"http://no.such.host.invalid cannot be reached",
        ),
        ({"S3_ENDPOINT_URL": "nonsense"}, BUCKET, r"Invalid endpoint: nonsense"),
        (
            {"S3_ENDPOINT_URL": "", "AWS_ENDPOINT_URL": "http://127.0.0.1:1"},
            BUCKET,
            r"http://127.0.0.1:1 cannot be reached",
        ),
    ],
)
def test_a_store_that_cannot_be_used(s3, monkeypatch, tmp_path, environment, bucket, message):
    for name, value in {
        "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": str(tmp_path),
        **environment,
    }.items():
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)
    (tmp_path / "file").write_bytes(b"data")
    address = f"s3://{bucket}/folder/file"
    uses = [files.stat, lambda place: files.put(tmp_path / "file", place)]
    for use in uses:
        with pytest.raises(ConfigError, match=rf"^s3://{bucket}.*: {message}") as caught:
            use(address)
        assert "\n" not in str(caught.value)


def test_the_aws_variable_names_the_server_too(s3, monkeypatch):
    monkeypatch.delenv("S3_ENDPOINT_URL")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    assert files.stat(f"s3://{BUCKET}/missing") is None


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://", r"s3://: names no bucket; must be s3://bucket/path"),
        ("s3:///file", r"s3:///file: names no bucket"),
        ("file:///x", r"file:///x: must be given as a path, without file://"),
        ("gs://bucket/file", r"gs://bucket/file: Please install gcsfs"),
        ("nonsense://x", r"nonsense://x: Protocol not known: nonsense"),
    ],
)
def test_urls_that_cannot_be_used(place, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        files.stat(place)


def test_a_server_that_does_not_answer_is_given_up(s3, monkeypatch):
    assert s3_client.FIRST_ATTEMPTS * FIRST_SECONDS < 12, "the user is told within 15 seconds"
    monkeypatch.setattr(s3_client, "FIRST_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(
            ConfigError,
            match=r"^s3://data: http://127.* cannot be reached: Read timeout; check the network",
        ):
            files.stat(f"s3://{BUCKET}/x")


def test_an_answer_that_breaks_off_is_asked_for_again(s3, tmp_path, monkeypatch):
    data = random.Random(2).randbytes(3 << 20)
    files.write(f"s3://{BUCKET}/{tmp_path.name}/file", data)
    with Relay(s3.endpoint) as relay:
        monkeypatch.setenv("S3_ENDPOINT_URL", relay.endpoint)
        relay.num_cuts = 3
        assert files.read(f"s3://{BUCKET}/{tmp_path.name}/file") == data
        assert relay.num_cuts == 0
        relay.num_cuts = 100
        with pytest.raises(StoreError, match=r"/file: .*(broken|Connection|read)"):
            files.read(f"s3://{BUCKET}/{tmp_path.name}/file")
        assert 80 < relay.num_cuts <= 100 - s3_client.ATTEMPTS, "asked again, but not for ever"


@pytest.mark.parametrize(
    "name", ["ba12.pt", "shard.00000.mds", ".hidden", "a b", "naïve", "x" * 255]
)
def test_a_plain_name(name):
    assert files.is_plain_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/etc/passwd",
        "../up",
        "a/b",
        "a\\b",
        "a\0b",
        "a\nb",
        "\x1b[2J",
        "\ud800",
        "x" * 256,
        "é" * 128,
        None,
        3,
    ],
)
def test_a_name_that_is_not_plain(name):
    assert not files.is_plain_name(name)
