"""The tiny CLIP: pictures and short statements, contrasted until patches bind shape, colour, size and place.

A statement agrees with a picture as far as *some* token of it does (the late interaction of FILIP, arXiv 2111.07783), and every pair of a
batch is judged on its own with a sigmoid (SigLIP, arXiv 2303.15343); because scenes know their truth, the table of targets is exact:

    patches + CLS  T.D --+
                         |-- scale * cos --> logsumexp over tokens + bias --> true / false
    statement        D --+

Half of a picture's own statements are near misses (the same things with a colour, shape, size or place swapped). A max over tokens
gives each patch a reason to know what lies under it and where; a pooled vector alone would not (dev/LOG.md has the comparison).
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from llavakit.config import parse, save
from llavakit.miniature.close_ups import close_ups
from llavakit.miniature.pictures import Gallery, gallery
from llavakit.scenes.statements import NUMBERS, ORDER, SIDES, near_misses, statement_groups, statements
from llavakit.scenes.world import Scene
from llavakit.train.optim import Kind, Optimizer, factor

CLOSE_UPS = 20_000_000  # where in the split their scenes begin: far from the pictures'
GROUP_WEIGHTS = (0.38, 0.44, 0.12, 0.06)  # things, signs, pairs, counts


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """How the tiny CLIP is built and trained."""

    out: Path = Path("build/tiny/tower")
    """folder for the vision tower and its metrics"""
    tokenizer: Path = Path("build/tiny/tokenizer")
    """folder of the tokenizer"""
    size: int = 112
    """side of a view in pixels"""
    patch: int = 14
    """side of a patch in pixels"""
    width: int = 192
    """width of the vision transformer"""
    layers: int = 6
    """layers of the vision transformer; LLaVA reads the last but one"""
    heads: int = 6
    """attention heads of the vision transformer"""
    text_width: int = 128
    """width of the text transformer"""
    text_layers: int = 2
    """layers of the text transformer"""
    dimension: int = 128
    """width of the space in which pictures and statements meet"""
    scenes: int = 80_000
    """different training scenes, all drawn before the first step"""
    steps: int = 3_600
    """optimizer steps"""
    batch: int = 64
    """pictures a step"""
    true_statements: int = 8
    """true statements drawn for each picture"""
    false_statements: int = 8
    """near misses drawn for each picture"""
    rate: float = 2.5e-3
    """peak learning rate (cosine)"""
    optimizer: Kind = "muon"
    """muon learned in 300 steps what adamw learned in 1,000 (dev/LOG.md)"""
    weight_decay: float = 0.05
    """weight decay of matrices"""
    warmup: int = 150
    """steps of linear warm-up"""
    seed: int = 0
    """seed of weights, order and statements"""
    late: bool = True
    """false: the pooled vector alone meets the text, as in plain CLIP"""
    letters: bool = True
    """false: printed text is stated whole only, never letter by letter"""
    close_ups: float = 0.0
    """share of a batch's pictures that are close-ups of small print, for towers that will see tiles (AnyRes)"""
    squashed: bool = False
    """true: every second scene fills the square without its aspect ratio, as AnyRes shows the whole; else all are padded"""
    start: Path | None = None
    """folder of a stopped run whose weights to go on from"""
    stop: int | None = None
    """stop after this many of ``steps``, in the middle of the schedule"""
    misses: bool = True
    """false: no near misses, only the other pictures' statements"""


