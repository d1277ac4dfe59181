"""``llava serve`` and ``llava batch`` as commands; what the server does is tested in tests/serving."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from llavakit.cli import options
from llavakit.cli.serve import is_loopback, named, warn
from llavakit.errors import ConfigError
from llavakit.serve.fetch import Remote
from llavakit.serve.service import Settings

Llava = Callable[..., Any]


def test_a_port_in_use_is_one_line_at_once(llava: Llava) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        llava("serve", "--port", port).failed(1, f"port {port}", "--port")
    llava("serve", "--host", "256.0.0.1").failed(1, "256.0.0.1", "--host")
    llava("serve", "--host", "192.0.2.1").failed(1, "192.0.2.1", "--host")


WRONG = [("--api-key", ""), ("--api-key", "a b "), ("--api-key", "é"), ("a", "b", "--served-name", "c"), ("a", "--model", "b")]


@pytest.mark.parametrize("words", WRONG)
def test_wrong_words_are_refused_before_anything_is_loaded(llava: Llava, words: tuple[str, ...]) -> None:
    llava("serve", "--port", 0, *words).failed(2)


def test_names_are_the_models_own_or_those_given(tmp_path: Path) -> None:
    (tmp_path / "my-llava").mkdir()
    loading = options.Loading()
    assert list(named(None, None, loading)) == ["tiny"]
    assert list(named([str(tmp_path / "my-llava"), "tiny-hd", "owner/name"], None, loading)) == ["my-llava", "tiny-hd", "owner/name"]
    assert named(["tiny"], ["gpt"], loading)["gpt"].model == "tiny"
    for models, names in ((["tiny", "tiny"], None), (["tiny"], ["a", "b"])):
        with pytest.raises(ConfigError):
            named(models, names, loading)


def test_only_this_machine_is_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org")))


def test_an_open_door_is_said_loudly(capsys: pytest.CaptureFixture[str]) -> None:
    warn("127.0.0.1", Settings())
    warn("0.0.0.0", Settings(key="k", remote=Remote(hosts=("example.org",))))
    assert capsys.readouterr().err == ""
    warn("0.0.0.0", Settings(remote=Remote(hosts=("*",))))
    first, second = capsys.readouterr().err.splitlines()
    assert "WARNING: everybody who reaches 0.0.0.0" in first
    assert "--allow-host" in second


def test_a_batch_is_answered_and_goes_on(llava: Llava, tiny_model_dir: Path, folder: Path) -> None:
    def line(name: str) -> str:
        body = {"model": "t", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
        return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}) + "\n"

    Path("in.jsonl").write_text(line("a") + "{\n" + line("b"))
    words = ("batch", "in.jsonl", "out.jsonl", "--model", tiny_model_dir, "--served-name", "t")
    assert llava(*words).err == "batch: 2 answered, 1 in error\n"
    assert llava(*words).err == "batch: 0 answered, 0 in error, 3 known before\n"
    assert len(Path("out.jsonl").read_text().splitlines()) == 3
    llava("batch", "nothing.jsonl", "out.jsonl").failed(2, "nothing.jsonl")


def test_a_server_from_its_start_to_its_end(tiny_model_dir: Path) -> None:
    command = [sys.executable, "-m", "llavakit", "serve", str(tiny_model_dir), "--served-name", "t", "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "LLAVA_API_KEY"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    said = process.stderr.readline()
    found = re.match(r"serving t at (http://127\.0\.0\.1:\d+) after", said)
    assert found, said
    body = {"model": "t", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 60, "stream": True}
    with httpx.stream("POST", found[1] + "/v1/chat/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        assert list(lines)[-2:] == ["data: [DONE]", ""]  # drained
    begun = time.perf_counter()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert time.perf_counter() - begun < 20
    assert "Traceback" not in err
