"""From a batch to new tokens: prefill, decode, sample, and what has been read so far.

    prefill     read prompts (text and pictures), give the scores of the next token          B.T   -> B.V
    decode_one  read one token a row, give the scores of the next                            B     -> B.V
    sample      choose a token a row: the best, or by temperature and top-p with a seed      B.V   -> B
    stream      one conversation, token by token
    generate    a batch, rows that have ended leave it; beam search (``model/beam.py``) when asked

``Past`` is the memory: the keys and values of every position read, so nothing is read twice. A batch is padded on the left.
Scores are float32. Sizes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Cache

from llavakit.errors import ContextError
from llavakit.model.beam import Beams
from llavakit.model.cache import new_cache
from llavakit.types import Sampling

if TYPE_CHECKING:
    from llavakit.model.llava import Llava
    from llavakit.processor import Batch

Ends = Callable[[int, int], bool]  # (row of the batch, token just chosen) -> this row's reply is over


@dataclass(kw_only=True)
class Past:
    """What a model has read of each row."""

    cache: Cache
    mask: Tensor  # (B, read) bool, False on padding
    padded: bool  # whether any of it is padding; without, attention needs no mask

    @staticmethod
    def empty(model: Llava, rows: int = 1) -> Past:
        mask = torch.zeros(rows, 0, dtype=torch.bool, device=model.device)
        return Past(cache=new_cache(model.language_model.config), mask=mask, padded=False)

    @property
    def length(self) -> int:
        """Positions read, padding included."""
        return self.mask.shape[1]

    def keep(self, positions: int) -> None:
        """Forget everything after the first ``positions``; everything at all where the cache cannot forget a part."""
        if positions == self.length:
            return
        if positions and self.cache.is_croppable:
            self.cache.crop(positions - self.length)
        else:
            positions = 0
            self.cache.layers.clear()
        self.mask = self.mask[:, :positions]

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]

    def repeat(self, times: int) -> None:
        """Every row ``times`` times, copies side by side."""
        self.cache.batch_repeat_interleave(times)
        self.mask = self.mask.repeat_interleave(times, 0)


def context_length(model: Llava) -> int:
    """How many positions the language model was built for."""
    return int(model.language_model.config.max_position_embeddings)


def check_context(model: Llava, *, prompt: int, new: int) -> None:
    """Refuse what does not fit before anything is computed (hardening P4): nothing is ever cut silently. Raises ContextError.

    prompt: positions read and to be read, image tokens included; new: tokens the reply may take.
    """
    limit = context_length(model)
    rest = limit - prompt
    if rest < new:
        raise ContextError(
            f"{prompt} prompt tokens and {new} new ones do not fit a context of {limit}",
            code="context_length_exceeded",
            where="max_new_tokens" if rest > 0 else "messages",
            remedy=f"ask for at most {rest} new tokens" if rest > 0 else "shorten the conversation or use fewer images",
        )


@torch.inference_mode()
def prefill(model: Llava, batch: Batch, past: Past) -> Tensor:
    """Read a batch behind what was read before. Returns the scores (B, V) of the token after the last position."""
    return prefill_embeddings(model, model.embed(batch), mask=batch.mask, positions=batch.positions, past=past)


@torch.inference_mode()
def prefill_embeddings(model: Llava, embeddings: Tensor, *, mask: Tensor, positions: Tensor, past: Past) -> Tensor:
    """The same from embeddings (B, T, H): pictures are in their places already."""
    assert not model.training, "call eval() before generating"
    past.mask = torch.cat([past.mask, mask], 1)
    past.padded = past.padded or not bool(mask.all())
    return _read(model, past, inputs_embeds=embeddings, position_ids=positions)


@torch.inference_mode()
def decode_one(model: Llava, tokens: Tensor, past: Past) -> Tensor:
    """Read one more token (B,) in each row. Returns the scores (B, V) of the next."""
    positions = past.mask.sum(1, keepdim=True)
    past.mask = torch.nn.functional.pad(past.mask, (0, 1), value=True)
    return _read(model, past, input_ids=tokens[:, None], position_ids=positions)


def _read(model: Llava, past: Past, **inputs: Tensor) -> Tensor:
    output = model.language_model(
        **inputs,
        attention_mask=past.mask if past.padded else None,
        past_key_values=past.cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1].float()  # type: ignore[no-any-return]


def sample(scores: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """One token a row, (B,): the best one at temperature 0, otherwise drawn from the smallest set holding ``top_p`` of the probability.

    generators: one a row, so that a row draws the same tokens alone and in a batch. Drawing is done on the CPU in float64.
    """
    if sampling.temperature == 0:
        return scores.argmax(-1)
    scores = scores.detach().to("cpu", torch.float64)
    scores = (scores - scores.amax(-1, keepdim=True)) / sampling.temperature
    probabilities, order = torch.softmax(scores, -1).sort(dim=-1, descending=True, stable=True)
    reached = probabilities.cumsum(-1)
    probabilities = probabilities.masked_fill(reached - probabilities >= sampling.top_p, 0)
    reached = probabilities.cumsum(-1)
    dice = torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    places = torch.searchsorted(reached, dice * reached[:, -1:], right=True).clamp(max=(probabilities > 0).sum(-1, keepdim=True) - 1)
    chosen: Tensor = order.gather(-1, places)[:, 0]
    return chosen


def new_generator(seed: int | None) -> torch.Generator:
    """A random stream of one's own: the same for the same seed, a new one for None."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


