"""Laws of ``train``: what a stage changes, what a step computes, what a run starts from."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from weights import equal, weights

from llavakit import config as options
from llavakit.checkpoint import places, store
from llavakit.config import TrainConfig
from llavakit.data.sources import read_llava
from llavakit.errors import CheckpointError, ConfigError, LlavaError, TrainingError
from llavakit.train import loop, start, state
from llavakit.train.loop import train
from llavakit.train.optim import Optimizer, factor, hidden_matrices
from llavakit.train.progress import read_metrics
from llavakit.train.stages import STAGES, Stage

# ---- stages


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_step_changes_exactly_what_the_stage_declares(stage: str, request: pytest.FixtureRequest, tiny_model_dir: Path) -> None:
    outcome = train(replace(request.getfixturevalue(stage), steps=1, batch_size=12, weight_decay=0.1))
    before, after = weights(tiny_model_dir), weights(outcome.checkpoint)
    learned = {name for name in before if STAGES[stage].rate(name) is not None}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == learned
    assert {name.split(".")[0] for name in changed} == {"multi_modal_projector", *(["language_model"] if stage == "finetune" else [])}


def test_the_first_row_that_matches_wins() -> None:
    stage = Stage(name="own", table=((r"a\.bias", None), (r"a\..*", 0.5), (r".*", 1.0)))
    assert [stage.rate(name) for name in ("a.bias", "a.weight", "b")] == [None, 0.5, 1.0]
    assert stage.with_rows(((r"b", None),)).rate("b") is None


def test_a_name_that_no_row_matches_is_an_error() -> None:
    with pytest.raises(TrainingError) as caught:
        STAGES["finetune"].rate("resampler.query")
    assert caught.value.code == "unmatched_parameter"
    assert caught.value.where == "resampler.query"


def test_patterns_match_whole_names() -> None:
    with pytest.raises(TrainingError):
        STAGES["finetune"].rate("old_vision_tower.weight")


def test_a_stage_must_leave_something_to_learn() -> None:
    with pytest.raises(TrainingError) as caught:
        Stage(name="own", table=((".*", None),)).apply(nn.Linear(2, 2))
    assert caught.value.code == "nothing_learns"


def test_own_rows_reach_the_run(finetune: TrainConfig, tiny_model_dir: Path) -> None:
    outcome = train(replace(finetune, steps=1, rates=((r"language_model\..*", None), (r"vision_tower\..*", 1.0))))
    before, after = weights(tiny_model_dir), weights(outcome)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"vision_tower", "multi_modal_projector"}
    with pytest.raises(ConfigError) as caught:
        train(replace(finetune, rates=(("(", None),)))
    assert caught.value.where == "rates"


# ---- the optimizer


@settings(deadline=None)
@given(steps=st.integers(1, 400), warmup=st.floats(0, 1))
def test_the_rate_climbs_then_falls_to_nothing(steps: int, warmup: float) -> None:
    shares = [factor(step, steps=steps, warmup=warmup) for step in range(steps)]
    climb = math.ceil(warmup * steps)
    assert all(0 < share <= 1 for share in shares)
    assert shares[:climb] == sorted(shares[:climb])
    assert shares[climb:] == sorted(shares[climb:], reverse=True)
    assert max(shares) == 1.0
    assert factor(steps, steps=steps, warmup=min(warmup, 0.9)) < 1e-9 or climb == steps


def test_the_cosine_is_the_originals() -> None:
    """100 steps at ratio 0.03: transformers' get_cosine_schedule_with_warmup gives these from step 3 on."""
    for step in (3, 10, 50, 99):
        assert factor(step, steps=100, warmup=0.03) == pytest.approx(0.5 * (1 + math.cos(math.pi * (step - 3) / 97)))
    assert [factor(step, steps=100, warmup=0.03) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_norms_and_biases_do_not_decay() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimizer = Optimizer(module, {n: 1.0 for n, _ in module.named_parameters()}, lr=0.1, weight_decay=0.5, betas=(0.9, 0.999), clip=0)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1.0)
    changed = {name for name, parameter in module.named_parameters() if not torch.equal(before[name], parameter)}
    assert changed == {"0.weight"}
    assert torch.allclose(module[0].weight, before["0.weight"] * (1 - 0.1 * 0.5))


