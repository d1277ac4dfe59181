"""Run what ``write_gguf`` writes through llama.cpp and compare: token ids, logits, picture embeddings, greedy answers.

    pip install gguf llama-cpp-python            # the second builds llama.cpp; a C++ compiler is needed
    python dev/llama_cpp_check.py FOLDER [--next]

Without --next the built-in model, with it a random LLaVA-NeXT of the tests' size. Pictures are exactly as large as the tower's view (a
canvas, for NeXT's tiles), so that nothing is resized and only rounding and llama.cpp's tanh GELU differ.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import PIL.Image
import torch
from llama_cpp import mtmd_cpp as mtmd

from llavakit.assistant import built_in
from llavakit.checkpoint.gguf import write_gguf
from llavakit.checkpoint.store import load
from llavakit.model.generation import generate
from llavakit.types import Conversation, Sampling

NEW = 16
TEXTS = ("What color is the square?", "How many things are there?  Two, or 3?", "Describe the picture: naïve café, 42 %.", "the word dog")


def random_next() -> tuple[Any, Any]:
    """A NeXT of the tests' size; its canvases are two tiles wide or high."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from llavakit.model.llava import Llava
    from llavakit.preprocess import Preprocess
    from llavakit.processor import Processor
    from llavakit.prompts import TEMPLATES
    from llavakit.tiling import Tiling
    from tiny import llama_tokenizer, tiny_config

    torch.manual_seed(0)
    tokenizer, canvases = llama_tokenizer(), ((56, 112), (112, 56), (112, 112))
    config = tiny_config(tokenizer, canvases=canvases, merge="spatial_unpad")
    tiling = Tiling(side=56, canvases=canvases, merge="spatial_unpad")
    processor = Processor(
        tokenizer=tokenizer,
        template=TEMPLATES["vicuna_v1"],
        preprocess=Preprocess(size=56, aspect="squash"),
        tiling=tiling,
        max_length=1024,
    )
    return Llava(config).eval(), processor


def apart(found: Any, expected: Any) -> str:
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    return (
        f"largest difference {np.abs(found - expected).max():.2e}, relative {np.abs(found - expected).max() / np.abs(expected).max():.2e}"
    )


def words_and_logits(llm: llama_cpp.Llama, model: Any, processor: Any) -> None:
    equal = 0
    for text in TEXTS:
        ids = processor.tokenizer(text).input_ids
        theirs = llm.tokenize(text.encode(), add_bos=True, special=False)
        equal += theirs == ids
        if theirs != ids:
            print("  other ids:", text, theirs, ids)
        llm.reset()
        llm.eval(ids)
        with torch.inference_mode():
            ours = model.language_model(input_ids=torch.tensor([ids])).logits[0].float().numpy()
            reply = model.language_model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)[
                0, len(ids) :
            ]
        print("  logits:", apart(llm.scores[: len(ids)], ours), "| greedy equal:", greedy(llm) == reply.tolist())
    print(f"ids equal for {equal} of {len(TEXTS)} texts")


def greedy(llm: llama_cpp.Llama, new: int = NEW) -> list[int]:
    """The next tokens after what the context holds."""
    taken = []
    for _ in range(new):
        row = llama_cpp.llama_get_logits_ith(llm._ctx.ctx, -1)
        taken.append(int(np.ctypeslib.as_array(row, (llm.n_vocab(),)).argmax()))
        llm.eval(taken[-1:])
    return taken


