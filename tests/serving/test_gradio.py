"""The Gradio app: its history becomes a conversation; the rest is Gradio's, and is tried where it is installed."""

from __future__ import annotations

import importlib.util
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from llavakit.errors import MissingExtraError, PromptError
from llavakit.responder.scripted import ScriptedResponder
from llavakit.serve import gradio_app
from llavakit.types import Conversation, assistant

DOG = Path(str(files("llavakit") / "pictures" / "scene-60002004.png"))


def said(role: str, *content: Any) -> dict[str, Any]:
    return {"role": role, "content": list(content)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def picture(path: Path) -> dict[str, Any]:
    return {"type": "file", "file": {"path": str(path)}}


PLAIN = [
    {"role": "user", "content": {"path": str(DOG)}},
    {"role": "user", "content": "What is this?"},
    {"role": "assistant", "content": "A dog."},
]


def test_the_first_question() -> None:
    got = gradio_app.conversation({"text": "What is this?", "files": [str(DOG)]}, [])
    assert got == Conversation.ask("What is this?", DOG)


@pytest.mark.parametrize(
    "history",
    [
        [said("user", picture(DOG), text("What is this?")), said("assistant", text("A dog."))],
        [said("user", picture(DOG)), said("user", text("What is this?")), said("assistant", text("A dog."))],
        PLAIN,
    ],
    ids=["one message", "two messages", "plain"],
)
def test_a_history_goes_on(history: list[dict[str, Any]]) -> None:
    got = gradio_app.conversation({"text": "Where?", "files": []}, history)
    (more,) = Conversation.ask("Where?").messages
    assert got == Conversation.ask("What is this?", DOG).then(assistant("A dog.")).then(more)


def test_a_question_without_a_reply_is_left_out() -> None:
    history = [said("user", text("Too long")), said("assistant", text(""))]
    assert gradio_app.conversation({"text": "Short", "files": []}, history) == Conversation.ask("Short")


def test_nothing_is_no_question() -> None:
    with pytest.raises(PromptError, match="no question"):
        gradio_app.conversation({"text": " ", "files": []}, [])


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(MissingExtraError, match=r"llavakit\[gradio\]"):
        gradio_app.package()


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed: pip install 'llavakit[gradio]'")
def test_the_app_is_built() -> None:
    made = gradio_app.app(ScriptedResponder(["A dog."]), name="tiny", examples=[("What is this?", DOG)])
    assert made.title == "tiny"
