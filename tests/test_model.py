"""Laws of the model: what the tower reads, what reaches the head, how losses add up, and what a config says."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llavakit.errors import CheckpointError, PromptError
from llavakit.model.llava import IGNORED, Llava
from llavakit.model.presets import CLIP_L_336, PRESETS, ModelConfig, clip
from llavakit.model.vision import VisionTower
from llavakit.processor import Batch, Processor
from llavakit.types import Conversation, Image, Pixels, assistant, user
from tiny import tiny_config, tiny_processor

QUESTIONS = ("What is this?", "How many things are there? Answer with a number.", "Why?", "Hello, hello, hello!")
REPLIES = ("A red circle.", "3", "Because it is so.", "")


def picture(seed: int) -> Image:
    pixels = torch.randint(0, 256, (40 * 30 * 3,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image(Pixels(40, 30, pixels.numpy().tobytes()))


def talk(number: int, images: int) -> Conversation:
    """A closed conversation of two turns with so many pictures in the first."""
    pictures = [part for index in range(images) for part in (picture(number + index), "\n")]
    return Conversation(
        (
            user(*pictures, QUESTIONS[number % 4]),
            assistant(REPLIES[number % 3]),
            user(QUESTIONS[(number + 1) % 4]),
            assistant(REPLIES[(number + 1) % 3]),
        )
    )


@pytest.fixture(scope="module")
def processor(tokenizer: Any) -> Processor:
    return tiny_processor(tokenizer)


@pytest.fixture
def model(tokenizer: Any) -> Llava:
    return make(tokenizer)


def make(tokenizer: Any, **changes: Any) -> Llava:
    torch.manual_seed(1)
    return Llava(tiny_config(tokenizer, **changes)).eval()


def batch_of(processor: Processor, images: list[int], *, side: str = "right") -> Batch:
    return processor.collate([processor.encode(talk(n, count), learn=True) for n, count in enumerate(images)], side=side)


@pytest.mark.parametrize("layer", [-4, -3, -2, -1, 0, 2])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_the_tower_is_bit_equal_to_the_hidden_state_it_stops_at(layer: int, feature: Any) -> None:
    torch.manual_seed(0)
    tower = VisionTower(clip(size=56, width=32, layers=3, heads=2), select_layer=layer, select_feature=feature)
    views = torch.randn(3, 3, 56, 56)
    whole = tower.vision_model(views, output_hidden_states=True).hidden_states
    assert len(whole) == 4
    assert torch.equal(tower(views), whole[layer][:, 1:] if feature == "patch" else whole[layer])


def test_the_layers_after_it_are_not_run() -> None:
    tower = VisionTower(clip(size=28, width=32, layers=3, heads=2), select_layer=-2, select_feature="patch")
    for dead in (tower.vision_model.encoder.layers[2], tower.vision_model.post_layernorm):
        dead.register_forward_pre_hook(lambda *_: pytest.fail("a dead layer was run"))
    assert tower(torch.randn(1, 3, 28, 28)).shape == (1, 4, 32)


@pytest.mark.parametrize(("kind", "erf"), [("linear", False), ("mlp2x_gelu", True)])
def test_the_projector_is_the_formula(tokenizer: Any, kind: Any, erf: bool) -> None:
    projector = make(tokenizer, projector=kind).multi_modal_projector
    features = torch.randn(5, 32) * 3
    expected = features @ projector.linear_1.weight.T + projector.linear_1.bias
    if erf:
        expected = expected * 0.5 * (1 + torch.erf(expected / 2**0.5))
        expected = expected @ projector.linear_2.weight.T + projector.linear_2.bias  # type: ignore[operator]
    torch.testing.assert_close(projector(features), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pictures_fill_their_places_in_reading_order_and_words_stay(model: Llava, processor: Processor, side: str) -> None:
    batch = batch_of(processor, [2, 0, 1], side=side)
    table = model.language_model.get_input_embeddings()
    filled, words = model.embed(batch), table(batch.input_ids)
    places = batch.input_ids == processor.image_token_id
    assert torch.equal(filled[~places], words[~places])
    assert torch.equal(filled[places], model.encode_views(batch.views).flatten(0, 1))


def test_counts_that_disagree_are_refused(model: Llava, processor: Processor) -> None:
    batch = batch_of(processor, [1, 1])
    short = batch.input_ids.clone()
    short[0, (short[0] == processor.image_token_id).nonzero()[0]] = 5
    for wrong in (replace(batch, views=batch.views[:1]), replace(batch, grids=batch.grids[:1]), replace(batch, input_ids=short)):
        with pytest.raises(PromptError) as caught:
            model.embed(wrong)
        assert caught.value.code == "image_token_count"


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, position by position, as a textbook has it."""
    total = torch.zeros(())
    for row in range(labels.shape[0]):
        for at in range(1, labels.shape[1]):
            if labels[row, at] != IGNORED:
                total = total - torch.log_softmax(logits[row, at - 1].float(), -1)[labels[row, at]]
    return total


