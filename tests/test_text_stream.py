"""Laws of the text stream: the pieces joined are the finished text, and no piece is ever taken back (hardening P7, P8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llavakit.text_stream import TextStream, finished_text, held_ids, stop_at

WORDS = ("a", "photo", "of", "two", "red", "birds", "and", "ünïcödé", "你好", "quick", "fox", "USER", "stop", "###", "end")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _llama_like() -> Tokenizer:
    """Pieces with ``▁``, single-byte tokens for the rest: the tokenizer of LLaMA and Vicuna."""
    letters = sorted(set("".join(WORDS)))
    pieces = ["<unk>", "<s>", "</s>", *BYTES, "▁", "▁▁", *(f"▁{word}" for word in WORDS), *letters, "\n"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return tokenizer


def _byte_level() -> Tokenizer:
    """Byte-level pieces: the tokenizer of GPT-2 and Qwen2, where any token may end inside a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return tokenizer


TOKENIZERS = {"llama": _llama_like(), "bytes": _byte_level()}
HELD = {name: held_ids(one.get_vocab(), one.get_added_tokens_decoder()) for name, one in TOKENIZERS.items()}
STOPS = st.lists(st.sampled_from(["###", "stop", "USER", "\n", "o s", "好", "🙂🙂", "aa", "ab", " "]), max_size=3)


def _decode(name: str) -> Callable[[Sequence[int]], str]:
    return lambda ids: TOKENIZERS[name].decode(list(ids), skip_special_tokens=True)


def _pieces(name: str, ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    stream = TextStream(_decode(name), held=HELD[name], stop=stop)
    return [*(stream.push(number) for number in ids), stream.finish()]


@settings(max_examples=400, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(TOKENIZERS)), stop=STOPS)
def test_joined_pieces_are_the_finished_text_of_any_ids(data: st.DataObject, name: str, stop: list[str]) -> None:
    size = TOKENIZERS[name].get_vocab_size()
    ids = data.draw(st.lists(st.one_of(st.integers(0, size - 1), st.integers(0, 260)), max_size=24))
    pieces = _pieces(name, ids, stop)
    assert "".join(pieces) == finished_text(_decode(name)(ids), stop)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=20), name=st.sampled_from(sorted(TOKENIZERS)), stop=STOPS)
def test_joined_pieces_are_the_finished_text_of_any_text(text: str, name: str, stop: list[str]) -> None:
    ids = TOKENIZERS[name].encode(text, add_special_tokens=False).ids
    assert "".join(_pieces(name, ids, stop)) == finished_text(_decode(name)(ids), stop)


@settings(max_examples=200, deadline=None)
@given(words=st.lists(st.sampled_from(["st", "op", "s", "#", "##", "US", "ER", "🙂", "é", " ", "x"]), max_size=12), stop=STOPS)
def test_no_piece_shows_a_stop_string_or_its_beginning_too_early(words: list[str], stop: list[str]) -> None:
    ids = [number for word in words for number in TOKENIZERS["llama"].encode(word, add_special_tokens=False).ids]
    shown = ""
    final = finished_text(_decode("llama")(ids), stop)
    for piece in _pieces("llama", ids, stop):
        shown += piece
        assert final.startswith(shown)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_a_character_of_several_tokens_appears_whole(name: str) -> None:
    ids = TOKENIZERS[name].encode("ok 🙂 x", add_special_tokens=False).ids
    assert len(ids) >= 7
    pieces = [piece for piece in _pieces(name, ids) if piece]
    assert "".join(pieces) == "ok 🙂 x"
    assert all("\ufffd" not in piece for piece in pieces)
    assert sum("🙂" in piece for piece in pieces) == 1


def test_text_comes_as_early_as_it_is_certain() -> None:
    vocabulary = TOKENIZERS["llama"].get_vocab()
    stream = TextStream(_decode("llama"), held=HELD["llama"], stop=["stop !"])
    shown = [stream.push(vocabulary[token]) for token in ("▁two", "▁red", "▁stop", "▁red", "▁fox")]
    assert shown == ["two", " red", "", " stop red", " fox"]


def test_a_stop_string_ends_the_reply_and_what_follows_is_ignored() -> None:
    vocabulary = TOKENIZERS["llama"].get_vocab()
    stream = TextStream(_decode("llama"), held=HELD["llama"], stop=["red"])
    shown = [stream.push(vocabulary[token]) for token in ("▁two", "▁red", "▁birds")]
    assert stream.stopped
    assert [*shown, stream.finish()] == ["two", "", "", ""]


def test_the_stop_string_that_ends_first_wins() -> None:
    assert stop_at("abcd", ["abcd", "c"]) == 2
    assert stop_at("abcd", ["bc", "c"]) == 1
    assert stop_at("abcd", ["x"]) is None


def test_broken_bytes_are_shown_as_such_at_the_end() -> None:
    vocabulary = TOKENIZERS["llama"].get_vocab()
    ids = [vocabulary["▁two"], vocabulary["<0xE4>"], vocabulary["<0xBD>"]]
    assert "".join(_pieces("llama", ids)) == "two\ufffd\ufffd"
