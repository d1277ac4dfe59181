"""A sample as runs of one kind, for people: what is a picture, what is learned, what is read only.

<s> USER : \\n <image> x 576 ... What is this ? ASSISTANT : A cat . </s>
[ ignored ][  image  ][           ignored             ][  learned   ]
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from llavakit.processor import IGNORED, Inputs, Processor


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one kind: ``image``, ``learned`` or ``ignored``."""

    kind: str
    pieces: tuple[str, ...]


def runs(inputs: Inputs, processor: Processor) -> list[Run]:
    """The sequence as runs of one kind, in order; together they hold every token once."""

    def kind(position: int) -> str:
        if ids[position] == processor.image_token_id:
            return "image"
        return "ignored" if labels[position] == IGNORED else "learned"

    ids, labels = inputs.input_ids.tolist(), inputs.labels.tolist()
    pieces = processor.tokenizer.convert_ids_to_tokens(ids)
    return [Run(name, tuple(pieces[i] for i in group)) for name, group in groupby(range(len(ids)), key=kind)]
