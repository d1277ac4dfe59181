"""Bad checkpoints (hardening C1 to C6, C8, C9): each is refused by name, before memory is taken, and nothing of it is run."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from llavakit.checkpoint import dtypes, files, store, weights
from llavakit.errors import CheckpointError
from llavakit.model.llava import Llava
from llavakit.model.presets import ModelConfig
from tiny import tiny_config, tiny_processor

QUIET = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy to be spoiled."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


@pytest.fixture
def sharded(tokenizer: Any, tmp_path: Path) -> Path:
    store.save(Llava(tiny_config(tokenizer)), tiny_processor(tokenizer), tmp_path / "sharded", max_shard_bytes=60_000)
    return tmp_path / "sharded"


def refused(folder: Path, code: str, *names: str, **options: Any) -> str:
    """Loading is refused with this code, in one line that holds these names."""
    with pytest.raises(CheckpointError) as caught:
        store.load(folder, **options)
    line = str(caught.value)
    assert caught.value.code == code, line
    assert caught.value.remedy
    assert "\n" not in line
    for name in names:
        assert name in line
    return line


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, taking memory for a weight is a failure."""
    monkeypatch.setattr(weights, "read", lambda *_: pytest.fail("memory was taken for the weights"))


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / files.SINGLE)
    change(tensors)
    save_file(tensors, folder / files.SINGLE)


def same(found: Llava, expected: Llava) -> None:
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in found.state_dict().items():
        assert value.dtype == expected.state_dict()[name].dtype, name
        assert torch.equal(value, expected.state_dict()[name]), name


# C1


@pytest.mark.usefixtures("no_memory")
def test_missing_shards_are_all_named(sharded: Path) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 4
    for shard in shards[1:3]:
        shard.unlink()
    refused(sharded, "missing_file", shards[1].name, shards[2].name)


@pytest.mark.usefixtures("no_memory")
def test_a_folder_without_weights_or_config_or_of_nothing(folder: Path) -> None:
    (folder / files.SINGLE).unlink()
    refused(folder, "missing_file", files.SINGLE)
    (folder / files.CONFIG).unlink()
    refused(folder, "no_checkpoint", files.CONFIG)
    refused(folder / "nowhere", "no_checkpoint", "nowhere")


@pytest.mark.usefixtures("no_memory")
def test_an_index_that_promises_what_its_files_do_not_hold(sharded: Path) -> None:
    index = sharded / files.INDEX
    placed = json.loads(index.read_text())["weight_map"]
    name = "language_model.lm_head.weight"
    other = next(file for file in placed.values() if file != placed[name])
    change_json(index, lambda fields: fields["weight_map"].update({name: other, "language_model.more": other}))
    refused(sharded, "damaged_index", name, "language_model.more")
    index.write_text('{"weight_map": {}}')
    refused(sharded, "damaged_index", files.INDEX)


# C2


@QUIET
@given(data=st.data())
def test_any_prefix_of_a_file_is_refused_by_name(tiny_model_dir: Path, tmp_path: Path, data: Any) -> None:
    whole = (tiny_model_dir / files.SINGLE).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    length = data.draw(st.one_of(st.integers(1, header + 100), st.integers(1, len(whole) - 1)))
    (tmp_path / files.SINGLE).write_bytes(whole[:length])
    with pytest.raises(CheckpointError) as caught:
        files.tensors(tmp_path, allow_pickle=False)
    assert caught.value.code == "damaged_file"
    assert files.SINGLE in str(caught.value)


