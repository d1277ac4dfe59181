"""The files of a processor in llava-hf layout: written for transformers, read from it.

tokenizer.json, tokenizer_config.json     the tokenizer; its model_max_length is the processor's
preprocessor_config.json                  images.Preprocess (LlavaImageProcessor, with do_pad)
processor_config.json                     image token, patch size, whether the class feature is kept; ours: image_pieces
chat_template.jinja                       the template; published folders may keep it in a JSON file instead
config.json                               read only, for the context length
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llavakit.chat_template import foreign
from llavakit.errors import CheckpointError, PromptError
from llavakit.preprocess import Preprocess
from llavakit.prompts import TEMPLATES, Template, spelled
from llavakit.tiling import Size, Tiling, pinpoints
from llavakit.types import Conversation, Image, Pixels, Text, assistant, system, user

_NO_LENGTH = 10**6  # transformers writes 1e30 where a tokenizer names no length
_PIECES = "tokenizer.model"
_AROUND = ("<im_start>", "<im_end>")  # spec 1.2, the first checkpoints
_USUAL_LENGTH = 4096  # Vicuna v1.5 (spec 1.3)


def write(
    folder: Path,
    *,
    tokenizer: Any,
    template: Template,
    preprocess: Preprocess,
    max_length: int,
    values: Mapping[str, Any],
    canvases: Sequence[Size] = (),
) -> None:
    """Write all files but config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    named = {"processor_class": "LlavaNextProcessor" if canvases else "LlavaProcessor"}
    kept = {name: value for name, value in _json(folder / "tokenizer_config.json").items() if name != "chat_template"}
    _write_json(folder / "tokenizer_config.json", {**kept, **named, "model_max_length": max_length})
    _write_json(folder / "preprocessor_config.json", {**preprocess.to_hf(canvases), **named})
    _write_json(folder / "processor_config.json", {**named, **values})
    (folder / "chat_template.jinja").write_text(template.jinja(), "utf-8")
    copy_pieces(tokenizer, folder)


def copy_pieces(tokenizer: Any, folder: Path) -> bool:
    """Keep SentencePiece's file, which old programs read and transformers 5 does not write; whether there is one."""
    home = Path(tokenizer.name_or_path or ".") / _PIECES
    if home.is_file() and tokenizer.name_or_path:
        shutil.copyfile(home, folder / _PIECES)
    return (folder / _PIECES).exists()


