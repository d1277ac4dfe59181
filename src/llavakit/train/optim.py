"""AdamW or Muon over the parameters that learn, the learning-rate curve, and the optimizer's memory by parameter name.

rate
 1 |   /--.._                 climbs in ceil(warmup * steps) steps, then 0.5 * (1 + cos(pi * share of the rest))
   |  /      `-._             (spec 4.2: warm-up ratio 0.03, cosine to 0). Step s stands at s + 1 in the climb, so that
 0 | /           `-.._        no step is spent at rate 0, where the original's first step is.
   +--------------------> step
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llavakit.errors import CheckpointError
from llavakit.train.ranks import like, whole

Kind = Literal["adamw", "muon"]


def factor(step: int, *, steps: int, warmup: float) -> float:
    """The share of the peak rate at which optimizer step ``step`` (from 0) is taken."""
    climb = math.ceil(warmup * steps)
    if step < climb:
        return (step + 1) / climb
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - climb) / max(1, steps - climb))))


def hidden_matrices(model: nn.Module) -> frozenset[str]:
    """The weights Muon is meant for: those of linear layers between the embedding and the head, the head itself left out."""
    heads = {id(part.get_output_embeddings()) for part in model.modules() if isinstance(part, PreTrainedModel)}
    linear = ((name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear) and id(part) not in heads)
    return frozenset(f"{name}.weight" for name, _ in linear)


class Optimizer:
    """Fused AdamW. Weights and moments are fp32; norms and biases (one dimension) do not decay.

    With ``kind="muon"`` the hidden matrices take Muon's orthogonal steps instead (Jordan et al. 2024), scaled to the size of AdamW's
    (arXiv 2502.16982), so that one rate serves both; everything else stays with AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        rates: Mapping[str, float],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        clip: float,
        kind: Kind = "adamw",
    ) -> None:
        self._named = {name: parameter for name, parameter in model.named_parameters() if name in rates}
        self._parameters = list(self._named.values())
        self._lr, self._clip = lr, clip
        hidden = hidden_matrices(model) if kind == "muon" else frozenset()
        groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
        for name, parameter in self._named.items():
            assert parameter.dtype == torch.float32, f"{name} learns in {parameter.dtype}"
            groups.setdefault((name in hidden, rates[name], parameter.ndim > 1), []).append(parameter)
        rows: dict[bool, list[dict[str, object]]] = {False: [], True: []}
        for (orthogonal, rate, decays), members in groups.items():
            rows[orthogonal].append({"params": members, "weight_decay": weight_decay if decays else 0.0, "share": rate})
        fused = self._parameters[0].device.type in ("cpu", "cuda", "mps")
        self._steppers: list[torch.optim.Optimizer] = []
        if rows[False]:
            self._steppers.append(torch.optim.AdamW(rows[False], lr=lr, betas=betas, eps=1e-8, fused=fused))
        if rows[True]:
            self._steppers.append(torch.optim.Muon(rows[True], lr=lr, momentum=0.95, adjust_lr_fn="match_rms_adamw"))

    @property
    def learned(self) -> int:
        """How many numbers learn."""
        return sum(parameter.numel() for parameter in self._parameters)

    def clip_gradients(self) -> Tensor:
        """The norm of all gradients before clipping (a scalar tensor); scales them down to ``clip`` unless that is 0."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._clip:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._clip, norm)
        return whole(norm)

    def step(self, share: float) -> float:
        """One update at ``share`` of the peak rate; the rate of rows with rate 1 is returned."""
        for stepper in self._steppers:
            for group in stepper.param_groups:
                group["lr"] = self._lr * group["share"] * share
            stepper.step()
        return self._lr * share

    def forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """The moments and step counts by parameter name; empty before the first update."""
        return {
            f"{key}/{name}": value.detach()
            for name, parameter in self._named.items()
            for stepper in self._steppers
            for key, value in stepper.state.get(parameter, {}).items()
        }

    def parameter(self, name: str) -> nn.Parameter | None:
        """The one of this name that learns."""
        return self._named.get(name)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of ``state``. Raises CheckpointError when the names or shapes are of other parameters."""
        found: dict[str, dict[str, Tensor]] = {}
        for full, value in state.items():
            key, _, name = full.partition("/")
            found.setdefault(name, {})[key] = value
        # A parameter without a memory is one that no gradient has reached: the tower's layers after the one LLaVA reads.
        strange = sorted(set(found) - set(self._named))
        strange += [
            name
            for name, entry in found.items()
            if name in self._named and any(value.ndim and value.shape != self._named[name].shape for value in entry.values())
        ]
        if strange:
            raise CheckpointError(
                f"the optimizer's memory does not fit {len(strange)} parameters, first {strange[0]}",
                code="optimizer_mismatch",
                remedy="resume with the stage and rates of the checkpoint, or start a new run from it",
            )
        owners = {id(member): stepper for stepper in self._steppers for group in stepper.param_groups for member in group["params"]}
        for name, entry in found.items():
            parameter = self._named[name]
            owners[id(parameter)].state[parameter] = {key: like(value, parameter) for key, value in entry.items()}
