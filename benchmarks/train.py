"""A training epoch against transformers' own LLaVA, well used: ``python benchmarks/train.py [--quick] [--rounds N] [--only SIDE ...]``.

Same weights, same samples in the same epoch, same arithmetic: bf16 under autocast, learned weights and AdamW in fp32, frozen weights in
bf16, gradients clipped. An epoch of stage 2 has conversations about a picture each:

    --data mixed    six of 620 to 1,400 tokens, two optimizer steps of three as they are drawn (22 to 40 % of padding)
    --data single   640, 700, 900 and 1,400 tokens, one step of four (54 % of padding; nothing to group)

Stage 1 has as many captions. The sides:

    padded    the batches as they come, padded to the longest          targets: ours 1.7 times faster, 0.8 of its peak memory
    grouped   two batches of nearly equal lengths                               1.15 times faster
    trainer   transformers.Trainer on the padded batches
    sft       TRL's SFTTrainer on the padded batches (where trl is installed)
    ours      llavakit's loop: packed rows, the head sees learned positions only, freed memory kept (model/heap.py)
    align, ours-align     stage 1                                               1.12 times faster

The other sides run as their users run them; with --heap they too keep freed memory, as an environment of MALLOC_MMAP_MAX_=0 and
MALLOC_TRIM_THRESHOLD_=-1 would have it. Each side runs in a process of its own, the sides take turns, and of the epochs that a process
trains the first warms up and is not counted. The rate is so small that the weights stay what they are, and so the loss of that first
epoch must be one and the same on all sides. "bound" is the time of the necessary products at the machine's measured speed of multiplying.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from fixture import FULL, QUICK, Shape, new_processor, photograph, write_checkpoint
from measure import Times, ceilings, faster

from llavakit.config import FINETUNE, PRETRAIN, TrainConfig
from llavakit.data.loader import Loader, Window
from llavakit.data.sources import read_llava
from llavakit.model.heap import give_back, keep_memory
from llavakit.train.loop import train

LEARNED_SHARE, CAPTION = 1 / 3, 29
AGAINST = {"ours": ("padded", "grouped", "trainer", "sft"), "ours-align": ("align",)}
TARGETS = {("ours", "padded"): 1.7, ("ours", "grouped"): 1.15, ("ours-align", "align"): 1.12}
STAGE_OF = {"align": "pretrain", "ours-align": "pretrain"}
SHAPES = {"full": FULL, "quick": QUICK}


@dataclass(frozen=True)
class Epoch:
    """The lengths of its samples in tokens, and how many are in a batch, which is an optimizer step."""

    lengths: tuple[int, ...]
    batch: int

    @property
    def steps(self) -> int:
        return len(self.lengths) // self.batch


DATA = {"mixed": Epoch((640, 900, 1400, 700, 620, 1100), 3), "single": Epoch((640, 700, 900, 1400), 4)}


def write_data(folder: Path, shape: Shape, epoch: Epoch) -> None:
    """Conversations whose lengths in tokens are given: one word of the made-up tokenizer is one token."""
    words, draw = [f"w{number}" for number in range(20000)], random.Random(0)
    talks, captions = [], []
    for number, length in enumerate(epoch.lengths):
        (folder / f"{number}.jpg").write_bytes(photograph(number))
        room = max(30, length * shape.patches // FULL.patches - shape.patches - 40)
        learned = int(room * LEARNED_SHARE)
        question, reply = (" ".join(draw.choices(words, k=count)) for count in (room - learned, learned))
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": reply}]
        talks.append({"id": f"t{number}", "image": f"{number}.jpg", "conversations": turns})
        said = [turns[0], {"from": "gpt", "value": " ".join(draw.choices(words, k=CAPTION))}]
        captions.append({"id": f"c{number}", "image": f"{number}.jpg", "conversations": said})
    (folder / "finetune.json").write_text(json.dumps(talks))
    (folder / "pretrain.json").write_text(json.dumps(captions))


def config_of(side: str, folder: Path, epoch: Epoch, epochs: int) -> TrainConfig:
    stage = STAGE_OF.get(side, "finetune")
    base = PRETRAIN if stage == "pretrain" else FINETUNE
    return replace(
        base, start=folder / "checkpoint", data=folder / f"{stage}.json", out=folder / f"out-{side}", steps=epochs * epoch.steps, lr=1e-12,
        aspect="pad", batch_size=epoch.batch, accumulation=1, dtype="bf16", frozen_dtype="bf16", device="cpu", max_length=4096,
        preflight=False, save_every=10**6, resume="auto",
    )  # fmt: skip


def run_side(side: str, folder: Path, epoch: Epoch, epochs: int) -> dict[str, Any]:
    """In this process: the seconds of each epoch after the first, the first one's loss for each learned token, the peak of memory."""
    config = config_of(side, folder, epoch, epochs)
    told: list[tuple[float, float, int]] = []
    peak = []

    def step(seconds: float, loss: float, learned: int) -> None:
        told.append((seconds, loss * learned, learned))
        peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    if side.startswith("ours"):
        train(config, on_step=lambda report: step(report.step_time, float(report.loss or 0), report.learned), save_model=_unsaved)
    elif side in ("trainer", "sft"):
        _trainer(config, step, sft=side == "sft")
    else:
        _plain(config, step, group=epoch.steps if side == "grouped" else 0)
    took = [one[0] for one in told]
    seconds = [sum(took[start : start + epoch.steps]) for start in range(epoch.steps, len(took), epoch.steps)]
    loss = sum(one[1] for one in told[: epoch.steps]) / sum(one[2] for one in told[: epoch.steps])
    return {"seconds": seconds, "loss": loss, "peak": peak[-1]}


