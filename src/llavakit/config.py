"""``TrainConfig``, everything a training run depends on, and its recipes (spec 4.2). How it is spelled is ``settings``'s affair."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llavakit.errors import ConfigError
from llavakit.settings import Difference, Option, describe, differences, from_dict, in_range, load, parse, save, to_dict

__all__ = [
    "FINETUNE", "FIXED", "LORA", "PRETRAIN", "QLORA", "Difference", "Lora", "Option", "TrainConfig", "describe", "differences",
    "from_dict", "load", "parse", "save", "to_dict",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Small matrices learned beside frozen layers (arXiv 2106.09685); the defaults are LLaVA-1.5's (spec 4.2)."""

    r: int = 128
    "Rank: each layer learns B A, with A r x inputs and B outputs x r."
    alpha: int = 256
    "B A counts alpha / r times."
    dropout: float = 0.05
    "Share of the inputs that A does not see in a step."
    targets: str | None = None
    "A regular expression of whole names of linear layers; none takes all of the language model but its head."
    bits: int = 16
    "How the language model's frozen layers are held: 4 (NF4, double quantisation: QLoRA) or 8 by bitsandbytes; 16 as stored."

    def __post_init__(self) -> None:
        in_range("lora.r", self.r, 1, math.inf)
        in_range("lora.alpha", self.alpha, 1, math.inf)
        in_range("lora.dropout", self.dropout, 0, 0.999)
        if self.bits not in (4, 8, 16):
            raise ConfigError(f"no layers of {self.bits} bits", code="bad_value", where="lora.bits", remedy="give 4, 8 or 16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a training run depends on. Two runs of one value on one machine give the same weights, bit for bit."""

    stage: Literal["pretrain", "finetune"]
    "The recipe: pretrain learns the projector alone, finetune the projector and the language model (spec 4.1)."
    rates: tuple[tuple[str, float | None], ...] = ()
    "Own rows [pattern, rate] put before the stage's table; rate multiplies lr, null freezes; the first match wins."
    lora: Lora | None = None
    "Learn LoRA matrices beside the language model's frozen layers; with start, which is their base (finetune)."
    start: Path | None = None
    "A native checkpoint to start from: a folder, the folder of a run, tiny (built in), or a Hub id."
    tower: Path | None = None
    "A folder holding a CLIP vision model; with start, it takes the place of the checkpoint's own."
    decoder: Path | None = None
    "Without start: a folder holding a causal language model and its tokenizer."
    projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
    "Without start: the shape of the new, untrained projector."
    data: Path | None = None
    "The samples: LLaVA JSON or JSONL, plain or gzipped; or a mixture, as a manifest (.yaml) or the name of a shipped one."
    images: Path | None = None
    "The folder that the samples' image names are relative to (default: the folder of data); of a mixture, where its files lie."
    share: float = 1.0
    "Of a mixture: the part of every source that is taken; 0.01 and 0.1 are the usual trials."
    placement: Literal["as_data", "random", "first"] = "as_data"
    "Where the picture stands in a turn: as written, before or after the first question at random (papers), or first (the code)."
    template: str = "vicuna_v1"
    "The prompt format (a name of prompts.TEMPLATES)."
    aspect: Literal["square", "pad", "anyres"] = "pad"
    "How a picture meets the tower: 'square' crops the middle, 'pad' fills with the mean colour, 'anyres' adds tiles (LLaVA-NeXT)."
    tiles: str = "released"
    "With anyres: the canvases as columns x rows, '1x2,2x1,2x2'; or released, blog (NeXT), hd (LLaVA-1.5-HD) (spec 2.3, 2.4, 2.9)."
    base: Literal["squash", "pad"] = "squash"
    "With anyres: how the view of the whole becomes square: scaled without its aspect ratio (NeXT), or padded (LLaVA-1.5-HD)."
    max_length: int = 2048
    "The longest sequence, image tokens included."
    batch_size: int = 16
    "Samples in one forward pass."
    accumulation: int = 8
    "Forward passes in one optimizer step, on all devices together: the global batch is batch_size x accumulation anywhere."
    epochs: int = 1
    "Times through the samples."
    steps: int | None = None
    "Optimizer steps in all; when given, epochs is not used."
    lr: float = 2e-5
    "Peak learning rate of rows with rate 1."
    warmup: float = 0.03
    "Share of the steps in which the rate climbs from 0; after it the rate falls to 0 along a cosine."
    optimizer: Literal["adamw", "muon"] = "adamw"
    "adamw as in the papers; muon takes orthogonal steps in the hidden matrices: new models learn in fewer steps (dev/LOG.md)."
    weight_decay: float = 0.0
    "Decay of the weights; norms and biases never decay."
    betas: tuple[float, float] = (0.9, 0.999)
    "AdamW's two averages."
    clip: float = 1.0
    "Largest gradient norm; 0 is off, as in the original ZeRO-2/3 recipes (spec trap 38)."
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    "Arithmetic of the forward pass; learned weights are kept in fp32 always. auto: bf16 where the hardware computes it."
    frozen_dtype: Literal["keep", "bf16"] = "keep"
    "How frozen weights are held: as stored, or halved to bf16 (only when the forward pass is bf16)."
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    "Where to compute; auto takes cuda, then mps, then cpu."
    shard: Literal["none", "full"] = "none"
    "Under torchrun: each rank holds the model (DDP), or a part of every layer, gradient and moment (FSDP2)."
    timeout: int = 1800
    "Under torchrun: seconds without a step after which a rank writes its stacks to stacks-RANK.txt and ends."
    gradient_checkpointing: bool = False
    "Compute the decoder's activations twice and keep fewer of them: about a third slower, far less memory."
    seed: int = 0
    "Fixes the order of samples, the new projector and every random draw."
    workers: int = 0
    "Processes that prepare batches; 0 prepares them in the training process."
    cache_mb: int = 0
    "Memory for prepared samples, so that later epochs skip decoding; each worker has its own share."
    pack: bool = True
    "Put the samples of a forward pass behind one another in one row, each apart, instead of padding them to the longest."
    group: int = 0
    "Sort samples by modality and length inside runs of so many optimizer steps, to pad less; 0 is off."
    on_bad_sample: Literal["stop", "skip"] = "stop"
    "A sample that cannot be used stops the run, or is left out and counted."
    allow_outside: bool = False
    "Let image names leave the images folder (absolute or ../)."
    preflight: bool = True
    "Before the first step of a new run: open every picture's header, show what is learned, rehearse save and resume, predict the hours."
    out: Path = Path("runs/out")
    "The run folder: config.yaml, metrics.jsonl, loss.png and the checkpoints step-N."
    holdout: int = 0
    "Samples kept from training; their loss by source and kind goes to evaluations.jsonl."
    eval_every: int = 0
    "Steps between measurements on them; 0 measures at every checkpoint."
    panel: int = 6
    "Pictures among them whose first question is answered at each measurement (panel.json, report.html)."
    save_every: int = 1000
    "Steps between checkpoints; the last step is always saved."
    keep: int = 2
    "Checkpoints kept; 0 keeps all."
    log_every: int = 10
    "Steps between printed lines when the output is no terminal; metrics.jsonl has every step."
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    "Also send the numbers to one of these (extras of the same names)."
    resume: str = "auto"
    "auto goes on from the newest good checkpoint in out; never refuses a used folder; else a checkpoint folder."
    force: bool = False
    "Go on although the model, the data or the order of samples has changed since the checkpoint."
    non_finite_limit: int = 3
    "Stop after so many steps in a row whose loss or gradient is not a number; such steps change nothing."

    def __post_init__(self) -> None:
        at_least_one = ("batch_size", "accumulation", "epochs", "max_length", "save_every", "log_every", "non_finite_limit", "timeout")
        not_negative = ("lr", "weight_decay", "clip", "seed", "workers", "cache_mb", "group", "keep", "holdout", "eval_every", "panel")
        least = dict.fromkeys(at_least_one, 1) | dict.fromkeys(not_negative, 0)
        for name, low in least.items():
            in_range(name, getattr(self, name), low, math.inf)
        in_range("warmup", self.warmup, 0, 1)
        in_range("share", self.share, 0, 1)
        for beta in self.betas:
            in_range("betas", beta, 0, 1)
        if self.steps is not None:
            in_range("steps", self.steps, 1, math.inf)


# What may not change between a checkpoint and its resumption without force: they decide what the weights and the samples are.
FIXED = frozenset({
    "stage", "rates", "lora", "start", "tower", "decoder", "projector", "data", "images", "share", "placement",
    "holdout", "template", "aspect", "tiles", "base", "max_length", "optimizer", "seed", "group", "on_bad_sample",
    "allow_outside",
})  # fmt: skip

PRETRAIN = TrainConfig(stage="pretrain", template="plain", aspect="square", lr=1e-3, batch_size=32, out=Path("runs/pretrain"))
FINETUNE = TrainConfig(
    stage="finetune", template="vicuna_v1", aspect="pad", placement="first", lr=2e-5, batch_size=16, out=Path("runs/finetune")
)
LORA = replace(FINETUNE, lora=Lora(), lr=2e-4, out=Path("runs/lora"))
QLORA = replace(LORA, lora=Lora(r=64, alpha=16, bits=4), out=Path("runs/qlora"))  # the original's values where its script gives none
