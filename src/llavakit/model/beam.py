"""Beam search, the bookkeeping: keep the few most probable continuations of each conversation, return the best finished one.

The rules are transformers' (length penalty 1, ``early_stopping=False``), so the ids are the same as its ``generate(num_beams=n)``:

* a step ranks all continuations of a conversation's beams and looks at the first ``beams * max(2, 1 + number of end tokens)``;
* of these, the best ``beams`` that have not ended go on; ended ones count only if they rank among the first ``beams``;
* an ended one scores log probability / number of tokens; the best ``beams`` of them are kept;
* a conversation is settled once ``beams`` have ended and the best one going on, ended now, would not enter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Beams:
    """One conversation's beams: (log probability, tokens), best first; of the ended ones (score, tokens), best first."""

    beams: int
    going: list[tuple[float, list[int]]] = field(default_factory=lambda: [(0.0, [])])
    ended: list[tuple[float, list[int]]] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)  # which old beam each one going on extends
    settled: bool = False

    def advance(self, log_probabilities: Tensor, *, stop_ids: frozenset[int], last: bool) -> None:
        """Take (beams so far, V) log probabilities of the next token. ``last``: no step follows, so everything ends here."""
        width = log_probabilities.shape[1]
        totals = log_probabilities + torch.tensor([score for score, _ in self.going])[:, None]
        wanted = min(self.beams * max(2, 1 + len(stop_ids)), totals.numel())
        best = torch.topk(totals.flatten(), wanted)
        old, self.going, self.parents = self.going, [], []
        for rank, (score, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            parent, token = divmod(place, width)
            tokens = [*old[parent][1], token]
            if token in stop_ids or last:
                if rank < self.beams and not self.settled:
                    self.ended.append((score / len(tokens), tokens))
            elif len(self.going) < self.beams:
                self.going.append((score, tokens))
                self.parents.append(parent)
        self.ended = sorted(self.ended, key=lambda one: -one[0])[: self.beams]
        self.settled = self.settled or last or (len(self.ended) == self.beams and not self._may_improve())

    def _may_improve(self) -> bool:
        score, tokens = self.going[0]
        return score / len(tokens) > self.ended[-1][0]

    @property
    def tokens(self) -> list[int]:
        """The last token of every beam going on: what to read next."""
        return [tokens[-1] for _, tokens in self.going]

    def reply(self, stop_ids: frozenset[int]) -> list[int]:
        """The best ended continuation, without its end token."""
        tokens = self.ended[0][1]
        return tokens[:-1] if tokens[-1] in stop_ids else tokens
