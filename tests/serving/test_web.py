"""The chat page's routes: its files, what the model sees, attention, votes. The numbers are the processor's and the model's own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine
from served import run
from transformers import PreTrainedTokenizerFast

from llavakit.errors import LlavaError
from llavakit.model.llava import Llava
from llavakit.processor import Processor
from llavakit.serve import seen, sight, web
from llavakit.serve.api import build
from llavakit.serve.service import Service, Settings
from llavakit.serve.web import PageSettings, Shown
from llavakit.tiling import HD, MERGES, RELEASED, Grid, Tiling, tiles_of
from llavakit.types import Conversation, Image, Pixels, assistant
from tiny import tiny_config, tiny_processor

FOLDER = files("llavakit") / "serve" / "web"
ASSETS = sorted(entry.name for entry in FOLDER.iterdir() if not entry.name.startswith("__"))
Desk = Callable[..., httpx.Response]


def tiled(processor: Processor, **changes: Any) -> Processor:
    """The tiny processor with canvases."""
    fields = {"canvases": tiles_of(RELEASED, 56), "merge": "spatial_unpad"} | changes
    return Processor(
        tokenizer=processor.tokenizer, template=processor.template, preprocess=replace(processor.preprocess, aspect="squash"),
        tiling=Tiling(side=56, **fields), max_length=1024,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Llava:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Llava(tiny_config(tokenizer, canvases=tiles_of(RELEASED, 56), merge="spatial_unpad")).eval()


@pytest.fixture(scope="module")
def processor(tokenizer: PreTrainedTokenizerFast) -> Processor:
    return tiled(tiny_processor(tokenizer))


@pytest.fixture
def desk(model: Llava, processor: Processor) -> Desk:
    """One request to a server with the page; ``page`` and ``served`` are its settings."""

    def ask(method: str, path: str, *, page: PageSettings | None = None, served: Settings | None = None, **options: Any) -> httpx.Response:
        service = Service({"m": ScriptedEngine(context=1024)}, served)
        shown = {"m": Shown(processor=processor, model=model)}
        app = build(service, web.routes(service, shown, page))

        async def once() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
                return await http.request(method, path, **options)

        return run(once())

    return ask


def image(width: int = 90, height: int = 60) -> Image:
    return Image(Pixels(width, height, bytes((x * 7 + y) % 256 for y in range(height) for x in range(width) for _ in range(3))))


def talk(*sizes: tuple[int, int], reply: str | None = None) -> Conversation:
    asked = Conversation.ask("What is in the picture?", *(image(*size) for size in sizes))
    return asked if reply is None else asked.then(assistant(reply))


def body(conversation: Conversation, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": conversation.to_openai()} | more


# Files


@pytest.mark.parametrize("name", ASSETS)
def test_every_file_of_the_page_is_served_with_its_type_and_the_policy(desk: Desk, name: str) -> None:
    got = desk("GET", f"/web/{name}")
    assert got.status_code == 200
    assert got.content == (FOLDER / name).read_bytes()
    assert got.headers["content-type"] == web.TYPES[Path(name).suffix]
    assert "default-src 'none'" in got.headers["content-security-policy"]
    assert got.headers["x-content-type-options"] == "nosniff"
    assert desk("GET", f"/web/{name}", headers={"if-none-match": got.headers["etag"]}).status_code == 304


def test_the_policy_lets_in_nothing_inline_and_nothing_foreign() -> None:
    assert not re.search(r"unsafe|\*|https?:", web.POLICY)
    for name in ASSETS:
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), name
        assert not re.search(r"""(src|href)=["'](https?:)?//|url\(|@import|<script>|<style|\sstyle="|\son\w+=""", text), name
        assert text.count("\n") < 400, name


def test_the_page_names_only_files_that_are_there() -> None:
    named = set(re.findall(r'(?:src|href)="web/([^"]+)"', (FOLDER / "index.html").read_text(encoding="utf-8")))
    for name in ASSETS:
        named |= set(re.findall(r'from "\./([^"]+)"', (FOLDER / name).read_text(encoding="utf-8")))
    assert named <= set(ASSETS)
    assert {name for name in ASSETS if name.endswith((".js", ".css"))} <= named


def test_every_part_that_the_modules_ask_for_is_on_the_page() -> None:
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    ids = set(re.findall(r'id="([^"]+)"', page))
    scripts = "".join((FOLDER / name).read_text(encoding="utf-8") for name in ASSETS if name.endswith(".js"))
    made = set(re.findall(r'id: "([^"]+)"', scripts))
    assert set(re.findall(r'\$\("([^"]+)"\)', scripts)) <= ids | made
    assert {f"i-{name}" for name in re.findall(r'icon\("(\w+)"\)', scripts)} <= ids


@pytest.mark.parametrize(
    "path",
    [
        "/web/",
        "/web/nothing.js",
        "/web/../web.py",
        "/web/%2e%2e/web.py",
        "/web//etc/passwd",
        "/web/pictures/../web/index.html",
        "/web/__init__.py",
    ],
)
def test_no_other_file_is_served(desk: Desk, path: str) -> None:
    got = desk("GET", path)
    assert got.status_code == 404
    assert got.json()["error"]["code"] == "not_found"


def test_the_page_and_the_pictures_it_offers(desk: Desk) -> None:
    assert desk("GET", "/").content == (FOLDER / "index.html").read_bytes()
    allowed = desk("GET", "/web/api/settings").json()
    assert allowed["models"] == [{"id": "m", "context": 1024, "attention": True}]
    assert allowed["votes"] is False
    for example in allowed["examples"]:
        assert example["question"].endswith("?")
        assert desk("GET", f"/{example['picture']}").headers["content-type"] == "image/png"


# What the model sees


@given(
    width=st.integers(1, 1400),
    height=st.integers(1, 1400),
    shapes=st.sampled_from([(), RELEASED, HD]),
    merge=st.sampled_from(MERGES),
    aspect=st.sampled_from(["pad", "square", "squash"]),
    class_token=st.booleans(),
    side=st.sampled_from([56, 60, 112]),
)
def test_the_patches_are_all_tokens_of_the_grid(
    tokenizer: PreTrainedTokenizerFast, width: int, height: int, shapes: Any, merge: Any, aspect: Any, class_token: bool, side: int
) -> None:
    tiling = Tiling(side=side, canvases=tiles_of(shapes, side), merge=merge, class_token=class_token and merge == "flat")
    preprocess = replace(tiny_processor(tokenizer).preprocess, size=side, aspect=aspect)
    given_processor = type("P", (), {"tiling": tiling, "preprocess": preprocess})()
    one, grid = seen.picture((width, height), given_processor), tiling.grid(width, height)
    alone = int(not grid.rows and merge == "spatial_unpad")
    assert sum(patches.tokens for patches in one.patches) + alone == grid.tokens == one.tokens
    assert len(one.tiles) + 1 == grid.views == one.views
    assert_padding_is_left_out(one, grid)


def assert_padding_is_left_out(one: seen.Picture, grid: Grid) -> None:
    """The tiles cover the picture, and of an unpadded map no row or column lies wholly outside of it."""
    if not one.tiles:
        return
    ends = [(box.left + box.width, box.top + box.height) for box in one.tiles]
    assert min(box.left for box in one.tiles) <= 1e-9
    assert min(box.top for box in one.tiles) <= 1e-9
    assert max(right for right, _ in ends) >= 1 - 1e-9
    assert max(bottom for _, bottom in ends) >= 1 - 1e-9
    if grid.merge == "spatial_unpad" and grid.kept_columns and grid.kept_rows:
        box = one.patches[1].box
        cell = box.width / one.patches[1].columns, box.height / one.patches[1].rows
        assert box.left > -2.01 * cell[0]
        assert box.top > -2.01 * cell[1]


@pytest.mark.parametrize("reply", [None, "A red circle."])
def test_what_is_shown_is_what_the_processor_makes(desk: Desk, processor: Processor, reply: str | None) -> None:
    conversation = talk((90, 60), (40, 130), reply=reply)
    inputs = processor.encode(conversation, learn=reply is not None)
    found = desk("POST", "/web/api/see", json=body(conversation)).json()
    assert found["tokens"] == len(inputs.input_ids)
    assert found["image_tokens"] == int((inputs.input_ids == processor.image_token_id).sum())
    assert found["text_tokens"] + found["image_tokens"] == found["tokens"]
    assert [one["tokens"] for one in found["pictures"]] == [grid.tokens for grid in inputs.grids]
    assert sum(one["views"] for one in found["pictures"]) == len(inputs.views)
    assert found["context"] == 1024


def test_too_long_a_conversation_is_shown_all_the_same(desk: Desk, processor: Processor) -> None:
    found = desk("POST", "/web/api/see", json=body(Conversation.ask("word " * 3000))).json()
    assert found["tokens"] > found["context"] == 1024


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model": "other"}, 404, "model_not_found"),
        ({"messages": []}, 400, None),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]},
            400,
            None,
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}, 400, None),
    ],
)
def test_what_cannot_be_seen_is_an_error_in_the_one_shape(desk: Desk, change: dict[str, Any], status: int, code: str | None) -> None:
    got = desk("POST", "/web/api/see", json=body(talk()) | change)
    assert got.status_code == status
    assert set(got.json()["error"]) == {"message", "type", "param", "code"}
    assert code is None or got.json()["error"]["code"] == code


def test_another_sites_form_cannot_ask(desk: Desk) -> None:
    assert desk("POST", "/web/api/see", content=json.dumps(body(talk())), headers={"content-type": "text/plain"}).status_code == 400


def test_with_a_key_the_page_s_questions_need_it(desk: Desk) -> None:
    served = Settings(key="secret")
    assert desk("POST", "/web/api/see", json=body(talk()), served=served).status_code == 401
    assert desk("GET", "/web/api/settings", served=served).status_code == 401
    right = {"authorization": "Bearer secret"}
    assert desk("POST", "/web/api/see", json=body(talk()), served=served, headers=right).status_code == 200


# Attention


@torch.inference_mode()
def eager_rows(model: Llava, processor: Processor, conversation: Conversation, first: int, last: int) -> torch.Tensor:
    """(layers, T) by transformers' own eager attention, of which the whole square is kept."""
    inputs = processor.encode(conversation, learn=True)
    batch = processor.collate([inputs], side="right").to(model.device, model.dtype)
    before = model.language_model.config._attn_implementation
    model.language_model.set_attn_implementation("eager")
    try:
        given_out = model.language_model.base_model(
            inputs_embeds=model.embed(batch), position_ids=batch.positions, output_attentions=True, use_cache=False
        )
    finally:
        model.language_model.set_attn_implementation(before)
    return torch.stack([layer[0, :, first - 1 : last].mean((0, 1)) for layer in given_out.attentions])


@pytest.mark.parametrize("sizes", [((90, 60),), ((90, 60), (40, 130)), ()])
def test_attention_is_transformers_own(model: Llava, processor: Processor, sizes: tuple[tuple[int, int], ...]) -> None:
    conversation = talk(*sizes, reply="A red circle left of a blue square.")
    inputs = processor.encode(conversation, learn=True)
    first, last = sight.word_tokens(inputs, processor, conversation, 2, 5)
    wanted = eager_rows(model, processor, conversation, first, last)
    got = sight.attention_rows(model, processor, inputs, torch.arange(first - 1, last))
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(got.sum(1), torch.ones(len(got)), atol=1e-5, rtol=0)


def test_the_engines_model_is_left_as_it_was(model: Llava, processor: Processor) -> None:
    before = {
        name: (id(part), part.config._attn_implementation) for name, part in model.named_modules() if hasattr(part, "config") and name
    }
    sight.look(model, processor, talk((90, 60), reply="A red circle."), start=2, end=5)
    after = {name: (id(part), part.config._attn_implementation) for name, part in model.named_modules() if hasattr(part, "config") and name}
    assert before == after


@given(st.data())
def test_a_word_is_found_where_it_stands(tokenizer: PreTrainedTokenizerFast, data: st.DataObject) -> None:
    processor = tiny_processor(tokenizer)
    words = data.draw(
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters="\ufffd"), min_size=1, max_size=6),
            min_size=1,
            max_size=6,
        )
    )
    reply = " ".join(words)
    at = data.draw(st.integers(0, len(words) - 1))
    start = sum(len(word) + 1 for word in words[:at])
    conversation = talk(reply=reply)
    inputs = processor.encode(conversation, learn=True)
    first, last = sight.word_tokens(inputs, processor, conversation, start, start + len(words[at]))
    assert words[at] in processor.decode(inputs.input_ids[first : last + 1])