@torch.inference_mode()
def stream(model: Llava, batch: Batch, *, sampling: Sampling, stop_ids: frozenset[int], past: Past | None = None) -> Generator[int]:
    """The tokens of one reply, each as soon as it is chosen, without the end token. A token is read only when the next is asked for.

    past: continue behind this memory and leave it filled; ``batch`` then holds only what is new. Raises ContextError.
    """
    assert batch.input_ids.shape[0] == 1, "stream takes one conversation"
    past = Past.empty(model) if past is None else past
    check_context(model, prompt=past.length + batch.input_ids.shape[1], new=sampling.max_new_tokens)
    generators = [new_generator(sampling.seed)]
    scores = prefill(model, batch, past)
    for count in range(1, sampling.max_new_tokens + 1):
        token = sample(scores, sampling, generators)
        number = int(token)
        if number in stop_ids:
            return
        yield number
        if count < sampling.max_new_tokens:
            scores = decode_one(model, token.to(scores.device), past)


@torch.inference_mode()
def generate(model: Llava, batch: Batch, *, sampling: Sampling, stop_ids: frozenset[int], ends: Ends | None = None) -> list[list[int]]:
    """The new tokens of every row, without the end token.

    ends: asked after every token; True ends that row (a stop string was written), the token included. Not asked by beam search.
    Raises ContextError.
    """
    check_context(model, prompt=batch.input_ids.shape[1], new=sampling.max_new_tokens)
    past = Past.empty(model, batch.input_ids.shape[0])
    scores = prefill(model, batch, past)
    if sampling.num_beams > 1:
        return beam_search(model, scores, past, beams=sampling.num_beams, new=sampling.max_new_tokens, stop_ids=stop_ids)
    return decode_many(model, scores, past, sampling=sampling, stop_ids=stop_ids, ends=ends)


@torch.inference_mode()
def decode_many(
    model: Llava,
    scores: Tensor,
    past: Past,
    *,
    sampling: Sampling,
    stop_ids: frozenset[int],
    ends: Ends | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> list[list[int]]:
    """Go on from ``scores`` until every row has ended. A row that has ended leaves the batch, so the rest goes faster.

    generators: what each row draws from; None: every row from a stream of its own that begins at ``sampling.seed``.
    """
    alive = list(range(scores.shape[0]))
    replies: list[list[int]] = [[] for _ in alive]
    generators = generators or [new_generator(sampling.seed) for _ in alive]
    for count in range(1, sampling.max_new_tokens + 1):
        tokens = sample(scores, sampling, [generators[row] for row in alive])
        going = [_take(token, row, replies[row], stop_ids, ends) for row, token in zip(alive, tokens.tolist(), strict=True)]
        if count == sampling.max_new_tokens or not any(going):
            break
        if not all(going):
            places = torch.tensor([place for place, goes in enumerate(going) if goes])
            alive, tokens = [alive[place] for place in places.tolist()], tokens[places]
            past.keep_rows(places.to(past.mask.device))
        scores = decode_one(model, tokens.to(scores.device), past)
    return replies


def _take(token: int, row: int, reply: list[int], stop_ids: frozenset[int], ends: Ends | None) -> bool:
    """Write a chosen token down; whether the row goes on."""
    if token in stop_ids:
        return False
    reply.append(token)
    return ends is None or not ends(row, token)


@torch.inference_mode()
def beam_search(model: Llava, scores: Tensor, past: Past, *, beams: int, new: int, stop_ids: frozenset[int]) -> list[list[int]]:
    """The best reply of every row, from the scores (B, V) after a prefill. ``past`` is used up."""
    rows = scores.shape[0]
    searches = [Beams(beams) for _ in range(rows)]
    past.repeat(beams)
    logits = scores[:, None]  # (B, 1 then beams, V): at first every beam is the same one
    for count in range(1, new + 1):
        for search, row in zip(searches, torch.log_softmax(logits, -1).cpu(), strict=True):
            search.advance(row, stop_ids=stop_ids, last=count == new)
        if all(search.settled for search in searches):
            break
        parents = [number * beams + parent for number, search in enumerate(searches) for parent in search.parents]
        tokens = [token for search in searches for token in search.tokens]
        past.cache.reorder_cache(torch.tensor(parents, device=scores.device))
        logits = decode_one(model, torch.tensor(tokens, device=scores.device), past).unflatten(0, (rows, beams))
    return [search.reply(stop_ids) for search in searches]
