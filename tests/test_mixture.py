"""Laws of ``data.mixture``, ``data.manifest`` and ``data.parts``: what is taken, what is shipped, and a merged file against its table."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from llavakit.data.loader import epoch_windows
from llavakit.data.manifest import SHIPPED, Manifest, Part, SourceSpec, read_manifest, shipped
from llavakit.data.mixture import Mixture, choose, open_mixture
from llavakit.data.parts import STRAY, PartCounts, count_parts
from llavakit.data.sources import read_llava
from llavakit.errors import ConfigError, DataError

PRINT = "a" * 64


def record(number: int, question: str = "What?", **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"Number {number}."}]
    return {"id": f"{number}", "conversations": turns} | fields


def write(root: Path, name: str, records: Any) -> Path:
    path = root / name
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def source(name: str, **fields: Any) -> SourceSpec:
    return SourceSpec(name=name, file=Path(f"{name}.json"), **fields)


def mixture(root: Path, *sources: SourceSpec, **options: Any) -> Mixture:
    return open_mixture(Manifest(name="m", sources=sources), root, **options)


def ids(samples: Mixture) -> list[str]:
    return [f"{sample.where.split(':')[0]}{sample.id}" for sample in samples]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Pillow.new("RGB", (8, 8)).save(tmp_path / "p.png")
    write(tmp_path, "a.json", [record(i) for i in range(40)])
    write(tmp_path, "b.json", [record(i, "<image>\nWho?", image="p.png") for i in range(10)])
    return tmp_path


# ---- which samples


@settings(deadline=None)
@given(count=st.integers(1, 300), wanted=st.integers(0, 900), more=st.integers(0, 300), seed=st.integers(0, 2**32))
def test_choosing(count: int, wanted: int, more: int, seed: int) -> None:
    """Exactly so many, ascending; no sample a second time before every one was taken; fewer lie inside more; always the same."""
    taken = choose(count, wanted, fingerprint=PRINT, seed=seed).tolist()
    times = Counter(taken)
    assert len(taken) == wanted
    assert taken == sorted(taken)
    assert all(0 <= number < count and wanted // count <= times[number] <= wanted // count + 1 for number in range(count))
    assert not times - Counter(choose(count, wanted + more, fingerprint=PRINT, seed=seed).tolist())
    assert taken == choose(count, wanted, fingerprint=PRINT, seed=seed).tolist()


def test_the_choice_is_the_same_in_every_year() -> None:
    """Stored once: a change that moves it would give another mixture under the same manifest."""
    assert choose(20, 6, fingerprint=PRINT, seed=3).tolist() == CHOSEN
    assert choose(20, 6, fingerprint=PRINT, seed=4).tolist() != CHOSEN
    assert choose(20, 6, fingerprint="b" * 64, seed=3).tolist() != CHOSEN


CHOSEN = [6, 10, 11, 13, 15, 19]


# ---- the mixture


def test_a_mixture_holds_its_sources_one_after_the_other(root: Path) -> None:
    whole = mixture(root, source("a"), source("b"))
    assert ids(whole) == [f"a{i}" for i in range(40)] + [f"b{i}" for i in range(10)]
    assert [bool(sample.conversation.images) for sample in whole] == [False] * 40 + [True] * 10
    alone = read_llava(root / "b.json")
    assert whole[-1].conversation == alone[-1].conversation
    assert whole[40].where == f"b: {alone[0].where}"
    assert list(whole.lengths()) == [*read_llava(root / "a.json").lengths(), *alone.lengths()]
    assert len(whole.lengths()) == 50
    assert pickle.loads(pickle.dumps(whole))[45] == whole[45]  # as it goes to the loader's workers
    with pytest.raises(IndexError):
        whole[50]


@pytest.mark.parametrize(
    ("fields", "taken"),
    [({}, 40), ({"share": 0.25}, 10), ({"take": 7}, 7), ({"share": 2.5}, 100), ({"share": 1e-9}, 1), ({"take": 40}, 40)],
)
def test_how_much_of_a_source_is_taken(fields: dict[str, Any], taken: int, root: Path) -> None:
    made = mixture(root, source("a", **fields), source("b"))
    assert len(made) == taken + 10
    assert [row.taken for row in made.table()] == [taken, 10]
    times = Counter(sample.id for sample in made if sample.where.startswith("a:"))
    assert max(times.values()) - min(times.get(str(i), 0) for i in range(40)) <= 1


def test_a_share_of_the_whole_keeps_its_proportions(root: Path) -> None:
    sources = source("a", share=2.0), source("b", seed=5)
    previous: Counter[str] = Counter()
    for share in (0.01, 0.1, 0.35, 1.0):
        made = mixture(root, *sources, share=share)
        taken = Counter(ids(made))
        assert not previous - taken  # the smaller trial lies inside the larger
        assert [row.taken for row in made.table()] == [max(1, round(share * 80)), max(1, int(share * 10 + 0.5))]
        previous = taken


def test_other_sources_do_not_change_the_choice(root: Path) -> None:
    alone = ids(mixture(root, source("a", share=0.3)))
    assert alone == [name for name in ids(mixture(root, source("b"), source("a", share=0.3))) if name.startswith("a")]
    assert alone != ids(mixture(root, source("a", share=0.3, seed=1)))


def test_each_file_says_how_far_its_reading_is(root: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    mixture(root, source("a"), source("b"), progress=lambda name: lambda done, whole: told.setdefault(name, []).append((done, whole)))
    assert {name: steps[-1] for name, steps in told.items()} == {name: ((root / name).stat().st_size,) * 2 for name in ("a.json", "b.json")}


def test_a_slice_is_a_mixture(root: Path) -> None:
    whole = mixture(root, source("a", share=0.5), source("b"))
    part = whole[5:29:3]
    assert ids(part) == ids(whole)[5:29:3]
    assert list(part.lengths()) == list(whole.lengths())[5:29:3] == list(whole.lengths()[5:29:3])
    assert part[::-1][0] == part[-1]
    assert part.fingerprint == whole.fingerprint
    assert epoch_windows(len(part), size=4, seed=0, epoch=0, lengths=part.lengths(), group=2)


def test_the_fingerprint_follows_files_and_choices(root: Path) -> None:
    def fingerprint(*sources: SourceSpec, **options: Any) -> str:
        return mixture(root, *sources, **options).fingerprint

    first = fingerprint(source("a"), source("b"))
    assert first == fingerprint(source("a", licence="other"), source("b"))
    others = [
        fingerprint(source("b"), source("a")),
        fingerprint(source("a", share=0.5), source("b")),
        fingerprint(source("a"), source("b"), share=0.5),
    ]
    write(root, "a.json", [record(i + 1) for i in range(40)])
    assert len({first, *others, fingerprint(source("a"), source("b"))}) == 5


def test_the_report_says_of_each_source_what_was_found(root: Path) -> None:
    write(root, "a.json", [*(record(i) for i in range(38)), {"id": "39"}, record(0)])
    made = mixture(root, source("a", count=41), source("b", count=10), on_bad="skip")
    assert made.report.records == 50
    assert made.report.faults == Counter({"no_turns": 1})
    assert made.report.remarks == Counter({"count_differs": 1, "id_repeated": 1})
    assert all(place.startswith("a: ") for places in made.report.places.values() for place in places)
    assert "40 records instead of 41" in " ".join(made.report.lines())
    assert [(row.name, row.expected, row.records, row.usable) for row in made.table()] == [("a", 41, 40, 39), ("b", 10, 10, 10)]
    assert sum(row.part for row in made.table()) == pytest.approx(1)
    assert len(made.lines()) == 3
    assert len({len(line) for line in made.lines()}) == 1


def test_everything_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_mixture(shipped("llava-1.5-665k"), tmp_path)
    said = str(caught.value)
    assert caught.value.code == "mixture_missing"
    folders = ["coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2"]
    assert all(f"{folder}/" in said for folder in folders)
    for told in ("llava_v1_5_mix665k.json", "liuhaotian/LLaVA-Instruct-150K", "COCO train2017", "7 of the mixture's"):
        assert told in said
    with pytest.raises(DataError) as caught:
        open_mixture(shipped("llava-1.5-665k"), tmp_path, on_bad="skip")
    assert "COCO" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "options", "code"),
    [({"take": 41}, {}, "take_too_large"), ({}, {"share": 0.0}, "bad_share"), ({}, {"share": 1.5}, "bad_share")],
)
def test_what_cannot_be_mixed(fields: dict[str, Any], options: dict[str, Any], code: str, root: Path) -> None:
    with pytest.raises(DataError) as caught:
        mixture(root, source("a", **fields), **options)
    assert caught.value.code == code
    assert caught.value.remedy


# ---- manifests


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_manifest_is_read(name: str) -> None:
    manifest = shipped(name)
    assert manifest.name == name
    assert manifest.count is not None
    for spec in manifest.sources:
        assert spec.title
        assert "://" not in repr(spec)  # titles, no addresses
        known = [part.count for part in spec.parts if part.count is not None]
        assert not known or sum(known) == spec.count


def test_the_table_of_llava_1_5() -> None:
    """Spec 4.5: the counts the author confirmed, and their sums by image root and by format words."""
    [spec] = shipped("llava-1.5-665k").sources
    counts = {part.name: part.count for part in spec.parts}
    assert counts == COUNTS
    assert sum(COUNTS.values()) == 665_298 == spec.count
    by_root: Counter[str] = Counter()
    by_words: Counter[str] = Counter()
    for part in spec.parts:
        by_root[part.roots[0] if part.roots else ""] += part.count or 0
        by_words[part.suffixes[0].split()[1] if part.suffixes else ""] += part.count or 0
    assert by_root == {
        "coco/train2017": 364_100,
        "vg/VG_100K": 86_417,
        "gqa/images": 72_140,
        "ocr_vqa/images": 80_000,
        "textvqa/train_images": 21_953,
        "": 40_688,
    }
    assert by_words == {"": 198_400, "the": 243_921, "with": 66_160, "a": 21_953 + 134_864}


COUNTS = {
    "llava-instruct": 157_712,
    "sharegpt": 40_688,
    "vqav2": 82_783,
    "gqa": 72_140,
    "okvqa": 8_998,
    "ocr-vqa": 80_000,
    "a-okvqa": 66_160,
    "textcaps": 21_953,
    "refcoco": 48_447,
    "visual-genome": 86_417,
}


def test_what_was_never_published_is_said(tmp_path: Path) -> None:
    (tmp_path / "next.json").write_text(json.dumps([record(0)]), encoding="utf-8")
    [spec] = shipped("next-760k").sources
    assert {part.name: part.count for part in spec.parts if part.count} == {}
    made = mixture(tmp_path, replace(spec, file=Path("next.json"), pictures=""))
    assert made.report.remarks["never_published"] == 1
    assert "demo-users" in " ".join(made.report.lines())


def test_a_manifest_is_the_same_in_yaml_and_json(tmp_path: Path) -> None:
    content = {"name": "m", "sources": [{"name": "a", "file": "a.json", "share": 0.5, "parts": [{"name": "x", "roots": ["r"]}]}]}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    (tmp_path / "m.json").write_text(json.dumps(content, indent="\t"), encoding="utf-8")
    wanted = Manifest(name="m", sources=(source("a", share=0.5, parts=(Part(name="x", roots=("r",)),)),))
    assert read_manifest(tmp_path / "m.yaml") == read_manifest(tmp_path / "m.json") == wanted


A = {"name": "a", "file": "a.json"}


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("", "no list of sources"),
        ({"sources": []}, "no list of sources"),
        ({"sources": ["a"]}, "sources[0]"),
        ({"sources": [{"name": "a"}]}, "without a name or a file"),
        ({"sources": [A | {"shares": 1}]}, "did you mean 'share'?"),
        ({"sources": [A | {"count": "many"}]}, "count"),
        ({"sources": [A | {"take": 5, "share": 0.5}]}, "share is given too"),
        ({"sources": [A | {"take": 0}]}, "take is 0"),
        ({"sources": [A | {"share": 0}]}, "out of range"),
        ({"sources": [A | {"seed": -1}]}, "out of range"),
        ({"sources": [A, A]}, "same name"),
        ({"sources": [A | {"parts": ["x"]}]}, "no list of mappings"),
        ({"sources": [A | {"parts": [{"name": "x", "roots": ["r", "s"]}, {"name": "y", "roots": ["r"]}]}]}, "two different lists"),
        ("{", "line 1"),
    ],
)
def test_a_manifest_that_is_wrong(content: Any, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises((DataError, ConfigError)) as caught:
        read_manifest(path)
    assert hint in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_mixture_that_is_not_shipped() -> None:
    with pytest.raises(ConfigError) as caught:
        shipped("llava-665k")
    assert "llava-1.5-665k" in str(caught.value)
    with pytest.raises(DataError) as missing:
        read_manifest(Path("none.yaml"))
    assert missing.value.code == "bad_file"


# ---- a merged file against its table

SCALE = 1500
SPOKEN = {  # as released: "Please provide ...", and the box or the name behind it
    "refcoco": "Please provide a short description for this region: [0.1, 0.2, 0.3, 0.4].",
    "visual-genome": "Please provide the bounding box coordinate of the region this sentence describes: a red cup.",
    "textcaps": "Provide a one-sentence caption for the provided image.\nReference OCR token: EXIT",
    "a-okvqa": "Why?\nA. x\nB. y\nAnswer with the option's letter from the given choices directly.",
    "llava-instruct": "What is odd here?",
    "sharegpt": "Answer the question using a single word or phrase: is this text alone?",
}


def merged(root: Path, scale: int = SCALE) -> tuple[SourceSpec, list[dict[str, Any]]]:
    """A file of the shape of the released one, every count divided by ``scale`` and rounded up, and its table."""
    [spec] = shipped("llava-1.5-665k").sources
    parts = tuple(replace(part, count=-(-(part.count or 0) // scale)) for part in spec.parts)
    records = []
    for part in parts:
        question = SPOKEN.get(part.name, "How many?\nAnswer the question using a single word or phrase.")
        for number in range(part.count or 0):
            fields = {"image": f"{part.roots[number % len(part.roots)]}/{number}.jpg"} if part.roots else {"model": ""}
            asked = f"<image>\n{question}" if part.roots else question
            records.append(record(number, asked, **fields))
    return replace(spec, parts=parts, count=len(records)), records


def counted(root: Path, spec: SourceSpec, records: list[dict[str, Any]]) -> PartCounts:
    return count_parts(read_llava(write(root, "merged.json", records), image_root=root / spec.images, check_images=False), spec, root)


def test_a_file_of_the_released_shape_fits_the_table(tmp_path: Path) -> None:
    spec, records = merged(tmp_path)
    found = counted(tmp_path, spec, records)
    assert not found.differences
    assert not found.strays
    assert found.whole.found == len(records) == spec.count
    parts = {part.name: part.count for part in spec.parts}
    by_part = {count.name: count.found for count in found.by_part}
    assert by_part.pop("vqav2, okvqa") == (parts.pop("vqav2") or 0) + (parts.pop("okvqa") or 0)
    assert by_part == parts
    assert [count.name for count in found.by_root] == [
        "coco/train2017",
        "no image",
        "gqa/images",
        "ocr_vqa/images",
        "textvqa/train_images",
        "vg/VG_100K, vg/VG_100K_2",
    ]
    assert sum(count.found for count in found.by_root) == sum(count.found for count in found.by_words) == len(records)


@pytest.mark.parametrize("images", [".", "playground/data"])
def test_where_the_images_lie_does_not_matter(images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, records = merged(tmp_path, 40_000)
    spec = replace(spec, images=Path(images))
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path, Path()):
        assert not counted(root, spec, records).differences


def test_what_is_lost_or_strange_is_named(tmp_path: Path) -> None:
    spec, records = merged(tmp_path, 10_000)
    lost = [entry for entry in records if not str(entry.get("image", "")).startswith("ocr_vqa/")]
    found = counted(tmp_path, spec, lost)
    assert {count.name for count in found.differences} == {
        "mix665k",
        "ocr_vqa/images",
        "ocr-vqa",
        "Answer the question using a single word or phrase",
    }
    strange = [*records, record(0, "<image>\nWhat?", image="flickr/1.jpg"), record(1, "<image>\nWhat?", image="gqa/images/1.jpg")]
    found = counted(tmp_path, spec, strange)
    assert len(found.strays) == 2
    assert {str(count) for count in found.differences} >= {f"{STRAY}: 2 (expected 0)", "another folder: 1 (expected 0)"}


def test_a_file_without_a_table_is_counted_as_a_whole(tmp_path: Path) -> None:
    for name in ("lcs-558k", "next-760k"):
        [spec] = shipped(name).sources
        found = counted(tmp_path, spec, [record(0)])
        assert [str(count) for count in found.differences] == [f"{spec.name}: 1 (expected {spec.count})"]


def test_numbers_that_were_only_rounded_are_not_held_against_a_file(tmp_path: Path) -> None:
    [spec] = shipped("llava-instruct-158k").sources
    found = counted(tmp_path, replace(spec, count=2), [record(i, "<image>\nWhat?", image=f"{i}.jpg") for i in range(2)])
    assert not found.differences
    assert [str(count) for count in found.by_part] == ["conversation, detail, complex-reasoning: 2 (never published)"]
