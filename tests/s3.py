"""A real S3 server on this machine: JuiceFS's gateway. A pytest plugin."""

from __future__ import annotations

import os
import selectors
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BUCKET = "data"


@dataclass(frozen=True)
class S3:
    """The server, with bucket `data`: its endpoint, a boto3 client, and the environment that
    leads a process to it.
    """

    endpoint: str
    client: Any
    env: dict[str, str]

    def upload(self, folder: Path, prefix: str) -> str:
        """Puts all files of a folder under s3://data/prefix, which it returns."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.client.put_object(
                    Bucket=BUCKET,
                    Key=f"{prefix}/{path.relative_to(folder)}",
                    Body=path.read_bytes(),
                )
        return f"s3://{BUCKET}/{prefix}"

    def keys(self, prefix: str) -> dict[str, int]:
        """Size of every object under s3://data/prefix, in bytes, by its name below it."""
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=BUCKET, Prefix=f"{prefix}/"
        )
        return {
            item["Key"][len(prefix) + 1 :]: item["Size"]
            for page in pages
            for item in page.get("Contents", [])
        }

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()


class Relay(socketserver.ThreadingTCPServer):
    """A line to the server that breaks: it cuts the next `num_cuts` answers after a megabyte,
    and is gone after `cut`. It takes `rate` bytes per second on the way to the server.
    """

    def __init__(self, endpoint: str, rate: float = float("inf")):
        super().__init__(("127.0.0.1", 0), _Connection)
        host, port = endpoint.removeprefix("http://").split(":")
        self.rate = rate
        self.last_upload = 0.0  # when a full block of one was on its way, by time.monotonic()
        self.num_sent = 0  # bytes, on the way to the server
        self.target, self.num_cuts, self.is_cut = (host, int(port)), 0, False
        self.endpoint = "http://{}:{}".format(*self.server_address)
        self.thread = threading.Thread(target=self.serve_forever, args=[0.05])

    def __enter__(self) -> Relay:
        self.thread.start()
        return self

    def cut(self) -> None:
        self.is_cut = True
        self.shutdown()
        self.thread.join()
        self.server_close()

    def __exit__(self, *error: object) -> None:
        self.cut()


class _Connection(socketserver.BaseRequestHandler):
    server: Relay

    def handle(self) -> None:
        num_bytes = 0
        # Not select.select: the numbers of the files may be too large for it.
        with (
            socket.create_connection(self.server.target) as server,
            selectors.DefaultSelector() as selector,
        ):
            for end in (self.request, server):
                selector.register(end, selectors.EVENT_READ)
            while not self.server.is_cut:
                for key, _ in selector.select(0.1):
                    source: Any = key.fileobj
                    block = source.recv(1 << 16)
                    if source is server:
                        num_bytes += len(block)
                        if num_bytes > 1 << 20 and self.server.num_cuts:
                            self.server.num_cuts -= 1
                            return
                    if not block:
                        return
                    if source is not server:
                        self.server.num_sent += len(block)
                    if source is not server and len(block) == 1 << 16:
                        self.server.last_upload = time.monotonic()
                        time.sleep(len(block) / self.server.rate)
                    (self.request if source is server else server).sendall(block)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    import boto3

    folder = tmp_path_factory.mktemp("s3")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    endpoint = f"http://{address[0]}:{address[1]}"
    juicefs = Path(sys.executable).with_name("juicefs")
    meta = f"sqlite3://{folder}/meta.db"
    env = {
        "MINIO_ROOT_USER": "tester",
        "MINIO_ROOT_PASSWORD": "testtest",
        "HOME": str(folder),
        "PATH": os.environ["PATH"],
    }
    subprocess.run(
        [juicefs, "format", meta, "test", "--storage", "file", "--bucket", f"{folder}/bucket/"],
        check=True,
        env=env,
        capture_output=True,
    )
    server = subprocess.Popen(
        [
            juicefs,
            "gateway",
            "--no-banner",
            "--multi-buckets",
            "--keep-etag",
            meta,
            f"{address[0]}:{address[1]}",
        ],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(address).close()
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)
        variables = {
            "S3_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "testtest",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="tester",
            aws_secret_access_key="testtest",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=BUCKET)
        yield S3(endpoint, client, variables)
        client.close()
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server, to which this process's environment points too. A `Script` needs it said:
    env=s3.env.
    """
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    # On a machine that is busy with other things
    monkeypatch.setattr("flame_composer.storage.s3_client.FIRST_SECONDS", 60)
    return s3_server
