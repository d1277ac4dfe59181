"""lmms-eval's own ``llava`` model, unmodified, on the drop-in package: a small task is made, run by lmms-eval, and held against llavakit.

    questions.json, drawn scenes --> docs, two tasks --(python -m lmms_eval --model llava)--> samples
        replies   generate_until   equal to Assistant.reply_batch, as llava eval asks?      both as answers files: --out FOLDER
        choices   loglikelihood    equal to the losses of our own training pass?            (the shipped pictures, three answers each)

lmms-eval 0.7.3 turns the results of loglikelihood into strings and then cannot read them itself, for any model, so the task brings its own
judge. In an environment of its own, as lmms-eval needs much that this project does not:

    python -m venv SCRATCH && . SCRATCH/bin/activate
    pip install -e . && pip install --no-deps lmms-eval
    pip install accelerate datasets evaluate jsonlines loguru numexpr pytablewriter python-dotenv requests sacrebleu sqlitedict tenacity \\
        tqdm-multiprocess zstandard
    python dev/lmms_eval_scenes.py [--checkpoint FOLDER] [--batch 3] [--per-type 5] [--out FOLDER]

Ends with 1 where a reply or a loss differs. Seen with lmms-eval 0.7.3, torch 2.13 (CPU), transformers 5.23.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from llavakit.assistant import Assistant
from llavakit.checkpoint.places import built_in
from llavakit.eval.scenes import held_out, normal
from llavakit.scenes.draw import draw
from llavakit.scenes.world import make_scene
from llavakit.types import Conversation, Sampling, assistant

PICTURES = Path(str(resources.files("llavakit"))) / "pictures"
NEW_TOKENS = 16
CLOSE = 0.02  # of a loss; the adapter hands pictures over in half precision
Doc = dict[str, Any]

FUNCTIONS = """
import ast
import PIL.Image

def visual(doc):
    return [PIL.Image.open(doc["image"]).convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def choose(doc, results):
    losses = [ast.literal_eval(str(result))[0] for result in results]
    return {"acc": float(doc["choices"][losses.index(min(losses))] == doc["answer"])}
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function made.visual
doc_to_text: !function made.text
doc_to_target: answer
doc_to_choice: {choices}
process_results: {judged}
target_delimiter: ""
generation_kwargs: {{max_new_tokens: {new_tokens}, temperature: 0, do_sample: false}}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Run lmms-eval's llava model on the drop-in package.")
    parser.add_argument("--checkpoint", type=Path, default=built_in(), help="a folder; otherwise the built-in model")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--per-type", type=int, default=0, help="so many questions of each type about drawn scenes, besides the shipped ones"
    )
    parser.add_argument("--out", type=Path, help="a folder for both files of answers")
    words = parser.parse_args()
    ours = Assistant.load(words.checkpoint, device="cpu")
    model = f"pretrained={words.checkpoint},device_map=auto,device=cpu,conv_template={ours.processor.template.name}"
    with tempfile.TemporaryDirectory() as room:
        shipped = shipped_docs()
        asked = [*shipped, *drawn_docs(Path(room), words.per_type)]
        write_task(Path(room), "replies", asked)
        write_task(Path(room), "choices", shipped)
        samples = run(Path(room), "llava", model, ("replies", "choices"), "--batch_size", str(words.batch))
        wrong = differing(asked, texts(samples["replies"]), replies(ours, asked), words.out)
        wrong += wrong_losses(ours, shipped, samples["choices"])
    print(*wrong, sep="\n")
    print(f"{len(asked)} replies and {sum(len(doc['choices']) for doc in shipped)} losses, {len(wrong)} differ")
    return 1 if wrong else 0


def shipped_docs() -> list[Doc]:
    """The questions about the package's pictures, each answer beside two wrong ones."""
    docs: list[Doc] = json.loads((PICTURES / "questions.json").read_text("utf-8"))
    answers = list(dict.fromkeys(doc["answer"] for doc in docs))
    for doc in docs:
        doc["image"] = str(PICTURES / doc["image"])
        place = answers.index(doc["answer"])
        doc["choices"] = sorted(answers[(place + step) % len(answers)] for step in range(3))
    return docs


def drawn_docs(room: Path, per_type: int) -> list[Doc]:
    """Held-out questions about held-out scenes, their pictures drawn into the room."""
    docs = []
    for row in held_out(per_type) if per_type else ():
        image = room / f"scene-{row.seed}.png"
        draw(make_scene(row.seed)).save(image)
        docs.append({"image": str(image), "question": row.question, "answer": row.answer, "choices": [row.answer]})
    return docs