def _unsaved(model: Any, processor: Any, folder: Path) -> None:
    folder.mkdir()


def _windows(config: TrainConfig, *, group: int) -> Iterator[Window]:
    """The same samples of each step as in our loop, padded: as they come, or sorted by length."""
    assert config.data is not None
    source = read_llava(config.data)
    processor = new_processor(FULL if (config.data.parent / "full").exists() else QUICK)
    if config.stage == "pretrain":
        from llavakit.prompts import TEMPLATES

        processor = processor.using(TEMPLATES["plain"])
    lengths = source.lengths() if group else ()
    return iter(Loader(source, processor, batch_size=config.batch_size, seed=config.seed, lengths=lengths, group=group))


def _theirs(config: TrainConfig) -> Any:
    """transformers' LLaVA: frozen parts in bf16 and without gradients, learned ones in fp32."""
    from transformers import LlavaForConditionalGeneration

    assert config.start is not None
    model = LlavaForConditionalGeneration.from_pretrained(config.start, dtype=torch.bfloat16)
    model.config.use_cache = False
    for name, parameter in model.named_parameters():
        learns = "projector" in name or (config.stage == "finetune" and "vision_tower" not in name)
        parameter.requires_grad_(learns)
        if learns:
            parameter.data = parameter.data.float()
    return model.train()


def _words(batch: Any) -> dict[str, Any]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.mask.long(), "pixel_values": batch.views, "labels": batch.labels}


def _plain(config: TrainConfig, step: Any, *, group: int) -> None:
    """A plain loop: autocast, sums over the learned tokens of the step, clipping, fused AdamW."""
    model = _theirs(config)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=config.lr, weight_decay=0.0, fused=True)
    assert config.steps is not None
    for window, _ in zip(_windows(config, group=group), range(config.steps), strict=False):
        began, total = time.perf_counter(), 0.0
        for batch in window.batches:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**_words(batch), num_items_in_batch=window.learned).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(learned, config.clip)
        optimizer.step()
        optimizer.zero_grad()
        step(time.perf_counter() - began, total, window.learned)
        give_back()  # outside the clock; without it glibc's leftovers grow until the kernel kills this side at 24 GiB


