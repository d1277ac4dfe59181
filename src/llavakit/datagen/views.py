"""What a run leaves for people and for training: files made from the ledger, each written whole and then put in its place.

    rows.jsonl       accepted rows in the order of the plan: LLaVA's format, and beside it kind, teacher, prompt, seed, attempt
    rejects.jsonl    every reply that is not used, with the reason and its words; questions that got none, with the fault
    finetune.json    the rows as ``llava train finetune`` and ``llava data check`` take them

They can be deleted: the same command makes them again without asking anybody.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavakit.datagen.checks import Rules, said
from llavakit.datagen.duplicates import Seen
from llavakit.datagen.files import line, whole
from llavakit.datagen.generate import Made
from llavakit.datagen.kinds import Prompts
from llavakit.datagen.objects import named
from llavakit.datagen.parse import Reject
from llavakit.datagen.rows import sample

ROWS, REJECTS, FINETUNE = "rows.jsonl", "rejects.jsonl", "finetune.json"


@dataclass
class Counts:
    """How many of each: rows by kind, replies not used by reason, questions without a reply, questions still to be asked."""

    rows: Counter[str] = field(default_factory=Counter)
    rejects: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    pending: int = 0

    def lines(self) -> list[str]:
        rows = ", ".join(f"{count:,} {kind}" for kind, count in self.rows.items()) or "none"
        lines = [f"rows: {self.rows.total():,} ({rows})"]
        if self.rejects:
            lines.append("replies not used: " + ", ".join(f"{count:,} {code}" for code, count in self.rejects.most_common()))
        if self.failed:
            lines.append(f"questions without a reply: {self.failed:,} (run again to ask them again)")
        if self.pending:
            lines.append(f"still to be asked: {self.pending:,} (run again to go on)")
        return lines


def write_views(
    folder: Path, found: Iterable[Made], *, teacher: str, prompts: Prompts, rules: Rules, failures: Mapping[str, str] | None = None
) -> Counts:
    """Write the three files. ``failures`` says, by task, why the last call about it gave no reply."""
    counts, seen, failures = Counts(), Seen(rules.near_duplicates), failures or {}
    with ExitStack() as stack:
        rows, rejects, training = (stack.enter_context(whole(folder / name)) for name in (ROWS, REJECTS, FINETUNE))
        training.write("[")
        for one in found:
            task = one.task
            for refused in one.refused:
                counts.rejects[refused.reject.code] += 1
                line(rejects, _reject(one, refused.reject, refused.attempt, refused.text, teacher))
            if one.turns is None:
                failed = task.id in failures and not one.settled
                counts.failed += failed
                counts.pending += not one.settled and not failed
                if failed:
                    line(rejects, _reject(one, Reject("no_reply", failures[task.id]), 0, "", teacher))
                continue
            text = said(one.turns)
            repeated = _repeated(seen, one, rules)
            if repeated is not None:
                counts.rejects[repeated.code] += 1
                line(rejects, _reject(one, repeated, one.attempt, text, teacher))
                continue
            record = sample(task.id, task.context.image, one.turns, image_first=task.image_first)
            training.write((",\n" if counts.rows.total() else "\n") + json.dumps(record, ensure_ascii=False))
            line(rows, record | _provenance(one, teacher, prompts) | _unknown(one, text))
            counts.rows[task.kind] += 1
        training.write("\n]\n")
    return counts


def _repeated(seen: Seen, one: Made, rules: Rules) -> Reject | None:
    """Whether an earlier row says the same; what a person says who wants a description is the plan's and tells nothing."""
    if "duplicate" in rules.off or one.turns is None:
        return None
    parts = (answer if one.task.kind == "detail" else f"{question}\n{answer}" for question, answer in one.turns)
    found = seen.add(one.task.id, "\n".join(parts))
    if found is None:
        return None
    earlier, share = found
    return Reject("duplicate" if share == 1 else "near_duplicate", f"{share:.0%} of what {earlier} says")


def _provenance(one: Made, teacher: str, prompts: Prompts) -> dict[str, Any]:
    """Who said it, to which prompt, drawn with which seed, at which attempt (0 is the first)."""
    task = one.task
    model = {"model": one.model} if one.model != teacher else {}
    return {"kind": task.kind, "teacher": teacher} | model | {"prompt": prompts.digest(task.kind), "seed": one.seed, "attempt": one.attempt}


def _unknown(one: Made, text: str) -> dict[str, Any]:
    if one.task.kind == "answer":
        return {}
    found = named(text, one.task.context.words())
    return {"objects": len(found.words)} | ({"unknown": list(found.unknown)} if found.unknown else {})


def _reject(one: Made, reject: Reject, attempt: int, text: str, teacher: str) -> dict[str, Any]:
    task = one.task
    where = {"id": task.id, "image": task.context.image, "kind": task.kind, "attempt": attempt, "teacher": teacher}
    return where | {"reason": reject.code, "detail": reject.detail, "text": text}
