"""The concept filter: the paper's rule by hand, against a naive reference, on files of every form, for any number of workers."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.data.formats import records as read_records
from llavakit.datagen import concepts
from llavakit.datagen.captions import Captions, instructions
from llavakit.datagen.concepts import balance, count, draw, key
from llavakit.datagen.phrases import chunks
from llavakit.datagen.plot import plot, thinned
from llavakit.datagen.select import Selection, select
from llavakit.errors import ConfigError, DataError


def naive(captions: Iterable[str], *, at_least: int, at_most: int, seed: int) -> list[int]:
    """The rule as the paper says it, with everything in memory and in the paper's order."""
    having: dict[str, list[int]] = {}
    for number, caption in enumerate(captions):
        for phrase in dict.fromkeys(chunks(caption)):
            having.setdefault(phrase, []).append(number)
    pool: set[int] = set()
    for phrase, numbers in sorted(having.items(), key=lambda row: len(row[1])):  # rarest first
        if len(numbers) < at_least:
            continue
        if len(numbers) > at_most:
            numbers = [numbers[at] for at in draw(key(phrase), len(numbers), at_most=at_most, seed=seed)]
        pool.update(numbers)
    return sorted(pool)


def kept(captions: Iterable[str], *, at_least: int = 3, at_most: int = 100, seed: int = 0, workers: int = 1) -> list[int]:
    table = count(captions, choice="builtin", workers=workers)
    chosen: list[int] = np.flatnonzero(balance(table, at_least=at_least, at_most=at_most, seed=seed)).tolist()
    return chosen


# --- the rule -------------------------------------------------------------------------------------------------------------------------


def test_the_rule_on_an_example_by_hand() -> None:
    """Three phrases are rare enough to be dropped, one is kept whole, one is too frequent and thinned to four."""
    captions = [
        "a cat on a cat on a cat",  # 0: "cat" counts once
        "a cat and a dog",  # 1
        "a dog",  # 2
        "a dog under a tree",  # 3: "tree" has one caption
        "a dog near a hot dog stand",  # 4: "hot dog stand" is not "dog"
        "a dog, a dog, a dog",  # 5
        "a dog with it",  # 6: a pronoun is no phrase
        "hot dog stand",  # 7
        "nothing at all",  # 8
        "two cats near a cat",  # 9: "two cats" is not "cat"
    ]
    table = count(captions, choice="builtin")
    counted = dict(zip(table.keys.tolist(), table.counts.tolist(), strict=True))
    assert counted == {key("cat"): 3, key("dog"): 6, key("tree"): 1, key("hot dog stand"): 2, key("two cats"): 1}
    dogs = [1, 2, 3, 4, 5, 6]
    drawn = {dogs[at] for at in draw(key("dog"), 6, at_most=4, seed=7)}
    assert kept(captions, at_most=4, seed=7) == sorted({0, 1, 9} | drawn)  # all of "cat", four of "dog"
    assert kept(captions) == sorted({0, 9, *dogs})  # nothing has more than a hundred


def test_at_least_and_at_most_are_the_papers() -> None:
    assert (concepts.AT_LEAST, concepts.AT_MOST) == (3, 100)
    exactly = ["a red kite"] * 100 + ["a blue kite"] * 101 + ["a green kite"] * 3 + ["a pink kite"] * 2
    chosen = kept(exactly)
    assert len(chosen) == 100 + 100 + 3
    assert set(range(100)) < set(chosen)
    assert not set(chosen) & {204, 205}


THINGS = st.sampled_from(["a cat", "a dog", "two dogs", "the old tree", "a red bus", "the sea", "it", "İstanbul", "some people"])
LINES = st.lists(st.lists(THINGS, max_size=4).map(" near ".join), max_size=40)


@given(LINES, st.integers(1, 5), st.integers(1, 8), st.integers(0, 3))
def test_it_is_the_naive_reference(captions: list[str], at_least: int, at_most: int, seed: int) -> None:
    expected = naive(captions, at_least=at_least, at_most=at_most, seed=seed)
    assert kept(captions, at_least=at_least, at_most=at_most, seed=seed) == expected


