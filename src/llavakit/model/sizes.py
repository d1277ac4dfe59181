"""How large a model is, without its weights: parameters by part, memory by type, tokens of a picture, replies at a time on a card.

    memory = parameters x bytes  +  batch x (tokens x bytes of keys and values  +  what one layer holds while it reads)

Closed formulas over the config, and modules on torch's meta device; nothing is read but headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from llavakit.model.llava import Llava
from llavakit.model.presets import ModelConfig

BITS: Mapping[str, float] = {"fp32": 32, "bf16": 16, "8bit": 8, "4bit": 4.5}  # 4bit: with a scale and a zero for 64 numbers
SPARE = 0.06  # of a card: the driver, fragmentation, work space
ROOM = 512  # tokens of question and reply beside the picture


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Parameters of the parts. ``idle``: those of the tower behind the layer that LLaVA reads; ``packable``: linear layers inside the
    language model, the only ones held in 8 or 4 bits (``model/quantize.py``)."""

    tower: int
    idle: int
    projector: int
    row_end: int
    language_model: int
    packable: int
    layers: int
    kv_width: int
    width: int
    feed_forward: int

    @property
    def total(self) -> int:
        return self.tower + self.projector + self.row_end + self.language_model

    def weights(self, kind: str) -> float:
        """Bytes of all weights held as ``kind``, a key of BITS."""
        rest = 4 if kind == "fp32" else 2
        return self.packable * BITS[kind] / 8 + (self.total - self.packable) * rest

    def cache(self, tokens: int, kind: str = "bf16") -> int:
        """Bytes of keys and values for so many tokens of one conversation."""
        return 2 * self.layers * self.kv_width * tokens * (4 if kind == "fp32" else 2)

    def working(self, tokens: int, kind: str = "bf16") -> int:
        """Bytes that one layer holds while it reads so many tokens: residual, norm, q, k, v, what they give, twice the feed-forward."""
        return tokens * (6 * self.width + 2 * self.feed_forward) * (4 if kind == "fp32" else 2)

    def batch(self, card: float, tokens: int, kind: str) -> int:
        """How many conversations of so many tokens fit on a card of ``card`` bytes at a time; 0 when the weights alone do not."""
        left = card * (1 - SPARE) - self.weights(kind) - self.working(tokens, kind)  # prompts are read one after the other
        return max(0, int(left // self.cache(tokens, kind)))


def sizes(model: Llava) -> Sizes:
    """Of a model on any device, "meta" included."""
    config, tower = model.config, model.vision_tower
    layers = tower.vision_model.encoder.layers
    unread = [layers[number] for number in range(tower.run_layers, len(layers))] + [tower.vision_model.post_layernorm]
    text = model.language_model.config
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    language = model.language_model
    tables = (language.get_input_embeddings(), language.get_output_embeddings())
    linears = [module for module in language.modules() if type(module) is nn.Linear and module not in tables]
    return Sizes(
        tower=_count(tower),
        idle=sum(map(_count, unread)),
        projector=_count(model.multi_modal_projector),
        row_end=0 if model.image_newline is None else model.image_newline.numel(),
        language_model=_count(language),
        packable=sum(module.weight.numel() for module in linears),
        layers=text.num_hidden_layers,
        kv_width=head * (getattr(text, "num_key_value_heads", None) or heads),
        width=int(config.text["hidden_size"]),
        feed_forward=int(text.intermediate_size),
    )


def outline(model: Llava) -> list[tuple[int, str, int]]:
    """The module tree, (depth, text, parameters), equal neighbours folded into one line."""
    lines: list[tuple[int, str, int]] = []

    def walk(name: str, module: nn.Module, depth: int, times: int) -> None:
        children = list(module.named_children())
        weight = getattr(module, "weight", None)
        shape = f" {tuple(weight.shape)}" if not children and isinstance(weight, nn.Parameter) else ""
        again = f" x {times}" if times > 1 else ""
        lines.append((depth, f"{name}: {type(module).__name__}{shape}{again}", times * _count(module)))
        if isinstance(module, nn.ModuleList) and len(children) > 1:
            walk(f"0 to {len(children) - 1}", children[0][1], depth + 1, len(children))
            return
        for child, part in children:
            walk(child, part, depth + 1, 1)

    walk("llava", model, 0, 1)
    return lines


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def empty(config: ModelConfig) -> Llava:
    """The model without memory."""
    import torch

    with torch.device("meta"):
        return Llava(config)