@QUIET
@given(data=st.data())
def test_any_altered_byte_of_a_header_is_refused_or_harmless(tokenizer: Any, tiny_model_dir: Path, tmp_path: Path, data: Any) -> None:
    """No other exception, and never a tensor that reaches out of its file."""
    altered = bytearray((tiny_model_dir / files.SINGLE).read_bytes())
    header = 8 + int.from_bytes(altered[:8], "little")
    altered[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / files.SINGLE).write_bytes(altered)
    model = weights.build(tiny_config(tokenizer))
    with suppress(CheckpointError):
        plan = weights.match(files.tensors(tmp_path, allow_pickle=False), model, where="here")
        kinds = dtypes.dtypes(plan, "fp32", torch.device("cpu"))
        weights.read(model, plan, kinds, torch.device("cpu"))
        assert all(value.dtype == torch.float32 for value in model.state_dict().values())


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("name", [files.SINGLE, files.CONFIG, "tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", "damaged_file"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "lfs_pointer")],
)
def test_empty_files_and_git_lfs_pointers_are_recognised(folder: Path, name: str, content: bytes, code: str) -> None:
    (folder / name).write_bytes(content)
    refused(folder, code, name)


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe{}", b"[" * 100_000, b'{"model_type": "llava", "text_config": 3}'])
def test_a_config_that_is_none(folder: Path, content: bytes) -> None:
    (folder / files.CONFIG).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        store.load(folder)
    assert caught.value.code in ("damaged_file", "bad_config")


json_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 99),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.just({}),
)


@QUIET
@given(path=st.sampled_from([(), ("text_config",), ("vision_config",)]), value=json_values, data=st.data())
def test_any_wrong_value_in_a_config_is_a_checkpoint_error_or_fits(tokenizer: Any, path: tuple[str, ...], value: Any, data: Any) -> None:
    fields = json.loads(json.dumps(tiny_config(tokenizer).to_hf()))
    inner = fields
    for step in path:
        inner = inner[step]
    inner[data.draw(st.sampled_from(sorted(inner)))] = value
    with suppress(CheckpointError):
        weights.build(ModelConfig.from_hf(fields))


# C3


@pytest.mark.usefixtures("no_memory")
def test_missing_unexpected_and_misshapen_weights_are_all_named(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["multi_modal_projector.linear_1.bias"], tensors["language_model.model.norm.weight"]
        tensors["image_newline"] = torch.zeros(32)
        tensors["language_model.model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
        tensors["multi_modal_projector.linear_2.bias"] = torch.zeros(3)
        tensors["lm_head.weight"] = torch.zeros(512, 32)
        tensors["vision_tower.vision_model.pre_layrnorm.bias"] = torch.zeros(32, dtype=torch.int8)

    change_weights(folder, spoil)
    line = refused(folder, "weights_mismatch", "multi_modal_projector.linear_1.bias", "language_model.model.norm.weight")
    assert "2 weights missing" in line
    assert "2 weights unexpected: image_newline, language_model.model.layers.7.mlp.up_proj.weight" in line
    assert "multi_modal_projector.linear_2.bias is 3, not 32" in line
    assert "1 weights twice" in line
    assert "1 weights of no weight's type: vision_tower.vision_model.pre_layrnorm.bias" in line


# C4


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def as_pickle(folder: Path, *, parts: int) -> None:
    tensors = load_file(folder / files.SINGLE)
    (folder / files.SINGLE).unlink()
    names = sorted(tensors)
    placed = {name: f"pytorch_model-{number % parts}.bin" for number, name in enumerate(names)}
    for file in set(placed.values()):
        torch.save({name: tensors[name] for name in names if placed[name] == file}, folder / (file if parts > 1 else "pytorch_model.bin"))
    if parts > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))


@pytest.mark.parametrize("parts", [1, 3])
def test_pickles_are_refused_until_allowed(folder: Path, tiny_model_dir: Path, parts: int) -> None:
    as_pickle(folder, parts=parts)
    refused(folder, "pickle_refused", ".bin")
    model, _ = store.load(folder, dtype="stored", allow_pickle=True)
    same(model, store.load(tiny_model_dir, dtype="stored")[0])


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_an_allowed_pickle_still_runs_nothing(folder: Path, tmp_path: Path, write: Callable[..., Any]) -> None:
    (folder / files.SINGLE).unlink()
    write({"weight": Bomb(tmp_path / "mark")}, folder / "pytorch_model.bin")
    refused(folder, "damaged_file", "pytorch_model.bin", allow_pickle=True)
    assert not (tmp_path / "mark").exists()