@given(LINES, st.integers(1, 5), st.integers(1, 8))
def test_laws_of_the_pool(captions: list[str], at_least: int, at_most: int) -> None:
    table = count(captions, choice="builtin")
    chosen = balance(table, at_least=at_least, at_most=at_most)
    assert table.total == len(captions) == len(chosen)
    after = table.having(chosen)
    frequent = table.counts >= at_least
    assert (after <= table.counts).all()
    assert (after[frequent] >= np.minimum(table.counts, at_most)[frequent]).all()  # every frequent phrase keeps its share
    small = frequent & (table.counts <= at_most)
    assert (after[small] == table.counts[small]).all()
    lasting = {int(number) for number in table.keys[frequent]}
    for number in np.flatnonzero(chosen):  # nobody is in the pool without a reason
        assert lasting & {key(phrase) for phrase in chunks(captions[number])}


@given(LINES, st.integers(1, 8), st.integers(0, 3))
def test_the_order_of_the_visits_does_not_matter_and_the_seed_does_only_in_draws(captions: list[str], at_most: int, seed: int) -> None:
    most = max(Counter(phrase for caption in captions for phrase in set(chunks(caption))).values(), default=0)
    assert kept(captions, at_most=max(most, 1), seed=seed) == kept(captions, at_most=10_000)
    assert kept(captions, at_most=at_most, seed=seed) == kept(iter(captions), at_most=at_most, seed=seed)


def test_draws_are_fair() -> None:
    """Each of 30 captions is drawn in a third of 900 seeds, within five standard deviations."""
    taken = Counter(at for seed in range(900) for at in draw(key("sky"), 30, at_most=10, seed=seed))
    assert len(taken) == 30
    assert all(abs(times - 300) < 5 * 14.2 for times in taken.values())
    assert draw(key("sky"), 30, at_most=10, seed=1) != draw(key("sea"), 30, at_most=10, seed=1)


def many(total: int, seed: int = 0) -> list[str]:
    """Captions whose things are as uneven as words are."""
    dice = random.Random(seed)
    return [f"a thing{int(dice.paretovariate(0.6)) % 5000} near a thing{int(dice.paretovariate(0.6)) % 5000}" for _ in range(total)]


def test_workers_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concepts, "BATCH", 700)
    captions = many(5000)
    one, three = count(captions, choice="builtin"), count(captions, choice="builtin", workers=3)
    for name in ("keys", "starts", "counts", "captions"):
        assert np.array_equal(getattr(one, name), getattr(three, name)), name
    assert one.total == three.total