class Reader:
    """llama.cpp's picture side."""

    def __init__(self, path: Path, llm: llama_cpp.Llama) -> None:
        settings = mtmd.mtmd_context_params_default()
        settings.use_gpu, settings.warmup, settings.n_threads = False, False, 2
        self.llm, self.context = llm, mtmd.mtmd_init_from_file(str(path).encode(), llm._model.model, settings)
        assert self.context, "llama.cpp refused the mmproj file"

    def chunks(self, text: str, picture: PIL.Image.Image) -> Any:
        raw = np.ascontiguousarray(np.asarray(picture.convert("RGB")))
        bitmap = mtmd.mtmd_bitmap_init(*picture.size, raw.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        words = text.encode()
        asked = mtmd.mtmd_input_text(words, len(words), True, True)
        chunks = mtmd.mtmd_input_chunks_init()
        code = mtmd.mtmd_tokenize(self.context, chunks, ctypes.byref(asked), (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap), 1)
        assert code == 0, code
        return chunks

    def read(self, chunks: Any) -> tuple[list[int], list[np.ndarray]]:
        """The ids, -1 for a picture's rows, and the embeddings of each view."""
        ids: list[int] = []
        views = []
        for index in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, index)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                count = ctypes.c_size_t()
                tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                ids += [tokens[place] for place in range(count.value)]
                continue
            rows, width = mtmd.mtmd_input_chunk_get_n_tokens(chunk), self.llm.n_embd()
            assert mtmd.mtmd_encode_chunk(self.context, chunk) == 0
            views.append(np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self.context), (rows, width)).copy())
            ids += [-1] * rows
        return ids, views

    def answer(self, chunks: Any) -> list[int]:
        self.llm.reset()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.llm._ctx.ctx), True)
        past = llama_cpp.llama_pos()
        assert mtmd.mtmd_helper_eval_chunks(self.context, self.llm._ctx.ctx, chunks, 0, 0, 512, True, ctypes.byref(past)) == 0
        self.llm.n_tokens = past.value
        return greedy(self.llm)


def picture_side(reader: Reader, model: Any, processor: Any) -> None:
    folder = built_in().parents[1] / "pictures"
    cases = json.loads((folder / "questions.json").read_text("utf-8"))
    tiled = bool(processor.tiling.canvases)
    side = processor.preprocess.size * (2 if tiled else 1)
    equal = 0
    for case in cases:
        picture = PIL.Image.open(folder / case["image"]).convert("RGB").resize((side, side), PIL.Image.Resampling.BICUBIC)
        inputs = processor.encode(Conversation.ask(case["question"], picture), learn=False)
        text = "".join(
            mtmd.mtmd_default_marker().decode() if segment.kind == "image" else segment.text
            for segment in processor.template.render(Conversation.ask(case["question"], picture))
        )
        chunks = reader.chunks(text, picture)
        ids, views = reader.read(chunks)
        with torch.inference_mode():
            ours = model.encode_views(inputs.views).float().numpy()
        if case is cases[0] or tiled:
            for number, (found, expected) in enumerate(zip(views, ours, strict=True)):
                print(f"  view {number}:", apart(found, expected))
        expected_ids = [-1 if token == processor.image_token_id else token for token in inputs.input_ids.tolist()]
        if tiled:
            print(f"  rows: llama.cpp {ids.count(-1)}, ours {expected_ids.count(-1)}; the prompts differ by the row ends")
            return
        batch = processor.collate([inputs], side="left")
        ours_said = generate(model, batch, sampling=Sampling(temperature=0, max_new_tokens=NEW), stop_ids=frozenset({-1}))[0]
        theirs_said = reader.answer(chunks)
        equal += ours_said == theirs_said
        if ids != expected_ids or ours_said != theirs_said:
            print(
                "  differs:",
                case["question"],
                "| ids equal:",
                ids == expected_ids,
                "|",
                processor.decode(theirs_said),
                "|",
                processor.decode(ours_said),
            )
    print(f"greedy answers equal for {equal} of {len(cases)} questions about pictures")


def main() -> None:
    folder, tiled = Path(sys.argv[1]), "--next" in sys.argv
    model, processor = random_next() if tiled else load(built_in(), dtype="float32")
    text, vision = write_gguf(model, processor, folder, dtype="float32")
    llm = llama_cpp.Llama(str(text), n_ctx=1024, n_batch=512, logits_all=True, n_gpu_layers=0, n_threads=2, verbose=False)
    words_and_logits(llm, model, processor)
    plain = llama_cpp.Llama(str(text), n_ctx=1024, n_batch=512, n_gpu_layers=0, n_threads=2, verbose=False)
    picture_side(Reader(vision, plain), model, processor)


if __name__ == "__main__":
    main()
