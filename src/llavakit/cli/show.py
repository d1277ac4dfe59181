"""``llava show``: a conversation as the model sees it: tokens by learned and ignored, the views as a picture, and the counts.

Only the processor is loaded, so this is quick on any checkpoint, and on a training file it answers "what will it learn from this?".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from llavakit.cli import options, terminal
from llavakit.cli.ask import understand
from llavakit.errors import ConfigError
from llavakit.types import Conversation, assistant

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.text import Text

    from llavakit.data.masks import Run
    from llavakit.processor import Inputs, Processor

EXAMPLES = """Examples:

  llava show photo.jpg "What is this?"
  llava show photo.jpg "What is this?" --reply "A cat." --views views.png
  llava show --data scenes/finetune.json --images scenes/images --index 3
"""


def show(
    words: Annotated[
        list[str] | None, Argument(metavar="WORDS", show_default=False, help="Pictures, then the question, as in ask.")
    ] = None,
    reply: Annotated[str | None, Option("--reply", metavar="TEXT", help="What the assistant says: shown as training sees it.")] = None,
    data: Annotated[Path | None, Option("--data", metavar="FILE", help="A training file (LLaVA JSON or JSONL) instead.")] = None,
    images: Annotated[Path | None, Option("--images", metavar="FOLDER", help="Where its pictures lie (default: beside it).")] = None,
    index: Annotated[int, Option("--index", min=0, help="Which of its samples.")] = 0,
    views: Annotated[Path | None, Option("--views", metavar="FILE", help="Save the views as a picture.")] = None,
    template: Annotated[str | None, Option("--template", help="Another prompt format than the model's.")] = None,
    model: options.Model = None,
    as_json: options.Json = False,
) -> None:
    """Show a conversation as the model sees it."""
    if (data is None) == (not words):
        raise ConfigError("nothing to show", code="no_question", remedy="give a question (with pictures before it), or --data FILE")
    from llavakit.data.masks import runs

    conversation = read_sample(data, images, index) if data is not None else typed(words or [], reply)
    processor = load_processor(model, template)
    inputs = processor.encode(conversation, learn=not conversation.open)
    found = runs(inputs, processor)
    if views is not None:
        options.save_picture(contact_sheet(inputs, processor), views)
    if as_json:
        record = counts(inputs, found) | {"ids": inputs.input_ids.tolist(), "labels": inputs.labels.tolist()}
        print(json.dumps(record))
        return
    console = terminal.out()
    colors = terminal.has_color(console)
    if colors and len(inputs.views):
        console.print(terminal.picture(contact_sheet(inputs, processor), columns=48))
    console.print(tokens_as_text(found, colors=colors))
    console.print()
    for name, value in counts(inputs, found).items():
        console.print(f"{name.replace('_', ' '):>14}  {value}")


def typed(words: list[str], reply: str | None) -> Conversation:
    """The conversation of the command line; with a reply it is closed, as a training sample is."""
    conversation = understand(words).conversation
    return conversation if reply is None else conversation.then(assistant(reply))


def read_sample(path: Path, images: Path | None, index: int) -> Conversation:
    """One sample of a training file, checked as training checks it."""
    from llavakit.data.sources import read_llava

    samples = read_llava(path, image_root=images)
    if index >= len(samples):
        raise ConfigError(f"no sample {index}", code="bad_value", where=str(path), remedy=f"it has {len(samples)}, counted from 0")
    return samples[index].conversation


def load_processor(model: str | None, template: str | None) -> Processor:
    """The processor of a checkpoint, without its weights."""
    options.quiet()
    from llavakit.checkpoint import places
    from llavakit.processor import Processor

    processor = Processor.load(places.find(model))
    return processor if template is None else processor.using(options.prompt_format(template))


def counts(inputs: Inputs, found: list[Run]) -> dict[str, int]:
    """What a sequence is made of."""

    def total(kind: str) -> int:
        return sum(len(run.pieces) for run in found if run.kind == kind)

    return {
        "tokens": len(inputs.input_ids),
        "image_tokens": total("image"),
        "learned": total("learned"),
        "ignored": total("ignored"),
        "images": len(inputs.grids),
        "views": len(inputs.views),
    }


def tokens_as_text(found: list[Run], *, colors: bool) -> Text:
    """Tokens divided by ``|``; learned ones green, or between ``[[`` and ``]]`` where colours are not seen."""
    from rich.text import Text

    styles = {"image": "cyan", "learned": "bold green", "ignored": "default"}
    text = Text()
    for run in found:
        words = f"{run.pieces[0]} x {len(run.pieces)}" if run.kind == "image" else "|".join(run.pieces)
        text.append(f"[[{words}]]" if run.kind == "learned" and not colors else words, styles[run.kind])
        text.append("|", "dim")
    return text


def contact_sheet(inputs: Inputs, processor: Processor) -> Image:
    """All views beside each other, brought back from the tower's numbers to colours."""
    import numpy as np
    from PIL import Image

    if not len(inputs.views):
        raise ConfigError("this conversation has no picture", code="no_picture", where="--views", remedy="name one before the question")
    mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (processor.preprocess.mean, processor.preprocess.std))
    views = np.clip((inputs.views.float().numpy() * std + mean) * 255 + 0.5, 0, 255).astype(np.uint8)
    gap, side = 4, views.shape[-1]
    sheet = Image.new("RGB", (len(views) * (side + gap) - gap, side), "white")
    for number, view in enumerate(views):
        sheet.paste(Image.fromarray(view.transpose(1, 2, 0)), (number * (side + gap), 0))
    return sheet
