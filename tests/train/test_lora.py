"""Laws of LoRA: what learns and what does not, a whole adapter in every save, one model whoever reads it, the same bits after a stop."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_resume import assert_same_run, stop_after
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from llavakit.checkpoint import adapters, store
from llavakit.checkpoint.convert import convert
from llavakit.checkpoint.layouts import describe
from llavakit.config import LORA, Lora, TrainConfig, parse
from llavakit.errors import CheckpointError, ConfigError, LlavaError, MissingExtraError, TrainingError
from llavakit.model.llava import Llava
from llavakit.processor import Processor
from llavakit.train import lora, start, state
from llavakit.train.loop import train
from llavakit.types import Conversation, Image, Pixels
from twins import apart

SMALL = Lora(r=4, alpha=8, dropout=0.2)
ADAPTER = Path("an adapter")
CLOSE = 1e-5  # fp32, relative to the largest logit


@pytest.fixture
def config(finetune: TrainConfig) -> TrainConfig:
    return replace(finetune, lora=SMALL, lr=2e-2, steps=3)


LIVE: dict[int, Tensor] = {}  # logits of the model in training, at each save of ``trained``


@pytest.fixture(scope="module")
def trained(data: Path, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of three steps that saved after each; tests do not change it."""
    config = replace(
        LORA, lora=SMALL, start=tiny_model_dir, data=data, out=tmp_path_factory.mktemp("lora") / "run", batch_size=2, accumulation=2,
        steps=3, save_every=1, keep=0, lr=2e-2, dtype="fp32", device="cpu", max_length=512,
    )  # fmt: skip
    save = lora.save

    def listen(model: Llava, processor: Processor, folder: Path, **options: Any) -> None:
        LIVE[int(folder.name.removeprefix("step-").removesuffix(".tmp"))] = logits(copy.deepcopy(model), processor)
        save(model, processor, folder, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "save", listen)
        assert train(config).step == 3
    return config


