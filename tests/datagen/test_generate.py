"""The ledger is the only truth: what is accepted follows from it alone, nothing is paid twice, and a killed run ends like any other."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from teaching import say

from llavakit.cli import main
from llavakit.data.sources import read_llava
from llavakit.datagen.checks import Rules
from llavakit.datagen.context import Box, Context
from llavakit.datagen.generate import Job, made, run
from llavakit.datagen.kinds import KINDS, SHARES, Prompts
from llavakit.datagen.plan import Plan, counts, task
from llavakit.datagen.preview import preview
from llavakit.datagen.views import Counts, write_views
from llavakit.errors import RefusedError, ResponderError
from llavakit.responder import Completion, Finish, Ledger, Limits, Price, Query, Usage
from llavakit.types import Sampling
from misbehaving import apart

PROMPTS = Prompts.load()
KIND_OF = {PROMPTS.of(kind).system: kind for kind in (*KINDS, "answer", "filter")}  # type: ignore[arg-type]
FILES = ("rows.jsonl", "rejects.jsonl", "finetune.json")


def contexts(number: int) -> list[Context]:
    said = ("A man walks a dog", "A dog on a leash", "Somebody is out with a pet")
    return [
        Context(f"{i:03}", f"{i:03}.jpg", tuple(f"{one}, scene {i}." for one in said), (Box("dog", 0, 0, 0.5, 1),)) for i in range(number)
    ]


class Teacher:
    """Scripted; counts what it is asked. ``change`` may give another text or finish, or raise."""

    name, at_once = "scripted", 8

    def __init__(self, change: Callable[[Query, str], str | tuple[str, Finish]] = lambda query, text: text) -> None:
        self.change, self.asked = change, Counter[str]()

    async def complete(self, query: Query) -> Completion:
        self.asked[query.key(self.name)] += 1
        talk = query.conversation
        text = self.change(query, say(KIND_OF[talk.system or ""], talk.turns[-1].text, seed=query.sampling.seed))
        words, finish = text if isinstance(text, tuple) else (text, "stop")
        return Completion(text=words, finish=finish, model="m-1", usage=Usage(prompt_tokens=10, reply_tokens=5))  # type: ignore[arg-type]

    async def close(self) -> None:
        return None


def job(number: int = 12, **changes: Any) -> Job:
    plan = Plan(contexts(number), counts(number, SHARES), seed=0, detailed=PROMPTS.detailed)
    return replace(Job(tasks=plan, prompts=PROMPTS, sampling=Sampling(temperature=0.7, max_new_tokens=300)), **changes)


def views(one: Job, ledger: Ledger, folder: Path) -> Counts:
    folder.mkdir(exist_ok=True)
    return write_views(folder, made(one, "scripted", ledger), teacher="scripted", prompts=one.prompts, rules=one.rules)


def whole(one: Job, teacher: Teacher, folder: Path) -> Counts:
    with Ledger(folder / "ledger.sqlite") as ledger:
        try:
            run(one, teacher, ledger, limits=Limits(again=one.again, first_wait=0.01, in_a_row=10_000))
        finally:
            counted = views(one, ledger, folder)
    return counted


def rows(folder: Path, name: str = "rows.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_all_three_kinds_in_the_order_of_the_plan(tmp_path: Path) -> None:
    one, teacher = job(), Teacher()
    counted = whole(one, teacher, tmp_path)
    assert [row["id"] for row in rows(tmp_path)] == [task.id for task in one.tasks]
    assert counted.rows == Counter(task.kind for task in one.tasks)
    assert set(counted.rows) == set(KINDS)
    for row in rows(tmp_path):
        assert {"kind", "teacher", "model", "prompt", "seed", "attempt"} <= set(row)
        assert row["prompt"] == PROMPTS.digest(row["kind"])
    samples = read_llava(tmp_path / "finetune.json", check_images=False)
    assert len(samples) == counted.rows.total()
    assert not samples.report.faults
    assert not samples.report.remarks


def test_nothing_is_paid_twice_and_views_come_back(tmp_path: Path) -> None:
    whole(job(), first := Teacher(), tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    for name in FILES:
        (tmp_path / name).unlink()
    whole(job(), again := Teacher(), tmp_path)
    assert set(first.asked.values()) == {1}
    assert not again.asked
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == before


def test_other_checks_read_old_replies_for_nothing(tmp_path: Path) -> None:
    def talk(query: Query, text: str) -> str:
        return text.replace("dog", "dog at [0.1, 0.2]") if query.id.endswith("detail") else text

    strict, lax = job(again=0), job(again=0, rules=Rules(off=frozenset(("coordinates",))))
    counted = whole(strict, Teacher(talk), tmp_path)
    assert counted.rejects == {"coordinates": strict.tasks.counts["detail"]}  # type: ignore[attr-defined]
    assert all("[0.1, 0.2]" in reject["text"] for reject in rows(tmp_path, "rejects.jsonl"))
    later = Teacher(talk)
    assert not whole(lax, later, tmp_path).rejects
    assert not later.asked


def test_another_prompt_is_another_question_and_rows_are_never_mixed(tmp_path: Path) -> None:
    whole(job(), first := Teacher(), tmp_path)
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "detail.txt").write_text("[system]\nSay all.\n")
    changed = Prompts.load(folder)
    KIND_OF["Say all."] = "detail"
    whole(job(prompts=changed), second := Teacher(), tmp_path)
    details = [row for row in rows(tmp_path) if row["kind"] == "detail"]
    assert len(second.asked) == len(details)
    assert not set(first.asked) & set(second.asked)
    assert {row["prompt"] for row in details} == {changed.digest("detail")}
    assert {row["prompt"] for row in rows(tmp_path)} == {changed.digest(kind) for kind in KINDS}


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("", "empty"),
        ("I'm sorry, but I can't help.", "refusal"),
        ("Question:\nWhat?", "unbalanced"),
        (("Question:\nWhat?\n===\nAnswer:\nA dog", "length"), "too_long"),
        (("A dog", "filter"), "filtered"),
        (("A dog", "cut"), "cut_off"),
    ],
)
def test_rejects_are_asked_again_and_kept_with_their_words(tmp_path: Path, reply: Any, code: str) -> None:
    firsts = {one.id: one.seed for one in job().tasks}

    def talk(query: Query, text: str) -> Any:
        return reply if query.id.endswith("reasoning") and query.sampling.seed == firsts[query.id] else text

    counted = whole(job(), Teacher(talk), tmp_path)
    assert counted.rows.total() == len(firsts)
    assert counted.rejects == {code: sum(name.endswith("reasoning") for name in firsts)}
    assert {row["attempt"] for row in rows(tmp_path) if row["kind"] == "reasoning"} == {1}
    kept = rows(tmp_path, "rejects.jsonl")
    assert {(one["reason"], one["attempt"], one["text"]) for one in kept} == {(code, 0, reply[0] if isinstance(reply, tuple) else reply)}


def test_a_question_that_is_refused_is_a_failure_and_asked_again_next_time(tmp_path: Path) -> None:
    def refuse(query: Query, text: str) -> str:
        if query.id.startswith("003"):
            raise RefusedError("not this one", code="refused")
        return text

    one = job()
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        run(one, Teacher(refuse), ledger, limits=Limits())
        failures = {failure.id: failure.what for failure in ledger.failures()}
        counted = write_views(
            tmp_path, made(one, "scripted", ledger), teacher="scripted", prompts=PROMPTS, rules=one.rules, failures=failures
        )
    lost = sum(task.id.startswith("003") for task in one.tasks)
    assert (counted.failed, counted.pending, counted.rows.total()) == (lost, 0, len(list(one.tasks)) - lost)
    assert all(kept["reason"] == "no_reply" for kept in rows(tmp_path, "rejects.jsonl"))
    assert whole(job(), Teacher(), tmp_path).rows.total() == len(list(one.tasks))


def test_what_stops_a_run_leaves_the_views_of_what_was_paid(tmp_path: Path) -> None:
    teacher = Teacher()

    def stop(query: Query, text: str) -> str:
        if len(teacher.asked) > 9:
            raise ResponderError("no credit", code="no_credit")
        return text

    teacher.change = stop
    with pytest.raises(ResponderError, match="no credit"):
        whole(job(), teacher, tmp_path)
    assert 1 <= len(rows(tmp_path)) <= 9
    assert len(json.loads((tmp_path / "finetune.json").read_text())) == len(rows(tmp_path))


def test_duplicates_within_a_run_are_rejected_in_order(tmp_path: Path) -> None:
    counted = whole(job(), Teacher(lambda query, text: "The same dog, always." if query.id.endswith("detail") else text), tmp_path)
    assert counted.rows["detail"] == 1
    first = next(one.id for one in job().tasks if one.kind == "detail")
    kept = rows(tmp_path, "rejects.jsonl")
    assert all(one["reason"] == "duplicate" and first in one["detail"] for one in kept)
    assert len(kept) == counted.rejects["duplicate"] > 1


def test_a_review_drops_what_the_teacher_would_not_use(tmp_path: Path) -> None:
    def judge(query: Query, text: str) -> str:
        if query.id.endswith("-review"):
            return "DROP: a telephone number" if query.id.startswith("002") else "Hm." if query.id.startswith("004") else "KEEP"
        return text

    counted = whole(job(review=True), teacher := Teacher(judge), tmp_path)
    assert counted.rejects["dropped"] == sum(one.context.id == "002" for one in job().tasks)
    assert counted.rejects["no_verdict"] == sum(one.context.id == "004" for one in job().tasks)
    assert not {row["id"][:3] for row in rows(tmp_path)} & {"002", "004"}
    assert "a telephone number" in (tmp_path / "rejects.jsonl").read_text()
    assert max(teacher.asked.values()) == 1


def test_peoples_own_questions_are_answered(tmp_path: Path) -> None:
    tasks = [task("answer", Context(str(i), f"{i}.jpg", ()), seed=0, instruction=f"What about {i}?") for i in range(5)]
    whole(job(tasks=tasks), Teacher(), tmp_path)
    for number, row in enumerate(rows(tmp_path)):
        first = row["conversations"][0]["value"]
        assert first in (f"<image>\nWhat about {number}?", f"What about {number}?\n<image>")


def test_the_preview_counts_what_is_left(tmp_path: Path) -> None:
    one = job()
    told = preview(one, price=Price(prompt=1, reply=2), concurrency=4)
    assert told.questions == dict(Counter(task.kind for task in one.tasks))
    assert told.money == pytest.approx((told.prompt_tokens + 2 * told.reply_tokens) / 1e6, rel=0.01)
    assert told.first.startswith("[system]")
    nothing = preview(one, price=None, concurrency=4, known=lambda task: True)
    assert (nothing.known, nothing.prompt_tokens, nothing.reply_tokens, nothing.money) == (len(list(one.tasks)), 0, 0, None)


def generate(folder: Path, server: str, out: str) -> Any:
    """The command in a process of its own: forked, so that what it imports is there already."""
    words = ["generate", str(folder / "contexts.jsonl"), "--out", str(folder / out), "--teacher", server, "--model", "scripted"]
    process = multiprocessing.get_context("fork").Process(target=main, args=([*words, "--concurrency", "2"],))
    process.start()
    return process


def ended(process: Any) -> int:
    process.join()
    return int(process.exitcode)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked here")
def test_ten_times_killed_is_as_if_undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")  # and its import is not paid for in every fork
    records = [{"id": one.id, "image": one.image, "captions": one.captions} for one in contexts(40)]
    (tmp_path / "contexts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    here = Path(__file__)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(here.parent), str(here.parents[2] / "src"))))  # for the server's answers
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    manners = ("--faults", "refusal=0.1", "length=0.1", "--latency", "0.03", "--answer", "teaching:answer")
    with apart(*manners) as server:
        for _ in range(10):
            process, before = generate(tmp_path, server, "killed"), replies(tmp_path / "killed")
            while replies(tmp_path / "killed") < before + 4 and process.is_alive():
                time.sleep(0.005)
            assert process.is_alive(), "it should be killed in the middle of its work"
            process.kill()
            assert ended(process) == -signal.SIGKILL
        assert ended(generate(tmp_path, server, "killed")) == 0
        assert ended(generate(tmp_path, server, "calm")) == 0
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()
    names = [row["id"] for row in rows(tmp_path / "killed")]
    assert len(names) == len(set(names)) > 60


def replies(folder: Path) -> int:
    """How many replies a ledger holds, read beside the process that writes it."""
    if not (folder / "ledger.sqlite").exists():
        return 0
    try:
        with sqlite3.connect(f"file:{folder / 'ledger.sqlite'}?mode=ro", uri=True) as connection:
            return int(connection.execute("SELECT count(*) FROM replies").fetchone()[0])
    except sqlite3.Error:
        return 0
