"""Features kept of a frozen tower: the same bits as without them, also half filled, torn, or shared; and never those of another tower."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_packing import gradients, taught
from test_ranks import close, finished, torchrun
from test_resume import assert_same_run, stop_after
from torch import Tensor

from llavakit.config import Lora, TrainConfig
from llavakit.data.features import FORGOTTEN, FeatureStore
from llavakit.data.manifest import SourceSpec
from llavakit.data.mixture import Ingredient, Mixture
from llavakit.data.sources import read_llava
from llavakit.errors import ConfigError, TrainingError
from llavakit.model.vision import VisionTower
from llavakit.processor import Batch, Processor
from llavakit.train import features as module
from llavakit.train.features import Keeper, about, most_views
from llavakit.train.loop import train
from test_families import made

CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore(folder=tmp_path, tokens=16, width=32, dtype=torch.float32)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many views the tower read, call by call."""
    found: list[int] = []
    forward = VisionTower.forward

    def counted(self: VisionTower, views: Tensor) -> Tensor:
        found.append(len(views))
        return forward(self, views)

    monkeypatch.setattr(VisionTower, "forward", counted)
    return found


@pytest.fixture
def kept(finetune: TrainConfig, tmp_path: Path) -> TrainConfig:
    """Two epochs of twelve samples with ten pictures."""
    return replace(finetune, cache_features=tmp_path / "features", epochs=2, steps=None, save_every=2)


def files(folder: Path) -> list[Path]:
    """Every picture kept under a folder."""
    return sorted(folder.glob("*/??/*"))


# ---- the same bits


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("member", ["v1", "1.5", "1.5-hd"])
def test_loss_and_gradients_are_the_same_bits(tokenizer: Any, store: FeatureStore, member: str, narrow: bool) -> None:
    """Packed and padded, empty store and full, pictures known beside unknown ones, several pictures a sample and none."""
    model, processor = made(tokenizer, member, "llama")
    model.train()
    model.vision_tower.eval().requires_grad_(False)
    store = replace(store, dtype=torch.bfloat16 if narrow else torch.float32)
    keeper = Keeper(store=store, tower=model.vision_tower, say=pytest.fail)
    plain = [processor.encode(talk, learn=True) for talk in taught()]
    for part, batched in ((slice(0, 2), processor.pack), (slice(None), processor.pack), (slice(None), padded(processor))):
        inputs = [processor.encode(talk, learn=True, known=store.get) for talk in taught()[part]]
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            expected = gradients(model, [batched(plain[part])])
            found = gradients(model, [keeper.completed(batched(inputs))])
        assert found[0] == expected[0]
        assert found[1].keys() == expected[1].keys()
        assert [name for name, value in found[1].items() if not torch.equal(value, expected[1][name])] == []
    assert store.count() == 6, "each picture once"


def padded(processor: Processor) -> Any:
    return lambda inputs: processor.collate(inputs, side="right")


@pytest.mark.parametrize("changes", [{}, {"workers": 2, "pack": False}, {"stage": "pretrain", "template": "plain"}, {"cache_mb": 1}])
def test_a_run_is_the_same_with_and_without(kept: TrainConfig, captions: Path, changes: dict[str, Any], tmp_path: Path) -> None:
    kept = replace(kept, **changes, **({"data": captions} if "stage" in changes else {}))
    plain = replace(kept, cache_features=None, out=tmp_path / "plain")
    train(kept)
    train(plain)
    assert_same_run(plain.out, kept.out)
    assert kept.cache_features is not None
    assert len(files(kept.cache_features)) == 10


def test_the_tower_reads_each_picture_once(kept: TrainConfig, looks: list[int], tmp_path: Path) -> None:
    """But for the blank of a batch without a picture; a second run does not ask it at all."""
    train(kept)
    assert looks == [1] * len(looks)
    assert 10 <= len(looks) <= 12
    looks.clear()
    train(replace(kept, out=tmp_path / "second", seed=3))
    assert len(looks) <= 2