def seen_by_head(model: Llava) -> list[torch.Size]:
    shapes: list[torch.Size] = []
    model.language_model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))
    return shapes


def test_the_loss_is_a_sum_over_learned_tokens_and_only_they_reach_the_head(model: Llava, processor: Processor) -> None:
    batch = batch_of(processor, [1, 0, 2])
    shapes = seen_by_head(model)
    short, full = model(batch), model(batch, full_logits=True)
    learned = int((batch.labels != IGNORED).sum())
    assert int(short.learned) == int(full.learned) == learned > 0
    assert shapes == [(1, learned, 32), (*batch.input_ids.shape, 32)]
    assert short.logits is None
    assert full.logits.shape == (*batch.input_ids.shape, model.config.rows)
    torch.testing.assert_close(short.loss_sum, full.loss_sum)
    torch.testing.assert_close(short.loss_sum, plain_loss(full.logits, batch.labels))


@pytest.mark.parametrize(
    "fields", [{"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 0.5}, {"model_type": "cohere", "logit_scale": 0.1}]
)
def test_what_a_language_model_does_to_its_logits_is_kept(tokenizer: Any, processor: Processor, fields: dict[str, Any]) -> None:
    base = tiny_config(tokenizer).text
    model = make(tokenizer, text={**base, "tie_word_embeddings": True, **fields})
    batch = batch_of(processor, [1, 0])
    torch.testing.assert_close(model(batch).loss_sum, model(batch, full_logits=True).loss_sum)


@settings(max_examples=15, deadline=None)
@given(images=st.lists(st.integers(0, 2), min_size=1, max_size=4), side=st.sampled_from(["left", "right"]))
def test_a_batch_is_the_sum_of_its_rows(tokenizer: Any, processor: Processor, images: list[int], side: str) -> None:
    model = make(tokenizer)
    whole = model(batch_of(processor, images, side=side))
    alone = [model(processor.collate([processor.encode(talk(n, count), learn=True)], side="right")) for n, count in enumerate(images)]
    torch.testing.assert_close(whole.loss_sum, torch.stack([one.loss_sum for one in alone]).sum(), rtol=1e-5, atol=1e-4)
    assert whole.learned == sum(one.learned for one in alone)


def test_nothing_to_learn_is_a_loss_of_zero_in_the_graph(model: Llava, processor: Processor) -> None:
    batch = batch_of(processor, [1])
    output = model.train()(replace(batch, labels=torch.full_like(batch.labels, IGNORED)))
    assert output.loss_sum == 0
    assert output.learned == 0
    output.loss_sum.backward()
    assert torch.equal(model.multi_modal_projector.linear_1.weight.grad, torch.zeros_like(model.multi_modal_projector.linear_1.weight))


def test_a_batch_without_pictures_gives_tower_and_projector_a_gradient_of_zero(model: Llava, processor: Processor) -> None:
    batch = batch_of(processor, [0, 0])
    shown = [
        p
        for name, p in model.named_parameters()
        if not name.startswith("language_model") and "layers.2" not in name and "post_" not in name
    ]
    loss = model.train()(batch).loss_sum
    torch.testing.assert_close(loss, model.eval()(batch).loss_sum)
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in shown)
    assert model.language_model.get_output_embeddings().weight.grad.any()


def gradients(model: Llava, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()(batch).loss_sum.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_computes_the_same_and_can_be_switched_off(model: Llava, processor: Processor) -> None:
    batch = batch_of(processor, [1, 0])
    runs: list[int] = []
    model.language_model.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    expected = gradients(model, batch)
    model.set_gradient_checkpointing(True)
    found = gradients(model, batch)
    assert len(runs) == 3  # once, then once more for the backward pass
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    model.set_gradient_checkpointing(False)
    gradients(model, batch)
    assert len(runs) == 4


def test_a_frozen_tower_may_be_of_another_type(model: Llava, processor: Processor) -> None:
    batch = batch_of(processor, [1, 1])
    expected = model(batch).loss_sum
    model.vision_tower.bfloat16()
    output = model(batch)
    assert output.loss_sum.dtype == torch.float32
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-2, atol=0.1)
    output.loss_sum.backward()
    assert model.multi_modal_projector.linear_1.weight.grad.dtype == torch.float32


def test_tied_embeddings_are_one_parameter(tokenizer: Any, processor: Processor) -> None:
    model = make(tokenizer, text={**tiny_config(tokenizer).text, "tie_word_embeddings": True})
    assert model.config.tied
    assert model.language_model.get_output_embeddings().weight is model.language_model.get_input_embeddings().weight
    assert F.embedding(torch.tensor([3]), model.language_model.lm_head.weight).shape == (1, 32)


def parameters(config: ModelConfig) -> dict[str, int]:
    with torch.device("meta"):
        model = Llava(config)
    return {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}


def test_the_presets_have_the_sizes_of_the_released_models() -> None:
    """Spec 1.3 to 1.5; the llava-hf files add 64 rows to embedding and head."""
    seven, thirteen = parameters(PRESETS["llava-1.5-7b"]), parameters(PRESETS["llava-1.5-13b"])
    assert seven == {
        "vision_tower": 303_507_456,
        "multi_modal_projector": 20_979_712,
        "language_model": 6_738_415_616 + 2 * 64 * 4096,
    }
    assert thirteen["multi_modal_projector"] == 31_467_520
    assert thirteen["language_model"] == 13_015_864_320 + 2 * 64 * 5120
    assert PRESETS["llava-1.5-7b"].view_tokens == 576


def test_a_published_config_is_the_preset() -> None:
    """The sparse fields that llava-hf files hold; the rest are transformers' defaults."""
    published = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "pad_token_id": 32001,
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
            "pad_token_id": 32001,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    }
    read, preset = ModelConfig.from_hf(published), PRESETS["llava-1.5-7b"]
    assert {name: read.vision[name] for name in CLIP_L_336} == preset.vision
    assert {name: read.text[name] for name in preset.text} == preset.text
    assert (read.projector, read.select_layer, read.select_feature, read.image_token_id) == ("mlp2x_gelu", -2, "patch", 32000)


