"""An endpoint is compared with our own model: a right one agrees, a wrong one is told by what is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stub_server import KEY, served

from llavakit.assistant import Assistant
from llavakit.errors import ConfigError, ResponderError, UnavailableError
from llavakit.model.generation import context_length
from llavakit.preprocess import Preprocess
from llavakit.processor import Inputs, Processor
from llavakit.prompts import TEMPLATES
from llavakit.serve import same
from llavakit.serve.endpoint import Endpoint
from llavakit.serve.wrong_ways import but
from llavakit.types import Conversation

FEW = 12
PICTURED = {"picture", "tall picture", "two pictures", "turns"}


@pytest.fixture(scope="module")
def ours() -> Assistant:
    """The built-in model: trained, so that what it is shown changes what it says."""
    return Assistant.load(dtype=torch.float32)


@pytest.fixture(scope="module")
def asked(ours: Assistant) -> dict[str, Conversation]:
    return same.questions(ours)


def compared(ours: Assistant, asked: dict[str, Conversation], **wrong: Any) -> same.Compared:
    with served(ours, **wrong) as url:
        return same.compare(Endpoint(url).ask, ours, {name: one for name, one in asked.items() if name != "long"}, new=FEW)


def plainly(processor: Processor) -> Callable[[Conversation], Inputs]:
    return lambda conversation: processor.encode(conversation, learn=False)


def test_the_questions_are_of_every_kind(ours: Assistant, asked: dict[str, Conversation]) -> None:
    assert set(asked) == PICTURED | {"text", "system", "long"}
    assert {len(one.images) for one in asked.values()} == {0, 1, 2}
    count = len(ours.processor.encode(asked["long"], learn=False).input_ids)
    assert context_length(ours.model) / 3 < count < context_length(ours.model)


@pytest.mark.parametrize("logprobs", [True, False])
def test_a_right_endpoint_agrees(ours: Assistant, asked: dict[str, Conversation], logprobs: bool) -> None:
    found = compared(ours, asked, logprobs=logprobs, said=lambda text: f" {text}\n")
    assert found.agrees
    assert not found.meanings
    assert all(row.same and row.their_prompt == row.prompt for row in found.rows)
    assert {row.agreement for row in found.rows} == ({1.0} if logprobs else {None})


def dropped(ours: Assistant) -> Callable[[Conversation], Inputs]:
    """The first token is left out, as a server does that leaves it to the chat template."""

    def encode(conversation: Conversation) -> Inputs:
        inputs = ours.processor.encode(conversation, learn=False)
        return replace(inputs, input_ids=inputs.input_ids[1:], labels=inputs.labels[1:])

    return encode


def ways(ours: Assistant) -> dict[str, tuple[dict[str, Any], str, set[str] | None]]:
    right = ours.processor
    silent = right.using(replace(right.template, system=""))
    return {
        "crop": ({"encode": plainly(but(right, preprocess=Preprocess(size=112, aspect="square")))}, "it crops pictures", None),
        "squash": ({"encode": plainly(but(right, preprocess=Preprocess(size=112, aspect="squash")))}, "it squashes pictures", None),
        "no system": ({"encode": plainly(silent)}, "leaves the system text out", {"text", *PICTURED}),
        "template": ({"encode": plainly(right.using(TEMPLATES["llava_hf"]))}, "as llava_hf, not vicuna_v1", None),
        "no first token": ({"encode": dropped(ours)}, "no first token", {"text", "system", *PICTURED}),
        "class feature": ({"counted": 1}, "class feature", PICTURED),
        "uncounted": ({"counted": -63}, "no image tokens", PICTURED),
    }


@pytest.mark.parametrize("name", ["crop", "squash", "no system", "template", "no first token", "class feature", "uncounted"])
def test_a_wrong_endpoint_is_told_by_what_it_does(ours: Assistant, asked: dict[str, Conversation], name: str) -> None:
    wrong, said, rows = ways(ours)[name]
    found = compared(ours, asked, **wrong)
    assert not found.agrees
    first = found.meanings[0]
    assert said in first.what
    assert first.remedy
    assert rows is None or set(first.rows) == rows
    assert {name for one in found.meanings for name in one.rows} == {row.name for row in found.rows if not row.same}


def test_two_faults_at_once_are_told_by_the_count(ours: Assistant, asked: dict[str, Conversation]) -> None:
    """No single way says what a server says that is wrong in two; the count still names one of them."""
    silent = ours.processor.using(replace(ours.processor.template, system=""))
    found = compared(ours, asked, encode=plainly(silent), said=lambda text: "A zebra.")
    assert not found.agrees
    assert found.meanings[0].what.startswith("it counts as if it leaves the system text out")
    assert set(found.meanings[0].rows) == {"text", *PICTURED}
    assert found.meanings[1].rows == ("system",)
    assert "weights" in found.meanings[1].what


def test_a_refused_question_is_a_row(ours: Assistant, asked: dict[str, Conversation]) -> None:
    found = compared(ours, asked, most_pictures=1)
    assert not found.agrees
    assert [row.name for row in found.rows if row.refused] == ["two pictures"]
    assert "at most 1 image" in found.meanings[0].what


def test_the_place_of_a_difference(ours: Assistant, asked: dict[str, Conversation]) -> None:
    one = {"picture": asked["picture"]}
    row = compared(ours, one, said=lambda text: text.rsplit(" ", 1)[0] + " zebra").rows[0]
    assert row.counted
    assert row.place is not None
    words = ours.processor.tokenizer(row.ours, add_special_tokens=False).input_ids
    others = ours.processor.tokenizer(row.theirs, add_special_tokens=False).input_ids
    assert words[: row.place] == others[: row.place]
    assert words[row.place : row.place + 1] != others[row.place : row.place + 1]
    assert row.margin is not None
    assert row.margin > same.NEAR
    assert not row.near


def test_near_ties_agree() -> None:
    rows = (same.Row(name="a", pictures=0), same.Row(name="b", pictures=0, ours="x", theirs="y", place=0, margin=same.NEAR / 2))
    assert same.Compared(rows=rows, meanings=()).agrees
    assert not same.Compared(rows=rows[1:], meanings=()).agrees  # not one that is the same
    assert not same.Compared(rows=(rows[0], replace(rows[1], margin=1.0)), meanings=()).agrees


def test_the_key_is_sent_and_never_told(ours: Assistant, asked: dict[str, Conversation]) -> None:
    with served(ours, key=KEY) as url:
        assert Endpoint(url + "/v1", key=KEY).ask(asked["text"], 2).prompt_tokens
        for key in (None, "other"):
            with pytest.raises(ResponderError, match="401"):
                Endpoint(url, key=key).ask(asked["text"], 2)
        endpoint = Endpoint(url, key=KEY)
        assert KEY not in endpoint._scrubbed(f"your {KEY} is wrong")


def test_waiting_for_an_endpoint(ours: Assistant) -> None:
    with served(ours) as url:
        Endpoint(url).wait(5)
    for alive, what in ((True, "was not ready"), (False, "it ended")):
        with pytest.raises(UnavailableError, match=what):
            Endpoint("http://127.0.0.1:9").wait(0.05, alive=lambda alive=alive: alive, pause=0.01)
    for wrong in ("127.0.0.1:8000", "ftp://x", "http://user:word@host"):
        with pytest.raises(ConfigError):
            Endpoint(wrong)


# --- the command ----------------------------------------------------------------------------------------------------------------------


def llava(*words: object) -> int:
    from llavakit.cli import main

    return main([str(word) for word in words])


def test_the_command_agrees_and_disagrees(
    ours: Assistant, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLAVA_API_KEY", KEY)
    with served(ours, key=KEY) as url:
        assert llava("verify", "--api", url, "--json", "--dtype", "float32") == 0
        told = json.loads(capsys.readouterr().out)
        assert told["agrees"]
        assert {row["question"] for row in told["rows"]} >= PICTURED
        changed = tmp_path / "changed"
        shutil.copytree(Path(same.__file__).parents[1] / "weights" / "tiny", changed)
        file = changed / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"do_pad": False, "image_processor_type": "CLIPImageProcessor"}))
        assert llava("verify", changed, "--api", url, "--dtype", "float32") == 1
        out = capsys.readouterr().out
        assert "it pads pictures" in out
        assert KEY not in out
