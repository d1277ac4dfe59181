"""What a run starts from: a native checkpoint, or a CLIP tower and a language model joined by an untrained projector.

Also where it computes, in which arithmetic, and how each weight is held: learned ones in fp32, frozen ones as they came.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

from llavakit.checkpoint import places, store
from llavakit.config import TrainConfig
from llavakit.data.features import FeatureStore
from llavakit.data.holdout import Part
from llavakit.data.loader import Loader
from llavakit.data.manifest import SHIPPED, read_manifest, shipped
from llavakit.data.mixture import Mixture, open_mixture
from llavakit.data.reading import Progress, now_and_then
from llavakit.data.sources import Source, read_llava
from llavakit.errors import CheckpointError, ConfigError
from llavakit.images import Preprocess
from llavakit.model.heap import keep_memory
from llavakit.model.llava import Llava
from llavakit.model.presets import ModelConfig, ProjectorKind
from llavakit.model.projector import Projector
from llavakit.processor import Processor
from llavakit.prompts import TEMPLATES, Template
from llavakit.tiling import SHAPES, tiles_of
from llavakit.train import state
from llavakit.train.attention import check_flex, use_training_attention
from llavakit.train.compiled import check_compiler, compile_layers
from llavakit.train.ranks import Ranks
from llavakit.train.stages import STAGES

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
FEW_STEPS, FEW_SAMPLES = 20, 8  # fewer steps than these are remarked on; a batch that is small enough
ROWS_ROUNDED_TO = 64  # spec 1.6: the embedding grows to a multiple of 64


def settled(config: TrainConfig) -> TrainConfig:
    """The same run with absolute paths, so that its echo reruns from anywhere; of a start on the Hub, the folder of the commit it has now.

    Raises ConfigError ``missing_option``, and what ``places.find`` does.
    """
    if config.data is None:
        raise ConfigError("no training data", code="missing_option", where="data", remedy="give data=<LLaVA JSON or JSONL file>")
    if config.start is None and (config.tower is None or config.decoder is None):
        raise ConfigError(
            "nothing to start from",
            code="missing_option",
            where="start",
            remedy="give start=<checkpoint> (tiny is the built-in one), or tower=<folder> decoder=<folder>",
        )
    if config.start is not None and config.decoder is not None:
        raise ConfigError("both a checkpoint and a decoder", code="bad_value", where="start", remedy="give start, or tower and decoder")
    template(config.template)
    STAGES[config.stage].with_rows(config.rates)
    named = str(config.data) in SHIPPED and not config.data.exists()
    images = config.images if config.images is not None else Path() if named else config.data.parent
    resume = config.resume if config.resume in ("auto", "never") else str(Path(config.resume).absolute())
    start = places.find(config.start) if config.start is not None else None
    paths = {
        name: path.absolute() if path is not None else None
        for name, path in (vars(config) | {"start": start}).items()
        if name in ("start", "tower", "decoder", "data", "cache_features")
    }
    if named:
        paths["data"] = config.data
    return replace(config, **paths, images=images.absolute(), out=config.out.absolute(), resume=resume)  # type: ignore[arg-type]


def samples(config: TrainConfig, say: Callable[[str], object]) -> Source | Mixture:
    """The samples of a file or of a mixture, checked; a file read for the first time says how far it is. Raises DataError."""
    assert config.data is not None
    given = {"on_bad": config.on_bad_sample, "allow_outside": config.allow_outside}

    def told(name: str) -> Progress:
        return now_and_then(f"reading {name}, once", say)

    if str(config.data) not in SHIPPED and config.data.suffix not in (".yaml", ".yml"):
        return read_llava(config.data, image_root=config.images, progress=told(config.data.name), **given)  # type: ignore[arg-type]
    manifest = shipped(str(config.data)) if str(config.data) in SHIPPED else read_manifest(config.data)
    return open_mixture(manifest, config.images or Path(), share=config.share, progress=told, **given)  # type: ignore[arg-type]


def few_steps(config: TrainConfig, samples: int, steps: int) -> str | None:
    """A remark where a published batch is too large for a small file: who brings 50 samples of a batch of 128 takes one step an epoch."""
    batch = config.batch_size * config.accumulation
    if config.steps is not None or steps >= FEW_STEPS:
        return None
    small = min(config.batch_size, FEW_SAMPLES)
    epochs = max(config.epochs, -(-FEW_STEPS // -(-samples // small)))
    return (
        f"{samples} samples in batches of {batch} make {steps} step{'s' * (steps > 1)}, too few to change a model much; "
        f"try batch_size={small} accumulation=1 epochs={epochs}, or the recipe few"
    )


def loader(
    config: TrainConfig, samples: Source | Mixture | Part, processor: Processor, ranks: Ranks, features: FeatureStore | None
) -> Loader:
    """This rank's batches of a run."""
    return Loader(
        samples,
        processor,
        batch_size=config.batch_size,
        seed=config.seed,
        accumulation=config.accumulation,
        workers=config.workers,
        group=config.group,
        pack=config.pack,
        rank=ranks.rank,
        world=ranks.world,
        lengths=samples.lengths(),
        placement=config.placement,
        cache_bytes=config.cache_mb << 20,
        on_bad=config.on_bad_sample,
        features=features,
    )