def test_the_heat_is_the_shares_of_the_tokens(desk: Desk, model: Llava, processor: Processor) -> None:
    conversation = talk((90, 60), (40, 130), reply="A red circle.")
    found = desk("POST", "/web/api/attention", json=body(conversation, start=2, end=5)).json()
    assert found["layers"] == [1, 2]
    assert found["of"] == 2
    assert "".join(found["tokens"]).strip("▁") == "red"
    inputs = processor.encode(conversation, learn=True)
    for share, maps, grid in zip(found["shares"], found["pictures"], inputs.grids, strict=True):
        assert sum(len(one["values"]) for one in maps) == grid.tokens - grid.row_ends
        assert sum(sum(one["values"]) for one in maps) <= share + 1e-5
        assert all(len(one["values"]) == one["rows"] * one["columns"] for one in maps)
    assert 0 < sum(found["shares"]) < 1
    late = desk("POST", "/web/api/attention", json=body(conversation, start=2, end=5, layers=[2, 2])).json()
    assert late["layers"] == [2, 2]
    assert late["pictures"] != found["pictures"]


@pytest.mark.parametrize(
    "change",
    [
        {"start": 5, "end": 5},
        {"start": 0, "end": 99},
        {"start": "0", "end": 1},
        {"start": 1, "end": 2},
        {"layers": [0, 1]},
        {"layers": [1, 9]},
        {"layers": 1},
    ],
)
def test_no_such_word_or_layers(desk: Desk, change: dict[str, Any]) -> None:
    got = desk("POST", "/web/api/attention", json=body(talk(reply="A red circle."), start=0, end=1) | change)
    assert got.status_code == 400
    assert got.json()["error"]["code"] == "bad_parameter"


