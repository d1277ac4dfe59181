"""What the API refuses, each row of the hardening list one test or a few (A1-A5, A9-A12)."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from scripted_engine import ScriptedEngine
from served import CHAT, ask, client, data_url, get, look, picture, png, post, run, service, wrong

from llavakit.serve.limits import Limits

BAD_JSON = {
    "empty": b"",
    "words": b"hello",
    "half": b'{"model": "m"',
    "list": b"[]",
    "number": b"3",
    "deep": b'{"model": "m", "messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "deep enough": b'{"model": "m", "messages": ' + b"[" * 100 + b"]" * 100 + b"}",
    "deep objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "twice": b'{"model": "m", "model": "n", "messages": []}',
    "twice inside": b'{"model": "m", "messages": [{"role": "user", "role": "user", "content": "x"}]}',
    "nan": b'{"model": "m", "temperature": NaN}',
    "infinity": b'{"model": "m", "temperature": -Infinity}',
    "digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "not utf-8": b'{"model": "\xff"}',
    "utf-16": '{"model": "m"}'.encode("utf-16"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_a1_what_is_no_json_is_refused_at_once(name: str) -> None:
    served = service()

    async def timed() -> tuple[Any, float]:
        """The last answer, and the shortest time of some: the machine may be busy."""
        spent = []
        async with client(served) as http:
            await http.get("/health")
            for _ in range(5):
                begun = time.perf_counter()
                answer = await http.post(CHAT, content=BAD_JSON[name], headers={"content-type": "application/json"})
                spent.append(time.perf_counter() - begun)
        return answer, min(spent)

    answer, seconds = run(timed())
    wrong(answer, 400, "invalid_json")
    assert seconds < 0.05


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""])
def test_a1_another_content_type_is_refused(kind: str) -> None:
    wrong(run(post(service(), json.dumps(ask()).encode(), headers={"content-type": kind})), 400, "invalid_json")


MISTYPED: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"messages": [{"role": "user", "content": "x"}]}, "model"),
    "no messages": ({"model": "m"}, "messages"),
    "empty messages": ({"model": "m", "messages": []}, "messages"),
    "messages a string": ({"model": "m", "messages": "x"}, "messages"),
    "message a string": ({"model": "m", "messages": ["x"]}, "messages[0]"),
    "no role": ({"model": "m", "messages": [{"content": "x"}]}, "messages[0].role"),
    "content a number": ({"model": "m", "messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    "content null": ({"model": "m", "messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    "part a string": ({"model": "m", "messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
    "no text": ({"model": "m", "messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    "no url": (
        {"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].image_url.url",
    ),
    "url a string": (
        {"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:x"}]}]},
        "messages[0].content[0].image_url",
    ),
    "detail unknown": (
        {"model": "m", "messages": [{"role": "user", "content": [picture(detail="fine")]}]},
        "messages[0].content[0].image_url.detail",
    ),
    "temperature words": (ask(temperature="hot"), "temperature"),
    "temperature true": (ask(temperature=True), "temperature"),
    "max_tokens half": (ask(max_tokens=1.5), "max_tokens"),
    "seed half": (ask(seed=0.5), "seed"),
    "stream a word": (ask(stream="yes"), "stream"),
    "stop numbers": (ask(stop=[1]), "stop[0]"),
    "seed words": (ask(seed="x"), "seed"),
    "usage a word": (ask(stream_options={"include_usage": "x"}), "stream_options.include_usage"),
}


@pytest.mark.parametrize("name", MISTYPED)
def test_a2_wrong_types_name_their_field(name: str) -> None:
    body, where = MISTYPED[name]
    answer = run(post(service(), body))
    code = answer.json()["error"]["code"]
    assert code in ("invalid_type", "missing_parameter", "bad_content")
    assert wrong(answer, 400, code)["param"] == where


OUT_OF_RANGE = [
    ("temperature", -1), ("temperature", 1e9), ("top_p", 0), ("top_p", 1.1), ("max_tokens", 0), ("max_tokens", -1),
    ("max_tokens", 10**9), ("seed", -1), ("seed", 2**65), ("stop", ["x"] * 17), ("stop", ""), ("stop", "\ud800"), ("n", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE, ids=repr)
def test_p10_values_out_of_range_name_their_field(name: str, value: Any) -> None:
    answer = run(post(service(), json.dumps(ask(**{name: value})).encode()))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name


def test_p10_infinite_numbers_are_refused() -> None:
    body = json.dumps(ask()).encode().replace(b"{", b'{"temperature": 1e999, ', 1)
    assert wrong(run(post(service(), body)), 400, "invalid_type")["param"] == "temperature"


def test_a2_unknown_fields_are_ignored_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "llavakit.serve")
    assert run(post(service(), ask(colour="red", user="me", metadata={"a": "b"}))).status_code == 200
    assert "ignored=colour" in caplog.text
    assert "metadata" not in caplog.text


def test_p9_turns_out_of_order_name_their_message() -> None:
    body = ask() | {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}
    assert wrong(run(post(service(), body)), 400, "bad_turn_order")["param"] == "messages[1]"


def test_p4_what_does_not_fit_is_refused_with_its_own_code() -> None:
    wrong(run(post(service(ScriptedEngine(context=50)), ask("x" * 100))), 400, "context_length_exceeded")


def test_a3_an_unknown_model_is_told_what_is_served() -> None:
    error = wrong(run(post(service(), ask() | {"model": "gpt-5"})), 404, "model_not_found")
    assert "m" in error["message"].split()
    wrong(run(get(service(), "/v1/models/gpt-5")), 404, "model_not_found")


def test_a4_a_body_that_is_announced_too_large_is_not_read() -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield b"x" * 1000

    async def asked(headers: dict[str, str]) -> Any:
        served = service(limits=Limits(body=10_000))
        async with client(served) as http:
            return await http.post(CHAT, content=body(), headers={"content-type": "application/json"} | headers)

    wrong(run(asked({"content-length": "100000"})), 413, "request_too_large")
    assert read == 0
    answer = run(asked({}))
    wrong(answer, 413, "request_too_large")
    assert answer.headers["connection"] == "close"
    assert read <= 12


def test_a4_all_bodies_together_are_bounded() -> None:
    wrong(run(post(service(limits=Limits(bodies=100)), ask("x" * 200))), 503, "overloaded")


def test_a5_pictures_are_counted_and_weighed_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    url = data_url(png(100, 100))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)  # whoever decodes fails
    wrong(run(post(service(limits=Limits(images=2)), look(url, url, url))), 400, "too_many_images")
    wrong(run(post(service(limits=Limits(bytes=300)), look(url, url, url))), 400, "media_budget_exceeded")
    wrong(run(post(service(limits=Limits(pixels=25_000)), look(url, url, url))), 400, "media_budget_exceeded")
    assert run(post(service(limits=Limits(pixels=30_000)), look(url, url, url))).status_code == 200


def test_i5_a_bomb_is_refused_from_its_header() -> None:
    bomb = data_url(png(12_000, 12_000, "1"))
    error = wrong(run(post(service(), look(data_url(png()), bomb))), 400, "image_too_many_pixels")
    assert error["param"] == "messages[0].content[1].image_url.url"


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,@@@", "image_bad_base64"),
        ("data:image/png;base64,iVBORw0KGg", "image_bad_base64"),
        ("data:image/png,abc", "image_bad_data_url"),
        ("data:image/png;base64", "image_bad_data_url"),
        (data_url(b"<svg></svg>"), "image_unreadable"),
        (data_url(b""), "image_unreadable"),
    ],
)
def test_i15_pictures_that_are_none_name_their_field(url: str, code: str) -> None:
    error = wrong(run(post(service(), look(url))), 400, code)
    assert error["param"] == "messages[0].content[0].image_url.url"
    assert "0x" not in error["message"]


@pytest.mark.parametrize("url", ["https://example.org/a.png", "http://127.0.0.1/a.png"])
def test_a6_remote_pictures_are_off(url: str) -> None:
    wrong(run(post(service(), look(url))), 400, "remote_images_disabled")


LOCAL = ["file:///etc/passwd", "/etc/passwd", "etc/passwd", "../../x.png", "\\\\unc\\share\\x.png", "FILE:/x", "ftp://h/x", "", "C:\\x.png"]


@pytest.mark.parametrize("url", LOCAL)
def test_a9_local_paths_are_never_opened(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathlib.Path.open", None)
    body = ask() | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    wrong(run(post(service(), body)), 400, "image_url_not_allowed")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/m", "/ready", "/version", "/metrics", "/openapi.json", "/nothing"])
def test_a10_every_route_but_health_asks_for_the_key(path: str) -> None:
    served = service(key="secret")
    wrong(run(get(served, path)), 401, "invalid_api_key")
    for given in ("Bearer wrong", "Bearer secret2", "Bearer", "secret", "Basic !!!", "Bearer " + "x" * 8000, "Bearer \xff"):
        wrong(run(get(served, path, headers=[(b"authorization", given.encode("latin-1"))])), 401, "invalid_api_key")
    wrong(run(get(served, path + "?api_key=secret&token=secret&key=secret")), 401, "invalid_api_key")
    assert run(get(served, "/health")).status_code == 200
    assert run(get(served, path, headers={"authorization": "Bearer secret"})).status_code in (200, 404)


def test_a10_asking_needs_the_key_before_the_body_is_read() -> None:
    wrong(run(post(service(key="secret"), b"no json")), 401, "invalid_api_key")
    assert run(post(service(key="secret"), ask(), headers={"authorization": "Bearer secret"})).status_code == 200


def test_a10_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("hmac.compare_digest", compare)
    for given in ("", "s", "secret", "secretsecret"):
        run(get(service(key="secret"), "/version", headers={"authorization": f"Bearer {given}"}))
    assert len(compared) == 4
    assert {len(part) for pair in compared for part in pair} == {32}


def test_a10_a_browser_is_asked_for_the_key() -> None:
    served = service(key="secret")
    assert run(get(served, "/", headers={"accept": "text/html"})).headers["www-authenticate"].startswith("Basic")
    assert run(get(served, "/")).headers["www-authenticate"] == "Bearer"
    assert run(get(served, "/version", auth=("anybody", "secret"))).status_code == 200


UNSUPPORTED: list[tuple[str, Any]] = [
    ("tools", [{"type": "function", "function": {"name": "f"}}]), ("tool_choice", "required"), ("functions", [{}]), ("audio", {"v": "x"}),
    ("modalities", ["text", "audio"]), ("response_format", {"type": "json_schema", "json_schema": {}}),
    ("response_format", {"type": "json_object"}), ("n", 2), ("n", 10**9), ("logprobs", True), ("top_logprobs", 3), ("logit_bias", {"5": 1}),
    ("presence_penalty", 0.5), ("frequency_penalty", True), ("prediction", {}), ("reasoning_effort", "high"), ("top_k", 5),
    ("guided_json", {}), ("repetition_penalty", 1.1), ("use_beam_search", True), ("continue_final_message", True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), UNSUPPORTED, ids=repr)
def test_a11_what_we_do_not_do_is_refused(name: str, value: Any) -> None:
    assert wrong(run(post(service(), ask(**{name: value}))), 400, "unsupported_parameter")["param"] == name


def test_a11_asking_for_nothing_is_fine() -> None:
    nothing = {
        "tools": [],
        "n": 1,
        "logprobs": False,
        "response_format": {"type": "text"},
        "presence_penalty": 0,
        "top_k": -1,
        "audio": None,
    }
    assert run(post(service(), ask(**nothing))).status_code == 200


def test_a11_parts_and_roles_that_we_do_not_know_are_refused() -> None:
    parts = [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]
    error = wrong(run(post(service(), ask() | {"messages": [{"role": "user", "content": parts}]})), 400, "unsupported_parameter")
    assert error["param"] == "messages[0].content[0].type"
    tool = [{"role": "tool", "content": "x", "tool_call_id": "1"}]
    wrong(run(post(service(), ask() | {"messages": tool})), 400, "unsupported_parameter")
    wrong(run(post(service(), ask() | {"messages": [{"role": "wizard", "content": "x"}]})), 400, "unknown_role")


def test_a12_ids_are_echoed_only_where_they_are_harmless() -> None:
    for given in ("abc-1_2", "x" * 64):
        assert run(get(service(), "/health", headers={"x-request-id": given})).headers["x-request-id"] == given
    for given in ("a b", "x" * 65, "a\tb", "é", "", "a;b"):
        got = run(get(service(), "/health", headers=[(b"x-request-id", given.encode("latin-1"))])).headers["x-request-id"]
        assert got.startswith("req-")


@pytest.mark.parametrize(("method", "path"), [("GET", CHAT), ("PUT", CHAT), ("HEAD", "/v1/models"), ("OPTIONS", CHAT), ("POST", "/health")])
def test_a12_wrong_methods_get_405(method: str, path: str) -> None:
    async def asked() -> Any:
        async with client(service()) as http:
            return await http.request(method, path, headers={"origin": "http://evil.example", "access-control-request-method": "POST"})

    answer = run(asked())
    assert answer.status_code == 405
    assert answer.headers["allow"]
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a12_unknown_addresses_get_404() -> None:
    for path in ("/docs", "/redoc", "/v1", "/v1/chat/completions/", "/v1/completions", "//", "/%00", "/etc/passwd"):
        wrong(run(get(service(), path)), 404, "not_found")


def test_a_page_elsewhere_cannot_call_a_server_on_this_machine() -> None:
    served = service(hosts=("127.0.0.1", "localhost"))
    wrong(run(get(served, "/v1/models", headers={"host": "evil.example:8000"})), 403, "host_not_allowed")
    for host in ("127.0.0.1:8000", "localhost", "LOCALHOST:1"):
        assert run(get(served, "/v1/models", headers={"host": host})).status_code == 200
