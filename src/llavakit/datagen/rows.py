"""A task and the turns that came of it -> one training record in LLaVA's format.

{"id": "17-detail", "conversations": [{"from": "human", "value": "<image>\\nDescribe ..."}, {"from": "gpt", ...}], "image": "17.jpg"}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llavakit.datagen.parse import Turns
from llavakit.datagen.plan import Task
from llavakit.types import Conversation, Image, Message, Text, assistant, user


def filled(task: Task, turns: Turns) -> Turns:
    """The turns with what the person says, where the teacher gave bare text."""
    return tuple((question or task.instruction, answer) for question, answer in turns)


def sample(name: str, image: str, turns: Sequence[tuple[str, str]], *, image_first: bool) -> dict[str, Any]:
    """The record. The picture stands before or after the first question (spec 3.4), on a line of its own."""
    messages: list[Message] = []
    for number, (question, answer) in enumerate(turns):
        messages += [user(question) if number else _first(question, image, image_first), assistant(answer)]
    return {"id": name, **Conversation(tuple(messages)).to_llava(image_names=[image])}


def _first(question: str, image: str, image_first: bool) -> Message:
    picture = Image(Path(image))
    return user(picture, Text("\n" + question)) if image_first else user(Text(question + "\n"), picture)