def test_rates_multiply_the_learning_rate_and_only_the_learned_have_a_memory() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False), "c": nn.Linear(2, 2, bias=False)})
    optimizer = Optimizer(module, {"a.weight": 1.0, "b.weight": 0.1}, lr=0.01, weight_decay=0, betas=(0.9, 0.999), clip=0)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert optimizer.step(0.5) == 0.005
    moved = {name: float((before[name] - parameter.detach()).mean()) for name, parameter in module.named_parameters()}
    assert moved == pytest.approx({"a.weight": 0.005, "b.weight": 0.0005, "c.weight": 0.0}, rel=1e-4)
    assert {name.partition("/")[2] for name in optimizer.state()} == {"a.weight", "b.weight"}


def test_muon_turns_the_hidden_matrices_alone() -> None:
    """Its step in a hidden matrix is orthogonal times a rate; embedding, head and norms take AdamW's step, of one size everywhere."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2))
    rates = dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
    optimizer = Optimizer(model, rates, lr=0.01, weight_decay=0, betas=(0.9, 0.999), clip=0, kind="muon")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(1.0)
    assert hidden_matrices(model) == {name for name in rates if "_proj" in name}
    for name, parameter in model.named_parameters():
        step = (before[name] - parameter.detach()) / 0.01
        if name in hidden_matrices(model):
            singular = torch.linalg.svdvals(step) / (0.2 * max(step.shape) ** 0.5)  # match_rms_adamw, arXiv 2502.16982
            assert float(singular.max()) < 1.3, name
            assert float((singular > 0.5).float().mean()) > 0.8, name  # where the gradient had nearly nothing, so has the step
        else:
            assert torch.allclose(step.abs(), torch.ones_like(step), atol=1e-3), name


def test_another_stages_memory_is_refused() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    made = [Optimizer(module, {name: 1.0}, lr=0.01, weight_decay=0, betas=(0.9, 0.999), clip=0) for name in ("a.weight", "b.weight")]
    module["a"].weight.grad = torch.ones(2, 2)
    made[0].step(1.0)
    with pytest.raises(CheckpointError) as caught:
        made[1].restore(made[0].state())
    assert caught.value.code == "optimizer_mismatch"


# ---- what a step computes


def test_accumulation_is_one_large_batch(finetune: TrainConfig) -> None:
    """Sums over learned tokens, divided once over the window: the split into batches changes nothing but rounding."""
    runs = {}
    for size, times in ((12, 1), (4, 3), (5, 3)):
        config = replace(finetune, batch_size=size, accumulation=times, steps=1, clip=0, out=finetune.out / str(size))
        train(config)
        runs[size] = read_metrics(config.out)[0]
    assert runs[4]["samples"] == runs[12]["samples"] == 12
    assert runs[4]["learned"] == runs[12]["learned"]
    for name in ("loss", "grad_norm"):
        assert runs[4][name] == pytest.approx(runs[12][name], rel=1e-5)
        assert runs[5][name] == pytest.approx(runs[12][name], rel=1e-5)


def test_the_loss_is_the_mean_over_the_replies(finetune: TrainConfig, tiny_model_dir: Path) -> None:
    """Against plain cross entropy over full logits of the same window, computed here."""
    config = start.settled(replace(finetune, steps=1, batch_size=12, accumulation=1))
    model, processor = start.model_and_processor(config, None)
    source = read_llava(config.data, image_root=config.images)
    (batch,) = next(iter(loop.Loader(source, processor, batch_size=12, seed=config.seed))).batches
    with torch.no_grad():
        logits = model(batch, full_logits=True).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten(), ignore_index=-100)
    train(config)
    assert read_metrics(config.out)[0]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_few_steps_learn_the_colours(finetune: TrainConfig) -> None:
    train(replace(finetune, steps=40, batch_size=12, accumulation=1, lr=3e-3, warmup=0.1))
    losses = [line["loss"] for line in read_metrics(finetune.out)]
    assert losses[-1] < 0.5 * losses[0]


def test_gradient_checkpointing_changes_memory_not_numbers(finetune: TrainConfig) -> None:
    outcomes = [train(replace(finetune, gradient_checkpointing=flag, out=finetune.out / str(flag), steps=2)) for flag in (False, True)]
    assert equal(weights(outcomes[0]), weights(outcomes[1]))


def test_bf16_keeps_fp32_masters_and_leaves_frozen_weights_alone(pretrain: TrainConfig, tiny_model_dir: Path) -> None:
    outcome = train(replace(pretrain, dtype="bf16", frozen_dtype="bf16", steps=1))
    model, _ = start.model_and_processor(start.settled(pretrain), outcome.checkpoint)
    before = weights(tiny_model_dir)
    for name, parameter in model.named_parameters():
        if name.startswith("multi_modal_projector"):
            assert parameter.dtype == torch.float32
            assert not torch.equal(parameter, parameter.to(torch.bfloat16).float()), "a master that bf16 can hold is no master"
        else:
            assert torch.equal(parameter.float(), before[name].to(torch.bfloat16).float())


# ---- starting


def test_a_start_may_be_a_name(finetune: TrainConfig) -> None:
    """What ``--model`` takes: a built-in model, or a folder, which wins."""
    assert start.settled(replace(finetune, start=Path("tiny"))).start == places.built_in("tiny").absolute()
    assert start.settled(finetune).start == finetune.start


@pytest.mark.parametrize(("samples", "steps", "said"), [(50, 1, True), (200, 2, True), (50 * 128, 50, False)])
def test_a_run_of_few_steps_is_remarked_on(samples: int, steps: int, said: bool, finetune: TrainConfig) -> None:
    """The words name options that make it at least twenty steps; where steps are asked for, nothing is said."""
    config = replace(finetune, steps=None, batch_size=16, accumulation=8)
    remark = start.few_steps(config, samples, steps)
    assert bool(remark) == said
    assert start.few_steps(replace(config, steps=steps), samples, steps) is None
    if remark:
        better = options.parse(config, remark.split("try ")[1].split(",")[0].split())
        assert better.batch_size == 8
        steps = better.epochs * math.ceil(samples / (better.batch_size * better.accumulation))
        assert steps >= start.FEW_STEPS
        assert start.few_steps(better, samples, steps) is None


def test_stage_one_joins_two_models_by_an_untrained_projector(
    pretrain: TrainConfig, finetune: TrainConfig, parts: tuple[Path, Path]
) -> None:
    tower, decoder = parts
    config = replace(pretrain, start=None, tower=tower, decoder=decoder, steps=2)
    outcome = train(config)
    model, processor = store.load(outcome.checkpoint)
    assert model.config.image_token_id == processor.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>")
    second = train(replace(finetune, start=pretrain.out, out=finetune.out.parent / "two", steps=1))
    assert second.step == 1
    again = train(replace(config, out=finetune.out.parent / "again"))
    assert equal(weights(outcome), weights(again))


@pytest.fixture
def parts(tiny_model_dir: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Like the tiny model taken apart: a CLIP folder, and a folder with a decoder and a tokenizer."""
    from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

    model, processor = store.load(tiny_model_dir)
    tower, decoder = tmp_path / "tower", tmp_path / "decoder"
    torch.manual_seed(1)
    CLIPVisionModel(CLIPVisionConfig(**dict(model.config.vision))).save_pretrained(tower)
    AutoModelForCausalLM.from_config(model.language_model.config).save_pretrained(decoder)
    processor.tokenizer.save_pretrained(decoder)
    return tower, decoder


