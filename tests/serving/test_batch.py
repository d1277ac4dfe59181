"""Files of requests: every line one response, whatever happens in between."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine
from served import ask, data_url, look, png, run, service

from llavakit.errors import BusyError, DataError, ImageError, LlavaError
from llavakit.serve.batch import Counts, answer_all
from llavakit.serve.limits import Limits
from llavakit.serve.service import Service


def line(name: Any, body: Any = None, **fields: Any) -> str:
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body or ask(f"line {name}")} | fields)


def answered(folder: Path, lines: list[str], served: Service | None = None, **options: Any) -> tuple[list[dict[str, Any]], Counts]:
    requests, responses = folder / "in.jsonl", folder / "out.jsonl"
    requests.write_text("\n".join(lines) + "\n", encoding="utf-8")
    counts = run(answer_all(served or service(), requests, responses, **options))
    return [json.loads(one) for one in responses.read_text(encoding="utf-8").splitlines()], counts


def test_every_line_gets_its_response(tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda ask: [ask.conversation.messages[0].text])
    lines = [line(f"id-{index}", look(data_url(png()), text=f"picture {index}")) for index in range(100)]
    found, counts = answered(tmp_path, lines, service(engine))
    assert (counts.good, counts.bad, counts.known) == (100, 0, 0)
    told = {one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"] for one in found}
    assert told == {f"id-{index}": f"picture {index}" for index in range(100)}
    assert {one["response"]["status_code"] for one in found} == {200}
    assert len({one["id"] for one in found}) == len({one["response"]["request_id"] for one in found}) == 100


def test_many_are_under_way_at_once_and_not_more(tmp_path: Path) -> None:
    engine, most = ScriptedEngine(lambda ask: [0.01, "a"]), 0
    submit = engine.submit

    async def counted(ask: Any) -> Any:
        nonlocal most
        most = max(most, engine.running + 1)
        return await submit(ask)

    engine.submit = counted  # type: ignore[method-assign]
    answered(tmp_path, [line(str(index)) for index in range(40)], service(engine), at_once=8)
    assert most == 8


BAD = {
    "no json": ("{", "invalid_json"),
    "list": ("[]", "invalid_json"),
    "no id": (line(None), "missing_parameter"),
    "number id": (line(3), "missing_parameter"),
    "another url": (line("a", url="/v1/embeddings"), "unsupported_parameter"),
    "get": (line("a", method="GET"), "unsupported_parameter"),
    "no body": (line("a", body=[1]), "missing_parameter"),
    "stream": (line("a", ask(stream=True)), "unsupported_parameter"),
    "another model": (line("a", ask() | {"model": "x"}), "model_not_found"),
    "bad picture": (line("a", look(data_url(b"x"))), "image_unreadable"),
    "tools": (line("a", ask(tools=[{}])), "unsupported_parameter"),
    "too long": (line("a", ask("x" * 20_000)), "request_too_large"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_gets_an_error_line_and_the_next_goes_on(name: str, tmp_path: Path) -> None:
    bad, code = BAD[name]
    served = service(limits=Limits(body=10_000))
    found, counts = answered(tmp_path, [line("first"), bad, "", line("last")], served)
    assert (counts.good, counts.bad) == (2, 1)
    (error,) = [one for one in found if one["error"]]
    assert error["error"]["code"] == error["response"]["body"]["error"]["code"] == code
    assert error["response"]["status_code"] in (400, 404, 413)
    assert error["custom_id"] == "a" or error["error"]["line"] == 2
    again, counts = answered(tmp_path, [line("first"), bad, "", line("last")], served)
    assert again == found
    assert counts.known == 3


def test_an_id_that_stands_twice_is_answered_once(tmp_path: Path) -> None:
    lines = [line("a"), line("b"), line("a"), line("a")]
    for _ in range(2):
        found, _ = answered(tmp_path, lines, at_once=1)
        assert [one["custom_id"] for one in found] == ["a", "b", None, None]
        assert [one["error"]["line"] for one in found[2:]] == [3, 4]


def test_a_failing_reply_fails_its_line_only(tmp_path: Path) -> None:
    def script(ask: Any) -> Any:
        text = ask.conversation.messages[0].text
        if text == "line b":
            return [LlavaError("secret", code="x")]
        return [ImageError("cut", code="image_truncated", where="images[0]")] if text == "line c" else ["fine"]

    found, _ = answered(tmp_path, [line("a"), line("b"), line("c"), line("d")], service(ScriptedEngine(script)))
    assert {one["custom_id"]: one["response"]["status_code"] for one in found} == {"a": 200, "b": 500, "c": 400, "d": 200}
    assert "secret" not in json.dumps(found)


def test_a_full_engine_is_waited_for(tmp_path: Path) -> None:
    _, counts = answered(tmp_path, [line(str(index)) for index in range(6)], service(ScriptedEngine(lambda ask: [0.05, "a"], room=2)))
    assert counts.good == 6


def test_a_dead_engine_ends_the_run_and_it_goes_on_later(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    served = service(engine)
    lines = [line(str(index)) for index in range(9)]
    engine.alive = False
    with pytest.raises(BusyError, match="engine"):
        answered(tmp_path, lines, served)
    engine.alive = True
    assert answered(tmp_path, lines, served)[1].good == 9


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 4000), again=st.integers(0, 4000))
def test_a_run_cut_anywhere_goes_on_to_the_same_end(cut: int, again: int, tmp_path: Path) -> None:
    lines = [line("a"), "{", line("b"), line("a"), line("c", ask(n=3)), line("é")]
    (tmp_path / "out.jsonl").unlink(missing_ok=True)
    answered(tmp_path, lines)
    for length in (cut, again):
        whole = (tmp_path / "out.jsonl").read_bytes()
        (tmp_path / "out.jsonl").write_bytes(whole[:length])
        found, _ = answered(tmp_path, lines)
        assert (tmp_path / "out.jsonl").read_bytes()[: whole.rfind(b"\n", 0, length) + 1] == whole[: whole.rfind(b"\n", 0, length) + 1]
        assert sorted((one["custom_id"] or "", one["response"]["status_code"]) for one in found) == [
            ("", 400), ("", 400), ("a", 200), ("b", 200), ("c", 400), ("é", 200),
        ]  # fmt: skip


def test_another_file_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("my notes\n")
    with pytest.raises(DataError, match="no response of a batch"):
        answered(tmp_path, [line("a")])
    assert (tmp_path / "out.jsonl").read_text() == "my notes\n"


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"in\.jsonl"):
        run(answer_all(service(), tmp_path / "in.jsonl", tmp_path / "out.jsonl"))
    (tmp_path / "in.jsonl").write_text(line("a"))
    with pytest.raises(DataError, match="nowhere"):
        run(answer_all(service(), tmp_path / "in.jsonl", tmp_path / "nowhere" / "out.jsonl"))


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    served = service(ScriptedEngine(lambda ask: [0.3, "a"]))
    (tmp_path / "in.jsonl").write_text(line("a"))

    async def both() -> list[Any]:
        runs = [answer_all(served, tmp_path / "in.jsonl", tmp_path / "out.jsonl") for _ in range(2)]
        return await asyncio.gather(*runs, return_exceptions=True)

    outcomes = run(both())
    assert sorted(type(one).__name__ for one in outcomes) == ["Counts", "DataError"]


def test_a_file_of_another_system_is_read(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + (line("a") + "\r\n\r\n" + line("b")).encode())
    assert run(answer_all(service(), tmp_path / "in.jsonl", tmp_path / "out.jsonl")).good == 2