# C5


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("nested", [False, True])
def test_code_in_a_checkpoint_is_never_run(folder: Path, tmp_path: Path, name: str, nested: bool) -> None:
    (folder / "own.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    entry = {"auto_map": {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Slow", None], "AutoProcessor": "own.Processor"}}
    change_json(folder / name, lambda fields: fields.update({"deep": [1, entry]} if nested else entry))
    line = refused(folder, "remote_code", name, "auto_map")
    assert "never run" in line
    assert not (tmp_path / "mark").exists()


# C6


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        (lambda fields: fields.update(image_token_index=500), ("510", "500")),
        (lambda fields: fields["text_config"].update(vocab_size=511, pad_token_id=0), ("512", "511")),
        (lambda fields: fields["vision_config"].update(image_size=70), ("56", "70", "16", "25")),
        (lambda fields: fields.update(vision_feature_select_strategy="full"), ("16", "17")),
    ],
)
def test_a_tokenizer_or_processor_of_another_model(folder: Path, change: Callable[..., Any], numbers: tuple[str, ...]) -> None:
    change_json(folder / files.CONFIG, change)
    refused(folder, "processor_mismatch", *numbers)


def test_more_rows_than_tokens_are_welcome(tokenizer: Any, tmp_path: Path) -> None:
    """Published models round the table up to a multiple of 64 (spec 1.6)."""
    model = Llava(tiny_config(tokenizer, text={**tiny_config(tokenizer).text, "vocab_size": 576}))
    store.save(model, tiny_processor(tokenizer), tmp_path / "wide")
    same(store.load(tmp_path / "wide", dtype="stored")[0], model)


# C8


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_reported_by_name(folder: Path, value: float, dtype: torch.dtype) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        tensors["language_model.lm_head.weight"][-1, -1] = value
        tensors["multi_modal_projector.linear_1.bias"][0] = value

    change_weights(folder, spoil)
    line = refused(folder, "non_finite", "language_model.lm_head.weight", "multi_modal_projector.linear_1.bias")
    assert "in 2 weights" in line


def test_numbers_too_large_for_the_type_asked_for_are_reported(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors["multi_modal_projector.linear_1.bias"].fill_(1e5))
    refused(folder, "non_finite", "multi_modal_projector.linear_1.bias", dtype="fp16")
    assert store.load(folder, dtype="bf16")[0].dtype == torch.bfloat16


def test_a_mixture_of_types_is_reported_and_becomes_one_unless_it_is_kept(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_weights(folder, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items() if n.startswith("multi")}))
    with caplog.at_level(logging.WARNING):
        model, _ = store.load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "float16" in caplog.text
    assert "float32" in caplog.text
    kept, _ = store.load(folder, dtype="stored")
    assert {p.dtype for p in kept.multi_modal_projector.parameters()} == {torch.float16}
    assert {p.dtype for p in kept.language_model.parameters()} == {torch.float32}


# C9


@pytest.mark.parametrize(
    "name",
    ["../out.safetensors", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "C:x", "x\0y", "./model.safetensors", "sub/../model.safetensors"],
)
def test_an_index_cannot_lead_out_of_its_folder(tiny_model_dir: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "model").mkdir()
    for place in (tmp_path / "out.safetensors", tmp_path / "model" / files.SINGLE):
        shutil.copy(tiny_model_dir / files.SINGLE, place)
    (tmp_path / "model" / files.INDEX).write_text(json.dumps({"weight_map": {"language_model.lm_head.weight": name}}))
    with pytest.raises(CheckpointError) as caught:
        files.tensors(tmp_path / "model", allow_pickle=False)
    assert caught.value.code == "unsafe_path"


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("name", [files.SINGLE, files.CONFIG, "tokenizer.json"])
def test_a_link_cannot_lead_out_of_its_folder(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    refused(folder, "unsafe_path", name)


def test_links_within_the_folder_and_in_the_hubs_cache_are_followed(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The cache keeps a model's files as blobs and links to them from each revision."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(tiny_model_dir, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    same(store.load(snapshot, dtype="stored")[0], store.load(tiny_model_dir, dtype="stored")[0])
