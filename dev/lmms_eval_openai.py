"""lmms-eval's ``openai`` model against a server, held against the same checkpoint asked directly: do both give the same answers?

    questions, drawn scenes --(python -m lmms_eval --model openai)--> the server --> samples == Assistant.reply_batch?

    llava serve FOLDER                                                             (or any OpenAI-compatible server of this checkpoint)
    python dev/lmms_eval_openai.py --url http://127.0.0.1:8000/v1 [--model NAME] [--checkpoint FOLDER] [--per-type 5] [--out FOLDER]

The environment is that of ``lmms_eval_scenes.py``, and ``pip install openai``. Ends with 1 where a reply differs, also where one failed.
lmms-eval asks 32 questions at once and sends pictures as PNG, without loss.

Seen with lmms-eval 0.7.3 and ``llava serve tiny``: 48 replies, 0 differ. A server that batches may differ in the rounding of the dtype,
where two tokens are equally likely.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from lmms_eval_scenes import differing, drawn_docs, replies, run, shipped_docs, texts, write_task

from llavakit.assistant import Assistant
from llavakit.checkpoint.places import built_in


def main() -> int:
    parser = argparse.ArgumentParser(description="Run lmms-eval's openai model against a server of ours.")
    parser.add_argument("--url", required=True, help="as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="llava", help="its name at the server")
    parser.add_argument("--key", default="none", help="what the server wants as a key")
    parser.add_argument("--checkpoint", type=Path, default=built_in(), help="what the server serves; otherwise the built-in model")
    parser.add_argument(
        "--per-type", type=int, default=0, help="so many questions of each type about drawn scenes, besides the shipped ones"
    )
    parser.add_argument("--out", type=Path, help="a folder for both files of answers")
    words = parser.parse_args()
    arguments = f"model={words.model},base_url={words.url},api_key={words.key},timeout=300,max_retries=1"
    with tempfile.TemporaryDirectory() as room:
        asked = [*shipped_docs(), *drawn_docs(Path(room), words.per_type)]
        write_task(Path(room), "replies", asked)
        samples = run(Path(room), "openai", arguments, ("replies",))
        wrong = differing(asked, texts(samples["replies"]), replies(Assistant.load(words.checkpoint, device="cpu"), asked), words.out)
    print(*wrong, sep="\n")
    print(f"{len(asked)} replies, {len(wrong)} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
