"""Laws of ``train``: what a stage changes, what a step computes, what a run leaves behind, what stops it."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow
from torch import Tensor, nn

from llavakit.checkpoint import store
from llavakit.config import FINETUNE, PRETRAIN, TrainConfig
from llavakit.errors import CheckpointError, ConfigError, LlavaError, TrainingError
from llavakit.train import loop, progress, start, state
from llavakit.train.loop import Outcome, train
from llavakit.train.optim import Optimizer, factor
from llavakit.train.progress import StepReport, read_metrics
from llavakit.train.stages import STAGES, Stage


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve samples: pictures of one colour with its name, and two without a picture."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for number, name in enumerate(["red", "green", "blue", "white", "black"] * 2):
        Pillow.new("RGB", (30 + number, 24), name).save(folder / f"{number}.png")
        conversation = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": f"It is {name}."}]
        records.append({"id": f"c{number}", "image": f"{number}.png", "conversations": conversation})
    for number in range(2):
        conversation = [{"from": "human", "value": f"Say {number}."}, {"from": "gpt", "value": f"{number} it is."}]
        records.append({"id": f"t{number}", "conversations": conversation})
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="session")
def captions(data: Path) -> Path:
    """The samples with a picture: what the plain template takes."""
    path = data.with_name("captions.json")
    path.write_text(json.dumps([record for record in json.loads(data.read_text()) if "image" in record]))
    return path


@pytest.fixture
def pretrain(finetune: TrainConfig, captions: Path) -> TrainConfig:
    return replace(finetune, stage="pretrain", template="plain", data=captions)


@pytest.fixture
def finetune(data: Path, tiny_model_dir: Path, tmp_path: Path) -> TrainConfig:
    return replace(
        FINETUNE, start=tiny_model_dir, data=data, out=tmp_path / "run", batch_size=2, accumulation=2, steps=3, lr=1e-3, dtype="fp32",
        device="cpu", max_length=512,
    )  # fmt: skip


def weights(folder: os.PathLike[str]) -> dict[str, Tensor]:
    model, _ = store.load(Path(folder), dtype="auto")
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


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
        STAGES["finetune"].rate("image_newline")
    assert caught.value.code == "unmatched_parameter"
    assert caught.value.where == "image_newline"


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
    source = loop.read_llava(config.data, image_root=config.images)
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


def test_stage_one_joins_two_models_by_an_untrained_projector(
    pretrain: TrainConfig, finetune: TrainConfig, parts: tuple[Path, Path]
) -> None:
    tower, decoder = parts
    config = replace(pretrain, start=None, tower=tower, decoder=decoder, steps=2)
    outcome = train(config)
    model, processor = store.load(outcome.checkpoint)
    assert model.config.image_token_id == processor.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>")
    second = train(replace(finetune, start=outcome.checkpoint, out=finetune.out.parent / "two", steps=1))
    assert second.step == 1
    again = train(replace(config, out=finetune.out.parent / "again"))
    assert equal(weights(outcome), weights(again))


@pytest.fixture
def parts(tiny_model_dir: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The tiny model taken apart: a CLIP folder, and a decoder folder whose tokenizer knows no image token."""
    from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

    model, processor = store.load(tiny_model_dir)
    tower, decoder = tmp_path / "tower", tmp_path / "decoder"
    torch.manual_seed(1)
    CLIPVisionModel(CLIPVisionConfig(**dict(model.config.vision))).save_pretrained(tower)
    AutoModelForCausalLM.from_config(model.language_model.config).save_pretrained(decoder)
    processor.tokenizer.save_pretrained(decoder)
    return tower, decoder


