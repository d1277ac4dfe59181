"""The chat page in a real browser, light and dark, at 390 and 1440 pixels, over a server in a thread (W4 to W6)."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browsing import DOG, MOONS, SHAPES, Browser, Page, ask, expect, file, last, replied, shot, sound, started, until
from page_server import HTML, LONG, UNSAFE, PageServer
from PIL import Image

from llavakit.assistant import Assistant
from llavakit.serve.limits import Limits

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as browser:
        yield browser


@pytest.fixture(scope="module")
def models() -> dict[str, Assistant]:
    return {name: Assistant.load(name) for name in ("tiny-next", "tiny")}


@pytest.fixture(scope="module")
def server(models: dict[str, Assistant], tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    with PageServer(models, votes=tmp_path_factory.mktemp("votes") / "votes.jsonl") as server:
        yield server


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """A page in a browser profile of its own; no script of it may fail."""
    contexts, failures = [], []

    def open_page(url: str, *, scheme: str = "light", width: int = 1440, like: Page | None = None, ready: bool = True) -> Page:
        if like is None:
            size = {"width": width, "height": 900 if width > 640 else 844}
            contexts.append(browser.new_context(viewport=size, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("console", lambda said: failures.append(said.text) if "Content Security Policy" in said.text else None)
        page.goto(url)
        if ready:
            page.wait_for_selector("#examples button", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not failures


@pytest.mark.parametrize(("scheme", "width"), SHAPES)
def test_a_conversation(server: PageServer, opened: Open, scheme: str, width: int) -> None:
    """Three turns with two pictures; what the model sees; a vote; Stop; again; an edit; too long; a restart."""
    page = opened(server.url, scheme=scheme, width=width)
    shape = (scheme, width)
    three_turns(page, shape)
    what_it_sees(page, shape)
    a_vote(page, server)
    stop_and_again(page, server, shape)
    an_edit(page)
    too_long(page, shape)
    a_restart(page, server, shape)


def three_turns(page: Page, shape: tuple[str, int]) -> None:
    expect(page.locator("#examples button")).to_have_count(4)
    sound(page)
    shot(page, f"welcome-{shape[1]}-{shape[0]}")
    ask(page, "What word is written?", DOG)
    replied(page, 1)
    assert last(page) == "dog"
    ask(page, "What color is the square?")
    replied(page, 2)
    assert last(page) == "black"
    ask(page, "What shape is the purple thing?", MOONS)
    replied(page, 3)
    assert re.search(r"\d+ of 1,024 tokens", page.inner_text("#meter"))
    sound(page)
    shot(page, f"talk-{shape[1]}-{shape[0]}")


def what_it_sees(page: Page, shape: tuple[str, int]) -> None:
    page.click("#sight-button")
    page.wait_for_selector("#sight-canvas")
    sound(page)
    shot(page, f"views-{shape[1]}-{shape[0]}")
    page.click("text=Patches")
    shot(page, "patches", only=("light", 1440), shape=shape)
    page.click(".segments >> text=Attention")
    expect(page.locator("figcaption")).to_contain_text("of all attention for")
    sound(page)
    shot(page, f"attention-{shape[1]}-{shape[0]}")
    page.click("#sight-close")


def a_vote(page: Page, server: PageServer) -> None:
    good = page.locator(".reply.last .doing[aria-label^='Good']")
    good.click()
    expect(good).to_have_attribute("aria-pressed", "true")
    assert server.votes is not None
    line = json.loads(server.votes.read_text(encoding="utf-8").splitlines()[-1])
    assert line["kind"] == "up"
    assert len(line["messages"]) == 6
    assert line["reply_id"].startswith("chatcmpl-")


def stop_and_again(page: Page, server: PageServer, shape: tuple[str, int]) -> None:
    ask(page, LONG)
    expect(page.locator(".reply.last .text")).to_contain_text("3, ")
    shot(page, "writing", only=("dark", 390), shape=shape)
    page.keyboard.press("Escape")
    expect(page.locator(".reply.stopped")).to_have_count(1)
    engine = server.engines["tiny-next"]
    until(page, lambda: not engine.running)
    told = engine.told
    page.wait_for_timeout(200)
    assert engine.told == told  # nothing is computed for a reply that nobody reads
    assert last(page).startswith("1, 2, 3,")
    page.locator(".reply.last .doing[aria-label^='Write']").click()
    expect(page.locator(".reply.last .text")).to_contain_text("2, ")
    page.click("#stop")
    expect(page.locator(".reply.stopped")).to_have_count(1)


def an_edit(page: Page) -> None:
    page.locator(".asked .doing").last.click()
    page.fill(".editing textarea", "How many things are there?")
    sound(page)
    page.press(".editing textarea", "Enter")
    replied(page, 4)
    assert last(page).isdigit()


def too_long(page: Page, shape: tuple[str, int]) -> None:
    ask(page, "word " * 1500)
    trouble = page.locator(".reply.last .trouble")
    expect(trouble).to_contain_text("Too long for this model")
    assert re.search(r"\d{4} .*tokens", trouble.inner_text())
    sound(page)
    shot(page, "long", only=("light", 390), shape=shape)
    trouble.get_by_role("button", name="Change the question").click()
    page.fill(".editing textarea", "Is there a star?")
    page.press(".editing textarea", "Enter")
    replied(page, 5)


def a_restart(page: Page, server: PageServer, shape: tuple[str, int]) -> None:
    trouble = page.locator(".reply.last .trouble")
    server.stop()
    ask(page, "Is there a circle?")
    expect(trouble).to_contain_text("The server does not answer")
    sound(page)
    server.start()
    expect(trouble).to_contain_text("The server is back")
    shot(page, "back", only=("light", 1440), shape=shape)
    trouble.get_by_role("button", name="Try again").click()
    replied(page, 6)
    assert len(server.engines["tiny-next"].asked[-1].conversation.messages) == 11


def test_a_models_words_are_text(server: PageServer, opened: Open) -> None:
    page = opened(server.url)
    ask(page, UNSAFE)
    replied(page, 1)
    text = page.locator(".reply .text")
    assert text.inner_text() == HTML.replace("**", "").replace("`", "")
    assert text.locator("img, script, a").count() == 0
    assert text.locator("strong").inner_text() == "bold"
    assert page.title() == "llavakit"


def test_a_reload_keeps_the_conversation_and_its_pictures(server: PageServer, opened: Open) -> None:
    page = opened(server.url)
    ask(page, "What word is written?", DOG)
    replied(page, 1)
    page.reload()
    replied(page, 1)
    assert last(page) == "dog"
    expect(page.locator(".asked img")).to_have_js_property("complete", True)
    assert page.locator(".asked img").evaluate("image => image.naturalWidth") == 224
    ask(page, "What color is the square?")
    replied(page, 2)
    assert last(page) == "black"  # the picture went along


def test_a_reload_in_the_middle_keeps_what_was_written(server: PageServer, opened: Open) -> None:
    page = opened(server.url)
    ask(page, LONG)
    expect(page.locator(".reply .text")).to_contain_text("5, ")
    page.reload()
    expect(page.locator(".reply.stopped .text")).to_contain_text("1, 2, 3, 4, 5, ")


@pytest.mark.parametrize(
    "stored", ["{", "[]x", '[{"role":"user"}]', '[{"role":"user","text":"a","pictures":[1]}]', "17", '[{"role":"assistant","text":""}]']
)
def test_a_broken_store_is_set_aside(server: PageServer, opened: Open, stored: str) -> None:
    page = opened(server.url)
    page.evaluate("() => addEventListener('pagehide', (event) => event.stopImmediatePropagation(), true)")
    page.add_init_script(f"sessionStorage.setItem('llavakit.turns', {json.dumps(stored)})")
    page.goto(server.url)
    expect(page.locator("#said")).to_contain_text("could not be read")
    ask(page, "What word is written?", DOG)
    replied(page, 1)


def test_two_tabs_are_two_conversations(server: PageServer, opened: Open) -> None:
    one = opened(server.url)
    ask(one, "What word is written?", DOG)
    replied(one, 1)
    other = opened(server.url, like=one)
    expect(other.locator("#welcome")).to_be_visible()
    ask(other, "What shape is the purple thing?", MOONS)
    replied(other, 1)
    other.click("#new")
    expect(other.locator("#welcome")).to_be_visible()
    one.reload()
    replied(one, 1)
    assert one.locator(".asked img").evaluate("image => image.naturalWidth") == 224


def test_a_picture_that_breaks_off_is_told_at_once(server: PageServer, opened: Open) -> None:
    page = opened(server.url)
    page.set_input_files("#files", [file("half.png", MOONS.read_bytes()[:30]), file("dog.png", DOG.read_bytes()), file("none.png", b"")])
    expect(page.locator("#said")).to_have_text(re.compile("half.png cannot be opened.*none.png is empty"))
    sound(page)
    expect(page.locator("#picked li")).to_have_count(1)


def test_a_picture_that_the_server_refuses_is_told_by_its_number(server: PageServer, opened: Open) -> None:
    page = opened(server.url)
    icon = io.BytesIO()
    Image.open(MOONS).save(icon, "ICO")
    ask(page, "What are these?", file("dog.png", DOG.read_bytes()), file("moons.ico", icon.getvalue()))
    trouble = page.locator(".reply.last .trouble")
    expect(trouble).to_contain_text("A picture cannot be used")
    expect(trouble).to_contain_text("Picture 2: ICO pictures are not opened. Use one of JPEG")
    trouble.get_by_role("button", name="Change the question").click()
    page.click("[aria-label='Remove picture 2']")
    page.press(".editing textarea", "Enter")
    replied(page, 1)


def test_a_picture_above_the_limit_is_scaled_and_that_is_said(models: dict[str, Assistant], opened: Open) -> None:
    with PageServer({name: models[name] for name in models}, limits=Limits(pixels=20_000)) as small:
        page = opened(small.url)
        page.set_input_files("#files", [DOG])
        expect(page.locator("#said")).to_contain_text("scaled from 224 × 168 to 163 × 122")
        ask(page, "What word is written?")
        replied(page, 1)
        assert last(page) == "dog"


def test_a_conversation_too_large_to_send_is_told(models: dict[str, Assistant], opened: Open) -> None:
    with PageServer(models, limits=Limits(body=14_000)) as small:
        page = opened(small.url)
        ask(page, "What word is written?", DOG)
        replied(page, 1)
        ask(page, "And here?", MOONS)
        expect(page.locator(".reply.last .trouble")).to_contain_text("where this server takes 0.01 MB")


def test_over_the_real_engine(models: dict[str, Assistant], opened: Open) -> None:
    with PageServer({"tiny-next": models["tiny-next"]}, real=True) as real:
        page = opened(real.url)
        ask(page, "What word is written?", DOG)
        replied(page, 1)
        page.click("#sight-button")
        page.click(".segments >> text=Attention")
        expect(page.locator("figcaption")).to_contain_text("of all attention for “dog”")
        ask(page, "What shape is the purple thing?", MOONS)
        replied(page, 2)
        assert [page.locator(".reply .text").nth(at).inner_text() for at in (0, 1)] == ["dog", "moon"]
        expect(page.locator("figcaption")).to_contain_text("of all attention for “moon”")


def test_a_key_is_asked_for_and_kept_in_the_tab(models: dict[str, Assistant], opened: Open) -> None:
    with PageServer(models) as locked:
        page = opened(locked.url)
        locked.stop()
        locked.key = "open sesame"
        locked.start()
        ask(page, "What word is written?", DOG)
        page.locator(".trouble").get_by_role("button", name="Enter the key").click()
        page.fill("#key-words", "open sesame")
        page.press("#key-words", "Enter")
        replied(page, 1)
        assert page.evaluate("() => [localStorage, sessionStorage].map((one) => JSON.stringify(one).includes('sesame'))") == [False, True]


def test_busy_is_waited_for(server: PageServer, opened: Open) -> None:
    page = opened(server.url)
    engine = server.engines["tiny-next"]
    engine.room = 0
    ask(page, "What word is written?", DOG)
    expect(page.locator(".trouble")).to_contain_text("Trying again in 1 s")
    engine.room = 1000
    replied(page, 1)


def test_by_keyboard_alone(server: PageServer, opened: Open) -> None:
    page = opened(server.url)
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.type("Is there")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("a star?")
    assert page.input_value("#words") == "Is there\na star?"
    page.keyboard.press("Enter")
    replied(page, 1)
    assert page.evaluate("() => document.activeElement.id") == "words"
    assert page.inner_text("#announce").strip() == last(page).strip()
    page.focus("#settings-button")
    page.keyboard.press("Enter")
    page.fill("#set-system", "Answer in one word.")
    page.fill("#set-seed", "7")
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).not_to_be_visible()
    ask(page, "Is there a circle?")
    replied(page, 2)
    asked = server.engines["tiny-next"].asked[-1]
    assert asked.sampling.seed == 7
    assert asked.conversation.system == "Answer in one word."


def test_the_model_is_chosen_and_the_conversation_saved(server: PageServer, opened: Open, tmp_path: Path) -> None:
    page = opened(server.url)
    page.select_option("#model", "tiny")
    ask(page, "What word is written?", DOG)
    replied(page, 1)
    assert page.locator(".who").inner_text() == "tiny"
    assert server.engines["tiny"].asked
    page.click("#settings-button")
    sound(page)
    shot(page, "settings")
    with page.expect_download() as saved:
        page.click("#export")
    saved.value.save_as(tmp_path / "saved.json")
    whole = json.loads((tmp_path / "saved.json").read_text(encoding="utf-8"))
    assert whole["model"] == "tiny"
    assert [message["role"] for message in whole["messages"]] == ["user", "assistant"]
    assert whole["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    page.get_by_text("Dark", exact=True).click()
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(22, 20, 18)"


def test_a_huge_reply_is_shown(server: PageServer, opened: Open) -> None:
    page = opened(server.url)
    engine = server.engines["tiny-next"]
    script, engine.script = engine.script, lambda ask: ["A picture of **many** words. " * 40] * 300
    try:
        page.click("#settings-button")
        page.fill("#set-max_tokens", "400")
        page.keyboard.press("Escape")
        ask(page, "Go on.")
        replied(page, 1)
    finally:
        engine.script = script
    assert len(last(page)) > 300_000
    ask(page, "Is there a star?")
    expect(page.locator(".trouble")).to_contain_text("Too long for this model")


def test_a_model_that_is_still_being_loaded_is_waited_for(models: dict[str, Assistant], opened: Open) -> None:
    with PageServer({}) as early:
        page = opened(early.url, ready=False)
        expect(page.locator("#status")).to_contain_text("The model is being loaded")
        sound(page)
        early.stop()
        early.assistants = models
        early.start()
        expect(page.locator("#examples button")).to_have_count(4)
        expect(page.locator("#status")).to_be_empty()


def test_a_picture_is_seen_before_it_is_sent(server: PageServer, opened: Open) -> None:
    page = opened(server.url)
    page.click("#sight-button")
    expect(page.locator("#sight-body")).to_contain_text("Add a picture")
    page.set_input_files("#files", [DOG])
    expect(page.locator("#sight-body")).to_contain_text("268 tokens")
    page.set_input_files("#files", [MOONS])
    expect(page.locator("#sight-body")).to_contain_text("336 tokens")
    expect(page.get_by_role("button", name="Attention")).to_be_disabled()
    page.click("[aria-label='Remove picture 2']")
    expect(page.locator("#sight-body")).to_contain_text("268 tokens")
