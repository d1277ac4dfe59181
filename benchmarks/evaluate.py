"""Answering 2,000 questions about drawn scenes: ``python benchmarks/evaluate.py [--count N] [--parts N] [--batch N] [--model NAME]``.

    theirs   transformers, one question after another: its PIL processor, its own generate, greedy, inference mode    (pictures are files)
    single   ours with batches of one                                                        (only with --single)
    ours     ``llava eval``'s harness: batches of like length, encoded a thread ahead, answers synced to the disk          goal: 3 times

Both compute in the same dtype, on the same weights, with the same prompts. The questions are dealt into parts; for each part the sides take
turns, in the opposite order each time, so every question is asked once a side and whatever else the machine does meets both. The bound is
what the machine needs for the products alone, at its measured best speed. Equal answers are counted, and right ones of each side.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from measure import Times, ceilings, faster
from transformers import AutoModelForImageTextToText, AutoProcessor

from llavakit.assistant import Assistant
from llavakit.checkpoint import places
from llavakit.eval import answers, scenes
from llavakit.eval.benchmark import Question
from llavakit.eval.harness import Job, by_model
from llavakit.eval.run_folder import Run, digest

PROTOCOL = scenes.SCENES.protocols[0]
GOAL = 3.0
Side = Callable[[Sequence[Question]], list[str]]


class Theirs:
    """transformers, one by one."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def __call__(self, asked: Sequence[Question]) -> list[str]:
        with torch.inference_mode():
            return [self._answer(question) for question in asked]

    def _answer(self, question: Question) -> str:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\n" + question.prompt}]}]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        assert question.image is not None
        with PIL.Image.open(question.image.source) as opened:  # type: ignore[arg-type]
            inputs = self.processor(images=opened.convert("RGB"), text=prompt, return_tensors="pt").to(self.model.dtype)
        ids = self.model.generate(**inputs, max_new_tokens=PROTOCOL.max_new_tokens, do_sample=False)
        text: str = self.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text.strip()


class Ours:
    """The harness, from files to a file."""

    def __init__(self, assistant: Assistant, room: Path, batch: int) -> None:
        self.assistant, self.room, self.batch = assistant, room, batch
        self.runs = 0

    def __call__(self, asked: Sequence[Question]) -> list[str]:
        self.runs += 1
        out = self.room / f"{self.batch}-{self.runs}"
        run = Run(benchmark="scenes", protocol=PROTOCOL, prompts_sha256=digest(asked), questions=len(asked), model="tiny")
        by_model(Job(questions=asked, run=run, out=out), self.assistant, batch=self.batch)
        return [one.text or "" for one in answers.match(asked, answers.read(out / "answers.jsonl")).answered]


def in_turn(sides: dict[str, Side], parts: Sequence[Sequence[Question]]) -> tuple[dict[str, Times], dict[str, float], dict[str, list[str]]]:
    """Every part to every side, after a few questions that are not counted: seconds part by part, CPU seconds in all, all answers."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu = dict.fromkeys(sides, 0.0)
    said: dict[str, list[str]] = {name: [] for name in sides}
    for side in sides.values():
        side(parts[0][:8])
    for number, part in enumerate(parts):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            gc.collect()
            start, busy = time.perf_counter(), time.process_time()
            said[name] += sides[name](part)
            seconds[name].append(time.perf_counter() - start)
            cpu[name] += time.process_time() - busy
    return {name: Times(tuple(values)) for name, values in seconds.items()}, cpu, said


def products(assistant: Assistant, asked: Sequence[Question]) -> float:
    """Operations of the matrix products for some questions: weights times positions. Attention and the replies' tokens are left out."""
    model = assistant.model
    sizes = {name: sum(p.numel() for p in part.parameters() if p.ndim > 1) for name, part in model.named_children()}
    inputs = [assistant.encode(question.conversation(), PROTOCOL.sampling) for question in asked[:50]]
    table = model.language_model.get_input_embeddings().weight.numel()
    each = [2 * (sizes["language_model"] - 2 * table) * len(one.input_ids) for one in inputs]
    seen = [
        2 * (sizes["vision_tower"] + sizes["multi_modal_projector"]) * sum(g.views * g.view_tokens for g in one.grids) for one in inputs
    ]
    return (sum(each) + sum(seen)) / len(inputs) * len(asked)


def shown(times: Times, count: int) -> str:
    each = sorted(1e3 * seconds * len(times.seconds) / count for seconds in times.seconds)
    return f"{sum(times.seconds):7.1f} s   {each[len(each) // 2]:6.1f} [{each[0]:.1f}-{each[-1]:.1f}] ms a question"


def right(asked: Sequence[Question], said: Sequence[str]) -> int:
    return sum(scenes.normal(text) == scenes.normal(str(question.truth)) for question, text in zip(asked, said, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both sides")
    parser.add_argument("--single", action="store_true", help="also ours with batches of one")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as room:
        asked, parts = prepared(Path(room) / "scenes", given.count, given.parts)
        report(given, Path(room), asked, parts)


def prepared(folder: Path, count: int, parts: int) -> tuple[list[Question], list[list[Question]]]:
    """The questions, their pictures as files, dealt into parts."""
    scenes.make(folder, count)
    asked = scenes.questions(folder, PROTOCOL)[:count]
    dealt = [asked[number::parts] for number in range(parts)]
    return [question for part in dealt for question in part], dealt


def report(given: Any, room: Path, asked: Sequence[Question], parts: Sequence[Sequence[Question]]) -> None:
    folder = places.find(given.model)
    assistant = Assistant.load(folder, device="cpu")
    sides: dict[str, Side] = {"theirs": Theirs(folder, assistant.model.dtype), "ours": Ours(assistant, room, given.batch)}
    if given.single:
        sides["single"] = Ours(assistant, room, 1)
    load, dtype = os.getloadavg()[0], str(assistant.model.dtype).removeprefix("torch.")
    print(f"{len(asked):,} questions in {len(parts)} parts, {given.model} in {dtype}, {given.threads} threads, load {load:.1f}")
    bound = products(assistant, asked) / ceilings().multiply
    times, cpu, said = in_turn(sides, parts)
    for name, text in sorted(said.items()):
        alike = sum(a == b for a, b in zip(text, said["theirs"], strict=True))
        busy = f"CPU {1e3 * cpu[name] / len(asked):.1f} ms"
        print(f"{name:8}{shown(times[name], len(asked))}, {busy}   {right(asked, text):,} right, {alike:,} as theirs")
    for name in sorted(set(sides) - {"theirs"}):
        ratio, total = faster(times["theirs"], times[name]), sum(times["theirs"].seconds) / sum(times[name].seconds)
        goal = f"   goal {GOAL:g} {'met' if total >= GOAL else 'MISSED'}" if name == "ours" else ""
        print(f"{name:8}{total:.2f} times faster in all, by part {ratio.median:.2f} [{ratio.least:.2f}-{ratio.most:.2f}]{goal}")
    print(f"bound   {bound:.1f} s for the products alone; transformers reach {100 * bound / sum(times['theirs'].seconds):.0f} %, ", end="")
    print(f"llavakit {100 * bound / sum(times['ours'].seconds):.0f} %")


if __name__ == "__main__":
    main()