def talk(seed: int = 0) -> Conversation:
    pixels = torch.randint(0, 256, (40, 90, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Conversation.ask("What colour?", Image(Pixels(width=90, height=40, rgb=pixels.numpy().tobytes())))


def logits(model: Llava, processor: Processor) -> Tensor:
    batch = processor.collate([processor.encode(talk(), learn=False)], side="right")
    with torch.no_grad():
        return model.float().eval()(batch, full_logits=True).logits  # type: ignore[no-any-return]


def attached(config: TrainConfig, resumed: Path | None) -> lora.Begun:
    """As the loop begins, before anything is placed."""
    torch.manual_seed(config.seed)
    cpu = torch.device("cpu")
    return lora.begin(start.settled(config), resumed, device=cpu, forward=torch.float32, save_model=store.save)


def checkpoint(config: TrainConfig) -> Path:
    return state.checkpoints(config.out)[0]


def refused(code: str, *words: str, folder: Path, **options: Any) -> None:
    with pytest.raises(LlavaError) as caught:
        store.load(folder, **options)
    assert caught.value.code == code
    assert all(word in str(caught.value) for word in words)
    assert caught.value.remedy


# ---- what learns


def test_matrices_learn_in_the_language_model_alone(config: TrainConfig) -> None:
    """The tower's attention has layers of the same names (spec trap 25); its own are a different part and stay bare."""
    begun = attached(config, None)
    layers = {name.partition(".lora_A")[0] for name in begun.rates if ".lora_A." in name}
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in layers} == linear
    assert len(layers) == 2 * len(linear)
    assert all(name.startswith("language_model.model.layers.") for name in layers)
    assert any(name.endswith("q_proj.weight") for name, _ in begun.model.vision_tower.named_parameters())
    learned = {name for name, parameter in begun.model.named_parameters() if parameter.requires_grad}
    assert learned == set(begun.rates)
    projector = {name for name in learned if "lora_" not in name}
    assert {name.partition(".")[0] for name in projector} == {"multi_modal_projector"}
    assert {begun.rates[name] for name in projector} == {0.1}
    assert {rate for name, rate in begun.rates.items() if name not in projector} == {1.0}


def test_a_fresh_adapter_changes_nothing_yet(config: TrainConfig, tiny_model_dir: Path) -> None:
    begun = attached(config, None)
    assert torch.equal(logits(begun.model, begun.processor), logits(*store.load(tiny_model_dir)))


def test_exactly_the_declared_parameters_change(trained: TrainConfig) -> None:
    before = {name: value.clone() for name, value in attached(trained, None).model.state_dict().items()}
    after = attached(trained, checkpoint(trained))
    changed = {name for name, value in after.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(after.rates)


def test_own_targets_and_rates(config: TrainConfig) -> None:
    tower = replace(config, lora=replace(SMALL, targets=r"vision_tower\..*\.1\..*q_proj|language_model\..*\.1\..*v_proj"))
    layers = {name.partition(".lora_A")[0] for name in attached(tower, None).rates if ".lora_A." in name}
    assert layers == {
        "vision_tower.vision_model.encoder.layers.1.self_attn.q_proj",
        "language_model.model.layers.1.self_attn.v_proj",
    }
    outcome = train(replace(tower, steps=1))
    again = attached(tower, outcome.checkpoint)
    merged = store.load(outcome.checkpoint, base=config.start, dtype="fp32")
    assert apart(logits(*merged), logits(again.model, again.processor)) < CLOSE
    frozen = attached(replace(config, rates=((r"multi_modal_projector\..*", None),)), None)
    assert all("lora_" in name for name in frozen.rates)


@pytest.mark.parametrize(
    ("changes", "code", "where"),
    [
        ({"lora": replace(SMALL, targets=r"q_proj")}, "no_target", "lora.targets"),
        ({"lora": replace(SMALL, targets="(")}, "bad_value", "lora.targets"),
        ({"start": ADAPTER}, "bad_value", "start"),
        ({"start": ADAPTER, "lora": None}, "bad_value", "start"),
        ({"stage": "pretrain"}, "bad_value", "stage"),
        ({"tower": Path("tower")}, "bad_value", "tower"),
        ({"start": None, "tower": Path("tower"), "decoder": Path("decoder")}, "bad_value", "start"),
        ({"rates": ((r".*lora_.*", None),)}, "bad_value", "rates"),
        ({"rates": ((r"language_model\..*", 1.0),)}, "bad_value", "rates"),
        ({"shard": "full", "lora": replace(SMALL, bits=4)}, "bad_value", "shard"),
        ({"device": "mps", "lora": replace(SMALL, bits=4)}, "bad_value", "lora.bits"),
    ],
)
def test_what_is_no_lora_run_says_so(changes: dict[str, Any], code: str, where: str, config: TrainConfig, trained: TrainConfig) -> None:
    changes = {name: trained.out if value is ADAPTER else value for name, value in changes.items()}
    with pytest.raises(ConfigError) as caught:
        train(replace(config, **changes))
    assert (caught.value.code, caught.value.where) == (code, where)
    assert caught.value.remedy
    assert state.checkpoints(config.out) == []


@pytest.mark.parametrize(("package", "extra", "bits"), [("peft", "lora", 16), ("bitsandbytes", "qlora", 4)])
def test_a_missing_package_is_told_with_its_extra(
    package: str, extra: str, bits: int, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(MissingExtraError) as caught:
        train(replace(config, lora=replace(SMALL, bits=bits)))
    assert f"llavakit[{extra}]" in caught.value.remedy


# ---- every save is whole


@pytest.mark.parametrize("step", [1, 2, 3])
def test_every_save_is_a_whole_model_with_its_base(step: int, trained: TrainConfig, tiny_model_dir: Path) -> None:
    """Had the run been killed after any of them: merged or attached again, it gives the logits that the model in training gave."""
    folder, live = trained.out / f"step-{step}", LIVE[step]
    state.verify(folder)
    again = attached(trained, folder)
    assert torch.equal(logits(again.model, again.processor), live)
    merged, processor = store.load(folder, base=tiny_model_dir, dtype="fp32")
    assert apart(logits(merged, processor), live) < CLOSE
    assert apart(logits(*store.load(tiny_model_dir, dtype="fp32")), live) > 1e-3
    assert processor.max_length == 512


def test_the_projector_is_in_every_save(trained: TrainConfig, tiny_model_dir: Path) -> None:
    """Even a frozen one: users lost it (haotian-liu/LLaVA#1200), and an adapter must never need a guess."""
    for step in (1, 2, 3):
        found = load_file(trained.out / f"step-{step}" / "adapter_model.safetensors")
        assert sum("multi_modal_projector" in name for name in found) == 4
        assert sum("lora_" in name for name in found) == 2 * 14
    model, _ = store.load(checkpoint(trained), base=tiny_model_dir)
    base, _ = store.load(tiny_model_dir)
    assert not torch.equal(model.multi_modal_projector.linear_1.weight, base.multi_modal_projector.linear_1.weight)


def test_peft_reads_it_onto_transformers_model(trained: TrainConfig, tiny_model_dir: Path) -> None:
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(tiny_model_dir), checkpoint(trained)).eval()
    ours = attached(trained, checkpoint(trained))
    batch = ours.processor.collate([ours.processor.encode(talk(), learn=False)], side="right")
    with torch.no_grad():
        found = theirs(input_ids=batch.input_ids, attention_mask=batch.mask, pixel_values=batch.views).logits
        whole = theirs.merge_and_unload()(input_ids=batch.input_ids, attention_mask=batch.mask, pixel_values=batch.views).logits
    expected = logits(ours.model, ours.processor)
    assert apart(found, expected) < CLOSE
    assert apart(whole, expected) < CLOSE


def test_a_merged_model_needs_nothing_more(trained: TrainConfig, tiny_model_dir: Path, tmp_path: Path) -> None:
    done = convert(trained.out, tmp_path / "merged", base=tiny_model_dir)
    assert (done.source, done.target, done.same_ids) == ("lora", "hf", True)
    assert done.error <= CLOSE
    live = attached(trained, checkpoint(trained))
    assert apart(logits(*store.load(tmp_path / "merged", dtype="fp32")), logits(live.model, live.processor)) < CLOSE
    fields = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert adapters.MARK not in fields


def test_a_new_row_end_vector_goes_with_the_adapter(config: TrainConfig, tiny_model_dir: Path) -> None:
    """A base without tiles learns them: its config, processor and vector are the checkpoint's own."""
    run = replace(config, aspect="anyres", tiles="1x2,2x1", steps=1, lora=replace(SMALL, r=2))
    folder = train(run).checkpoint
    again = attached(run, folder)
    merged, processor = store.load(folder, base=tiny_model_dir, dtype="fp32")
    assert merged.config.canvases
    assert "image_newline" in again.rates
    assert apart(logits(merged, processor), logits(again.model, again.processor)) < CLOSE
    fresh = attached(run, None).model.image_newline
    assert merged.image_newline is not None
    assert not torch.equal(merged.image_newline, fresh)


def test_a_linear_projector(config: TrainConfig, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Stored as transformers has it, with the identity behind it."""
    from peft import PeftModel

    old, processor = store.load(tiny_model_dir)
    torch.manual_seed(0)
    store.save(Llava(replace(old.config, projector="linear")), processor, tmp_path / "linear")
    run = replace(config, start=tmp_path / "linear", steps=1)
    folder = train(run).checkpoint
    again = attached(run, folder)
    expected = logits(again.model, again.processor)
    assert apart(logits(*store.load(folder, base=tmp_path / "linear", dtype="fp32")), expected) < CLOSE
    theirs = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(tmp_path / "linear"), folder).eval()
    batch = processor.collate([processor.encode(talk(), learn=False)], side="right")
    with torch.no_grad():
        found = theirs(input_ids=batch.input_ids, attention_mask=batch.mask, pixel_values=batch.views).logits
    assert apart(found, expected) < CLOSE


# ---- stopping and going on


@pytest.mark.parametrize("changes", [{}, {"dtype": "bf16", "frozen_dtype": "bf16"}, {"gradient_checkpointing": True}])
def test_resumed_equals_uninterrupted(changes: dict[str, Any], config: TrainConfig, tmp_path: Path) -> None:
    whole = replace(config, out=tmp_path / "whole", epochs=2, steps=None, **changes)
    train(whole)
    parted = replace(whole, out=tmp_path / "parted")
    for step in (1, 3):
        assert train(parted, on_step=stop_after(step)).exit_code == 143
    assert train(parted).exit_code == 0
    assert_same_run(whole.out, parted.out)


def test_another_adapter_or_base_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    base = tmp_path / "base"
    assert config.start is not None
    shutil.copytree(config.start, base)
    run = replace(config, start=base)
    train(run, on_step=stop_after(1))
    with pytest.raises(TrainingError) as caught:
        train(replace(run, lora=replace(SMALL, r=8)))
    assert (caught.value.code, "lora" in str(caught.value)) == ("run_changed", True)
    change_base(base)
    with pytest.raises(CheckpointError) as other:
        train(run)
    assert other.value.code == "wrong_base"


def change_base(folder: Path) -> None:
    content = load_file(folder / "model.safetensors")
    name = next(name for name in content if name.endswith("layers.0.self_attn.q_proj.weight") and "language_model" in name)
    save_file(content | {name: content[name] * 1.05}, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_base_is_known_in_any_type_and_no_other_is_taken_for_it(trained: TrainConfig, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Hardening C7."""
    model, processor = store.load(tiny_model_dir)
    for dtype in (torch.bfloat16, torch.float16):
        store.save(model, processor, tmp_path / str(dtype), dtype=dtype)
        store.load(checkpoint(trained), base=tmp_path / str(dtype))
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    change_base(other)
    refused("wrong_base", str(tiny_model_dir), folder=checkpoint(trained), base=other)
    refused("base_missing", "--base", str(tiny_model_dir), folder=checkpoint(trained))


# ---- an adapter that changes nothing


def test_a_run_whose_adapter_changes_nothing_is_an_error(config: TrainConfig, tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        train(replace(config, lr=0))
    assert caught.value.code == "adapter_changes_nothing"
    assert caught.value.remedy
    folder = checkpoint(config)
    assert describe(folder).kind == "lora"
    refused("adapter_changes_nothing", "every B is zero", folder=folder, base=tiny_model_dir)
    with pytest.raises(CheckpointError) as other:
        convert(folder, tmp_path / "merged", base=tiny_model_dir)
    assert other.value.code == "adapter_changes_nothing"
    assert not (tmp_path / "merged").exists()


def test_a_change_too_small_for_the_type_is_an_error(trained: TrainConfig, tiny_model_dir: Path, tmp_path: Path) -> None:
    """B is not zero, but in bf16 the merged weights are the base's."""
    model, processor = store.load(tiny_model_dir)
    store.save(model, processor, tmp_path / "base", dtype=torch.bfloat16)
    folder = tmp_path / "faint"
    shutil.copytree(checkpoint(trained), folder)
    content = load_file(folder / "adapter_model.safetensors")
    faint = {name: value * 1e-9 if "lora_B" in name else value for name, value in content.items()}
    save_file(faint, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        convert(folder, tmp_path / "merged", base=tmp_path / "base")
    assert caught.value.code == "adapter_changes_nothing"
    assert "logits" in str(caught.value)


# ---- options


def test_an_inner_option_turns_it_on() -> None:
    plain = replace(LORA, lora=None)
    assert parse(plain, ["lora.r=16"]).lora == Lora(r=16)
    assert parse(LORA, ["lora.bits=4", "lora.targets=.*q_proj"]).lora == Lora(bits=4, targets=".*q_proj")
    assert parse(LORA, ["lora=none"]).lora is None
    with pytest.raises(ConfigError) as caught:
        parse(LORA, ["lora.rank=3"])
    assert caught.value.code == "unknown_option"
    for word in ("lora.r=0", "lora.dropout=1", "lora.bits=5", "lora.alpha=0"):
        with pytest.raises(ConfigError) as caught:
            parse(LORA, [word])
        assert caught.value.where == word.partition("=")[0]
