"""Published systems have the published sizes (spec 1.3 to 1.6), and the closed formulas agree with what models hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llavakit.checkpoint import store
from llavakit.model.generation import Past
from llavakit.model.quantize import QUANTIZATIONS
from llavakit.model.released import SYSTEMS
from llavakit.model.sizes import empty, outline, sizes
from llavakit.preprocess import Preprocess
from llavakit.prompts import TEMPLATES

VICUNA_7B, VICUNA_13B, MISTRAL_7B, YI_34B = 6_738_415_616, 13_015_864_320, 7_241_732_096, 34_388_917_248
TOWER_336, TOWER_224 = 303_507_456, 303_179_776
PUBLISHED = {  # language model with its own vocabulary, tower, projector, row end
    "llava-v1-7b": (VICUNA_7B, TOWER_224, 4_198_400, 0),
    "llava-v1-13b": (VICUNA_13B, TOWER_224, 5_248_000, 0),
    "llava-v1-13b-scienceqa": (VICUNA_13B, TOWER_224, 5_248_000, 0),
    "llava-v1.5-7b": (VICUNA_7B, TOWER_336, 20_979_712, 0),
    "llava-v1.5-13b": (VICUNA_13B, TOWER_336, 31_467_520, 0),
    "llava-v1.5-hd-7b": (VICUNA_7B, TOWER_224, 20_979_712, 4096),
    "llava-v1.5-hd-13b": (VICUNA_13B, TOWER_224, 31_467_520, 5120),
    "llava-v1.6-vicuna-7b": (VICUNA_7B, TOWER_336, 20_979_712, 4096),
    "llava-v1.6-vicuna-13b": (VICUNA_13B, TOWER_336, 31_467_520, 5120),
    "llava-v1.6-mistral-7b": (MISTRAL_7B, TOWER_336, 20_979_712, 4096),
    "llava-v1.6-34b": (YI_34B, TOWER_336, 58_734_592, 7168),
}


def test_every_system_is_listed() -> None:
    assert PUBLISHED.keys() == SYSTEMS.keys()


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_has_its_published_size(name: str) -> None:
    system = SYSTEMS[name]
    found = sizes(empty(system.config))
    grown = 2 * (system.config.rows - system.rows) * found.width
    assert (found.language_model - grown, found.tower, found.projector, found.row_end) == PUBLISHED[name]
    assert system.template in TEMPLATES
    assert Preprocess(size=system.config.image_size, aspect=system.aspect).size == system.config.tiling.side
    assert system.config.has_newline == name.startswith(("llava-v1.5-hd", "llava-v1.6"))


def test_systems_survive_their_files() -> None:
    for name, system in SYSTEMS.items():
        again = type(system.config).from_hf(system.config.to_hf())
        assert (again.canvases, again.merge, again.image_size, again.projector) == (
            system.config.canvases, system.config.merge, system.config.image_size, system.config.projector,
        ), name  # fmt: skip
        assert sizes(empty(again)) == sizes(empty(system.config)), name


@pytest.mark.parametrize("quantization", [None, *QUANTIZATIONS])
def test_the_formula_of_weights_is_what_is_held(quantization: str | None) -> None:
    from llavakit.checkpoint import places

    folder = places.built_in()
    found = sizes(store.load(folder)[0])
    model, _ = store.load(folder, dtype="bf16", quantization=quantization)  # type: ignore[arg-type]
    held = sum(value.nbytes for value in model.state_dict().values())
    assert found.weights(quantization or "bf16") == pytest.approx(held, rel=0.01)


def test_the_formula_of_the_cache_is_what_is_held(tiny_model_dir: Path) -> None:
    model, _ = store.load(tiny_model_dir, dtype="fp32")
    past = Past.empty(model)
    with torch.inference_mode():
        model.language_model(input_ids=torch.arange(7)[None], past_key_values=past.cache)
    held = sum(tensor[..., :7, :].numel() * 4 for layer in past.cache.layers for tensor in (layer.keys, layer.values))
    assert sizes(model).cache(7, "fp32") == held


def test_a_batch_fits_and_one_more_does_not() -> None:
    found = sizes(empty(SYSTEMS["llava-v1.6-mistral-7b"].config))
    card, tokens = 24 * 2**30, 3000
    count = found.batch(card, tokens, "bf16")
    used = found.weights("bf16") + found.working(tokens, "bf16")
    assert used + count * found.cache(tokens) <= card * 0.94 < used + (count + 1) * found.cache(tokens)
    assert found.batch(8 * 2**30, tokens, "bf16") == 0


def test_the_tree_counts_everything_once() -> None:
    model = empty(SYSTEMS["llava-v1.5-7b"].config)
    lines = outline(model)
    assert lines[0][2] == sum(parameter.numel() for parameter in model.parameters())
    assert len(lines) < 60, "layers that are alike are one line"
