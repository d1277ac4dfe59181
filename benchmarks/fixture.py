"""What both sides of the benchmark are given: a checkpoint with random weights, photographs, questions.

Speed and memory do not depend on what the weights say, so they are random; the shapes are real (perf. of a CLIP ViT-L/14-336 tower, an
MLP projector and a 24-layer, 1024-wide Llama decoder of 0.4 billion weights). The tokenizer knows 32,000 made-up words, each one token,
so that a reply of random words is read back as the very same tokens, as a trained model's reply is.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import PIL.Image
import PIL.ImageFilter
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llavakit.checkpoint import store
from llavakit.images import Preprocess
from llavakit.model.llava import Llava
from llavakit.model.presets import ModelConfig, clip, llama
from llavakit.processor import Processor
from llavakit.prompts import CURIOUS_USER, TEMPLATES
from llavakit.tiling import RELEASED, tiles_of

ROWS, IMAGE, PAD = 32064, 32000, 32001
QUESTION = "Describe the picture in detail and say how many persons you see"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model and what bounds its speed."""

    name: str
    view: int
    tower_width: int
    tower_layers: int
    width: int
    layers: int
    tiles: tuple[tuple[int, int], ...] = ()  # columns x rows to choose from; none: LLaVA-1.5, some: NeXT

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            canvases=tiles_of(self.tiles, self.view),
            merge="spatial_unpad" if self.tiles else "flat",
            vision=clip(size=self.view, width=self.tower_width, layers=self.tower_layers, heads=self.tower_width // 64),
            text=llama(
                width=self.width,
                layers=self.layers,
                heads=self.width // 64,
                feed_forward=4 * self.width,
                rows=ROWS,
                positions=4096,
                pad=PAD,
            ),
            image_token_id=IMAGE,
        )

    @property
    def patches(self) -> int:
        return (self.view // 14) ** 2

    @property
    def layer_weights(self) -> int:
        """Weights of the decoder's layers: attention 4 w^2, gated feed-forward 12 w^2 each."""
        return self.layers * 16 * self.width**2

    @property
    def weights(self) -> int:
        """All weights: tower, projector, decoder layers, table and head (norms and biases left out)."""
        tower = self.tower_layers * 12 * self.tower_width**2
        projector = self.tower_width * self.width + self.width**2
        return tower + projector + self.layer_weights + 2 * ROWS * self.width

    def first_token_flops(self, prompt: int) -> float:
        """Operations needed before the first token: all tower layers but the last, projector, prefill, one row of the head."""
        rows, width = self.patches + 1, self.tower_width
        tower = (self.tower_layers - 1) * (rows * 2 * 12 * width**2 + 4 * rows**2 * width)
        projector = self.patches * 2 * (width * self.width + self.width**2)
        prefill = 2 * self.layer_weights * prompt + self.layers * 2 * prompt**2 * self.width
        return tower + projector + prefill + 2 * ROWS * self.width

    def step_bytes(self, read: int, rows: int = 1, size: int = 2) -> float:
        """Bytes a decoding step must read: the layers, the head, and the keys and values of what was read."""
        return size * (self.layer_weights + ROWS * self.width + rows * 2 * self.layers * self.width * read)


FULL = Shape(name="CLIP-L/14-336 + 0.5B decoder", view=336, tower_width=1024, tower_layers=24, width=1024, layers=24)
NEXT = replace(FULL, name="CLIP-L/14-336, AnyRes + 0.5B decoder", tiles=RELEASED)
QUICK = Shape(name="a toy (quick)", view=112, tower_width=256, tower_layers=4, width=256, layers=4)

QUICK_NEXT = replace(QUICK, name="a toy (quick), AnyRes", tiles=RELEASED)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: the words of the prompts, then made-up ones; the image token and the pad token at LLaVA's places."""
    words = dict.fromkeys(["<unk>", "<s>", "</s>", *(f"▁{word}" for word in f"{CURIOUS_USER} USER: ASSISTANT: {QUESTION}".split())])
    made_up = (f"▁w{number}" for number in range(ROWS))
    pieces = [*words, *(next(made_up) for _ in range(IMAGE - len(words))), "<image>", "<pad>"]
    backend = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return made


def write_checkpoint(folder: Path, shape: Shape, dtype: torch.dtype) -> None:
    """A native checkpoint with random weights, stored in ``dtype``."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # half the memory while it is made
    try:
        model = Llava(shape.config)
    finally:
        torch.set_default_dtype(before)
    store.save(model, new_processor(shape), folder, dtype=dtype)


def new_processor(shape: Shape) -> Processor:
    return Processor(
        tokenizer=tokenizer(),
        template=TEMPLATES["vicuna_v1"],
        preprocess=Preprocess(size=shape.view, aspect="squash" if shape.tiles else "pad"),
        tiling=shape.config.tiling,
        max_length=4096,
    )


@lru_cache(maxsize=4)
def photograph(seed: int, size: tuple[int, int] = (1000, 667)) -> bytes:
    """A JPEG that compresses like a photograph: clouds of colour, edges and grain."""
    channels = []
    for channel in range(3):
        clouds = PIL.Image.effect_mandelbrot((125, 84), (-2 + seed % 97 / 50, -1.2, 0.6 + channel / 9, 1.2), 60)
        grain = PIL.Image.effect_noise(size, 18)
        channels.append(PIL.Image.blend(clouds.resize(size, PIL.Image.Resampling.BICUBIC), grain, 0.3))
    stream = io.BytesIO()
    PIL.Image.merge("RGB", channels).filter(PIL.ImageFilter.GaussianBlur(0.6)).save(stream, "JPEG", quality=90)
    return stream.getvalue()
