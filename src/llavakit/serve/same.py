"""Does an endpoint answer as we do? Drawn scenes are asked about at both, greedily, and what differs is told with what it probably means.

    questions --+--> endpoint   prompt tokens, text, log-probabilities    --+
                +--> our model  prompt tokens, text                       --+--> Row each --> wrong ones --> Meaning

The meaning is found by being wrong on purpose: the same questions through our own model with one thing changed (``serve.wrong_ways``).
Whoever then counts and says what the endpoint did shows what it does. Words are compared without the blanks around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from llavakit.assistant import Assistant
from llavakit.errors import ContextError, RefusedError
from llavakit.model.generation import context_length, generate
from llavakit.processor import IGNORED, Inputs
from llavakit.scenes.draw import draw
from llavakit.scenes.statements import captions
from llavakit.scenes.world import Scene, scenes
from llavakit.serve.endpoint import Answer
from llavakit.serve.wrong_ways import Made, Way, wrong_ways
from llavakit.text_stream import finished_text
from llavakit.types import Conversation, Image, Sampling, Text, assistant, system, user

NEW_TOKENS = 24
NEAR = 0.15  # nats between two tokens that rounding to 16 bits may exchange
LONG_SIDE = 672  # of the pictures: enough for tiles
Ask = Callable[[Conversation, int], Answer]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question at both. ``place``: the first token that differs; ``margin``: by how much we preferred ours, in nats.

    ``agreement``: share of the endpoint's tokens that are our likeliest, where it tells log-probabilities. ``refused``: its words, or ours.
    """

    name: str
    pictures: int
    ours: str = ""
    theirs: str = ""
    prompt: int = 0
    their_prompt: int | None = None
    place: int | None = None
    margin: float | None = None
    agreement: float | None = None
    refused: str = ""

    @property
    def counted(self) -> bool:
        """Whether the prompts have the same length, as far as the endpoint says."""
        return self.their_prompt in (None, self.prompt)

    @property
    def same(self) -> bool:
        return self.counted and self.place is None and not self.refused

    @property
    def near(self) -> bool:
        """Whether the words part where we were nearly of two minds ourselves."""
        return self.counted and not self.refused and self.margin is not None and self.margin < NEAR


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What a difference probably is, and in which questions it shows."""

    what: str
    remedy: str
    rows: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """``agrees``: the endpoint says what we say, but for near ties."""

    rows: tuple[Row, ...]
    meanings: tuple[Meaning, ...]

    @property
    def agrees(self) -> bool:
        return all(row.same or row.near for row in self.rows) and any(row.same for row in self.rows)


def questions(ours: Assistant) -> dict[str, Conversation]:
    """What is asked, from one test scene that is wide and one that is tall. What the context cannot hold is left out."""
    wide, tall = (next(scene for scene in scenes("test") if _shape(scene) == way) for way in ("wide", "tall"))
    first, second = (Image.of(draw(scene, long_side=LONG_SIDE)) for scene in (wide, tall))
    place = wide.things[0].place
    room = min(ours.processor.max_length, context_length(ours.model)) - NEW_TOKENS
    asked = {
        "text": Conversation((user("What is a square?"),)),
        "system": Conversation((system("Answer in one word."), user("Which colour is a ripe banana?"))),
        "picture": Conversation((user(first, Text(f"What is at the {place} of the picture?")),)),
        "tall picture": Conversation((user(second, Text("Describe the picture.")),)),
        "two pictures": Conversation((user(first, second, Text("What do the two pictures show?")),)),
        "turns": Conversation((user(first, Text("How many things are there?")), assistant("Some."), user("Which colours do they have?"))),
    }
    asked["long"] = Conversation((user(_long(ours, " ".join(captions(wide)), room // 2) + " How many things are there?"),))
    return {name: one for name, one in asked.items() if _fits(ours, one, room)}


def compare(ask: Ask, ours: Assistant, asked: dict[str, Conversation] | None = None, *, new: int = NEW_TOKENS) -> Compared:
    """Ask both. A question that the endpoint refuses is a row of its own; other faults of it are raised (ResponderError)."""
    asked = questions(ours) if asked is None else asked
    rows = tuple(_row(name, one, ask, ours, new) for name, one in asked.items())
    return Compared(rows=rows, meanings=tuple(_meanings(rows, asked, ours, new)))


def _row(name: str, asked: Conversation, ask: Ask, ours: Assistant, new: int) -> Row:
    inputs = ours.processor.encode(asked, learn=False, room=new)
    row = Row(name=name, pictures=len(asked.images), prompt=len(inputs.input_ids), ours=reply(ours, inputs, new))
    try:
        answer = ask(asked, new)
    except RefusedError as error:
        return replace(row, refused=error.what)
    row = replace(row, theirs=answer.text.strip(), their_prompt=answer.prompt_tokens)
    if answer.tokens:
        row = replace(row, agreement=_agreement(ours, inputs, answer.tokens))
    if row.theirs == row.ours:
        return row
    place, margin = _parting(ours, inputs, row.ours, row.theirs)
    return replace(row, place=place, margin=margin)


def reply(ours: Assistant, inputs: Inputs, new: int) -> str:
    """Our greedy words to an encoded question."""
    batch = ours.processor.collate([inputs], side="left").to(ours.model.device, ours.model.dtype)
    (ids,) = generate(ours.model, batch, sampling=Sampling(max_new_tokens=new), stop_ids=ours.stop_ids)
    return finished_text(ours.processor.decode(ids), ours.processor.template.stop).strip()


@torch.inference_mode()
def _scores(ours: Assistant, inputs: Inputs, said: Sequence[int]) -> torch.Tensor:
    """Log-probabilities after the prompt and after each of some tokens of a reply, one row each."""
    ids = torch.cat([inputs.input_ids, torch.tensor(list(said), dtype=torch.long)])
    grown = replace(inputs, input_ids=ids, labels=torch.full_like(ids, IGNORED))
    batch = ours.processor.collate([grown], side="left").to(ours.model.device, ours.model.dtype)
    rows = ours.model.language_model(inputs_embeds=ours.model.embed(batch), use_cache=False, logits_to_keep=len(said) + 1).logits[0]
    return torch.log_softmax(rows.float(), -1)


def _parting(ours: Assistant, inputs: Inputs, mine: str, theirs: str) -> tuple[int, float]:
    """The first token in which two replies differ, and by how much our model prefers its own there."""
    end = min(ours.stop_ids, default=0)
    a, b = ([*ours.processor.tokenizer(text, add_special_tokens=False).input_ids, end] for text in (mine, theirs))
    place = next((at for at, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)) - 1)
    scores = _scores(ours, inputs, a[:place])[-1]
    return place, abs(float(scores[a[place]] - scores[b[place]]))


def _agreement(ours: Assistant, inputs: Inputs, tokens: Sequence[str]) -> float:
    """Share of the endpoint's tokens that are our likeliest after what it said before. Counted up to the first one that we do not know."""
    known = ours.processor.tokenizer.get_vocab()
    ids = [known.get(token.replace(" ", "▁"), known.get(token)) for token in tokens]
    said = [number for number in ids[: ids.index(None) if None in ids else len(ids)] if number is not None]
    best = _scores(ours, inputs, said).argmax(-1).tolist()
    return sum(one == other for one, other in zip(said, best, strict=False)) / len(said) if said else 0.0