def test_a_decoder_without_an_image_token_gets_one(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """Spec 1.6: the table grows to a multiple of 64 by rows like the old ones, and the old ones stay."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "red": 3, "blue": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    decoder = tmp_path / "words"
    fields = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 64}
    old = LlamaForCausalLM(LlamaConfig(vocab_size=5, **fields))
    old.save_pretrained(decoder)
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(decoder)
    model, tokenizer = start.join(parts[0], decoder, "linear")
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [5, 6]
    assert (model.config.image_token_id, model.config.rows) == (5, 64)
    for new_table, old_table in (
        (model.language_model.model.embed_tokens.weight, old.model.embed_tokens.weight),
        (model.language_model.lm_head.weight, old.lm_head.weight),
    ):
        assert torch.equal(new_table[:5], old_table)
        assert float((new_table[5:] - old_table.mean(0)).detach().abs().max()) < 0.1 * float(old_table.detach().std())
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_folder_that_is_no_part_is_named(parts: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        start.join(tmp_path, parts[1], "linear")
    assert (caught.value.code, caught.value.where) == ("bad_part", str(tmp_path))


def test_a_tower_given_with_a_checkpoint_takes_the_place_of_its_own(
    parts: tuple[Path, Path], tiny_model_dir: Path, finetune: TrainConfig
) -> None:
    tower = load_file(parts[0] / "model.safetensors")
    after = weights(train(replace(finetune, tower=parts[0], steps=1)).checkpoint)
    stored = {name.removeprefix("vision_tower.vision_model."): value for name, value in after.items() if name.startswith("vision_tower.")}
    named = {name.removeprefix("vision_model."): value for name, value in tower.items()}
    assert stored.keys() == named.keys()
    assert all(torch.equal(stored[name].float(), named[name].float()) for name in named)
    assert not equal(stored, {name.removeprefix("vision_tower.vision_model."): v for name, v in weights(tiny_model_dir).items()})


def test_a_tower_of_another_shape_is_refused(finetune: TrainConfig, tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    CLIPVisionModel(
        CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=28, patch_size=14)
    ).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError) as caught:
        train(replace(finetune, tower=tmp_path / "other"))
    assert caught.value.code == "bad_part"
    assert "embedding" in caught.value.what


@pytest.mark.parametrize(
    ("changes", "code", "where"),
    [
        ({"data": None}, "missing_option", "data"),
        ({"start": None}, "missing_option", "start"),
        ({"decoder": Path("x")}, "bad_value", "start"),
        ({"tower": Path("x")}, "bad_part", "x"),
        ({"template": "vicuna"}, "bad_value", "template"),
        ({"start": Path("/nowhere")}, None, ""),
        ({"data": Path("/nowhere.json")}, "bad_file", "/nowhere.json"),
    ],
)
def test_a_run_that_cannot_start_says_so(changes: dict[str, Any], code: str | None, where: str, finetune: TrainConfig) -> None:
    with pytest.raises(LlavaError) as caught:
        train(replace(finetune, **changes))
    assert code in (None, caught.value.code)
    assert where in caught.value.where
    assert state.checkpoints(finetune.out) == []


def test_a_mixture_trains_and_its_share_and_placement_are_fixed(finetune: TrainConfig, data: Path, tmp_path: Path) -> None:
    """A manifest in place of a file; what decides which samples there are, and how they read, may not change on the way."""
    sources = [{"name": "pictures", "file": data.name, "images": "."}, {"name": "again", "file": data.name, "images": ".", "take": 3}]
    manifest = data.with_name("mixture.yaml")
    manifest.write_text(yaml.safe_dump({"name": "small", "sources": sources}))
    run = replace(finetune, data=manifest, images=data.parent, placement="random", steps=2)
    outcome = train(run)
    assert sum(line["samples"] for line in read_metrics(run.out)) == 8
    store.load(outcome.checkpoint)
    for changed in ({"share": 0.5}, {"placement": "first"}):
        with pytest.raises(TrainingError, match="not the run"):
            train(replace(run, steps=3, **changed))  # type: ignore[arg-type]