configs = st.builds(
    lambda layer, feature, projector, tied, kind, image: {
        "select_layer": layer,
        "select_feature": feature,
        "projector": projector,
        "text": {
            "model_type": kind,
            "vocab_size": 99,
            "hidden_size": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": tied,
        },
        "vision": clip(size=28, width=8, layers=3, heads=2),
        "image_token_id": image,
    },
    st.integers(-4, 3),
    st.sampled_from(["patch", "cls_patch"]),
    st.sampled_from(["linear", "mlp2x_gelu"]),
    st.booleans(),
    st.sampled_from(["llama", "mistral", "qwen2"]),
    st.integers(0, 98),
)


@settings(max_examples=30, deadline=None)
@given(fields=configs)
def test_a_config_survives_its_file_and_transformers(fields: dict[str, Any]) -> None:
    config = ModelConfig(**fields)
    file = json.loads(json.dumps(config.to_hf()))
    again = ModelConfig.from_hf(file)
    assert ModelConfig.from_hf(again.to_hf()) == again
    theirs = LlavaConfig(**{name: value for name, value in file.items() if name != "architectures"})
    assert file["architectures"] == [LlavaForConditionalGeneration.__name__]
    for name, value in fields["text"].items():
        assert getattr(theirs.text_config, name) == again.text[name] == value
    for name, value in fields["vision"].items():
        assert getattr(theirs.vision_config, name) == again.vision[name] == value
    assert theirs.tie_word_embeddings == again.tied == fields["text"]["tie_word_embeddings"]
    assert (again.projector, again.select_layer, again.select_feature) == (config.projector, config.select_layer, config.select_feature)
    assert theirs.image_seq_length == config.view_tokens


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model_type": "llava_onevision"}, "unsupported_model"),
        ({"model_type": "llava_next", "image_grid_pinpoints": [[55, 56]]}, "bad_pinpoints"),
        ({"merge": "pool"}, "bad_config"),
        ({"model_type": None}, "unsupported_model"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "original_layout"),
        ({"projector_hidden_act": "relu"}, "unsupported_model"),
        ({"projector_hidden_act": "linear"}, "unsupported_model"),
        ({"projector_type": "resampler"}, "unsupported_model"),
        ({"multimodal_projector_bias": False}, "unsupported_model"),
        ({"vision_feature_layer": [-2, -5]}, "unsupported_model"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "unsupported_model"),
        ({"text_config": {"model_type": "no_such_model"}}, "bad_config"),
        ({"text_config": {"model_type": "llama", "vocab_size": "many"}}, "bad_config"),
        ({"vision_feature_layer": -9}, "bad_config"),
        ({"image_token_index": 512}, "bad_config"),
    ],
)
def test_a_config_of_something_else_is_refused(tokenizer: Any, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_hf(tiny_config(tokenizer).to_hf() | changes)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
