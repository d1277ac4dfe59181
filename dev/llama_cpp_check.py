"""Run a checkpoint through llama.cpp and compare it with ours: ``python dev/llama_cpp_check.py [CHECKPOINT] [--picture FILE]...``.

Needs llama-cpp-python and gguf. Writes the two files to a temporary folder and compares, one line each:

    vocabulary    ids of texts
    decoder       logits and greedy tokens of a text
    views         embeddings of each view: llama.cpp is given the very pixels our tower sees, so that only arithmetic differs
    answer        greedy tokens after llama.cpp's embeddings, joined as LLaVA joins them
    picture       embeddings when llama.cpp prepares the picture itself

llama.cpp since May 2025 puts the class row after the patches, while positions and the choice of rows take it to be the first
(ggml-org/llama.cpp issue 25814). The check computes that as well and says which of the two a build does.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from llama_cpp import mtmd_cpp as mtmd
from torch import Tensor

from llavakit.checkpoint.dtypes import DTYPES
from llavakit.checkpoint.gguf import write_gguf
from llavakit.checkpoint.store import load
from llavakit.images import open_image
from llavakit.model.llava import Llava
from llavakit.model.merge import merge
from llavakit.processor import Inputs, Processor
from llavakit.types import Conversation, Image, Text, user

TEXTS = ("What is in the picture? Answer with a single word.", "The quick brown fox jumps over 13 lazy dogs.", "Ça va ? 雪\nYes.")
NEW = 16


class LlamaCpp:
    """The two files, loaded."""

    def __init__(self, language: Path, vision: Path) -> None:
        self.model = llama_cpp.Llama(
            str(language), n_ctx=0, n_batch=2048, n_ubatch=2048, logits_all=True, n_threads=1, type_k=0, type_v=0, verbose=False
        )
        self.width, self.rows = self.model.n_embd(), self.model.n_vocab()
        params = mtmd.mtmd_context_params_default()
        params.use_gpu, params.n_threads, params.print_timings, params.warmup = False, 1, False, False
        self.vision = mtmd.mtmd_init_from_file(str(vision).encode(), self.model.model, params)
        assert self.vision, "llama.cpp cannot read the mmproj file"

    def encode(self, picture: np.ndarray[Any, Any]) -> list[Tensor]:
        """Embeddings of each view llama.cpp makes of a picture (H.W.3 bytes)."""
        height, width, _ = picture.shape
        pixels = np.ascontiguousarray(picture, dtype=np.uint8)
        bitmap = mtmd.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        marker = mtmd.mtmd_default_marker()
        text = mtmd.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
        chunks = mtmd.mtmd_input_chunks_init()
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        failed = mtmd.mtmd_tokenize(self.vision, chunks, ctypes.byref(text), bitmaps, 1)
        assert not failed, f"mtmd_tokenize: {failed}"
        found = []
        for number in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, number)
            if mtmd.mtmd_input_chunk_get_type(chunk) != mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                continue
            failed = mtmd.mtmd_encode_chunk(self.vision, chunk)
            assert not failed, f"mtmd_encode_chunk: {failed}"
            count = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            numbers = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self.vision), shape=(count * self.width,))
            found.append(torch.from_numpy(numbers.copy()).view(count, self.width))
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        return found

    def read(self, pieces: Sequence[list[int] | Tensor], new: int) -> tuple[Tensor, list[int]]:
        """The logits after the last of some token ids and embeddings, and the greedy tokens that follow."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.model.ctx), True)
        past = 0
        for piece in pieces:
            past = self._decode(piece, past)
        first, greedy = self._logits(), []
        for _ in range(new):
            greedy.append(int(self._logits().argmax()))
            past = self._decode([greedy[-1]], past)
        return first, greedy

    def _decode(self, piece: list[int] | Tensor, past: int) -> int:
        count = len(piece)
        batch = llama_cpp.llama_batch_init(count, self.width if isinstance(piece, Tensor) else 0, 1)
        batch.n_tokens = count
        if isinstance(piece, Tensor):
            ctypes.memmove(batch.embd, piece.float().contiguous().numpy().ctypes.data, count * self.width * 4)
        for place in range(count):
            if not isinstance(piece, Tensor):
                batch.token[place] = piece[place]
            batch.pos[place], batch.n_seq_id[place], batch.seq_id[place][0] = past + place, 1, 0
            batch.logits[place] = place == count - 1
        failed = llama_cpp.llama_decode(self.model.ctx, batch)
        assert not failed, f"llama_decode: {failed}"
        llama_cpp.llama_batch_free(batch)
        return past + count

    def _logits(self) -> Tensor:
        numbers = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.model.ctx, -1), shape=(self.rows,))
        return torch.from_numpy(numbers.copy())


@torch.no_grad()
def ours(model: Llava, rows: Tensor, new: int) -> tuple[Tensor, list[int]]:
    """The logits after the last of some embeddings T.H, and the greedy tokens that follow."""
    first, greedy = None, []
    for _ in range(new + 1):
        logits = model.language_model(inputs_embeds=rows[None]).logits[0, -1]
        first = logits if first is None else first
        greedy.append(int(logits.argmax()))
        rows = torch.cat([rows, model.language_model.get_input_embeddings()(torch.tensor(greedy[-1:]))])
    return first, greedy[:new]


