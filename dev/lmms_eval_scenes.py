"""lmms-eval's own ``llava`` model, unmodified, on the drop-in package: a small task is made, run by lmms-eval, and held against llavakit.

    questions.json --> docs.jsonl, two tasks --(python -m lmms_eval --model llava)--> samples --> equal replies? equal losses?
                       replies: ask        (generate_until)
                       choices: score three answers (loglikelihood; lmms-eval 0.7.3 turns its results into strings and then cannot read
                                them itself, for any model, so the task brings its own judge)

In an environment of its own, as lmms-eval needs much that this project does not:

    python -m venv SCRATCH && . SCRATCH/bin/activate
    pip install -e . && pip install --no-deps lmms-eval
    pip install accelerate datasets evaluate jsonlines loguru numexpr pytablewriter python-dotenv requests sacrebleu sqlitedict tenacity \\
        tqdm-multiprocess zstandard
    python dev/lmms_eval_scenes.py [--checkpoint FOLDER] [--batch 3]

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
from llavakit.types import Conversation, Sampling, assistant

PICTURES = Path(str(resources.files("llavakit"))) / "pictures"
NEW_TOKENS = 16
CLOSE = 0.02  # of a loss; the adapter hands pictures over in half precision

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
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        docs = write_tasks(Path(room))
        ours = Assistant.load(words.checkpoint, device="cpu")
        samples = run(Path(room), words.checkpoint, words.batch, ours.processor.template.name)
    wrong = [*wrong_replies(ours, docs, samples["replies"]), *wrong_losses(ours, docs, samples["choices"])]
    print(*wrong, sep="\n")
    print(f"{len(docs)} replies and {sum(len(doc['choices']) for doc in docs)} losses, {len(wrong)} differ")
    return 1 if wrong else 0


def write_tasks(room: Path) -> list[dict[str, Any]]:
    """The two tasks and their documents: the questions about the package's pictures, each answer beside two wrong ones."""
    docs: list[dict[str, Any]] = json.loads((PICTURES / "questions.json").read_text("utf-8"))
    answers = list(dict.fromkeys(doc["answer"] for doc in docs))
    for doc in docs:
        doc["image"] = str(PICTURES / doc["image"])
        place = answers.index(doc["answer"])
        doc["choices"] = sorted(answers[(place + step) % len(answers)] for step in range(3))
    (room / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs), "utf-8")
    (room / "made.py").write_text(FUNCTIONS, "utf-8")
    asked = {"kind": "generate_until", "choices": "null", "judged": "null", "metric": "exact_match"}
    chosen = {"kind": "multiple_choice", "choices": "choices", "judged": "!function made.choose", "metric": "acc"}
    for name, fields in (("replies", asked), ("choices", chosen)):
        text = TASK.format(name=name, docs=room / "docs.jsonl", new_tokens=NEW_TOKENS, **fields)
        (room / f"{name}.yaml").write_text(text, "utf-8")
    return docs


def run(room: Path, checkpoint: Path, batch: int, template: str) -> dict[str, list[dict[str, Any]]]:
    """What lmms-eval logs of each task, in the order of the documents."""
    model = f"pretrained={checkpoint},device_map=auto,device=cpu,conv_template={template}"
    command = [sys.executable, "-m", "lmms_eval", "--model", "llava", "--model_args", model, "--tasks", "replies,choices"]
    command += ["--include_path", str(room), "--batch_size", str(batch), "--log_samples", "--output_path", str(room / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(room / "cache")}
    subprocess.run(command, check=True, env=os.environ | offline)
    found = {}
    for name in ("replies", "choices"):
        (log,) = (room / "out").rglob(f"*_samples_{name}.jsonl")
        found[name] = sorted(map(json.loads, log.read_text("utf-8").splitlines()), key=lambda sample: int(sample["doc_id"]))
    return found


def wrong_replies(ours: Assistant, docs: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]]) -> list[str]:
    """The documents that our own assistant answers otherwise."""
    wrong = []
    for doc, sample in zip(docs, samples, strict=True):
        asked = Conversation.ask(doc["question"], Path(doc["image"]))
        reply = "".join(ours.reply(asked, Sampling(max_new_tokens=NEW_TOKENS))).strip()
        theirs = sample["filtered_resps"][0] if isinstance(sample["filtered_resps"], list) else sample["filtered_resps"]
        print(f"{doc['question']}  {theirs}  ({doc['answer']})")
        wrong += [] if theirs.strip() == reply else [f"{doc['question']}: {theirs!r} there, {reply!r} here"]
    return wrong


@torch.no_grad()
def wrong_losses(ours: Assistant, docs: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]]) -> list[str]:
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
