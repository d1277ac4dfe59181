"""Tokens and money: what a call may cost at most is set aside before it is made, so that a budget holds however many are under way."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llavakit.errors import ConfigError
from llavakit.responder.ledger import Spent
from llavakit.responder.protocol import Completion, Query

_BYTES_A_TOKEN = 3  # English has about 4: what is set aside should be too much rather than too little
_A_MESSAGE = 8
_A_PICTURE = 1600  # as large as the common servers count one


@dataclass(frozen=True, kw_only=True)
class Price:
    """Money for a million tokens."""

    prompt: float
    reply: float

    def of(self, prompt_tokens: int, reply_tokens: int) -> float:
        return (prompt_tokens * self.prompt + reply_tokens * self.reply) / 1e6


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a ledger's replies of one model may cost in all, runs before this one included. Money needs a price."""

    tokens: int | None = None
    money: float | None = None
    price: Price | None = None

    def __post_init__(self) -> None:
        if self.money is not None and self.price is None:
            raise ConfigError("a budget in money needs a price", code="no_price", where="price", remedy="say what a million tokens cost")

    def cost(self, spent: Spent) -> float | None:
        return self.price.of(spent.prompt_tokens, spent.reply_tokens) if self.price else None


@dataclass(frozen=True)
class Estimate:
    """Tokens that a call may take. The reply's part cannot be exceeded, the prompt's is guessed from its length."""

    prompt: int
    reply: int


def estimate(query: Query) -> Estimate:
    prompt = 0
    for message in query.conversation.messages:
        prompt += _A_MESSAGE + len(message.text.encode()) // _BYTES_A_TOKEN + _A_PICTURE * len(message.images)
    return Estimate(prompt, query.sampling.max_new_tokens)


class Purse:
    """What is spent, and what is set aside for calls under way.

    The guess of a prompt's tokens learns from what the server counts: it grows by the largest ratio seen.
    """

    def __init__(self, budget: Budget, spent: Spent) -> None:
        self.budget, self.spent = budget, spent
        self._aside_prompt = self._aside_reply = 0
        self._ratio = 1.0

    @property
    def anything_aside(self) -> bool:
        return self._aside_reply > 0

    def fits(self, call: Estimate) -> bool:
        """Whether this call can be paid for, whatever it and those under way will cost."""
        budget = self.budget
        if budget.tokens is None and budget.money is None:
            return True
        prompt = self.spent.prompt_tokens + (self._aside_prompt + call.prompt) * self._ratio
        reply = self.spent.reply_tokens + self._aside_reply + call.reply
        if budget.tokens is not None and prompt + reply > budget.tokens:
            return False
        return budget.money is None or budget.price is None or budget.price.of(int(prompt), int(reply)) <= budget.money

    def set_aside(self, call: Estimate) -> None:
        self._aside_prompt += call.prompt
        self._aside_reply += call.reply

    def give_back(self, call: Estimate) -> None:
        self._aside_prompt -= call.prompt
        self._aside_reply -= call.reply

    def pay(self, call: Estimate, completion: Completion) -> None:
        """A reply came: what was set aside becomes what the server counted."""
        self.give_back(call)
        usage, spent = completion.usage, self.spent
        if usage is None:
            self.spent = replace(spent, replies=spent.replies + 1, uncounted=spent.uncounted + 1)
            return
        self.spent = Spent(
            replies=spent.replies + 1,
            prompt_tokens=spent.prompt_tokens + usage.prompt_tokens,
            reply_tokens=spent.reply_tokens + usage.reply_tokens,
            uncounted=spent.uncounted,
        )
        self._ratio = max(self._ratio, usage.prompt_tokens / max(1, call.prompt))
