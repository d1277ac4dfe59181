"""What is remembered of replies that have ended: the longest beginning is found, bytes are counted, the oldest goes first."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.assistant import common_prefix
from llavakit.serve.features import Features
from llavakit.serve.memory import Memory, Shape
from llavakit.serve.prefix import Found, Prefixes

SHAPE = Shape(layers=1, heads=1, width=2, dtype=torch.float32, device=torch.device("cpu"))
KEYS = st.lists(st.sampled_from([1, 2, b"a", b"b"]), min_size=9, max_size=40)


def remembered(keys: list[int | bytes]) -> Memory:
    """Each position holds what stands there, so that what is continued can be told."""
    memory = Memory(SHAPE, most=len(keys), now=len(keys))
    marks = torch.tensor([float(key if isinstance(key, int) else key[0]) for key in keys])
    memory.write(0, marks[None, :, None].expand(1, -1, 2), marks[None, :, None].expand(1, -1, 2))
    memory.grow(len(keys))
    return memory


def slow_common_prefix(old: list[int | bytes], new: list[int | bytes]) -> int:
    same = 0
    while same < min(len(old), len(new) - 1) and old[same] == new[same]:
        same += 1
    while same and isinstance(new[same], bytes) and new[same - 1] == new[same]:
        same -= 1
    return same


@settings(max_examples=200, deadline=None)
@given(old=KEYS, new=KEYS, shared=st.integers(0, 40))
def test_a_common_beginning_has_whole_pictures_and_leaves_one_to_read(old: list[int | bytes], new: list[int | bytes], shared: int) -> None:
    for one in (old, new[:shared] + old[shared:], new + old):
        assert common_prefix(one, new) == slow_common_prefix(one, new)


@settings(max_examples=60, deadline=None)
@given(history=st.lists(KEYS, min_size=1, max_size=12), room=st.integers(0, 6))
def test_the_longest_is_found_and_bytes_are_counted(history: list[list[int | bytes]], room: int) -> None:
    prefixes = Prefixes()
    for keys in history:
        known = [old for old, _ in prefixes._kept.values()]
        found = prefixes.find(keys)
        longest = max((common_prefix(old, keys) for old in known), default=0)
        assert found.length == (longest if longest >= 8 else 0)
        if found.memory is not None:
            memory = prefixes.begin(found, prompt=len(keys), most=len(keys))
            marks = [float(key if isinstance(key, int) else key[0]) for key in keys[: found.length]]
            assert memory.layer(0)[0][0, : memory.length, 0].tolist() == marks
        prefixes.put(keys, remembered(keys))
        assert any(old[: len(keys)] == keys for old, _ in prefixes._kept.values())
        prefixes.shrink(room * SHAPE.bytes_for(40))
        assert prefixes.held == sum(memory.nbytes for _, memory in prefixes._kept.values()) <= room * SHAPE.bytes_for(40)


def test_what_was_of_use_stays_longest() -> None:
    prefixes = Prefixes()
    talks: list[list[int | bytes]] = [[*range(number, number + 20)] for number in (0, 100, 200)]
    for keys in talks:
        prefixes.put(keys, remembered(keys))
    prefixes.begin(prefixes.find([*talks[0][:15], 7, 8]), prompt=17, most=20)  # copied: it lives on
    prefixes.shrink(SHAPE.bytes_for(20))
    assert [old for old, _ in prefixes._kept.values()] == [talks[0]]
    assert prefixes.find([5, *range(50)]) == Found()


def test_features_forget_the_least_recently_used_and_refuse_what_is_too_large() -> None:
    features = Features(300)
    for key in (b"a", b"b"):
        features.put(key, torch.zeros(30))
    assert features.get(b"a") is not None
    features.put(b"c", torch.zeros(30))
    features.put(b"huge", torch.zeros(300))
    assert [features.get(key) is not None for key in (b"a", b"b", b"c", b"huge")] == [True, False, True, False]
    assert (features.held, features.hits, features.misses) == (240, 3, 2)