def test_it_resumes_bit_for_bit_half_filled_or_damaged(kept: TrainConfig, tmp_path: Path) -> None:
    plain = replace(kept, cache_features=None, out=tmp_path / "plain")
    train(plain)
    assert kept.cache_features is not None
    train(kept, on_step=stop_after(2))
    half = files(kept.cache_features)
    assert 0 < len(half) < 10
    half[0].unlink()
    half[1].write_bytes(half[1].read_bytes()[:-700])
    train(kept)
    assert_same_run(plain.out, kept.out)
    assert len(files(kept.cache_features)) == 10
    assert half[1].stat().st_size == half[2].stat().st_size, "what was torn is whole again"


def test_two_ranks_fill_one_folder(kept: TrainConfig, tmp_path: Path) -> None:
    kept = replace(kept, lr=1e-4, epochs=1)
    alone = train(replace(kept, cache_features=None, out=tmp_path / "alone")).checkpoint
    finished(torchrun(kept))
    close(alone, kept.out / alone.name)
    assert kept.cache_features is not None
    assert len(files(kept.cache_features)) == 10


# ---- what is kept


def numbers(seed: int, views: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(views, 16, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_put_is_got(store: FeatureStore, dtype: torch.dtype) -> None:
    store = replace(store, dtype=dtype)
    assert store.get("ab12") is None
    for views in (1, 5):
        assert store.put("ab12", numbers(views, views, dtype))
        found = store.get("ab12")
        assert found is not None
        assert found.dtype == dtype
        assert torch.equal(found, numbers(views, views, dtype))
    assert store.count() == 1


@pytest.mark.parametrize("damage", ["short", "empty", "flipped", "longer", "another's"])
def test_a_file_that_is_not_whole_is_none(store: FeatureStore, damage: str) -> None:
    store.put("ab12", numbers(1))
    store.put("ab34", numbers(2))
    path = store.folder / "ab" / "ab12"
    content = path.read_bytes()
    flipped = bytes([*content[:99], content[99] ^ 4, *content[100:]])
    view = store.bytes_of_a_view
    wrong = {"short": content[:-view], "empty": b"", "flipped": flipped, "longer": content + bytes(view)}
    path.write_bytes(wrong.get(damage, (store.folder / "ab" / "ab34").read_bytes()))
    assert store.get("ab12") is None
    store.put("ab12", numbers(1))
    assert path.read_bytes() == content


def test_what_a_killed_process_left_is_swept_and_what_is_written_now_is_not(store: FeatureStore) -> None:
    store.put("ab12", numbers(1))
    old, young = (store.folder / "drafts" / name for name in ("old", "young"))
    for draft in (old, young):
        draft.write_bytes(b"torn")
    os.utime(old, (0, time.time() - FORGOTTEN - 9))
    store.sweep()
    assert (old.exists(), young.exists(), store.count()) == (False, True, 1)


def test_a_write_that_fails_leaves_nothing(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*paths: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert not store.put("ab12", numbers(1))
    assert not list((store.folder / "drafts").iterdir())


# ---- never another tower's


def test_another_tower_preparation_or_arithmetic_is_another_key(tokenizer: Any) -> None:
    model, processor = made(tokenizer, "1.5", "llama")
    known = about(model, processor, CPU, torch.float32)
    wide, _ = made(tokenizer, "1.5-hd", "llama")
    others = [
        about(model, processor, CPU, torch.bfloat16),
        about(model, processor, torch.device("cuda"), torch.float32),
        about(model, other_aspect(processor), CPU, torch.float32),
        about(wide, made(tokenizer, "1.5-hd", "llama")[1], CPU, torch.float32),
    ]
    assert all(other != known for other in others)
    layers = model.vision_tower.vision_model.encoder.layers
    with torch.no_grad():
        layers[-1].mlp.fc1.weight[0, 0] += 1  # behind the layer that is read
        model.multi_modal_projector.linear_1.weight.zero_()
        assert about(model, processor, CPU, torch.float32) == known
        layers[0].mlp.fc1.weight[0, 0] += 1e-3
    assert about(model, processor, CPU, torch.float32) != known


def other_aspect(processor: Processor) -> Processor:
    return Processor(
        tokenizer=processor.tokenizer, template=processor.template, preprocess=replace(processor.preprocess, aspect="square"),
        tiling=processor.tiling, max_length=processor.max_length,
    )  # fmt: skip


def test_a_changed_picture_is_another_picture(kept: TrainConfig, looks: list[int], tmp_path: Path) -> None:
    """The same name, size and time, another content."""
    assert kept.data is not None
    folder = shutil.copytree(kept.data.parent, tmp_path / "data")
    kept = replace(kept, data=folder / "data.json", images=folder)
    train(kept)
    victim = folder / "3.png"
    before, content = victim.stat(), bytearray(victim.read_bytes())
    shutil.copy(folder / "7.png", victim)
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert bytes(content) != victim.read_bytes()
    plain = replace(kept, cache_features=None, out=tmp_path / "plain")
    again = replace(kept, out=tmp_path / "again")
    train(plain)
    train(again)
    assert_same_run(plain.out, again.out)


# ---- what is refused


@pytest.mark.parametrize(
    "changes", [{"rates": ((r"vision_tower\..*", 0.2),)}, {"lora": Lora(r=2, targets=r"vision_tower\..*\.q_proj")}, {"shard": "full"}]
)
def test_a_tower_that_learns_or_is_cut_is_refused(kept: TrainConfig, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="leave it out, or") as caught:
        train(replace(kept, **changes))
    assert (caught.value.where, caught.value.code) == ("cache_features", "bad_value")


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_too_small_is_told_before_a_byte_is_written(kept: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten pictures of 16 x 32 numbers in fp32, and the room of a checkpoint."""
    each = 16 * 32 * 4 + 4
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Usage(0, 0, 10 * each))
    with pytest.raises(TrainingError, match=f"10 pictures, 0 of them kept already, {each:,} bytes a picture") as caught:
        train(kept)
    assert caught.value.code == "disk_full"
    assert kept.cache_features is not None
    assert not kept.cache_features.exists()


def test_a_disk_that_fills_up_stops_the_keeping_and_not_the_run(
    kept: TrainConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    puts: Counter[bool] = Counter()
    put = FeatureStore.put

    def short(self: FeatureStore, name: str, features: Tensor) -> bool:
        roomy = puts[True] < 4 and put(self, name, features)
        puts[roomy] += 1
        return roomy

    plain = replace(kept, cache_features=None, out=tmp_path / "plain")
    train(plain)
    monkeypatch.setattr(FeatureStore, "put", short)
    train(kept)
    assert puts == {True: 4, False: 1}
    assert "no more features can be kept" in capfd.readouterr().err
    assert_same_run(plain.out, kept.out)


# ---- how many


def test_the_most_views_and_the_different_pictures(tokenizer: Any, data: Path) -> None:
    assert [most_views(made(tokenizer, member, "llama")[1].tiling) for member in ("1.5", "1.5-hd", "next")] == [1, 7, 5]
    source = read_llava(data)
    assert (len(source), source.pictures(), source[2:].pictures()) == (12, 10, 8)
    twice = source.take([0, 0, 5, 11])
    assert twice.pictures() == 2
    spec = SourceSpec(name="it", file=data, share=2.5)
    assert Mixture([Ingredient.of(spec, source)]).pictures() == 10


def test_a_batch_without_pictures_is_left_alone(tokenizer: Any, store: FeatureStore) -> None:
    model, processor = made(tokenizer, "1.5", "llama")
    keeper = Keeper(store=store, tower=model.vision_tower, say=pytest.fail)
    batch: Batch = processor.pack([processor.encode(taught()[-1], learn=True, known=store.get)])
    assert keeper.completed(batch) is batch