def write_task(room: Path, name: str, docs: Sequence[Doc]) -> None:
    """A task of lmms-eval and its documents."""
    lines = room / f"{name}.jsonl"
    lines.write_text("".join(json.dumps(doc) + "\n" for doc in docs), "utf-8")
    (room / "made.py").write_text(FUNCTIONS, "utf-8")
    asked = {"kind": "generate_until", "choices": "null", "judged": "null", "metric": "exact_match"}
    chosen = {"kind": "multiple_choice", "choices": "choices", "judged": "!function made.choose", "metric": "acc"}
    fields = chosen if name == "choices" else asked
    (room / f"{name}.yaml").write_text(TASK.format(name=name, docs=lines, new_tokens=NEW_TOKENS, **fields), "utf-8")


def run(room: Path, model: str, arguments: str, tasks: Sequence[str], *more: str) -> dict[str, list[Doc]]:
    """What lmms-eval logs of each task, in the order of the documents."""
    command = [sys.executable, "-m", "lmms_eval", "--model", model, "--model_args", arguments, "--tasks", ",".join(tasks)]
    command += ["--include_path", str(room), "--log_samples", "--output_path", str(room / "out"), *more]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(room / "cache")}
    subprocess.run(command, check=True, env=os.environ | offline)
    found = {}
    for name in tasks:
        (log,) = (room / "out").rglob(f"*_samples_{name}.jsonl")
        found[name] = sorted(map(json.loads, log.read_text("utf-8").splitlines()), key=lambda sample: int(sample["doc_id"]))
    return found


def texts(samples: Sequence[Doc]) -> list[str]:
    """The replies that lmms-eval logged."""
    found = (sample["filtered_resps"] for sample in samples)
    return [str(reply[0] if isinstance(reply, list) else reply).strip() for reply in found]


def replies(ours: Assistant, docs: Sequence[Doc], batch: int = 16) -> list[str]:
    """Our own, in batches."""
    short = Sampling(max_new_tokens=NEW_TOKENS)
    found: list[str] = []
    for at in range(0, len(docs), batch):
        found += ours.reply_batch([Conversation.ask(doc["question"], Path(doc["image"])) for doc in docs[at : at + batch]], short)
    return [reply.strip() for reply in found]


def differing(docs: Sequence[Doc], theirs: Sequence[str], ours: Sequence[str], out: Path | None) -> list[str]:
    """The documents that are answered otherwise; both answers go into files, if there is a folder for them."""
    for doc, one in zip(docs, theirs, strict=True):
        print(f"{doc['question']}  {one}  ({doc['answer']})")
    for name, given in (("lmms-eval", theirs), ("llavakit", ours)):
        right = sum(normal(reply) == normal(doc["answer"]) for doc, reply in zip(docs, given, strict=True))
        print(f"{name}: {right} of {len(docs)} right")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            rows = [
                {
                    "question_id": number,
                    "prompt": doc["question"],
                    "text": text,
                    "answer_id": f"{name}-{number}",
                    "model_id": name,
                    "metadata": {},
                }
                for number, (doc, text) in enumerate(zip(docs, given, strict=True))
            ]
            (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    rows = zip(docs, theirs, ours, strict=True)
    return [f"{doc['question']}: {there!r} there, {here!r} here" for doc, there, here in rows if there != here]


@torch.no_grad()
def wrong_losses(ours: Assistant, docs: Sequence[Doc], samples: Sequence[Doc]) -> list[str]:
    """The choices whose mean loss is another in our own training pass."""
    wrong = []
    for doc, sample in zip(docs, samples, strict=True):
        for choice, found in zip(doc["choices"], sample["filtered_resps"], strict=True):
            theirs, _ = ast.literal_eval(str(found))
            talk = Conversation.ask(doc["question"], Path(doc["image"])).then(assistant(choice))
            batch = ours.processor.collate([ours.processor.encode(talk, learn=True)], side="right")
            made = ours.model(batch.to(ours.model.device, ours.model.dtype))
            loss = float(made.loss_sum / made.learned)
            if abs(loss - float(theirs)) > CLOSE * max(1.0, loss):
                wrong.append(f"{doc['question']} {choice}: loss {theirs} there, {loss:.4f} here")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
