"""Which conversations to ask a teacher for: contexts x a mix of kinds -> tasks, in an order that the seed alone decides.

    contexts    c0 c1 c2 c3 ...          every kind has its own shuffle of the contexts and takes the first of them;
    mix         58 : 23 : 77             kinds take turns so that any beginning of the plan has about the mix of the whole

No context is asked twice for the same kind. A task carries all chance of its row: where the picture stands in the first question, what a
person says who wants a description, the seed that is sent to the teacher.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from llavakit.datagen.context import Context
from llavakit.datagen.kinds import SHARES, Prompts
from llavakit.datagen.parse import Kind
from llavakit.errors import ConfigError
from llavakit.responder import Query
from llavakit.types import Image, Sampling


@dataclass(frozen=True, slots=True)
class Task:
    """One row to be made. ``instruction`` is what the person says where the reply is bare text, else empty."""

    id: str
    kind: Kind
    context: Context
    instruction: str
    image_first: bool
    seed: int

    def query(self, prompts: Prompts, sampling: Sampling, image: Image | None = None) -> Query:
        """What the teacher is asked (spec 5.2); ``image`` for a teacher who sees."""
        text = self.instruction if self.kind == "answer" else self.context.text(boxes=self.kind != "conversation")
        return Query(id=self.id, conversation=prompts.of(self.kind).ask(text, image), sampling=sampling.but(seed=self.seed))


class Plan:
    """The tasks in order, made as they are asked for. ``counts`` says how many there are of each kind."""

    def __init__(self, contexts: Sequence[Context], counts: Mapping[Kind, int], *, seed: int, detailed: Sequence[str]) -> None:
        for kind, count in counts.items():
            if count > len(contexts):
                what = f"{count:,} of kind {kind} from {len(contexts):,} pictures"
                raise ConfigError(what, code="too_many", where="count", remedy="no picture is asked twice for one kind: ask for fewer")
        self._contexts, self._seed, self._detailed = contexts, seed, detailed
        self.counts = {kind: count for kind, count in counts.items() if count}

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __iter__(self) -> Iterator[Task]:
        orders = {kind: iter(self._order(kind)) for kind in self.counts}
        for kind in _turns(self.counts):
            yield task(kind, self._contexts[next(orders[kind])], seed=self._seed, detailed=self._detailed)

    def _order(self, kind: Kind) -> array[int]:
        order = array("l", range(len(self._contexts)))
        random.Random(f"{self._seed}/{kind}").shuffle(order)
        return order


def task(kind: Kind, context: Context, *, seed: int, detailed: Sequence[str] = (), instruction: str = "") -> Task:
    """One task with its chances drawn: a function of seed, kind and the context's id, whatever else is planned."""
    name = f"{context.id}-{kind}"
    rng = random.Random(f"{seed}/{name}")
    first, said, teacher = rng.random() < 0.5, rng.random(), rng.randrange(1 << 31)
    if kind == "detail":
        instruction = detailed[int(said * len(detailed))]
    return Task(name, kind, context, instruction, first, teacher)


def counts(pictures: int, kinds: Mapping[Kind, float] = SHARES, total: int | None = None) -> dict[Kind, int]:
    """How many of each kind: ``total`` rows in the kinds' ratio by largest remainder; without a total as many as the pictures allow."""
    shares = {kind: Fraction(share) for kind, share in kinds.items() if share > 0}
    whole, most = sum(shares.values()), max(shares.values(), default=Fraction(1))
    if not shares:
        raise ConfigError("no kind of conversation is wanted", code="bad_value", where="kinds", remedy="name at least one")
    total = int(pictures * whole / most) if total is None else total
    exact = {kind: total * share / whole for kind, share in shares.items()}
    taken = {kind: int(value) for kind, value in exact.items()}
    for kind in sorted(exact, key=lambda kind: taken[kind] - exact[kind])[: total - sum(taken.values())]:
        taken[kind] += 1
    return taken


def _turns(counts: Mapping[Kind, int]) -> Iterator[Kind]:
    """Kinds in turn: at each step the one that lags most behind its share."""
    total = sum(counts.values())
    taken = dict.fromkeys(counts, 0)
    for step in range(1, total + 1):
        kind = max((k for k in counts if taken[k] < counts[k]), key=lambda k: counts[k] * step - taken[k] * total)
        taken[kind] += 1
        yield kind