def template(name: str) -> Template:
    if name not in TEMPLATES:
        raise ConfigError(f"no prompt format '{name}'", code="bad_value", where="template", remedy=f"use one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def device(config: TrainConfig, local: int = 0) -> torch.device:
    """The device asked for; auto takes the first there is of cuda, mps, cpu. ``local``: which of this machine's."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = config.device if config.device != "auto" else next(kind for kind, present in there.items() if present)
    if not there[name]:
        raise ConfigError(f"this machine has no {name}", code="bad_value", where="device", remedy="use device=auto")
    return torch.device(name, local) if name == "cuda" else torch.device(name)


def forward_dtype(config: TrainConfig, where: torch.device) -> torch.dtype:
    """bf16 where asked for, or where it is auto and the hardware multiplies it natively; else fp32."""
    if config.dtype != "auto":
        return torch.bfloat16 if config.dtype == "bf16" else torch.float32
    if where.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = where.type == "cpu" and store.cpu_has_bf16()
    return torch.bfloat16 if native else torch.float32


def model_and_processor(config: TrainConfig, resumed: Path | None) -> tuple[Llava, Processor]:
    """The model on the CPU, and the processor with the run's template, aspect and length. ``resumed`` is a checkpoint of this run."""
    folder = resumed if resumed is not None else config.start
    if folder is not None:
        model, old = store.load(_newest_of_run(folder), dtype="stored")
        tokenizer, token, preprocess = old.tokenizer, old.image_token, old.preprocess
        if resumed is None and config.tower is not None:
            change_tower(model, config.tower)
    else:
        assert config.tower is not None, "settled() saw to it"
        assert config.decoder is not None, "settled() saw to it"
        model, tokenizer = join(config.tower, config.decoder, config.projector)
        token, preprocess = IMAGE_TOKEN, Preprocess(size=model.config.image_size)
    aspect = config.aspect if config.aspect != "anyres" else config.base
    cut(model, config)
    processor = Processor(
        tokenizer=tokenizer,
        template=template(config.template),
        preprocess=replace(preprocess, aspect=aspect),
        tiling=model.config.tiling,
        image_token=token,
        max_length=config.max_length,
    )
    return model, processor


def change_tower(model: Llava, folder: Path) -> None:
    """Put another CLIP of the same shape in the place of the checkpoint's own. Raises CheckpointError ``bad_part``."""
    tower = _part(folder, CLIPVisionModel)
    old = model.vision_tower.vision_model
    shapes, needed = ({name: tuple(value.shape) for name, value in part.state_dict().items()} for part in (tower, old))
    wrong = next((name for name in {**needed, **shapes} if shapes.get(name) != needed.get(name)), None)
    if wrong is not None:
        what = f"its {wrong} is {shapes.get(wrong)}, the checkpoint's tower has {needed.get(wrong)}"
        raise CheckpointError(what, code="bad_part", where=str(folder), remedy="give a tower of the same shape")
    old.load_state_dict(tower.state_dict())


def cut(model: Llava, config: TrainConfig) -> None:
    """Give the model the tiles of ``aspect=anyres``, and a row-end vector where it has none yet (spec 1.5).

    Raises ConfigError ``bad_value`` where a model with tiles would lose them, and for tiles that cannot be read.
    """
    if config.aspect != "anyres":
        if model.config.canvases:
            raise ConfigError("the checkpoint sees tiles", code="bad_value", where="aspect", remedy="give aspect=anyres and its tiles")
        return
    canvases = tiles_of(shapes(config.tiles), model.config.image_size)
    model.config = replace(model.config, canvases=canvases, merge="spatial_unpad")
    if model.image_newline is None:
        table = model.language_model.get_input_embeddings().weight
        model.image_newline = nn.Parameter((torch.randn(table.shape[1]) / table.shape[1] ** 0.5).to(table.dtype))


def shapes(words: str) -> tuple[tuple[int, int], ...]:
    """Columns x rows of ``tiles``."""
    if words in SHAPES:
        return SHAPES[words]
    found = [re.fullmatch(r"\s*([1-9])\s*x\s*([1-9])\s*", word) for word in words.split(",")]
    if not all(found):
        remedy = f"write columns x rows, as 1x2,2x1,2x2, or one of {', '.join(SHAPES)}"
        raise ConfigError(f"'{words}' are no tiles", code="bad_value", where="tiles", remedy=remedy)
    return tuple((int(match[1]), int(match[2])) for match in found if match)


def _newest_of_run(folder: Path) -> Path:
    """A run's folder stands for its newest good checkpoint."""
    if (folder / "config.json").exists():
        return folder
    return state.newest(folder, lambda text: None) or folder


def join(tower: Path, decoder: Path, projector: ProjectorKind) -> tuple[Llava, Any]:
    """A new LLaVA from a CLIP folder and a causal language model's folder, and the latter's tokenizer with an image token.

    The projector is drawn from torch's random state. Missing ``<image>`` and ``<pad>`` tokens are added; when the table has no rows for
    them it grows to the next multiple of 64 by rows drawn around the mean of the old ones (spec 1.6). Raises CheckpointError ``bad_part``.
    """
    vision = _part(tower, CLIPVisionModel)
    text = _part(decoder, AutoModelForCausalLM)
    tokenizer = _part(decoder, AutoTokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    if len(tokenizer) > text.get_input_embeddings().weight.shape[0]:
        text.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=ROWS_ROUNDED_TO)
    outer = ModelConfig.from_hf(
        {
            "model_type": "llava",
            "vision_config": vision.config.to_dict(),
            "text_config": text.config.to_dict(),
            "tie_word_embeddings": text.config.tie_word_embeddings,
            "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        }
    )
    with torch.device("meta"):
        model = Llava(replace(outer, projector=projector))
    model.vision_tower.vision_model, model.language_model = vision, text
    widths = {"vision_width": vision.config.hidden_size, "text_width": text.config.hidden_size}
    model.multi_modal_projector = Projector(projector, **widths)
    return model, tokenizer


def _part(folder: Path, kind: Any) -> Any:
    options = {} if kind is AutoTokenizer else {"dtype": "auto", "attn_implementation": "sdpa"}
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{kind.__name__} cannot be loaded from it", code="bad_part", where=str(folder), remedy="give a folder that transformers saved"
        ) from error


def place(model: Llava, rates: Mapping[str, float], *, device: torch.device, forward: torch.dtype, frozen: str) -> None:
    """Move the weights: learned ones to fp32; frozen ones stay as stored, or bf16 when asked for and the forward pass is bf16."""
    for name, parameter in model.named_parameters():
        dtype = parameter.dtype
        if not dtype.is_floating_point:
            continue  # packed to few bits, and in its place already (lora.py)
        if name in rates or forward != torch.bfloat16 or dtype == torch.float16:
            dtype = torch.float32
        elif frozen == "bf16":
            dtype = torch.bfloat16
        parameter.data = parameter.data.to(device=device, dtype=dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device=device)


def check_packing(config: TrainConfig, model: Llava) -> None:
    """Raise ConfigError ``cannot_pack`` where the language model would let packed samples see each other."""
    if config.pack and not getattr(model.language_model, "_supports_attention_backend", False):
        what = f"{type(model.language_model).__name__} cannot keep packed samples apart"
        raise ConfigError(what, code="cannot_pack", where="pack", remedy="use pack=false (and group=64, to pad less)")


def set_modes(config: TrainConfig, model: Llava, rates: Mapping[str, float], *, device: torch.device, forward: torch.dtype) -> None:
    """Training mode, except for a tower that does not learn; activations kept or computed twice; attention; compiled layers.

    On a CPU the process keeps what it frees (``model.heap``). Raises ConfigError where FlexAttention or a compiler cannot be had.
    """
    if device.type == "cpu":
        keep_memory()
    model.train()
    tower_learns = any(name.startswith("vision_tower.") for name in rates)
    if not tower_learns:
        model.vision_tower.eval()
    model.set_gradient_checkpointing(config.gradient_checkpointing)
    if config.attention == "flex":
        check_flex(model.language_model, device, compiled=config.compile)
    use_training_attention(model.language_model, config.attention)
    if device.type == "cpu" and forward == torch.bfloat16 and tower_learns:
        model.vision_tower.vision_model.set_attn_implementation("eager")  # torch's flash kernel is slow backwards (dev/LOG.md)
    if config.compile:
        check_compiler(device)
        compile_layers(model)


def room(folder: Path) -> int:
    """Free bytes where ``folder`` is."""
    return shutil.disk_usage(folder).free