@torch.no_grad()
def class_row_last(model: Llava, views: Tensor) -> Tensor:
    """What the tower gives where the class row stands behind the patches and all else is as if it stood in front."""
    tower = model.vision_tower
    parts = tower.vision_model.embeddings
    patches = parts.patch_embedding(views).flatten(2).transpose(1, 2)
    hidden = torch.cat([patches, parts.class_embedding.expand(len(views), 1, -1)], dim=1) + parts.position_embedding.weight
    hidden = tower.vision_model.pre_layrnorm(hidden)
    for layer in tower.vision_model.encoder.layers[: tower.run_layers]:
        hidden = layer(hidden, None)
    return model.multi_modal_projector(hidden[:, 1:])  # type: ignore[no-any-return]


def compared(found: Tensor, expected: Tensor) -> str:
    """The largest difference relative to the largest number, and the mean cosine of the rows."""
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1).mean()
    return f"differ by {float((found - expected).abs().max() / expected.abs().max()):.1e} (mean cosine of rows {float(cosine):.6f})"


def same(found: list[int], expected: list[int], processor: Processor) -> str:
    agree = next((n for n, (one, two) in enumerate(zip(found, expected, strict=True)) if one != two), len(expected))
    return f"{agree} of {len(expected)} greedy tokens agree: {processor.decode(found)[:60]!r}"


def bytes_of(processor: Processor, views: Tensor) -> Iterator[np.ndarray[Any, Any]]:
    """The pixels of our views, as pictures."""
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (processor.preprocess.mean, processor.preprocess.std))
    for view in views:
        yield ((view * std + mean) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def pieces_of(inputs: Inputs, image: int, rows: Tensor) -> list[list[int] | Tensor]:
    """The prompt as runs of token ids and of embeddings."""
    pieces: list[list[int] | Tensor] = []
    taken = 0
    for token in inputs.input_ids.tolist():
        if token == image:
            if not pieces or not isinstance(pieces[-1], Tensor):
                pieces.append(rows[taken : taken + int((inputs.input_ids == image).sum())])
            taken += 1
        elif not pieces or isinstance(pieces[-1], Tensor):
            pieces.append([token])
        else:
            pieces[-1].append(token)
    return pieces


def check_text(model: Llava, processor: Processor, theirs: LlamaCpp) -> None:
    for text in TEXTS:
        found = theirs.model.tokenize(text.encode(), add_bos=True, special=False)
        print(f"vocabulary  {'the same ids' if found == processor.tokenizer(text).input_ids else f'DIFFERENT ids {found}'}: {text!r}")
        ids = processor.encode(Conversation((user(text),)), learn=False).input_ids
        expected, greedy = ours(model, model.language_model.get_input_embeddings()(ids), NEW)
        logits, tokens = theirs.read([ids.tolist()], NEW)
        print(f"decoder     logits {compared(logits, expected)}; {same(tokens, greedy, processor)}")


@torch.no_grad()
def check_picture(model: Llava, processor: Processor, theirs: LlamaCpp, file: Path, question: str) -> None:
    inputs = processor.encode(Conversation((user(Image(file), Text(question)),)), learn=False)
    expected = model.encode_views(inputs.views)
    found = torch.stack([theirs.encode(pixels)[0] for pixels in bytes_of(processor, inputs.views)])
    print(f"views       {file.name}, {len(found)} views of {found.shape[1]} rows: {compared(found, expected)}")
    wrong = class_row_last(model, inputs.views)
    if float((found - wrong).norm()) < float((found - expected).norm()):
        print(f"            this build has issue 25814; from what that gives, they {compared(found, wrong)}")
    image = model.config.image_token_id
    embeddings = model.language_model.get_input_embeddings()(inputs.input_ids)
    spots = (inputs.input_ids == image)[:, None]
    rows = [merge(features, inputs.grids, model.image_newline) for features in (expected, found)]
    logits, greedy = ours(model, embeddings.masked_scatter(spots, rows[0]), NEW)
    their_logits, tokens = theirs.read(pieces_of(inputs, image, rows[1]), NEW)
    print(f"answer      logits {compared(their_logits, logits)}; {same(tokens, greedy, processor)}")
    whole = theirs.encode(np.asarray(open_image(Image(file), processor.limits)))
    made = f"llama.cpp makes {len(whole)} views of the picture, LLaVA {len(expected)}"
    parts = [compared(mine, other) for mine, other in zip(whole, expected, strict=False)]
    print(f"picture     {made}; the first {parts[0]}" + (f"; the last {parts[-1]}" if len(parts) > 1 else ""))


def main() -> None:
    pictures = Path(str(files("llavakit") / "pictures"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=Path(str(files("llavakit") / "weights" / "tiny")))
    parser.add_argument("--picture", action="append", type=Path, help="default: the shipped ones")
    parser.add_argument("--question", default="What is in the picture?")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the two files")
    arguments = parser.parse_args()
    model, processor = load(arguments.checkpoint, dtype="fp32")
    with tempfile.TemporaryDirectory() as place:
        theirs = LlamaCpp(*write_gguf(model, processor, Path(place) / "gguf", dtype=DTYPES[arguments.dtype]))
        check_text(model, processor, theirs)
        for file in arguments.picture or sorted(pictures.glob("*.png")):
            check_picture(model, processor, theirs, file, arguments.question)


if __name__ == "__main__":
    main()
