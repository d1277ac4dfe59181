"""The training files of the papers at a few hundred records, under their real names and paths, and tiny parts of their models.

ROOT/  blip_laion_cc_sbu_558k.json  images/00453/004530000.jpg ...        llava_v1_5_mix665k.json  coco/train2017/ gqa/images/ ...
       chat.json                    images/GCC_train_002500000.jpg ...    llava_instruct_150k.json      coco/train2017/ again
       ScienceQA/problems.json ...  train/ID/image.png                    llava_next_raw_format_processed.json
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from llavakit.data.manifest import Part, shipped
from llavakit.model.presets import clip, llama
from llavakit.scenes.draw import draw
from llavakit.scenes.statements import captions
from llavakit.scenes.world import make_scene
from tiny import llama_tokenizer

Record = dict[str, Any]
LCS, CC3M, INSTRUCT, MIX, NEXT, SCIENCE, OWN = 264, 132, 34, 132, 134, 34, 132  # records: a batch of the papers' and a few more
SIDES = {224: 28, 336: 42}  # a tower's views, at an eighth
BRIEF = ("Render a clear and concise summary of the photo.", "What is this?", "Give a brief description of the image.")
SHORT = "Answer the question using a single word or phrase."
ASKED = {  # the format words of a source, behind its question, as they are released
    "vqav2": f"What color is it?\n{SHORT}", "okvqa": f"Who would use this?\n{SHORT}", "gqa": f"Is there a star?\n{SHORT}",
    "ocr-vqa": f"Who wrote this book?\n{SHORT}",
    "a-okvqa": "Why is it red?\nA. paint\nB. rust\nC. light\nD. dirt\nAnswer with the option's letter from the given choices directly.",
    "textcaps": "Provide a one-sentence caption for the provided image.\nReference OCR token: EXIT, 42",
    "refcoco": "Please provide a short description for this region: [0.1, 0.25, 0.5, 0.75].",
    "visual-genome": "Please provide the bounding box coordinate of the region this sentence describes: a red cup.",
}  # fmt: skip
REPLIES = {"a-okvqa": "B", "visual-genome": "[0.1, 0.25, 0.5, 0.75]", "refcoco": "red cup on the left"}


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[at % 2], "value": value} for at, value in enumerate(values)]


class Files:
    """Writes them all below ``root``, and keeps the records by file name."""

    def __init__(self, root: Path) -> None:
        self.root, self.records = root, dict[str, list[Record]]()
        self._scenes = [make_scene(seed) for seed in range(24)]
        self._drawn = [root / f"{seed}.jpg" for seed in range(24)]
        for scene, path in zip(self._scenes, self._drawn, strict=True):
            draw(scene, long_side=72).save(path, quality=90)
        self._draw = random.Random(4)
        for name, made, count in (
            ("blip_laion_cc_sbu_558k.json", self._lcs, LCS), ("chat.json", self._cc3m, CC3M),
            ("llava_instruct_150k.json", self._instruct, INSTRUCT), ("llava_v1_5_mix665k.json", self._mix, MIX),
            ("llava_next_raw_format_processed.json", self._next, NEXT), ("mine.json", self._own, OWN),
        ):  # fmt: skip
            self._write(name, made, count)
        self._science()

    def _write(self, name: str, made: Callable[[int], Iterator[Record]], count: int) -> None:
        records = list(made(count))
        self._draw.shuffle(records)
        (self.root / name).write_text(json.dumps(records), encoding="utf-8")
        self.records[name] = records

    def _picture(self, name: str, number: int) -> int:
        """Put a drawn scene under a name; which one."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._drawn[number % len(self._drawn)], path)
        return number % len(self._drawn)

    def _caption(self, scene: int) -> str:
        return captions(self._scenes[scene], self._draw)[0]

    def _pairs(self, names: Sequence[str]) -> Iterator[Record]:
        """Stage 1: an instruction before or behind the picture, and its caption."""
        for number, name in enumerate(names):
            caption = self._caption(self._picture(f"images/{name}", number))
            asked = BRIEF[number % len(BRIEF)]
            question = f"<image>\n{asked}" if number % 2 else f"{asked}\n<image>"
            yield {"id": Path(name).stem, "image": name, "conversations": turns(question, caption)}

    def _lcs(self, count: int) -> Iterator[Record]:
        return self._pairs([f"{453 + n % 9:05d}/{4530000 + n:09d}.jpg" for n in range(count)])

    def _cc3m(self, count: int) -> Iterator[Record]:
        return self._pairs([f"GCC_train_{2500000 + n:09d}.jpg" for n in range(count)])

    def _instruct(self, count: int) -> Iterator[Record]:
        """Conversations, details and reasonings about COCO; the picture stands before or behind the first question."""
        for number in range(count):
            name = f"{number:012d}.jpg"
            caption = self._caption(self._picture(f"coco/train2017/{name}", number))
            asked = "What can be seen?" if number % 3 else "Describe the following image."
            first = (f"<image>\n{asked}", caption) if number % 2 else (f"{asked}\n<image>", caption)
            more = ("How many things are there?", "There are three things.\n\nTwo of them are green.") * (number % 3)
            yield {"id": name[:-4], "image": name, "conversations": turns(*first, *more)}

    def _mix(self, count: int) -> Iterator[Record]:
        """Each source in its proportion, at least two; ids stand more than once, as in the released file."""
        [spec] = shipped("llava-1.5-665k").sources
        for part in spec.parts:
            for number in range(max(2, round(count * (part.count or 0) / (spec.count or 1)))):
                yield self._of_part(part, number)

    def _of_part(self, part: Part, number: int) -> Record:
        if not part.roots:
            return {"id": f"wgByO4Y_{number}", "model": "", "conversations": turns(*self._long(number))}
        name = f"{part.roots[number % len(part.roots)]}/{number:012d}.jpg"
        caption = self._caption(self._picture(name, number))
        asked = ASKED.get(part.name, "What is odd here?")
        more = (asked.split("\n")[0], REPLIES.get(part.name, "yes")) * (number % 4)
        reply = caption if part.name in ("llava-instruct", "textcaps") else REPLIES.get(part.name, "red")
        return {"id": f"{number:012d}", "image": name, "conversations": turns(f"<image>\n{asked}", reply, *more)}

    def _long(self, number: int) -> tuple[str, ...]:
        """Text alone; the first dialogue does not fit in 2048 tokens, and spells what a picture is marked by in a reply."""
        told = "The word is <image>, ASSISTANT: and </s>. " * (1 if number else 400)
        return (f"Say {number}.", f"{number} it is.", "Write hello in Python.", f"```python\nprint('hello')\n```\n{told}")

    def _next(self, count: int) -> Iterator[Record]:
        """The mixture's records, and pictures of documents and charts: tall, wide, and asked about in several turns."""
        for number, record in enumerate(self._mix(count - 30)):
            yield record | {"id": f"next-{number}"}
        for number in range(30):
            name = f"{('docvqa', 'chartqa', 'ai2d')[number % 3]}/{number}.jpg"
            self._picture(name, number + 5)
            yield {
                "id": f"doc-{number}",
                "image": name,
                "conversations": turns(f"<image>\nWhat is the date?\n{SHORT}", "1997", "Sure?", "Yes."),
            }

    def _own(self, count: int) -> Iterator[Record]:
        for number in range(count):
            name = f"photos/IMG_{number:04d}.jpg"
            caption = self._caption(self._picture(name, number))
            yield {"id": f"item-{number}", "image": name, "conversations": turns("<image>\nWhat do we sell here?", caption)}

    def _science(self) -> None:
        """ScienceQA as it is given out; the converter's file is no part of it."""
        folder = self.root / "ScienceQA"
        folder.mkdir()
        problems = {}
        for number in range(SCIENCE):
            pictured = number % 2 == 0
            if pictured:
                (self.root / f"train/{number}").mkdir(parents=True)
                draw(self._scenes[number % 24], long_side=64).save(self.root / f"train/{number}/image.png")
            problems[str(number)] = {
                "question": "Which is the larger?", "choices": ["the sun", "the moon", "a cup"][: 2 + number % 2], "answer": number % 2,
                "hint": "Look at the picture." if pictured else "", "image": "image.png" if pictured else None, "task": "closed choice",
                "grade": "grade5", "subject": "natural science", "topic": "physics", "category": "Size", "skill": "Compare",
                "lecture": "Size is how large a thing is.\\nStars are large." if number % 3 else "", "solution": "The sun is a star.",
                "split": "train",
            }  # fmt: skip
        (folder / "problems.json").write_text(json.dumps(problems), encoding="utf-8")
        (folder / "pid_splits.json").write_text(json.dumps({"train": list(problems), "test": []}), encoding="utf-8")


def tower(folder: Path, published: int) -> Path:
    """A CLIP whose views stand for those of ``published`` pixels."""
    fields = clip(size=SIDES[published], width=32, layers=3, heads=2, projection=16)
    CLIPVisionModel(CLIPVisionConfig(**fields)).save_pretrained(folder)
    return folder


def decoder(folder: Path, like: dict[str, Any]) -> Path:
    """A language model of the published one's kind: Vicuna's, Mistral's, or Yi's with ChatML's tokens; its tokenizer knows no picture."""
    tokenizer = llama_tokenizer(bare=True)
    if like["eos_token_id"] == 7:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"})
    fields = llama(width=32, layers=2, heads=4, feed_forward=64, rows=len(tokenizer), positions=8192, pad=0)
    grouped = like["num_key_value_heads"] < like["num_attention_heads"]
    own = {name: like[name] for name in ("model_type", "rms_norm_eps", "sliding_window", "rope_parameters") if name in like}
    own |= {"num_key_value_heads": 2 if grouped else 4, "eos_token_id": tokenizer.eos_token_id}
    fields = {name: value for name, value in (fields | own).items() if name != "model_type"}
    made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[like["model_type"]](**fields), dtype=torch.float32)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
