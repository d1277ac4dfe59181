"""Conversations for tests that state laws: any text at all, with everything in it that could be mistaken for control."""

from __future__ import annotations

from hypothesis import strategies as st

from llavakit.types import Conversation, Image, Message, Part, Pixels, Text, assistant, system, user

PICTURES = tuple(Image(Pixels(width=w, height=h, rgb=bytes(range(256))[: 3 * w * h])) for w, h in ((3, 2), (2, 5), (4, 4)))

# "▁" is how LLaMA's tokenizers spell a blank: no text with it survives them, in any program.
_characters = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), max_size=12)
_CONTROLS = ["ASSISTANT:", "USER: ", "</s>", "<s>", "<unk>", "<image>", "<|im_end|>", "<0x0A>", "###", ":"]
_nasty = st.sampled_from([*_CONTROLS, "\n", "\n\n", "\r\n", "  ", " ", "🙂👩‍👩‍👧", "é", "e\u0301"])
words = st.lists(_characters | _nasty, max_size=5).map("".join)
_PIECES = ["Hello", " there", ".", "\n", "12", " a red", "  ", "?", " friend", "é", ": "]
ordinary = st.lists(st.sampled_from(_PIECES), min_size=1, max_size=8).map("".join)


def questions(text: st.SearchStrategy[str]) -> st.SearchStrategy[Message]:
    said = text.filter(lambda words: bool(words.strip()))
    parts: st.SearchStrategy[Part] = st.sampled_from(PICTURES) | text.map(Text)
    shown = st.lists(parts, max_size=3).map(lambda more: user(PICTURES[0], *more))
    mixed = st.tuples(said, st.lists(parts, max_size=3)).map(lambda both: user(both[0], *both[1]))
    return shown | mixed


def conversations(text: st.SearchStrategy[str] = words, *, closed: bool = True, systems: bool = True) -> st.SearchStrategy[Conversation]:
    """Conversations of one to three questions; ``closed`` ones end with a reply."""

    @st.composite
    def drawn(draw: st.DrawFn) -> Conversation:
        messages: list[Message] = []
        if systems and draw(st.booleans()):
            messages.append(system(draw(text)))
        for _ in range(draw(st.integers(1, 3))):
            messages += [draw(questions(text)), assistant(draw(text))]
        return Conversation(tuple(messages if closed else messages[:-1]))

    return drawn()
