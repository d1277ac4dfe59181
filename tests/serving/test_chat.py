"""Chat completions over a scripted engine: what comes back, whole and in pieces."""

from __future__ import annotations

from scripted_engine import ScriptedEngine
from served import ask, data_url, events, get, look, png, post, run, service

from llavakit.types import Image, Text


def test_a_reply_comes_as_one_object() -> None:
    body = run(post(service(), look(data_url(png())))).json()
    (choice,) = body["choices"]
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert choice["message"]["content"] == "I see 1 pictures."
    assert choice["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 4
    assert body["usage"]["prompt_tokens_details"]["image_tokens"] == 10
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 4


def test_a_reply_comes_piece_by_piece_with_usage_last() -> None:
    answer = run(post(service(), ask(stream=True, stream_options={"include_usage": True})))
    told = events(answer.text)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert told[-1] == "[DONE]"
    assert told[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in told[:-2]) == "I see 0 pictures."
    assert told[-3]["choices"][0]["finish_reason"] == "stop"
    assert told[-2]["choices"] == []
    assert told[-2]["usage"]["completion_tokens"] == 4
    assert all(one["usage"] is None for one in told[:-2])
    assert len({one["id"] for one in told[:-1]}) == 1


def test_fields_become_the_ask() -> None:
    engine = ScriptedEngine()
    fields = {"temperature": 0.5, "top_p": 0.9, "seed": 7.0, "stop": "END", "max_completion_tokens": 3}
    run(post(service(engine), look(data_url(png()), **fields)))
    (got,) = engine.asked
    assert got.conversation.messages[0].parts == (Image(png()), Text("What is this?"))
    sampling = got.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.5, 0.9, 7)
    assert (sampling.stop, sampling.max_new_tokens, got.fitted) == (("END",), 3, False)


def test_a_reply_at_its_limit_says_length() -> None:
    body = run(post(service(), ask(max_tokens=2))).json()
    assert body["choices"][0]["finish_reason"] == "length"


def test_models_are_listed() -> None:
    body = run(get(service(), "/v1/models")).json()
    assert [one["id"] for one in body["data"]] == ["m"]
    assert run(get(service(), "/v1/models/m")).json()["max_model_len"] == 2048


def test_health_ready_version_metrics() -> None:
    served = service()
    for path in ("/health", "/ready", "/version"):
        assert run(get(served, path)).status_code == 200
    run(post(served, ask()))
    text = run(get(served, "/metrics")).text
    assert 'llava:request_success_total{model_name="m",finished_reason="stop"} 1' in text
    assert 'llava:time_to_first_token_seconds_count{model_name="m"} 1' in text
    assert 'llava:num_requests_running{model_name="m"} 0' in text
