"""Replies are read where there is one way to read them, and rejected with a reason where there is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavakit.datagen.parse import Reject, Turns, read, refuses, verdict, write

words = st.text(st.characters(categories=["L", "N", "P", "Zs"], exclude_characters="=:"), min_size=1, max_size=40)
paragraphs = st.lists(words.map(str.strip).filter(bool), min_size=1, max_size=3).map("\n\n".join).filter(lambda text: not refuses(text))
talks = st.lists(st.tuples(paragraphs, paragraphs), min_size=1, max_size=4).map(tuple)
TWO: Turns = (("What is it?", "A dog."), ("Where?", "On a sofa."))


@given(talks)
def test_what_is_written_is_read_back(turns: Turns) -> None:
    assert read("conversation", write(turns)) == turns
    found = read("reasoning", write(turns))
    assert found == turns if len(turns) == 1 else isinstance(found, Reject)


@given(talks, st.sampled_from(["bold", "fence", "last", "inline", "short", "numbered", "preamble", "crlf", "no separators", "loud"]))
def test_other_spellings_with_one_reading(turns: Turns, how: str) -> None:
    text = write(turns)
    if how == "bold":
        text = text.replace("Question:\n", "**Question:**\n").replace("Answer:\n", "**Answer**:\n")
    if how == "fence":
        text = f"```text\n{text}\n```"
    if how == "last":
        text += "\n===\n"
    if how == "inline":
        text = text.replace("Question:\n", "Question: ").replace("Answer:\n", "Answer: ")
    if how == "short":
        text = text.replace("Question:\n", "Q: ").replace("Answer:\n", "A: ")
    if how == "numbered":
        text = text.replace("Question:\n", "Question 1:\n").replace("Answer:\n", "Answer 1:\n")
    if how == "preamble":
        text = "Here is the dialogue.\n\n" + text
    if how == "crlf":
        text = text.replace("\n", "\r\n")
    if how == "no separators":
        text = text.replace("\n===\n", "\n\n")
    if how == "loud":
        text = text.replace("Question:", "QUESTION:").replace("===", " ===== ")
    assert read("conversation", text) == turns


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("``` \n```", "no_turns"),
        ("A dog on a sofa.", "no_turns"),
        ("Question:\nWhat is it?", "unbalanced"),
        ("Answer:\nA dog.", "unbalanced"),
        ("Question:\nWhat?\n===\nQuestion:\nWhere?\n===\nAnswer:\nHere.", "unbalanced"),
        ("Question:\nWhat?\n===\nAnswer:\nA dog.\n===\nAnswer:\nA cat.", "unbalanced"),
        ("Question:\n===\nAnswer:\nA dog.", "empty_turn"),
        ("Question:\nWhat?\n===\nAnswer:\n===\n", "empty_turn"),
        ("Question:\nWhat?\n===\nAnswer:\nA dog.\n===\nI hope this helps.", "stray_text"),
        ("One.\n===\nTwo.\n===\nQuestion:\nWhat?\n===\nAnswer:\nA dog.", "stray_text"),
        ("I'm sorry, but I can't assist with that.", "refusal"),
        ("As an AI language model, I cannot see pictures.", "refusal"),
        ("I cannot see the image, please describe it.", "refusal"),
        ("Unfortunately, I have no access to it.", "refusal"),
        ("Question:\nWhat?\n===\nAnswer:\nA \ufffd dog.", "bad_characters"),
        ("Question:\nWhat?\n===\nAnswer:\nA \0 dog.", "bad_characters"),
    ],
)
def test_no_certain_reading_is_a_typed_reject(text: str, code: str) -> None:
    found = read("conversation", text)
    assert isinstance(found, Reject)
    assert found.code == code
    assert found.detail


@pytest.mark.parametrize(("finish", "code"), [("length", "too_long"), ("filter", "filtered"), ("cut", "cut_off")])
def test_replies_that_did_not_end_are_not_read(finish: str, code: str) -> None:
    found = read("conversation", write(TWO), finish)  # type: ignore[arg-type]
    assert isinstance(found, Reject)
    assert found.code == code


def test_a_line_in_an_answer_that_looks_like_a_short_marker_stays_text() -> None:
    turns: Turns = (("Which one is right?", "There are two:\nA: the dog\nQ: the cat"),)
    assert read("reasoning", write(turns)) == turns


def test_a_description_is_bare_text() -> None:
    assert read("detail", "\nA dog.\n\nIt sleeps. \n") == (("", "A dog.\n\nIt sleeps."),)
    for text in (write(TWO), "A dog.\n===\nA cat."):
        found = read("detail", text)
        assert isinstance(found, Reject)
        assert found.code == "wrong_form"


@given(st.text(), st.sampled_from(["conversation", "detail", "reasoning", "answer"]))
def test_any_text_is_read_or_rejected(text: str, kind: str) -> None:
    found = read(kind, text)  # type: ignore[arg-type]
    if isinstance(found, Reject):
        return
    assert all(answer.strip() and (question.strip() or kind in ("detail", "answer")) for question, answer in found)


@pytest.mark.parametrize(
    "text",
    ["I'm at the beach in this picture", "Sorry is written on the card", "I can see a dog", "I see two boats", "I don't see any cat here"],
)
def test_what_is_no_refusal(text: str) -> None:
    assert not refuses(text)


def test_verdicts() -> None:
    assert verdict("KEEP") is None
    assert verdict("**keep**\n") is None
    assert verdict("DROP: an address can be read") == "an address can be read"
    assert verdict("Drop") == "no reason given"
    for text in ("", "Keeping it is fine", "I think so"):
        assert isinstance(verdict(text), Reject)