@pytest.mark.parametrize(
    ("changes", "code", "where"),
    [
        ({"data": None}, "missing_option", "data"),
        ({"start": None}, "missing_option", "start"),
        ({"tower": Path("x")}, "bad_value", "start"),
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


# ---- what a run leaves behind


def test_the_run_folder_is_complete(finetune: TrainConfig) -> None:
    reports: list[StepReport] = []
    outcome = train(finetune, on_step=reports.append)
    assert isinstance(outcome, Outcome)
    assert (outcome.step, outcome.exit_code, outcome.checkpoint) == (3, 0, finetune.out / "step-3")
    lines = read_metrics(finetune.out)
    assert [line["step"] for line in lines] == [report.step for report in reports] == [1, 2, 3]
    names = ["step", "epoch", "loss", "lr", "grad_norm", "tokens", "learned", "samples", "step_time", "tokens_per_s"]
    assert list(lines[0]) == names
    assert lines[-1]["epoch"] == 1.0
    assert (finetune.out / "latest").read_text() == "step-3\n"
    assert (finetune.out / "loss.png").stat().st_size > 1000
    echo = TrainConfig(**{"stage": "pretrain"})
    assert loop.options.load(echo, finetune.out / "config.yaml") == start.settled(finetune)


def test_the_echo_reruns_the_run_bit_for_bit(finetune: TrainConfig, tmp_path: Path) -> None:
    first = train(finetune)
    content = yaml.safe_load((finetune.out / "config.yaml").read_text())
    again = loop.options.from_dict(PRETRAIN, content | {"out": str(tmp_path / "again")})
    assert equal(weights(first), weights(train(again)))


def test_old_checkpoints_go_and_the_kept_ones_verify(finetune: TrainConfig) -> None:
    train(replace(finetune, steps=4, save_every=1, keep=2))
    kept = state.checkpoints(finetune.out)
    assert [folder.name for folder in kept] == ["step-4", "step-3"]
    for folder in kept:
        state.verify(folder)


def test_transformers_loads_a_checkpoint_as_it_is(finetune: TrainConfig) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    outcome = train(replace(finetune, steps=1))
    theirs = LlavaForConditionalGeneration.from_pretrained(outcome.checkpoint)
    ours = weights(outcome)
    assert torch.equal(theirs.get_input_embeddings().weight, ours["language_model.model.embed_tokens.weight"])
    assert AutoProcessor.from_pretrained(outcome.checkpoint).tokenizer is not None


def test_plain_lines_in_a_pipe_and_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    report = StepReport(
        step=1, epoch=0.5, loss=2.0, lr=1e-3, grad_norm=1.0, tokens=100, learned=25, samples=4, step_time=0.5, tokens_per_s=200
    )
    for stream in (io.StringIO(), Terminal()):
        with progress.progress(10, every=5, stream=stream) as shown:
            shown.step(report)
            shown.say("[words] in brackets")
        assert "loss 2.0000" in stream.getvalue()
        assert "[words] in brackets" in stream.getvalue()
        assert ("\x1b" in stream.getvalue()) == stream.isatty()


# ---- what stops a run


def test_a_step_that_is_not_finite_changes_nothing_and_too_many_stop(finetune: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda call: call >= 4)
    seen: list[StepReport] = []
    with pytest.raises(TrainingError) as caught:
        train(replace(finetune, batch_size=4, accumulation=1, steps=9, save_every=1, keep=0, non_finite_limit=3), on_step=seen.append)
    assert caught.value.code == "non_finite"
    assert [report.loss is None for report in seen] == [False] * 3 + [True] * 3
    dumped = [json.loads(line) for line in (finetune.out / "non_finite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in dumped] == [4, 5, 6]
    assert all(len(line["ids"][0]) == 4 for line in dumped)
    at = {n: weights(finetune.out / f"step-{n}") for n in (2, 3, 4, 5)}
    assert equal(at[3], at[4])
    assert equal(at[4], at[5])
    assert not equal(at[2], at[3])


def test_one_bad_step_is_survived(finetune: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda call: call == 2)
    outcome = train(replace(finetune, batch_size=4, accumulation=1, steps=3, non_finite_limit=2))
    assert outcome.exit_code == 0
    assert [line["loss"] is None for line in read_metrics(finetune.out)] == [False, True, False]
    assert all(bool(value.isfinite().all()) for value in weights(outcome).values())


def poison(monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool]) -> None:
    """Make the loss of some forward passes infinite."""
    calls = 0
    forward = loop.Llava.forward

    def poisoned(self: Any, batch: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        output = forward(self, batch, **options)
        return replace(output, loss_sum=output.loss_sum * math.inf) if when(calls) else output

    monkeypatch.setattr(loop.Llava, "forward", poisoned)


def test_samples_that_teach_nothing_stop_the_run(finetune: TrainConfig) -> None:
    """D10: a length that leaves no room for the replies is an error, not a loss of 0."""
    with pytest.raises(LlavaError) as caught:
        train(replace(finetune, max_length=12, batch_size=12))
    assert caught.value.code in ("silent_samples", "context_length_exceeded")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_the_step(number: int, code: int, finetune: TrainConfig, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupt(report: StepReport) -> None:
        if report.step == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    outcome = train(replace(finetune, steps=5), on_step=interrupt)
    assert signal.getsignal(number) is before
    assert (outcome.step, outcome.exit_code, outcome.checkpoint.name) == (2, code, "step-2")
    assert "goes on from there" in capfd.readouterr().err
    assert train(replace(finetune, steps=5)).exit_code == 0


def test_the_second_signal_ends_the_process_at_once() -> None:
    child = os.fork()
    if child == 0:
        with loop._Signals():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


# ---- disks that fail


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """The kernel refuses longer files: what a full disk looks like to every writer, also those not written in Python."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_during_a_save_costs_only_that_save(finetune: TrainConfig, capfd: pytest.CaptureFixture[str]) -> None:
    """T3: half a model written, then ENOSPC; the checkpoint before stays, nothing half stays, the run goes on."""
    calls = 0

    def failing(model: Any, processor: Any, folder: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        store.save(model, processor, folder)

    outcome = train(replace(finetune, steps=3, save_every=1, keep=0), save_model=failing)
    assert [folder.name for folder in state.checkpoints(finetune.out)] == ["step-3", "step-1"]
    assert not list(finetune.out.glob("*.tmp*"))
    assert "step 2 could not be saved" in capfd.readouterr().err
    state.verify(outcome.checkpoint)


def test_a_last_save_that_fails_is_an_error_and_the_run_resumes(finetune: TrainConfig) -> None:
    def limited(model: Any, processor: Any, folder: Path) -> None:
        with files_limited_to(2000):
            store.save(model, processor, folder)

    train(replace(finetune, steps=2))
    with pytest.raises(TrainingError) as caught:
        train(replace(finetune, steps=3), save_model=limited)
    assert caught.value.code == "not_saved"
    assert "bytes free" in str(caught.value)
    assert state.newest(finetune.out, print) == finetune.out / "step-2"
    assert train(replace(finetune, steps=3)).step == 3


def test_a_disk_without_room_is_noticed_at_the_start(finetune: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "room", lambda folder: 10)
    with pytest.raises(TrainingError) as caught:
        train(finetune)
    assert caught.value.code == "disk_full"