def _trainer(config: TrainConfig, step: Any, *, sft: bool) -> None:
    """transformers.Trainer, or TRL's SFTTrainer, with the padded batches, one batch an item."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    assert config.steps is not None
    windows = [window for window, _ in zip(_windows(config, group=0), range(config.steps), strict=False)]

    class Clock(TrainerCallback):  # type: ignore[misc]
        began = 0.0

        def on_step_begin(self, *given: Any, **rest: Any) -> None:
            self.began = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            if "loss" in (logs or {}):
                step(time.perf_counter() - self.began, float(logs["loss"]), windows[state.global_step - 1].learned)

    settings = {
        "output_dir": str(config.out), "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": config.steps,
        "learning_rate": config.lr, "lr_scheduler_type": "constant", "optim": "adamw_torch_fused", "weight_decay": 0.0,
        "max_grad_norm": config.clip, "bf16": True, "use_cpu": True, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "remove_unused_columns": False,
    }  # fmt: skip
    items = [_words(batch) for window in windows for batch in window.batches]
    rows: Any = [{"batch": number} for number in range(len(items))]
    given: dict[str, Any] = {"model": _theirs(config), "data_collator": lambda one: items[one[0]["batch"]], "callbacks": [Clock()]}
    if sft:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        rows = Dataset.from_list(rows)
        arguments = SFTConfig(**settings, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
        words = new_processor(FULL if (config.out.parent / "full").exists() else QUICK).tokenizer
        trainer: Any = SFTTrainer(args=arguments, processing_class=words, train_dataset=rows, **given)
    else:
        trainer = Trainer(args=TrainingArguments(**settings), train_dataset=rows, **given)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()


def necessary(shape: Shape, epoch: Epoch, stage: str) -> float:
    """Operations of an epoch: the tower forward, the decoder forward, backward to activations, and to weights where they learn."""
    lengths = [576 + 30 + 4] * len(epoch.lengths) if stage == "pretrain" else list(epoch.lengths)
    scale = shape.patches / FULL.patches
    tower = (
        len(lengths)
        * (shape.tower_layers - 1)
        * ((shape.patches + 1) * 24 * shape.tower_width**2 + 4 * shape.patches**2 * shape.tower_width)
    )
    tokens = [length * scale for length in lengths]
    decoder = sum(2 * shape.layer_weights * count + shape.layers * 2 * count**2 * shape.width for count in tokens)
    return tower + decoder * (2 if stage == "pretrain" else 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a toy shape: does it run?")
    parser.add_argument("--data", choices=DATA, default="mixed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="epochs of a process; the first is not counted")
    parser.add_argument("--only", nargs="*", default=None, help="sides")
    parser.add_argument("--heap", action="store_true", help="the other sides keep freed memory too")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    given = parser.parse_args()
    if given.side:
        if given.heap:
            keep_memory()
        print(json.dumps(run_side(given.side, given.folder, DATA[given.data], given.epochs)))
        return
    shape = QUICK if given.quick else FULL
    with tempfile.TemporaryDirectory(dir=given.folder) as room:
        folder = Path(room)
        write_checkpoint(folder / "checkpoint", shape, torch.bfloat16)
        write_data(folder, shape, DATA[given.data])
        (folder / ("quick" if given.quick else "full")).touch()
        sides = given.only or ["padded", "grouped", "trainer", *(["sft"] if find_spec("trl") else []), "ours", "align", "ours-align"]
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for number in range(given.rounds):
            for side in sides[:: 1 if number % 2 else -1]:
                words = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--epochs", str(given.epochs)]
                words += ["--data", given.data, *(["--heap"] if given.heap else [])]
                done = subprocess.run(words, check=False, stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    print(f"{side}: ended with {done.returncode} ({'killed, as for memory' if done.returncode == -9 else 'see above'})")
                else:
                    found[side].append(json.loads(done.stdout.strip().splitlines()[-1]))
                    print(f"round {number + 1}, {side}: {found[side][-1]}", file=sys.stderr, flush=True)
                subprocess.run(["rm", "-rf", str(folder / f"out-{side}")], check=True)
        report(shape, DATA[given.data], found)


def report(shape: Shape, epoch: Epoch, found: dict[str, list[dict[str, Any]]]) -> None:
    speed = ceilings().multiply
    print(f"{shape.name}; {torch.get_num_threads()} threads; {speed / 1e9:.0f} GFLOP/s in bf16")
    times = {side: Times(tuple(second for one in rounds for second in one["seconds"])) for side, rounds in found.items() if rounds}
    for side, rounds in found.items():
        if not rounds:
            continue
        bound = necessary(shape, epoch, STAGE_OF.get(side, "finetune")) / speed
        spent, peak = times[side], max(one["peak"] for one in rounds) / 2**30
        print(
            f"{side:12}{spent.median:8.2f} s [{spent.least:.2f}-{spent.most:.2f}]  peak {peak:.2f} GiB  loss {rounds[0]['loss']:.4f}"
            f"  bound {bound:.2f} s, reached {100 * bound / spent.median:.0f} %"
        )
    for ours, others in AGAINST.items():
        for other in others:
            if times.get(ours) and times.get(other):
                ratio, target = faster(times[other], times[ours]), TARGETS.get((ours, other))
                peaks = max(one["peak"] for one in found[ours]) / max(one["peak"] for one in found[other])
                goal = "" if target is None else f"  target {target:g} {'met' if ratio.median >= target else 'MISSED'}"
                spread = f"{ratio.median:.2f} [{ratio.least:.2f}-{ratio.most:.2f}]"
                print(f"{ours} against {other}: {spread} times faster, {peaks:.2f} of its peak{goal}")
                apart = abs(found[ours][0]["loss"] / found[other][0]["loss"] - 1)
                assert apart < 2e-3, f"the losses of the first epoch differ by {apart:.1%}"


if __name__ == "__main__":
    main()