def tokenizer(folder: Path) -> Any:
    """The tokenizer as transformers loads it; never from the network, never running code of the folder. Raises CheckpointError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise bare Exceptions on broken files
        raise CheckpointError(
            "the tokenizer cannot be loaded", code="tokenizer_unreadable", where=str(folder), remedy="fetch its tokenizer files again"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Files:
    """What the JSON files and the chat template of a folder say."""

    folder: Path
    preprocessor: Mapping[str, Any]
    processor: Mapping[str, Any]
    config: Mapping[str, Any]
    chat_template: str | None

    @staticmethod
    def read(folder: Path) -> Files:
        """A nested image processor counts before one written apart, as in transformers. Raises CheckpointError."""
        processor = _json(folder / "processor_config.json", missing={})
        nested = processor.get("image_processor")
        preprocessor = nested if isinstance(nested, dict) else _json(folder / "preprocessor_config.json")
        chat = _chat_template(folder, processor)
        return Files(
            folder=folder,
            preprocessor=preprocessor,
            processor=processor,
            config=_json(folder / "config.json", missing={}),
            chat_template=chat,
        )

    @property
    def tiling(self) -> Tiling:
        """The rule for tiles: the model's config.json where it is one of a tiled model, the preprocessor's own list otherwise."""
        side = Preprocess.from_hf(self.preprocessor).size
        points = self.config.get("image_grid_pinpoints") or self.preprocessor.get("image_grid_pinpoints")
        return Tiling(
            side=side,
            patch=int(self.processor.get("patch_size") or self.config.get("vision_config", {}).get("patch_size") or 14),
            canvases=pinpoints(points, side=side, height_first=True) if points else (),
            merge=self.config.get("merge") or ("spatial_unpad" if points else "flat"),
            arithmetic=self.config.get("arithmetic") or "transformers",
            class_token=self.class_token,
        )

    @property
    def image_token(self) -> str:
        return str(self.processor.get("image_token") or "<image>")

    @property
    def image_pieces(self) -> Literal["hf", "original"]:
        """How the text after a picture is tokenised (ours; transformers knows its own way only)."""
        return "original" if self.processor.get("image_pieces") == "original" else "hf"

    @property
    def class_token(self) -> bool:
        """True when the class feature is kept (577 tokens)."""
        strategy = self.processor.get("vision_feature_select_strategy") or self.config.get("vision_feature_select_strategy")
        return strategy == "full"

    def max_length(self, tokenizer: Any) -> int:
        """The tokenizer's length if it names one, else the language model's."""
        if tokenizer.model_max_length < _NO_LENGTH:
            return int(tokenizer.model_max_length)
        return int(self.config.get("text_config", {}).get("max_position_embeddings") or _USUAL_LENGTH)

    def template(self, tokenizer: Any) -> Template:
        """The template of the table that writes what the folder's chat template writes, else that chat template itself.

        Raises CheckpointError ``unknown_chat_template`` for one that does not work.
        """
        if self.chat_template is None:
            return TEMPLATES["llava_hf"]
        around = [_AROUND] if _AROUND[0] in self.chat_template else []
        for template in TEMPLATES.values():
            ended = template.ending(tokenizer.eos_token or template.end) if not template.plain_end else template
            for candidate in (template, ended, *(one.around_images(*both) for both in around for one in (template, ended))):
                if _renders(self.chat_template, candidate, tokenizer):
                    return candidate
        named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        return foreign(self.chat_template, tokens=named, where=str(self.folder))


def _renders(chat_template: str, template: Template, tokenizer: Any) -> bool:
    """Whether both write the same for every probe that ``template`` can write."""
    from transformers.utils.chat_template_utils import render_jinja_template

    probes = list(_written(template))
    try:
        texts, _ = render_jinja_template(
            conversations=[to_hf_messages(probe) for probe, _ in probes],
            chat_template=chat_template,
            add_generation_prompt=True,
            **tokenizer.special_tokens_map,
        )
    except Exception:  # a chat template may refuse a probe by raising anything
        return False
    return bool(texts == [text for _, text in probes])


def _written(template: Template) -> Iterator[tuple[Conversation, str]]:
    pixel = Image(Pixels(width=1, height=1, rgb=bytes(3)))
    first = user(pixel, Text("What?"))  # no line break of its own: published templates write it
    for probe in (
        Conversation((first,)),
        Conversation((user("Why?"),)),
        Conversation((first, assistant("A cat."), user("Why?"))),
        Conversation((system("Be brief."), first)),
    ):
        try:
            yield probe, spelled(template.render(probe))
        except PromptError:
            continue


def to_hf_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation as transformers' chat templates take it, part by part."""
    return [
        {
            "role": message.role,
            "content": [{"type": "image"} if isinstance(part, Image) else {"type": "text", "text": part.text} for part in message.parts],
        }
        for message in conversation.messages
    ]


def _chat_template(folder: Path, processor: Mapping[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text("utf-8")
    inside = _json(folder / "chat_template.json", missing={}).get("chat_template") or processor.get("chat_template")
    inside = inside or _json(folder / "tokenizer_config.json", missing={}).get("chat_template")
    return inside if isinstance(inside, str) else None


def _json(file: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object from a file; ``missing`` if there is none. Raises CheckpointError."""
    if missing is not None and not file.exists():
        return missing
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError("cannot be read as JSON", code="file_unreadable", where=str(file), remedy="fetch it again") from error
    if not isinstance(values, dict):
        raise CheckpointError("does not hold a JSON object", code="file_unreadable", where=str(file), remedy="fetch it again")
    return values


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
