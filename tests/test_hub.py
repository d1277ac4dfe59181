"""The Hub end to end: huggingface_hub itself against a small hub on this machine, of which the last word is what it was asked for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest

from llavakit.checkpoint import files, places, store
from llavakit.errors import CheckpointError

COMMIT, OLDER = "a1" * 20, "b2" * 20
NAME = "owner/name"


@dataclass
class Hub:
    """One repository with one branch. ``breaks_at``: a file of which only so many bytes come, once."""

    files: dict[str, bytes]
    breaks_at: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, file, range

    def fetched(self) -> set[str]:
        return {file for method, file, _ in self.asked if method == "GET"}


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if re.fullmatch(rf"/api/models/{NAME}(/revision/(main|{COMMIT}))?", path):
                self.answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in hub.files]}).encode())
            elif re.fullmatch(rf"/api/models/{NAME}/tree/{COMMIT}", path):
                self.answer(json.dumps([self.entry(name) for name in hub.files]).encode())
            elif (found := re.fullmatch(rf"/{NAME}/resolve/(?:main|{COMMIT})/(.+)", path)) and found[1] in hub.files:
                self.file(found[1])
            else:
                missing = "RevisionNotFound" if f"/{NAME}/" in path else "RepoNotFound"
                self.answer(b"{}", status=404, extra={"X-Error-Code": missing})

        def entry(self, name: str) -> dict[str, object]:
            return {"type": "file", "path": name, "size": len(hub.files[name]), "oid": hashlib.sha1(hub.files[name]).hexdigest()}

        def file(self, name: str) -> None:
            content, wanted = hub.files[name], self.headers.get("Range", "")
            hub.asked.append((self.command, name, wanted))
            start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
            extra = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if start:
                extra["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            cut = hub.breaks_at.pop(name, None) if self.command == "GET" else None
            self.answer(content[start:], status=206 if start else 200, extra=extra, cut=cut)

        def answer(self, body: bytes, *, status: int = 200, extra: dict[str, str] | None = None, cut: int | None = None) -> None:
            self.send_response(status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(extra or {})}
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:cut])
            if cut is not None:
                self.close_connection = True

    return Handler


@pytest.fixture
def hub(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the tiny model, and things beside it that nobody needs. The cache is empty, and so is the working folder."""
    content = {path.name: path.read_bytes() for path in tiny_model_dir.iterdir() if path.is_file()}
    beside = {"README.md": b"words", "pytorch_model.bin": b"a pickle", "onnx/model.safetensors": b"else", "checkpoint-5/config.json": b"{}"}
    served = Hub(content | beside)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(served))
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    constants, here = huggingface_hub.constants, f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": here,
        "HUGGINGFACE_CO_URL_TEMPLATE": constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, here),
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield served
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_model_comes_from_the_hub_once_and_loads(hub: Hub, tiny_model_dir: Path) -> None:
    folder = places.find(NAME)
    assert places.commit_of(folder) == COMMIT
    needed = {
        path.name for path in tiny_model_dir.iterdir() if path.is_file() and path.suffix in (".json", ".jinja", ".safetensors", ".txt")
    }
    assert hub.fetched() == needed
    ours, theirs = store.load(folder)[0].state_dict(), store.load(tiny_model_dir)[0].state_dict()
    assert ours.keys() == theirs.keys()
    assert all(bool((value == theirs[name]).all()) for name, value in ours.items())
    hub.asked.clear()
    assert places.find(NAME, revision=COMMIT) == folder
    assert hub.fetched() == set()


def test_what_was_fetched_is_there_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = places.find(NAME)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert places.find(NAME) == folder
    assert hub.asked == []


def test_a_broken_download_goes_on_where_it_broke(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    content, half = hub.files[files.SINGLE], 4000
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what has come is kept by the chunk
    hub.breaks_at[files.SINGLE] = half
    folder = places.find(NAME)
    assert (folder / files.SINGLE).read_bytes() == content
    assert ("GET", files.SINGLE, f"bytes={half}-") in hub.asked


@pytest.mark.parametrize(("name", "revision"), [("nobody/nothing", None), (NAME, "v9"), (NAME, OLDER)])
def test_what_the_hub_does_not_have(hub: Hub, name: str, revision: str | None) -> None:
    with pytest.raises(CheckpointError) as caught:
        places.find(name, revision=revision)
    assert caught.value.code == "hub_not_found"
    assert caught.value.where == (f"{name}@{revision}" if revision else name)
    assert hub.fetched() == set()
