"""The chat as a Gradio app, for places that expect one (Hugging Face Spaces): ``llava demo --gradio``. The extra ``gradio``.

Small on purpose: one picture box, one conversation, three sliders, a Stop. What else there is to see lies in our own page (``web``).
Gradio serves its own temporary folder and nothing else; uploads have a limit, nothing is shared, and what the model writes is text.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit.errors import LlavaError, MissingExtraError, PromptError
from llavakit.responder.protocol import Responder
from llavakit.types import Conversation, Message, Sampling, assistant

MAX_UPLOAD = "20mb"


def launch(responder: Responder, *, name: str, port: int | None = None, examples: Sequence[tuple[str, Path]] = ()) -> None:
    """Serve the app on 127.0.0.1 until it is interrupted (where GRADIO_SERVER_NAME says so, as on Spaces, elsewhere)."""
    app(responder, name=name, examples=examples).launch(server_port=port, share=False, max_file_size=MAX_UPLOAD, show_error=True)


def app(responder: Responder, *, name: str, examples: Sequence[tuple[str, Path]] = ()) -> Any:
    """The app over whoever replies. Raises MissingExtraError."""
    gradio = package()

    def reply(
        message: Mapping[str, Any], history: Sequence[Mapping[str, Any]], temperature: float, top_p: float, max_tokens: float
    ) -> Iterator[str]:
        said = ""
        try:
            sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=int(max_tokens))
            for piece in responder.reply(conversation(message, history), sampling):
                said += piece
                yield said
        except LlavaError as error:
            raise gradio.Error(str(error), title="That did not work") from error

    return gradio.ChatInterface(
        reply,
        multimodal=True,
        title=name,
        chatbot=gradio.Chatbot(render_markdown=False, sanitize_html=True, height="65vh", show_label=False, buttons=["copy"]),
        textbox=gradio.MultimodalTextbox(file_types=["image"], file_count="multiple", placeholder="Add a picture and ask something"),
        additional_inputs=[
            gradio.Slider(0, 2, 0, step=0.1, label="Temperature"),
            gradio.Slider(0.05, 1, 1, step=0.05, label="Top p"),
            gradio.Slider(16, 1024, 256, step=16, label="Longest reply, in tokens"),
        ],
        additional_inputs_accordion="Parameters",
        analytics_enabled=False,
        examples=[[{"text": question, "files": [str(picture)]}] for question, picture in examples] or None,
        cache_examples=False,
    )


def conversation(message: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> Conversation:
    """Gradio's history and the new message as a conversation. Neighbours of one role, as Gradio writes picture and words, become one.

    A question that got no reply (it was refused, or stopped before its first word) is left out.
    """
    turns: list[tuple[str, list[Any]]] = []
    for said in history:
        if not turns or turns[-1][0] != said["role"]:
            turns.append((said["role"], []))
        turns[-1][1].extend(_parts(said["content"]))
    pairs = [pair for pair in zip(turns[::2], turns[1::2], strict=False) if "".join(text for text in pair[1][1] if isinstance(text, str))]
    closed = [turn for (_, asked), (_, replied) in pairs for turn in (_asked(asked), assistant("".join(replied)))]
    now = [*map(Path, message.get("files", ())), *([message["text"]] if message.get("text", "").strip() else [])]
    if not now:
        raise PromptError("there is no question", code="empty_prompt", remedy="type one, or add a picture")
    return Conversation((*closed, _asked(now)))


def _asked(parts: Sequence[str | Path]) -> Message:
    """Pictures first, then the words on a line of their own."""
    (message,) = Conversation.ask(
        "\n".join(part for part in parts if isinstance(part, str)), *(part for part in parts if isinstance(part, Path))
    ).messages
    return message


def _parts(content: Any) -> Iterator[str | Path]:
    """Words and files of one message, in all the forms that Gradio 5 and 6 give it."""
    for part in content if isinstance(content, list | tuple) else [content]:
        if isinstance(part, str):
            yield part
        elif isinstance(part, Mapping) and part.get("type") == "text":
            yield part["text"]
        elif isinstance(part, Mapping):
            yield Path((part.get("file") or part)["path"])


def package() -> Any:
    """Gradio, or MissingExtraError."""
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise MissingExtraError("the app needs gradio", code="missing_extra", remedy="pip install 'llavakit[gradio]'") from error
