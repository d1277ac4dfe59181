"""Prompt formats byte for byte, what of them is learned, and the chat templates that say the same to transformers (spec 3.1-3.5)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from llavakit.errors import PromptError
from llavakit.processor_files import to_hf_messages
from llavakit.prompts import TEMPLATES, Segment, Template, spelled
from llavakit.types import Conversation, Message, Text, assistant, system, user
from talks import PICTURES, conversations, words

S_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
S_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
PICTURE, OTHER, _ = PICTURES
CHATS = [template for template in TEMPLATES.values() if template.name != "plain"]
chats = pytest.mark.parametrize("template", CHATS, ids=lambda template: template.name)


def text(name: str, *messages: Message) -> str:
    return spelled(TEMPLATES[name].render(Conversation(messages)))


def learned(segments: tuple[Segment, ...]) -> str:
    return "".join(segment.text for segment in segments if segment.learned)


# The texts of the specification


@pytest.mark.parametrize(("name", "opening"), [("vicuna_v1", S_USER), ("llava_v1", S_HUMAN)])
def test_the_vicuna_formats(name: str, opening: str) -> None:
    first = user(PICTURE, "\nQ1")
    assert text(name, first) == f"{opening} USER: <image>\nQ1 ASSISTANT:"
    assert text(name, first, assistant("A1"), user("Q2")) == f"{opening} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"
    assert text(name, first, assistant("A1")) == f"{opening} USER: <image>\nQ1 ASSISTANT: A1</s>"
    assert text(name, system("Be brief."), first) == "Be brief. USER: <image>\nQ1 ASSISTANT:"
    assert text(name, system(""), first) == "USER: <image>\nQ1 ASSISTANT:"


def test_the_mistral_format() -> None:
    first = user(PICTURE, "\nQ1")
    assert text("mistral_instruct", first) == "[INST] <image>\nQ1 [/INST]"
    assert text("mistral_instruct", system("S"), first) == "[INST] <<SYS>>\nS\n<</SYS>>\n\n<image>\nQ1 [/INST]"
    assert text("mistral_instruct", first, assistant("A1"), user("Q2")) == "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST]"


@pytest.mark.parametrize(
    ("name", "opening"),
    [
        ("chatml_direct", "Answer the questions."),
        ("mpt", "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."),
    ],
)
def test_the_chatml_formats(name: str, opening: str) -> None:
    asked = f"<|im_start|>system\n{opening}<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|><|im_start|>assistant\n"
    assert text(name, user(PICTURE, "\nQ1")) == asked
    second = "<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n"
    assert text(name, user(PICTURE, "\nQ1"), assistant("A1"), user("Q2")) == f"{asked}A1<|im_end|>{second}"
    own = text(name, system("Be brief."), user(PICTURE, "\nQ1"))
    assert own == asked.replace(opening, "Be brief.")


def test_the_llama_2_format() -> None:
    s = (
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language."
    )
    asked = f"[INST] <<SYS>>\n{s}\n<</SYS>>\n\n<image>\nQ1 [/INST]"
    assert text("llava_llama_2", user(PICTURE, "\nQ1")) == asked
    assert text("llava_llama_2", user(PICTURE, "\nQ1"), assistant("A1"), user("Q2")) == f"{asked} A1 </s><s>[INST] Q2 [/INST]"
    assert text("llava_llama_2", system(""), user("Q")) == "[INST] Q [/INST]"


def test_the_first_format() -> None:
    asked = f"{S_HUMAN}###Human: <image>\nQ1###Assistant:"
    assert text("llava_v0", user(PICTURE, "\nQ1")) == asked
    assert text("llava_v0", user(PICTURE, "\nQ1"), assistant("A1"), user("Q2")) == f"{asked} A1###Human: Q2###Assistant:"
    assert TEMPLATES["llava_v0"].stop == ("###",)


def test_the_llava_hf_format() -> None:
    first = user(PICTURE, "\nQ1")
    assert text("llava_hf", first) == "USER: <image>\nQ1 ASSISTANT:"
    assert text("llava_hf", first, assistant("A1"), user("Q2")) == "USER: <image>\nQ1 ASSISTANT: A1 USER: Q2 ASSISTANT:"
    assert text("llava_hf", first, assistant("A1")) == "USER: <image>\nQ1 ASSISTANT: A1</s>"
    assert text("llava_hf", user("Q", PICTURE, "R", OTHER)) == "USER: <image>\n<image>\nQ R ASSISTANT:"
    assert text("llava_hf", user(PICTURE)) == "USER: <image>\nASSISTANT:"


def test_the_plain_format() -> None:
    assert text("plain", user(PICTURE, "\nDescribe it.")) == "<image>"
    assert text("plain", user("Describe it.\n", PICTURE), assistant("A cat.")) == "<image>A cat.\n"
    assert TEMPLATES["plain"].stop == ("\n",)


@pytest.mark.parametrize(
    "messages",
    [(user("no picture"),), (user(PICTURE, OTHER),), (user(PICTURE), assistant("a"), user("b"))],
    ids=["none", "two", "two turns"],
)
def test_plain_takes_one_picture_and_its_caption(messages: tuple[Message, ...]) -> None:
    with pytest.raises(PromptError) as caught:
        text("plain", *messages)
    assert caught.value.code == "plain_needs_one_image"


@pytest.mark.parametrize(
    ("parts", "written"),
    [
        ((PICTURE, "\nQ"), "<image>\nQ"),
        ((PICTURE, "Q"), "<image>\nQ"),
        (("Q\n", PICTURE), "<image>\nQ"),  # a single picture comes first (spec 3.4)
        (("a ", PICTURE, " b"), "<image>\na  b"),
        ((PICTURE, OTHER, "\nQ"), "<image>\n<image>\nQ"),
        (("one ", PICTURE, "\ntwo ", OTHER), "one <image>\ntwo <image>"),  # interleaved pictures stay
        ((PICTURE,), "<image>"),
        (("\n", PICTURE), "<image>"),
        (("Q",), "Q"),
    ],
)
def test_where_pictures_stand(parts: tuple[object, ...], written: str) -> None:
    assert text("vicuna_v1", user(*parts)) == f"{S_USER} USER: {written} ASSISTANT:"  # type: ignore[arg-type]


# Laws


@chats
@given(conversation=conversations())
@settings(max_examples=60, deadline=None)
def test_a_prompt_is_the_beginning_of_what_is_learned(template: Template, conversation: Conversation) -> None:
    whole = template.render(conversation)
    for count in range(len(conversation.messages)):
        part = Conversation(conversation.messages[: count + 1])
        if part.open:
            segments = template.render(part)
            assert whole[: len(segments)] == segments
            assert whole[len(segments)].learned


@chats
@given(conversation=conversations())
@settings(max_examples=60, deadline=None)
def test_what_is_learned_is_the_replies_and_their_ends(template: Template, conversation: Conversation) -> None:
    replies = [message.text for message in conversation.turns if message.role == "assistant"]
    end = template.reply_end + template.end
    between = end if template.closing == "each" else ""
    assert learned(template.render(conversation)) == between.join(template.reply_space + reply for reply in replies) + end


@given(caption=words)
def test_plain_learns_the_caption_and_a_line_break(caption: str) -> None:
    assert learned(TEMPLATES["plain"].render(Conversation((user(PICTURE), assistant(caption))))) == caption + "\n"


@chats
@given(conversation=conversations(closed=False))
@settings(max_examples=40, deadline=None)
def test_people_write_text_and_pictures_are_pictures(template: Template, conversation: Conversation) -> None:
    segments = template.render(conversation)
    assert sum(segment.kind == "image" for segment in segments) == len(conversation.images)
    said = "".join(segment.text for segment in segments if segment.kind == "text")
    for message in conversation.turns:
        for part in message.parts:
            assert not isinstance(part, Text) or part.text.strip() in said
    control = {segment.text for segment in segments if segment.kind == "control"}
    own = {template.system_start, template.system, template.system_end, template.user_start, template.user_end + template.reply_start}
    assert control <= own | {template.reply_space, template.reply_end + template.end, template.glue, "\n"}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@given(conversation=conversations() | conversations(closed=False))
@settings(max_examples=80, deadline=None)
def test_the_chat_template_writes_the_same(template: Template, conversation: Conversation) -> None:
    if template.name == "plain":
        caption = conversation.turns[1:2] if not conversation.open else ()
        conversation = Conversation((user(PICTURE, "ignored"), *caption))
    rendered, _ = render_jinja_template(
        conversations=[to_hf_messages(conversation)], chat_template=template.jinja(), add_generation_prompt=conversation.open
    )
    assert rendered == [spelled(template.render(conversation))]


@chats
def test_chat_templates_read_bare_strings_and_wait_to_be_asked(template: Template) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    wanted = spelled(template.render(Conversation((system("S"), user("Q")))))
    asked, _ = render_jinja_template(conversations=[messages], chat_template=template.jinja(), add_generation_prompt=True)
    unasked, _ = render_jinja_template(conversations=[messages], chat_template=template.jinja())
    assert asked == [wanted]
    assert unasked == [wanted.removesuffix(template.reply_start)]


@chats
def test_transformers_masks_what_we_learn(template: Template) -> None:
    conversation = Conversation((user(PICTURE, "Q"), assistant("A cat."), user("R"), assistant("Two.")))
    (rendered,), (spans,) = render_jinja_template(
        conversations=[to_hf_messages(conversation)], chat_template=template.jinja(), return_assistant_tokens_mask=True
    )
    theirs = "".join(rendered[start:stop] for start, stop in spans)
    first = "A cat." + (template.reply_end + template.end if template.closing == "each" else "")
    glue = template.glue  # written inside their span, where the next question begins
    assert theirs == learned(template.render(conversation)).replace(first, first + glue)


@given(end=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_any_end_can_be_written(end: str) -> None:
    template = TEMPLATES["vicuna_v1"].ending(end)
    conversation = Conversation((user("Q"), assistant("A")))
    rendered, _ = render_jinja_template(conversations=[to_hf_messages(conversation)], chat_template=template.jinja())
    assert rendered == [spelled(template.render(conversation))]
    assert template.stop == (end,)


def test_a_template_is_a_value() -> None:
    own = replace(TEMPLATES["vicuna_v1"], name="own", user_start="Q: ", reply_start="A:", end="<|end|>")
    assert spelled(own.render(Conversation((system("S"), user("x"), assistant("y"))))) == "S Q: x A: y<|end|>"
    assert all(name == template.name for name, template in TEMPLATES.items())


# Bad input


@pytest.mark.parametrize("said", ["", " ", "\n\n", "\t \r\n", "\u3000"])
def test_an_empty_question_is_refused_by_position(said: str) -> None:  # P5
    for template in CHATS:
        with pytest.raises(PromptError) as caught:
            template.render(Conversation((system("S"), user("Q"), assistant("A"), user(said))))
        assert caught.value.code == "empty_prompt"
        assert caught.value.where == "messages[3]"


def test_an_empty_conversation_is_refused() -> None:  # P5
    for messages in ((), (system("S"),)):
        with pytest.raises(PromptError) as caught:
            TEMPLATES["vicuna_v1"].render(Conversation(messages))
        assert caught.value.code == "empty_prompt"


def test_a_picture_alone_and_words_alone_are_questions() -> None:  # P2
    for template in CHATS:
        assert "<image>" in spelled(template.render(Conversation((user(PICTURE),))))
        assert "<image>" not in spelled(template.render(Conversation((user("Q"),))))


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ((user("a"), user("b")), "messages[1]"),
        ((assistant("a"),), "messages[0]"),
        ((user("a"), system("b")), "messages[1]"),
        ((Message("tool", (Text("a"),)),), "messages[0]"),  # type: ignore[arg-type]
        ((system("a"), assistant("b")), "messages[1]"),
    ],
)
def test_turns_out_of_order_are_refused_by_position(messages: tuple[Message, ...], where: str) -> None:  # P9
    with pytest.raises(PromptError) as caught:
        Conversation(messages)
    assert caught.value.where == where


@pytest.mark.parametrize("bad", ["a\0b", "\ud800", "x\udfff"])
def test_text_that_is_no_text_is_refused(bad: str) -> None:  # P6
    with pytest.raises(PromptError) as caught:
        Conversation((user(bad),))
    assert caught.value.code == "bad_characters"


@pytest.mark.parametrize(
    ("value", "names"), [("<image><image>Q", ["a.png"]), ("Q", ["a.png"]), ("<image>\nQ", []), ("<image>", ["a.png", "b.png"])]
)
def test_markers_and_pictures_must_agree(value: str, names: list[str]) -> None:  # P1
    with pytest.raises(PromptError) as caught:
        Conversation.from_llava({"image": names, "conversations": [{"from": "human", "value": value}]})
    assert caught.value.code == "image_count"
    assert str(value.count("<image>")) in caught.value.what
    assert str(len(names)) in caught.value.what