def _meanings(rows: Sequence[Row], asked: dict[str, Conversation], ours: Assistant, new: int) -> list[Meaning]:
    """The ways of being wrong that count and say what the endpoint did, those first that explain most; then those that count as it did;
    then plain words for what is left."""
    ways, found = list(wrong_ways(ours)), list[Meaning]()
    left = [row for row in rows if not (row.same or row.refused)]
    for said, explains in (("{}", partial(_explains, ours=ours, new=new)), ("it counts as if {}, and its words differ too", _counts)):
        explained = [(way, {row.name for row in left if explains(way, row, asked[row.name])}) for way in ways] if left else []
        while left:
            names = {row.name for row in left}
            way, shown = max(((way, of & names) for way, of in explained), key=lambda pair: len(pair[1]))
            if not shown:
                break
            found.append(Meaning(what=said.format(way.what), remedy=way.remedy, rows=tuple(row.name for row in left if row.name in shown)))
            left = [row for row in left if row.name not in shown]
    plain = dict[tuple[str, str], list[str]]()
    for row in (*left, *(row for row in rows if row.refused)):
        plain.setdefault(_plain(row, rows), []).append(row.name)
    return found + [Meaning(what=what, remedy=remedy, rows=tuple(names)) for (what, remedy), names in plain.items()]


