"""``llava eval``: named, shown, asked, scored; offline, resumable, and every wrong word answered."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llavakit.eval import benchmarks, scenes
from llavakit.eval.benchmark import Answered, Protocol, Question, Verdict
from llavakit.eval.benchmark import Score as Number
from misbehaving import Manners, serving

ROOT = Path(__file__).parents[2]
Llava = Callable[..., Any]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "PER_KIND", 1)


def lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --- without a model ------------------------------------------------------------------------------------------------------------------


def test_benchmarks_are_named_and_shown(llava: Llava) -> None:
    assert "scenes" in llava("eval", "list").out
    assert {"name", "title", "protocols"} == set(json.loads(llava("eval", "list", "--json").out)[0])
    shown = llava("eval", "show", "scenes")
    for words in ("files", "scored by", "--protocol plain   (the default)", "64 tokens, greedy", "tiny: all but small 97.1 ± 0.3"):
        assert words in shown.out
    assert json.loads(llava("eval", "show", "scenes", "--json").out)["protocols"][0]["name"] == "plain"


def test_wrong_words(llava: Llava) -> None:
    llava("eval", "scens").failed(2, "did you mean scenes?")
    llava("eval", "scenes", "--protocol", "plan").failed(2, "did you mean plain?")
    llava("eval", "scenes", "nowhere").failed(1, "nowhere", "llava scenes export")
    llava("eval", "scenes", "--api", "http://localhost:9/v1").failed(2, "--model")
    llava("eval", "scenes", "--batch", 0).failed(2, "batch")
    llava("eval", "score", "scenes", "none.jsonl").failed(1, "none.jsonl")
    llava("eval", "show", "poem").failed(2, "poem")


def test_scoring_loads_no_model(llava: Llava, tmp_path: Path) -> None:
    """Files of LLaVA's own runner: a line a question, without our ids."""
    scenes.make(tmp_path / "data", 0)
    asked = scenes.questions(tmp_path / "data", scenes.SCENES.protocols[0])
    rows = [
        {"question_id": q.given, "prompt": q.prompt, "text": q.truth if n % 2 else "no idea", "answer_id": "x"} for n, q in enumerate(asked)
    ]
    (tmp_path / "theirs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    code = "import sys; from llavakit.cli import main; code = main(sys.argv[1:]); "
    code += "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(code)"
    words = ["eval", "score", "scenes", str(tmp_path / "theirs.jsonl"), str(tmp_path / "data"), "--json"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"warning: 1 of {len(asked)} questions have no answer: {asked[-1].id}\n"
    found = {score["metric"]: score for score in json.loads(done.stdout)["scores"]}
    assert found["all"]["value"] == pytest.approx(100 * (len(asked) // 2 - (len(asked) % 2 == 0)) / len(asked))
    assert found["all"]["count"] == len(asked)
    assert not list(tmp_path.glob("scenes"))


# --- with one -------------------------------------------------------------------------------------------------------------------------


def test_scenes_need_no_folder(llava: Llava, tiny_model_dir: Path) -> None:
    words = ("eval", "scenes", "--model", tiny_model_dir, "--out", "run", "--batch", 5)
    done = llava(*words)
    assert done.code == 0, done.err
    assert "all but small" in done.out
    assert "published" in done.out
    assert {path.name for path in Path("run").iterdir()} == {"answers.jsonl", "run.json", "scores.json", "page.html", "scenes"}
    assert [line["metadata"]["id"] for line in lines("run/answers.jsonl")] == [
        row["question_id"] for row in lines("run/scenes/benchmark.jsonl")
    ]
    facts = json.loads(Path("run/run.json").read_text())
    assert (facts["benchmark"], facts["protocol"], facts["template"], facts["aspect"]) == ("scenes", "plain", "vicuna_v1", "pad")
    before = Path("run/answers.jsonl").read_bytes()
    assert llava(*words).out == done.out
    assert Path("run/answers.jsonl").read_bytes() == before
    scored = llava("eval", "score", "scenes", "run/answers.jsonl", "--json")
    assert [score["metric"] for score in json.loads(scored.out)["scores"]] == [
        score["metric"] for score in json.loads(Path("run/scores.json").read_text())
    ]
    llava(*words, "--template", "plain").failed(1, "run.json", "template 'vicuna_v1', now 'plain'")


def test_run_is_the_same_word(llava: Llava, tiny_model_dir: Path) -> None:
    words = ("scenes", "--model", tiny_model_dir, "--limit", 3, "--no-page", "--json")
    short, long = llava("eval", *words, "--out", "a"), llava("eval", "run", *words, "--out", "b")
    assert json.loads(short.out)["scores"] == json.loads(long.out)["scores"]
    assert Path("a/answers.jsonl").read_bytes() == Path("b/answers.jsonl").read_bytes()
    assert len(lines("a/answers.jsonl")) == 3
    fewer = llava("eval", *words[:3], "--limit", 2, "--no-page", "--json", "--out", "a")
    assert (len(lines("a/answers.jsonl")), fewer.code, "warning" in fewer.err) == (3, 0, False)
    assert sum(score["count"] for score in json.loads(fewer.out)["scores"] if score["metric"] == "all") == 2
    assert len(list(Path("a/scenes/images").iterdir())) == 3


def test_a_folder_of_exported_scenes(llava: Llava, tiny_model_dir: Path) -> None:
    assert llava("scenes", "export", "data", "--count", 2, "--workers", 1).code == 0
    done = llava("eval", "scenes", "data", "--model", tiny_model_dir, "--limit", 4)
    assert done.code == 0, done.err
    assert len(lines(f"evaluation/scenes/plain/{tiny_model_dir.name}/answers.jsonl")) == 4
    assert "only           4 of " in done.out
    next(Path("data/images").iterdir()).unlink()
    gone = llava("eval", "scenes", "data", "--model", tiny_model_dir, "--out", "gone")
    assert gone.code == 0
    assert "failures.jsonl" in gone.err
    assert "have no answer" in gone.err


def test_two_ranks_are_one_run(llava: Llava, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("eval", "scenes", "--model", tiny_model_dir, "--batch", 2, "--no-page")
    assert llava(*words, "--out", "one").code == 0
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        done = llava(*words, "--out", "two")
        assert done.code == 0
        assert (done.out == "") == (rank == "1")
    assert "rank" not in done.err
    assert Path("one/answers.jsonl").read_bytes() == Path("two/answers.jsonl").read_bytes()


def test_a_server_is_asked(llava: Llava) -> None:
    with serving(Manners(latency=0.001)) as server:
        done = llava("eval", "scenes", "--api", server.url, "--model", "teacher", "--out", "run", "--no-page", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["model"] == "teacher"
    assert len(lines("run/answers.jsonl")) == len(lines("run/scenes/benchmark.jsonl"))


# --- protocols ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def exam(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small benchmark of its own: two protocols, verdicts, an upload, pictures that its files bring."""

    def asked(folder: Path, protocol: Protocol) -> list[Question]:
        return [Question(id=f"e{n}", given=n, prompt=f"What is {n}?{protocol.suffix}", truth="x") for n in range(3)]

    def submit(answered: list[Answered], folder: Path) -> Path:
        (folder / "upload.json").write_text(json.dumps([one.text for one in answered]))
        return folder / "upload.json"

    made = replace(
        scenes.SCENES,
        name="exam",
        protocols=(
            Protocol(name="strict", template="llava_hf", aspect="anyres", max_new_tokens=2, note="With care."),
            Protocol(name="loose", max_new_tokens=2, suffix="\nBriefly."),
        ),
        questions=asked,
        score=lambda answered: [Number(metric="accuracy", value=0.0, count=len(answered), headline=True)],
        verdict=lambda one: Verdict(parsed=one.text or "", points=0.0),
        submit=submit,
        make=None,
    )
    monkeypatch.setattr(benchmarks, "ALL", (scenes.SCENES, made))
    return made


def test_a_protocol_is_kept_or_its_departure_is_said(llava: Llava, tiny_model_dir: Path, exam: Any) -> None:
    done = llava("eval", "exam", ".", "--model", tiny_model_dir, "--out", "a")
    assert done.code == 0, done.err
    assert "the checkpoint's prompt format is vicuna_v1, protocol strict wants llava_hf and gets it" in done.err
    assert "wants the aspect anyres, and this checkpoint's processor has pad: published numbers do not compare" in done.err
    assert json.loads(Path("a/run.json").read_text())["template"] == "llava_hf"
    assert "With care." in done.out
    kept = llava("eval", "exam", ".", "--model", tiny_model_dir, "--out", "b", "--template", "vicuna_v1")
    assert "wants the prompt format llava_hf, and vicuna_v1 is used: published numbers do not compare" in kept.err
    assert json.loads(Path("b/run.json").read_text())["template"] == "vicuna_v1"
    loose = llava("eval", "exam", ".", "--model", tiny_model_dir, "--out", "c", "--protocol", "loose")
    assert "warning" not in loose.err
    assert lines("c/answers.jsonl")[0]["prompt"] == "What is 0?\nBriefly."
    assert json.loads(Path("c/upload.json").read_text()) == [line["text"] for line in lines("c/answers.jsonl")]
    assert "warning" not in llava("eval", "score", "exam", "c/answers.jsonl", ".").err  # run.json knows the protocol
    other = llava("eval", "score", "exam", "c/answers.jsonl", ".", "--protocol", "strict")
    assert "asked as exam, protocol loose" in other.err
    assert "matched by question_id" not in other.err  # our own ids are there


def test_files_that_must_be_brought(llava: Llava, exam: Any) -> None:
    llava("eval", "exam").failed(2, "FOLDER")