class TinyClip(nn.Module):
    """CLIPVisionModel and CLIPTextModel with projections into one space."""

    def __init__(self, config: TowerConfig, *, vocab: int, eos: int) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        self.late, self.eos = config.late, eos
        self.vision = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=config.width, intermediate_size=4 * config.width, num_hidden_layers=config.layers,
                num_attention_heads=config.heads, image_size=config.size, patch_size=config.patch, projection_dim=config.dimension,
            )
        )  # fmt: skip
        self.text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocab, hidden_size=config.text_width, intermediate_size=4 * config.text_width,
                num_hidden_layers=config.text_layers, num_attention_heads=4, max_position_embeddings=48,
                projection_dim=config.dimension, eos_token_id=eos, bos_token_id=1, pad_token_id=eos,
            )
        )  # fmt: skip
        for part in (self.vision, self.text):
            part.set_attn_implementation("eager")  # torch's flash kernel is three times slower backwards on a CPU (dev/LOG.md)
        with torch.no_grad():
            self.vision.embeddings.position_embedding.weight[1:] = grid_positions(config.size // config.patch, config.width)
        self.from_vision = nn.Linear(config.width, config.dimension, bias=False)
        self.from_text = nn.Linear(config.text_width, config.dimension, bias=False)
        self.scale = nn.Parameter(torch.tensor(math.log(20.0)))
        self.bias = nn.Parameter(torch.tensor(-9.0))

    def forward(self, views: Tensor, ids: Tensor) -> Tensor:
        """Logits B.P that statement p (ids P.L) is true of picture b (views B.3.S.S)."""
        out = self.vision(pixel_values=views)
        tokens = self.vision.post_layernorm(out.last_hidden_state) if self.late else out.pooler_output[:, None]
        pictures = F.normalize(self.from_vision(tokens).float(), dim=-1)  # B.T.D
        words = self.text(input_ids=ids).pooler_output
        said = F.normalize(self.from_text(words).float(), dim=-1)  # P.D
        agree = torch.einsum("btd,pd->bpt", pictures, said) * self.scale.exp()
        return torch.logsumexp(agree, dim=-1) + self.bias


def grid_positions(side: int, width: int, *, strength: float = 0.5) -> Tensor:
    """A start for the position table, side*side.width: a random row vector plus a random column vector, as strong as the pixels.

    CLIP's own start (0.02) drowns positions under pixels for the first thousand steps; "where" is then learned last (dev/LOG.md).
    """
    rows, columns = (torch.randn(side, width) * strength / math.sqrt(2) for _ in range(2))
    return (rows[:, None] + columns[None]).reshape(side * side, width)


class Statements:
    """Draws the statements of a batch and their table of truth."""

    def __init__(self, tokenizer: Any, config: TowerConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.eos = tokenizer.pad_token_id
        self._ids: dict[str, list[int]] = {}

    def statements(self, scenes: Sequence[Scene], rng: random.Random) -> tuple[list[str], Tensor, Tensor]:
        """P statements, truth B.P in 0/1, own B.P (statements drawn for that picture)."""
        truths = [statements(scene) for scene in scenes]
        rows: dict[str, set[int]] = {}
        for number, scene in enumerate(scenes):
            for words in self._draw(scene, truths[number], rng):
                rows.setdefault(words, set()).add(number)
        said = list(rows)
        truth = torch.tensor([[words in truth for words in said] for truth in truths], dtype=torch.float32)
        own = torch.zeros_like(truth)
        for column, words in enumerate(said):
            own[list(rows[words]), column] = 1.0
        return said, truth, own

    def _draw(self, scene: Scene, truth: frozenset[str], rng: random.Random) -> list[str]:
        groups = list(statement_groups(scene))
        if not self.config.letters:
            groups[1] = [words for words in groups[1] if words.split()[0] not in ORDER]
        weights = [w if g else 0.0 for w, g in zip(GROUP_WEIGHTS, groups, strict=True)]
        if not any(groups):
            return []  # a close-up of nothing
        chosen = [rng.choice(rng.choices(groups, weights)[0]) for _ in range(self.config.true_statements)]
        wrong = near_misses(scene, rng, self.config.false_statements, truth) if self.config.misses else []
        return [*chosen, *wrong]

    def encode(self, said: Sequence[str]) -> Tensor:
        """ids P.L, ended and padded with the end token."""
        rows = []
        for words in said:
            if words not in self._ids:
                self._ids[words] = [*self.tokenizer(words).input_ids, self.eos]
            rows.append(self._ids[words])
        longest = max(map(len, rows))
        return torch.tensor([row + [self.eos] * (longest - len(row)) for row in rows])


def contrast(logits: Tensor, truth: Tensor, own: Tensor) -> Tensor:
    """Sigmoid loss: a picture's own statements weigh as much as all of the other pictures' together."""
    loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    other = 1.0 - own
    positive, negative = other * truth, other * (1.0 - truth)
    parts = [(loss * weight).sum() / weight.sum().clamp(min=1.0) for weight in (own, positive, negative)]
    return parts[0] + 0.25 * parts[1] + parts[2]


@torch.no_grad()
def accuracy(model: TinyClip, pictures: Gallery, draw: Statements, *, batch: int = 64) -> dict[str, float]:
    """Share of held-out own statements judged rightly, by the statement's first word class (see ``_family``)."""
    rng = random.Random(1)
    right, total = Counter[str](), Counter[str]()
    for at in range(0, len(pictures.scenes), batch):
        index = list(range(at, min(at + batch, len(pictures.scenes))))
        said, truth, own = draw.statements([pictures.scenes[i] for i in index], rng)
        logits = model(torch.from_numpy(pictures.views(index)), draw.encode(said))
        good = ((logits > 0).float() == truth) & (own > 0)
        for column, words in enumerate(said):
            right[_family(words)] += int(good[:, column].sum())
            total[_family(words)] += int(own[:, column].sum())
    rows = {name: right[name] / total[name] for name in sorted(total)}
    return {"held_out": sum(right.values()) / sum(total.values())} | rows


def _family(words: str) -> str:
    """Which kind of statement this is, for reports only."""
    if " in front of " in words:
        return "order"
    if any(f" {side} a" in words for side in SIDES):
        return "relation"
    first = words.split()[0]
    if first in NUMBERS:
        return "count"
    if words.startswith(("the ", "a word", "a number", "small print")):
        return "sign"
    if first in ORDER:
        return "letter"
    return "thing"


def train_tower(config: TowerConfig, tokenizer: Any, *, log: Path | None = None, bf16: bool = True) -> TinyClip:
    """Train the tiny CLIP on drawn scenes of the train split."""
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    model = TinyClip(config, vocab=len(tokenizer), eos=tokenizer.pad_token_id)
    draw = Statements(tokenizer, config)
    if config.start is not None:
        model.load_state_dict(load_file(config.start / "clip.safetensors"))
    pictures = gallery("train", config.scenes, size=config.size, squashed=config.squashed)
    windows = close_ups("train", config.scenes // 2 if config.close_ups else 0, size=config.size, start=CLOSE_UPS)
    held_out = {"": gallery("test", 512, size=config.size, start=10_000_000, squashed=config.squashed)}
    if config.close_ups:
        held_out["close_up_"] = close_ups("test", 512, size=config.size, start=10_000_000)
    rates = dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
    rates |= {"scale": 10.0, "bias": 10.0}  # two numbers must not hold up the rest
    optimizer = Optimizer(
        model, rates, lr=config.rate, weight_decay=config.weight_decay, betas=(0.9, 0.98), clip=1.0, kind=config.optimizer
    )
    order: list[int] = []
    printed = [i for i, scene in enumerate(pictures.scenes) if any(sign.type == "large" for sign in scene.signs)]
    started, loss_mean = time.monotonic(), 0.0
    for step in range(config.stop or config.steps):
        if len(order) < config.batch:
            order = [*range(config.scenes), *(printed if config.letters else ())]  # reading is learned last: see print twice
            rng.shuffle(order)
        near = rng.sample(range(len(windows.scenes)), round(config.batch * config.close_ups))
        index = [order.pop() for _ in range(config.batch - len(near))]
        said, truth, own = draw.statements([*(pictures.scenes[i] for i in index), *(windows.scenes[i] for i in near)], rng)
        views = torch.from_numpy(np.concatenate([pictures.views(index), windows.views(near)]))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = model(views, draw.encode(said))
        loss = contrast(logits, truth, own)
        loss.backward()
        optimizer.clip_gradients()
        optimizer.step(factor(step, steps=config.steps, warmup=config.warmup / config.steps))
        optimizer.forget_gradients()
        loss_mean += loss.item()
        if (step + 1) % 100 == 0:
            row: dict[str, Any] = {"step": step + 1, "loss": loss_mean / 100, "seconds": round(time.monotonic() - started, 1)}
            if (step + 1) % 500 == 0:
                row |= {name + kind: share for name, seen in held_out.items() for kind, share in accuracy(model, seen, draw).items()}
            note(row, log)
            loss_mean = 0.0
    return model


def note(row: dict[str, Any], log: Path | None) -> None:
    """One line of progress on stderr and in the log."""
    print(" ".join(f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), file=sys.stderr, flush=True)
    if log:
        with log.open("a") as out:
            out.write(json.dumps(row) + "\n")


def run(words: Sequence[str] = ()) -> Path:
    """Train the tiny CLIP from ``key=value`` words and save its vision tower (a CLIPVisionModel); returns the folder."""
    from transformers import AutoTokenizer

    config = parse(TowerConfig(), words)
    config.out.mkdir(parents=True, exist_ok=True)
    log = config.out / "metrics.jsonl"
    log.unlink(missing_ok=True)
    model = train_tower(config, AutoTokenizer.from_pretrained(config.tokenizer), log=log)
    save_file(model.state_dict(), config.out / "clip.safetensors")
    model.vision.save_pretrained(config.out)
    save(config, config.out / "tower.yaml")
    return config.out