def test_captions_are_read_only_a_little_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source without an end cannot be held in memory."""
    monkeypatch.setattr(concepts, "BATCH", 50)
    read = done = 0

    def endless() -> Iterable[str]:
        nonlocal read
        while True:
            read += 1
            assert read - done <= 50 * (2 * 2 + 1)
            yield "a cat"

    def stop(so_far: int) -> None:
        nonlocal done
        done = so_far
        if done >= 1000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        count(endless(), choice="builtin", workers=2, progress=stop)


# --- files ----------------------------------------------------------------------------------------------------------------------------

TEXTS = ["a cat on the mat", "the cat", 'a "cat"\twith', "a dog", "  ", "cat <image> dog", "a dog near a dog", "dog"]


def rows(form: str) -> str:
    """The same captions in every form; a tab cuts a caption off in a TSV."""
    texts = [text.partition("\t")[0] for text in TEXTS]
    if form == "tsv":
        return "".join(f"{text}\thttp://x/{n}\r\n" for n, text in enumerate(texts))
    made: list[dict[str, Any]] = [{"id": f"GCC_train_{n:09d}", "image": f"GCC_train_{n:09d}.jpg"} for n in range(len(texts))]
    for record, text in zip(made, texts, strict=True):
        turns = [{"from": "human", "value": "Say.\n<image>"}, {"from": "gpt", "value": text}]
        record |= {"conversations": turns} if form == "llava" else {"caption": text}
    return json.dumps(made) if form != "jsonl" else "\n".join(map(json.dumps, made))


def run(path: Path, out: Path, **words: Any) -> Selection:
    return select(Captions(path, records=lambda file, tell: read_records(file, progress=tell)), out, choice="builtin", **words)


@pytest.mark.parametrize("form", ["tsv", "json", "jsonl", "llava"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_form_gives_the_same_samples(tmp_path: Path, form: str, packed: bool) -> None:
    path = tmp_path / "captions"
    path.write_bytes(gzip.compress(rows(form).encode()) if packed else rows(form).encode())
    found = run(path, tmp_path / "out.json")
    samples = json.loads((tmp_path / "out.json").read_text())
    assert [sample["conversations"][1]["value"] for sample in samples] == [TEXTS[n].partition("\t")[0] for n in (0, 1, 2, 3, 5, 6, 7)]
    assert samples[0]["id"] == "GCC_train_000000000"
    assert samples[4]["image"] == "GCC_train_000000005.jpg"
    assert (found.captions, found.left_out, found.kept, found.phrases, found.dropped) == (7, 1, 7, 4, 2)
    assert sorted(found.top) == [("cat", 4, 4), ("dog", 4, 4)]
    assert found.first_left_out.startswith("captions:")
    assert list(tmp_path.glob(".*")) == []


def test_samples_are_stage_1s(tmp_path: Path) -> None:
    """One turn each, an instruction of the list, the picture on either side, the same for a seed; training takes the file."""
    from llavakit.data.check import check

    (tmp_path / "captions.tsv").write_text("".join(f"a cat number {n}\tx\n" for n in range(200)))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / "captions.tsv", tmp_path / f"{name}.json", at_least=1, at_most=1000, seed=seed)
    a, b, c = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "abc")
    assert a == b != c
    asked = Counter(sample["conversations"][0]["value"].replace("<image>", "").strip() for sample in a)
    assert set(asked) == set(instructions())
    assert len(instructions()) == 11
    first = sum(sample["conversations"][0]["value"].startswith("<image>\n") for sample in a)
    last = sum(sample["conversations"][0]["value"].endswith("\n<image>") for sample in a)
    assert first + last == 200
    assert 60 < first < 140
    found = check(tmp_path / "a.json", image_root=tmp_path)
    assert {finding.code for finding in found.findings} == {"image_missing"}


def test_rows_can_be_kept_as_they_stand(tmp_path: Path) -> None:
    lines = rows("tsv").split("\r\n")
    (tmp_path / "in.tsv").write_text(rows("tsv"), newline="")
    run(tmp_path / "in.tsv", tmp_path / "out.tsv", records=True)
    assert (tmp_path / "out.tsv").read_text().splitlines() == [line for n, line in enumerate(lines) if n != 4 and line]
    (tmp_path / "in.json").write_text(rows("llava"))
    run(tmp_path / "in.json", tmp_path / "out.jsonl", records=True, at_least=4)
    kept_rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert kept_rows == [record for n, record in enumerate(json.loads(rows("llava"))) if n != 4]


def test_the_table_names_every_phrase(tmp_path: Path) -> None:
    captions = many(1000)
    (tmp_path / "in.tsv").write_text("\n".join(captions))
    found = run(tmp_path / "in.tsv", tmp_path / "out.json", at_most=20, table=tmp_path / "table.tsv", workers=2)
    head, *lines = (tmp_path / "table.tsv").read_text().splitlines()
    assert head.split("\t") == ["phrase", "before", "after"]
    counted = Counter(phrase for caption in captions for phrase in set(chunks(caption)))
    chosen = [captions[number] for number in naive(captions, at_least=3, at_most=20, seed=0)]
    after = Counter(phrase for caption in chosen for phrase in set(chunks(caption)))
    expected = {phrase: (number, after[phrase]) for phrase, number in counted.items() if number >= 3}
    assert {phrase: (int(b), int(a)) for phrase, b, a in (line.split("\t") for line in lines)} == expected
    assert found.before.tolist() == sorted((b for b, _ in expected.values()), reverse=True)
    assert found.after.tolist() == sorted((a for _, a in expected.values()), reverse=True)
    assert {phrase: (b, a) for phrase, b, a in found.top}.items() <= expected.items()


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "no_captions"),
        (b"\n\n", "no_captions"),
        (b"a cat\t1\n\xff\xfea\xff\t2\n", "bad_file"),
        (b'[{}, 7, {"caption": 3}]', "no_captions"),
        (b'[{"caption": "a cat"}', "bad_json"),
        (b"\x1f\x8bbroken", "bad_file"),
        (b"x" * (1 << 21), "bad_file"),
    ],
)
def test_bad_files_are_one_typed_error(tmp_path: Path, content: bytes, code: str) -> None:
    (tmp_path / "in").write_bytes(content)
    with pytest.raises(DataError) as caught:
        run(tmp_path / "in", tmp_path / "out.json")
    assert caught.value.code == code
    assert "in" in caught.value.where
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_would_fail_at_the_end_fails_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "in.tsv"
    path.write_text("a cat\tx\n" * 4)
    for out, words in ((tmp_path / "out.tsv", {}), (tmp_path / "out.json", {"records": True}), (tmp_path / "no" / "out.json", {})):
        with pytest.raises(ConfigError):
            run(path, out, **words)
    with pytest.raises(ConfigError, match="file to read"):
        run(path, path, records=True)
    with pytest.raises(ConfigError, match="image-name"):
        Captions(path, image_name="same.jpg")
    with pytest.raises(DataError, match="No such file"):
        Captions(tmp_path / "nowhere")


def test_an_old_result_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    out.write_text("old")
    path = tmp_path / "in.jsonl"
    path.write_text('{"id": "1", "caption": "a cat"}\n' * 5)  # no pictures: no samples can be made
    with pytest.raises(DataError, match="--records"):
        run(path, out)
    assert out.read_text() == "old"
    path.write_text('{"id": "1", "image": "1.jpg", "caption": "a cat"}\n' * 5)

    def change(work: str, done: int) -> None:
        path.write_text('{"id": "1", "image": "1.jpg", "caption": "a cat"}\n' * 6)

    with pytest.raises(DataError, match="changed"):
        run(path, out, progress=change)
    assert out.read_text() == "old"


# --- the picture and the command ------------------------------------------------------------------------------------------------------


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    (tmp_path / "in.tsv").write_text("\n".join(many(2000)))
    found = run(tmp_path / "in.tsv", tmp_path / "out.json", at_most=20)
    assert plot(found, tmp_path / "a.png", at_most=20).read_bytes().startswith(b"\x89PNG")
    assert "<svg" in plot(found, tmp_path / "a.svg", at_most=20).read_text()
    with pytest.raises(ConfigError, match=r"\.svg"):
        plot(found, tmp_path / "a.txt", at_most=20)


@settings(max_examples=20)
@given(st.integers(1, 50_000))
def test_thinning_keeps_both_ends(total: int) -> None:
    counts = np.sort(np.random.default_rng(total).integers(1, 10**6, total))[::-1]
    ranks, values = thinned(counts)
    assert (ranks[0], ranks[-1]) == (1, total)
    assert (np.diff(ranks) > 0).all()
    assert len(ranks) <= 2000
    assert (values == counts[ranks - 1]).all()


@pytest.fixture
def llava(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    from llavakit.cli import main

    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        code = main(list(words))
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


def test_the_command(llava: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("in.tsv").write_text("\n".join(many(3000)))
    monkeypatch.setattr("llavakit.cli.concepts.EVERY", 0.0)
    words = ("concepts", "in.tsv", "--out", "out.json", "--at-most", "20", "--workers", "1", "--engine", "builtin")
    code, out, err = llava(*words, "--table", "t.tsv")
    assert code == 0
    assert "built-in chunker" in out.splitlines()[0]
    assert out.splitlines()[-1] == "out.json"
    assert "finding phrases: " in err
    assert " a second" in err
    told = json.loads(llava(*words, "--json")[1])
    assert told["kept"] == len(json.loads(Path("out.json").read_text()))
    assert told["engine"].startswith("built-in")
    assert len(told["top"]) == 10
    assert llava("concepts", "in.tsv", "--out", "out.csv")[0] == 2
    code, out, err = llava("concepts", "none.tsv", "--out", "out.json")
    assert (code, out) == (1, "")
    assert err.startswith("error: none.tsv: No such file")
