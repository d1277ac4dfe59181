"""Several processes as one run: started by torchrun, DDP or FSDP2 below, and what they tell each other.

    torchrun --nproc-per-node 8 -m llavakit train finetune ...          one machine; with --nnodes and --rdzv-endpoint, many

    window of samples --dealt by the loader--> rank 0: batches      shard=none   every rank holds the model, gradients are summed (DDP)
                                               rank 1: batches      shard=full   every rank holds a part of each layer (FSDP2)

The global batch is ``batch_size x accumulation`` whatever the number of ranks, the sum of losses is divided by the learned tokens of all
of them, and so a run on two ranks takes the steps of a run on one, up to rounding. Alone, nothing here costs anything.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llavakit.checkpoint import weights
from llavakit.errors import TrainingError
from llavakit.model.llava import Llava

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among all: its number, how many there are, its number on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        """The one that writes files and talks."""
        return self.rank == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks, exact for whole numbers below 2**53."""
        if self.world == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64, device=self._speaks_on)
        dist.all_reduce(told)
        return [float(value) for value in told.tolist()]

    def of_main(self, value: T) -> T:
        """What the main process has, for all."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self._speaks_on)
        return box[0]

    def all(self, value: T) -> list[T]:
        """What each rank has, in order."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    @property
    def _speaks_on(self) -> torch.device:
        return torch.device("cuda", self.local) if dist.get_backend() == "nccl" else torch.device("cpu")


@contextmanager
def joined(kind: str, timeout: int) -> Iterator[Ranks]:
    """Join the processes that torchrun started; alone where there is no torchrun. ``timeout`` (seconds) ends a rank that waits in vain."""
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if world == 1:
        yield Ranks()
        return
    if dist.is_initialized():  # by a program that calls us, and ends it
        yield Ranks(rank=dist.get_rank(), world=dist.get_world_size(), local=local)
        return
    if kind == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    try:
        yield Ranks(rank=dist.get_rank(), world=world, local=local)
    finally:
        faulthandler.cancel_dump_traceback_later()
        dist.destroy_process_group()


@contextmanager
def watched(ranks: Ranks, out: Path, timeout: int) -> Iterator[Any]:
    """A function to call at each sign of life; after ``timeout`` seconds without one this rank writes its stacks and ends (T7)."""
    if ranks.world == 1:
        yield lambda: None
        return
    path = out / f"stacks-{ranks.rank}.txt"
    with path.open("w") as file:

        def alive() -> None:
            faulthandler.dump_traceback_later(timeout, exit=True, file=file)

        alive()
        try:
            yield alive
        finally:
            faulthandler.cancel_dump_traceback_later()
            path.unlink(missing_ok=True)  # nothing hung: a rank that does never comes here


def spread(model: Llava, ranks: Ranks, *, shard: str, device: torch.device, forward: torch.dtype) -> nn.Module:
    """What to call for a forward pass: the model itself, DDP around it, or the model cut layer by layer (FSDP2)."""
    if ranks.world == 1:
        return model
    if shard == "none":
        from torch.nn.parallel import DistributedDataParallel

        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (ranks.world,))
    narrow = forward == torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if narrow else MixedPrecisionPolicy()
    for layer in layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def layers(model: Llava) -> list[nn.Module]:
    """The blocks that are gathered one at a time: of the tower, and of the language model as transformers names them."""
    kinds = set(getattr(model.language_model, "_no_split_modules", None) or ())
    decoder = [module for module in model.language_model.modules() if type(module).__name__ in kinds]
    if not decoder:
        name = type(model.language_model).__name__
        raise TrainingError(f"{name} names no layers to cut at", code="cannot_shard", where="shard", remedy="use shard=none")
    return [*model.vision_tower.vision_model.encoder.layers, *decoder]


def quietly(forward: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
    """Gradients of all batches of a window but the last stay on their rank; they are summed once."""
    if hasattr(forward, "no_sync") and not last:
        return forward.no_sync()  # type: ignore[no-any-return, operator]  # DDP
    if hasattr(forward, "set_requires_gradient_sync"):
        forward.set_requires_gradient_sync(last)  # type: ignore[operator]  # FSDP2
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the CPU; every rank must ask at the same moment."""
    found = tensor.detach()
    return (found.full_tensor() if isinstance(found, DTensor) else found).cpu()


def is_cut(model: nn.Module) -> bool:
    """Whether this rank holds a part of each weight only."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gathered(named: Iterable[tuple[str, Tensor]], ranks: Ranks) -> dict[str, Tensor] | None:
    """Each of them whole on the main process, one after the other; None on the others, which must ask at the same moment."""
    found: dict[str, Tensor] = {}
    for name, parameter in named:
        full = whole(parameter)
        if ranks.main:
            found[name] = full
    return found if ranks.main else None


def whole_model(model: Llava, ranks: Ranks) -> Llava | None:
    """The model with complete weights on the main process, None on the others; the model itself where it is not cut."""
    if not is_cut(model):
        return model if ranks.main else None
    found = gathered(model.named_parameters(remove_duplicate=False), ranks)
    if found is None:
        return None
    made = weights.build(model.config)
    made.load_state_dict(found | {name: value for name, value in model.state_dict().items() if name not in found}, assign=True)
    made.language_model.tie_weights()  # one object again where there were two names
    return made


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A stored tensor as this rank holds the parameter it belongs to: its part of it, or a copy on its device."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)