def test_an_open_conversation_has_no_word(desk: Desk) -> None:
    got = desk("POST", "/web/api/attention", json=body(talk(), start=0, end=1))
    assert got.json()["error"]["code"] == "no_reply"


def test_a_model_that_bends_its_scores_is_refused(model: Llava, processor: Processor) -> None:
    query = torch.zeros(1, 4, 3, 8)
    with pytest.raises(LlavaError, match="cannot be shown"):
        sight.noted_attention(torch.nn.Module(), query, query, query, None, softcap=50.0)


# Votes


def test_votes_are_kept_only_where_the_server_was_started_so(desk: Desk, tmp_path: Path) -> None:
    vote = {"kind": "up", "model": "m", "reply_id": "r\n1", "messages": [{"role": "user", "content": "Hi\n{}"}], "secret": "no"}
    assert desk("POST", "/web/api/vote", json=vote).status_code == 404
    page = PageSettings(votes=tmp_path / "votes.jsonl")
    assert desk("GET", "/web/api/settings", page=page).json()["votes"] is True
    assert desk("POST", "/web/api/vote", json=vote, page=page).json() == {"kept": True}
    assert desk("POST", "/web/api/vote", json=vote | {"kind": "none"}, page=page).status_code == 200
    lines = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["kind"] for line in lines] == ["up", "none"]
    assert lines[0]["messages"] == vote["messages"]
    assert "secret" not in lines[0]


@pytest.mark.parametrize(("vote", "status"), [({"kind": "best"}, 400), ({}, 400), ({"kind": "up", "messages": "x" * (1 << 18)}, 413)])
def test_what_is_no_vote(desk: Desk, tmp_path: Path, vote: dict[str, Any], status: int) -> None:
    page = PageSettings(votes=tmp_path / "votes.jsonl")
    assert desk("POST", "/web/api/vote", json=vote, page=page).status_code == status
    assert not (tmp_path / "votes.jsonl").exists()