def _counts(way: Way, row: Row, asked: Conversation) -> bool:
    """Whether a wrong count is that of this way."""
    made = None if row.counted else _try(way, asked)
    return made is not None and made[1] == row.their_prompt


def _try(way: Way, asked: Conversation) -> Made | None:
    try:
        return way.encode(asked)
    except ContextError:
        return None


def _explains(way: Way, row: Row, asked: Conversation, *, ours: Assistant, new: int) -> bool:
    """Whether we, wrong in this way, count what the endpoint counted and say what it said."""
    made = _try(way, asked)
    if made is None:
        return False
    inputs, counted = made
    if row.their_prompt is not None and counted != row.their_prompt:
        return False
    if inputs is None:  # a way that our model cannot compute: the count must tell
        return not row.counted
    return _begins(ours, inputs, row.theirs) and reply(ours, inputs, new) == row.theirs


def _begins(ours: Assistant, inputs: Inputs, text: str) -> bool:
    """Whether our first token can begin a reply: most ways are ruled out by it, at the cost of reading the prompt."""
    first = int(_scores(ours, inputs, ())[-1].argmax())
    begun = ours.processor.decode([first]).strip()
    return first in ours.stop_ids or "\ufffd" in begun or text.startswith(begun)


def _plain(row: Row, rows: Sequence[Row]) -> tuple[str, str]:
    """What can be said of a difference that no way of being wrong explains, and what to do."""
    what, remedy = "other weights, another dtype, or a fault of the endpoint", "check which checkpoint and dtype it serves"
    if row.refused:
        what, remedy = f"it refuses the question: {row.refused}", "check its limits on pictures and context"
    elif not row.counted:
        assert row.their_prompt is not None
        more = row.their_prompt - row.prompt
        what = f"its prompt has {abs(more)} tokens {'more' if more > 0 else 'fewer'} than ours: another chat template, or a cut prompt"
        remedy = "give it the chat template that llava launch writes"
    elif row.near:
        what, remedy = f"a near tie ({row.margin:.2f} nats): rounding of another dtype or kernel", "nothing, if the others agree"
    elif row.pictures and all(one.same or one.near for one in rows if not one.pictures):
        what = "only pictures: its pixels, tower or projector differ"
        remedy = "compare its image processor, then the weights: llava verify"
    return what, remedy


def _shape(scene: Scene) -> str:
    return "wide" if scene.width > scene.height else "tall" if scene.width < scene.height else "square"


def _long(ours: Assistant, text: str, tokens: int) -> str:
    """A text again and again, about so many tokens long."""
    ids = ours.processor.tokenizer(text, add_special_tokens=False).input_ids
    return ours.processor.decode((ids * (tokens // len(ids) + 1))[:tokens])


def _fits(ours: Assistant, asked: Conversation, room: int) -> bool:
    try:
        return len(ours.processor.encode(asked, learn=False).input_ids) <= room
    except ContextError:
        return False
