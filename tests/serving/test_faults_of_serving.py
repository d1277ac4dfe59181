"""Clients that go, readers that stall, engines that fail, servers that are told to stop (S1-S5, S8-S11), on real sockets."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from scripted_engine import ScriptedEngine, Step
from served import CHAT, ask, client, data_url, events, get, look, png, post, run, service, wrong
from sockets import request, rest, serving, until

from llavakit.errors import ImageError, LlavaError
from llavakit.serve.limits import Limits
from llavakit.serve.protocol import Ask
from llavakit.serve.server import Server, bind
from llavakit.serve.service import Service

BODY, STREAM = json.dumps(ask()).encode(), json.dumps(ask(stream=True)).encode()


def slow(ask: Ask) -> Sequence[Step]:
    return ["word ", 0.01] * 3000


def silent(ask: Ask) -> Sequence[Step]:
    return [30.0, "late"]


@pytest.mark.parametrize(("body", "script"), [(STREAM, slow), (STREAM, silent), (BODY, slow), (BODY, silent)])
def test_s1_a_client_that_goes_ends_its_reply(body: bytes, script: Any) -> None:
    engine = ScriptedEngine(script)
    with serving(service(engine)) as running:
        talk = running.talk(request(body))
        until(lambda: engine.running)
        if body is STREAM and script is slow:
            while b"word" not in talk.recv(1 << 12):
                pass
        talk.close()
        assert until(lambda: engine.ended) < 1
        assert engine.running == 0
    assert engine.ended == ["cancelled"]


def test_s1_a_client_that_goes_while_it_sends_is_no_fault_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "llavakit.serve")
    with serving(service()) as running:
        running.talk(request(BODY)[:-5]).close()
        until(lambda: "gone=True" in caplog.text)
    assert "error" not in caplog.text


def test_s2_overload_is_told_at_once_and_passes() -> None:
    engine = ScriptedEngine(lambda ask: ["a", 0.3, "b"], room=4)
    with serving(service(engine)) as running, ThreadPoolExecutor(40) as pool, httpx.Client(base_url=running.url) as http:

        def asked(_: int) -> tuple[httpx.Response, float]:
            begun = time.perf_counter()
            return http.post(CHAT, json=ask()), time.perf_counter() - begun

        http.get("/health")
        answers = list(pool.map(asked, range(40)))
        refused = [(answer, seconds) for answer, seconds in answers if answer.status_code == 503]
        assert len(refused) >= 20
        for answer, _ in refused:
            wrong(answer, 503, "overloaded")
            assert answer.headers["retry-after"] == "1"
        assert sum(answer.status_code == 200 for answer, _ in answers) == 40 - len(refused)
        assert http.post(CHAT, json=ask()).status_code == 200  # it recovers


def test_s2_a_refusal_takes_less_than_fifty_milliseconds() -> None:
    engine = ScriptedEngine(room=0)
    with serving(service(engine)) as running, httpx.Client(base_url=running.url) as http:
        http.post(CHAT, json=look(data_url(png(300, 300))))

        def refused() -> float:
            begun = time.perf_counter()
            wrong(http.post(CHAT, json=look(data_url(png(300, 300)))), 503, "overloaded")
            return time.perf_counter() - begun

        assert min(refused() for _ in range(9)) < 0.05  # the least of some: the machine may be busy


def test_s3_a_reader_who_stalls_is_cut_off_and_others_are_not_held_up() -> None:
    engine = ScriptedEngine(lambda ask: ["x" * 500_000] * 200 if ask.sampling.max_new_tokens > 100 else ["ok"])
    with serving(service(engine, limits=Limits(seconds_to_read=0.5))) as running:
        talk = running.talk(request(STREAM), buffer=4096)
        until(lambda: engine.told > 1)
        time.sleep(0.2)
        told = engine.told
        assert httpx.post(running.url + CHAT, json=ask(max_tokens=5), timeout=2).status_code == 200
        time.sleep(0.1)
        assert engine.told - told <= 4  # what was not read was not made either
        assert told < 60
        until(lambda: "cancelled" in engine.ended)
        talk.close()


def test_s4_a_drain_refuses_at_once_and_lets_what_runs_end() -> None:
    engine = ScriptedEngine(lambda ask: ["a", 1.5, "b"])
    served = service(engine)
    with serving(served) as running:
        talk = running.talk(request(STREAM, CHAT, "Connection: close"))
        until(lambda: engine.running)
        running.server.handle_exit(signal.SIGTERM, None)
        wrong(httpx.get(running.url + "/ready"), 503, "shutting_down")
        refused = httpx.post(running.url + CHAT, json=ask())
        wrong(refused, 503, "shutting_down")
        assert refused.headers["retry-after"]
        assert httpx.get(running.url + "/health").status_code == 200
        assert b"[DONE]" in rest(talk)
        until(lambda: running.codes)
    assert running.codes == [0]
    assert engine.ended == ["stop"]
    assert engine.drained


@pytest.mark.parametrize("body", [BODY, STREAM])
def test_s4_what_outlasts_the_grace_is_told_so(body: bytes) -> None:
    engine = ScriptedEngine(slow)
    with serving(service(engine), grace=0.2) as running:
        talk = running.talk(request(body, CHAT, "Connection: close"))
        until(lambda: engine.running)
        running.server.handle_exit(signal.SIGTERM, None)
        assert b'"shutting_down"' in rest(talk)
        until(lambda: running.codes)
    assert running.codes == [0]


def test_s4_a_second_signal_ends_it_now() -> None:
    engine = ScriptedEngine(silent)
    with serving(service(engine), grace=30) as running:
        running.talk(request(STREAM))
        until(lambda: engine.running)
        for _ in range(2):
            running.server.handle_exit(signal.SIGTERM, None)
        assert until(lambda: running.codes) < 3
    assert running.codes == [128 + signal.SIGTERM]


SECRET = "the secret of /etc/shadow at 0x7f00"


def test_s5_a_reply_that_fails_gets_500_and_the_next_one_works() -> None:
    fail = [True]
    engine = ScriptedEngine(lambda ask: [LlavaError(SECRET, code="out_of_memory")] if fail.pop() else ["fine"])
    served = service(engine)
    fail[:] = [False, True]
    answer = run(post(served, ask()))
    wrong(answer, 500, "internal_error")
    assert "secret" not in answer.text
    assert run(post(served, ask())).status_code == 200


def test_s5_a_stream_that_fails_ends_with_an_error_event() -> None:
    engine = ScriptedEngine(lambda ask: ["half ", LlavaError(SECRET, code="out_of_memory")])
    answer = run(post(service(engine), ask(stream=True)))
    told = events(answer.text)
    assert answer.status_code == 200
    assert told[-1] == "[DONE]"
    assert told[-2]["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert not any(one["choices"][0]["finish_reason"] for one in told[:-2])


def test_s5_a_stream_that_fails_before_its_first_word_gets_a_status() -> None:
    engine = ScriptedEngine(lambda ask: [LlavaError(SECRET, code="out_of_memory")])
    wrong(run(post(service(engine), ask(stream=True))), 500, "internal_error")
    bad = ImageError("the picture's data end too early", code="image_truncated", where="images[1]")
    body = look(data_url(png()), data_url(png()), stream=True)
    error = wrong(run(post(service(ScriptedEngine(lambda ask: [bad])), body)), 400, "image_truncated")
    assert error["param"] == "messages[0].content[1].image_url.url"


def test_s5_an_engine_that_raises_gets_500(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine()

    async def submit(ask: Ask) -> None:
        raise MemoryError(SECRET)

    monkeypatch.setattr(engine, "submit", submit)
    answer = run(post(service(engine), ask()))
    wrong(answer, 500, "internal_error")
    assert "secret" not in answer.text


def test_s5_a_dead_engine_ends_the_process() -> None:
    engine = ScriptedEngine()
    with serving(service(engine)) as running:
        engine.alive = False
        wrong(httpx.get(running.url + "/health"), 503, "engine_dead")
        wrong(httpx.post(running.url + CHAT, json=ask()), 503, "engine_dead")
        until(lambda: running.codes)
    assert running.codes == [1]


def test_s8_ids_are_made_here_and_nobody_can_end_the_reply_of_another() -> None:
    async def asked() -> list[str]:
        served = service()
        async with client(served) as http:
            answers = [await http.post(CHAT, json=ask(), headers={"x-request-id": "same"}) for _ in range(20)]
            return [answer.json()["id"] for answer in answers]

    ids = run(asked())
    assert len(set(ids)) == 20
    assert all(re.fullmatch("chatcmpl-[0-9a-f]{32}", one) for one in ids)
    paths = run(get(service(), "/openapi.json")).json()["paths"]
    assert not [path for path in paths if "abort" in path or "cancel" in path or "delete" in paths[path]]


def test_s9_a_server_is_alive_while_its_model_is_loaded() -> None:
    served, go = Service(), threading.Event()

    def load() -> dict[str, ScriptedEngine]:
        go.wait(10)
        return {"m": ScriptedEngine()}

    with serving(served, load=load) as running:
        assert httpx.get(running.url + "/health").status_code == 200
        for answer in (httpx.get(running.url + "/ready"), httpx.post(running.url + CHAT, json=ask())):
            wrong(answer, 503, "model_loading")
            assert answer.headers["retry-after"]
        go.set()
        until(lambda: httpx.get(running.url + "/ready").status_code == 200)
        assert httpx.post(running.url + CHAT, json=ask()).status_code == 200


def test_s9_a_model_that_cannot_be_loaded_ends_the_process() -> None:
    error = LlavaError("no weights", code="x")

    def load() -> dict[str, ScriptedEngine]:
        raise error

    server = Server(Service(), bind("127.0.0.1", 0), load)
    with pytest.raises(LlavaError, match="no weights"):
        server.serve_until_told()


def test_s10_a_port_in_use_is_one_line() -> None:
    held = bind("127.0.0.1", 0)
    port = held.getsockname()[1]
    with pytest.raises(LlavaError, match=f"port {port} of 127.0.0.1 is in use.*--port"):
        bind("127.0.0.1", port)
    with pytest.raises(LlavaError, match="no address"):
        bind("host.invalid", 80)
    held.close()


def test_s11_logs_hold_ids_and_numbers_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    served = service(key="k3y", limits=Limits())
    headers = {"authorization": "Bearer k3y"}
    run(post(served, look(data_url(png()), text="my private words"), headers=headers))
    run(post(served, ask() | {"model": "x\nFAKE LINE", "bad\nfield": 1}, headers=headers))
    run(get(served, "/nothing%0aFAKE%20LINE?token=k3y", headers=headers))
    run(post(served, b'{"my private words"', headers=headers))
    run(get(served, "/version", headers={"authorization": "Bearer wr0ng"}))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("llavakit")]
    assert len(lines) == 5
    for line in lines:
        assert "\n" not in line
        assert not re.search("private|base64|k3y|wr0ng|FAKE LINE", line), line


def test_a12_a_head_that_is_no_http_or_too_large_gets_json() -> None:
    with serving(service()) as running:
        big = "X-Big: " + "x" * 1_000_000
        for sent in (b"hello\r\n\r\n", f"GET /health HTTP/1.1\r\nHost: a\r\n{big}\r\n\r\n".encode(), b"GET / HTTP/1.1\r\n\r\n"):
            talk = running.talk()
            try:
                talk.sendall(sent)
                head, _, body = rest(talk).partition(b"\r\n\r\n")
            except ConnectionError:
                continue  # cut off while it was still sending
            assert head.startswith(b"HTTP/1.1 400")
            assert json.loads(body)["error"]["code"] == "bad_request"
        assert httpx.get(running.url + "/health").status_code == 200


def test_a4_a_body_that_does_not_come_is_not_waited_for() -> None:
    with serving(service(limits=Limits(seconds_to_send=0.3))) as running:
        talk = running.talk(request(BODY)[:-5])
        got = rest(talk)
        assert got.startswith(b"HTTP/1.1 408")
        assert b'"request_timeout"' in got


def test_a4_a_large_body_is_answered_over_a_socket_before_it_is_sent() -> None:
    with serving(service(limits=Limits(body=100_000), key="k")) as running:
        big = b"x" * 20_000_000
        headers = {"authorization": "Bearer k", "content-type": "application/json"}
        wrong(httpx.post(running.url + CHAT, content=big, headers=headers), 413, "request_too_large")
        wrong(httpx.post(running.url + CHAT, content=big), 401, "invalid_api_key")
        chunked = httpx.post(running.url + CHAT, content=iter([big[:50_000]] * 400), headers=headers)
        wrong(chunked, 413, "request_too_large")
