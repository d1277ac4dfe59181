"""What the runs start from, made once each: parts of the shipped miniature, text-only decoders, and models put together of them.

tower/           tiny's own            flat/     tiny-next's weights as a model of one view
decoder-NAME/    text only             OWN/joined-PROJECTOR-LAYER-DECODER/    tower + decoder + an untrained projector
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from ablations.arms import DECODERS, Arm
from llavakit.checkpoint import places, store
from llavakit.config import FINETUNE
from llavakit.miniature import decoder
from llavakit.model.llava import Llava
from llavakit.preprocess import Preprocess
from llavakit.processor import Processor
from llavakit.prompts import TEMPLATES
from llavakit.tiling import Tiling
from llavakit.train.start import IMAGE_TOKEN, join


def make_parts(arm: Arm, folder: Path) -> None:
    """What an arm shares with others, before processes part."""
    if arm.start == "joined":
        tower(folder), decoder_of(arm.decoder, folder)
    elif arm.start == "flat":
        flat(folder)


def start_of(arm: Arm, seed: int, folder: Path, own: Path) -> Path:
    """The checkpoint that an arm's first stage starts from. ``own``: the series' folder, for what has a projector of its seed."""
    if arm.start == "joined":
        return joined(arm, seed, folder, own)
    return flat(folder) if arm.start == "flat" else places.built_in(arm.start)


def tower(folder: Path) -> Path:
    """The shipped tiny's CLIP tower."""
    out = folder / "tower"
    if not out.exists():
        model, _ = store.load(places.built_in("tiny"), dtype="float32")
        model.vision_tower.vision_model.save_pretrained(draft := folder / "tower.tmp")
        draft.rename(out)
    return out


def decoder_of(name: str, folder: Path) -> Path:
    """The shipped tiny's decoder, or one that has read and never seen."""
    out = folder / f"decoder-{name}"
    if not out.exists():
        draft, words = folder / f"{out.name}.tmp", DECODERS[name]
        shutil.rmtree(draft, ignore_errors=True)
        if words is None:
            model, processor = store.load(places.built_in("tiny"), dtype="float32")
            model.language_model.save_pretrained(draft)
            processor.tokenizer.save_pretrained(draft)
        else:
            tokenizer = folder / "tokenizer"
            store.load_processor(places.built_in("tiny")).tokenizer.save_pretrained(tokenizer)
            decoder.run([f"out={draft}", f"tokenizer={tokenizer}", *words])
        draft.rename(out)
    return out


def joined(arm: Arm, seed: int, folder: Path, own: Path) -> Path:
    """Tower, decoder and a new projector; ``seed`` draws the projector."""
    out = own / f"joined-{arm.projector}{arm.layer}-{arm.decoder}"
    if not (out / "config.json").exists():
        parts = tower(folder), decoder_of(arm.decoder, folder)
        torch.manual_seed(seed)
        model, tokenizer = join(*parts, arm.projector)
        config = replace(model.config, select_layer=arm.layer)
        read = Llava(config)  # a tower is told its layer when it is made
        read.load_state_dict(model.state_dict())
        sight = Preprocess(size=config.image_size, aspect="pad")
        store.save(read, _processor(tokenizer, sight, config.tiling), out)
    return out


def flat(folder: Path) -> Path:
    """The shipped tiny-next without its tiles: what it has learned of print stays, its canvases and its row-end vector go."""
    out = folder / "flat"
    if not (out / "config.json").exists():
        model, old = store.load(places.built_in("tiny-next"), dtype="float32")
        model.config, model.image_newline = replace(model.config, canvases=(), merge="flat"), None
        store.save(model, _processor(old.tokenizer, replace(old.preprocess, aspect="pad"), model.config.tiling), out)
    return out


def _processor(tokenizer: object, preprocess: Preprocess, tiling: Tiling) -> Processor:
    return Processor(
        tokenizer=tokenizer, template=TEMPLATES[FINETUNE.template], preprocess=preprocess, tiling=tiling, image_token=IMAGE_TOKEN,
        max_length=1024,
    )  # fmt: skip
