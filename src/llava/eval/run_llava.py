"""One question about one or several pictures: ``eval_model(args)`` prints the answer (spec 7.1).

python -m llava.eval.run_llava --model-path CHECKPOINT --image-file a.jpg,b.jpg --query "What is different?"
"""

from __future__ import annotations

import argparse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.utils import disable_torch_init
from llavakit.checkpoint.places import built_in
from llavakit.errors import ImageError
from llavakit.images import LIMITS, open_image
from llavakit.types import Image

_BY_NAME = (  # the first that stands in the model's name decides
    ("llama-2", "llava_llama_2"),
    ("mistral", "mistral_instruct"),
    ("v1.6-34b", "chatml_direct"),
    ("v1", "llava_v1"),
    ("mpt", "mpt"),
)
_SECONDS = 30


def image_parser(args: Any) -> list[str]:
    """The names in ``args.image_file``, one string or a list."""
    return args.image_file.split(args.sep) if isinstance(args.image_file, str) else list(args.image_file)


def load_image(image_file: str | bytes) -> PIL.Image.Image:
    """A picture in RGB from a path, a URL (http, https) or the bytes of a file. Raises ImageError."""
    if isinstance(image_file, bytes):
        return open_image(Image(image_file))
    if image_file.startswith(("http://", "https://")):
        return open_image(Image(_fetched(image_file)))
    return open_image(Image(Path(image_file)))


def load_images(image_files: Sequence[str | bytes]) -> list[PIL.Image.Image]:
    return [load_image(file) for file in image_files]


def eval_model(args: Any) -> str:
    """Load, ask, print. ``args.conv_mode`` None: chosen by the model's name, and written back."""
    disable_torch_init()
    path = str(args.model_path or built_in())
    name = get_model_name_from_path(path)
    tokenizer, model, image_processor, _ = load_pretrained_model(path, args.model_base, name)
    chosen = conv_mode(name, model.processor.template.name)
    if args.conv_mode is None:
        args.conv_mode = chosen
    elif args.conv_mode != chosen:
        print(f"[WARNING] conversation mode {args.conv_mode} as asked, where the model's name says {chosen}")
    prompt = prompt_of(args.query, args.conv_mode, wrapped=model.config.mm_use_im_start_end)
    images = load_images(image_parser(args))
    pixels = process_images(images, image_processor, model.config)
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")
    assert isinstance(ids, torch.Tensor)
    chosen_ids = model.generate(
        ids[None].to(model.device),
        images=[one.to(model.device) for one in pixels] if isinstance(pixels, list) else pixels.to(model.device),
        image_sizes=[image.size for image in images],
        do_sample=args.temperature > 0,
        temperature=args.temperature,
        top_p=args.top_p,
        num_beams=args.num_beams,
        max_new_tokens=args.max_new_tokens,
    )
    answer: str = tokenizer.batch_decode(chosen_ids, skip_special_tokens=True)[0].strip()
    print(answer)
    return answer


def conv_mode(model_name: str, template: str) -> str:
    """The conversation a model was taught: by its name, as ever; if that says nothing, by the checkpoint's own template."""
    named = (mode for part, mode in _BY_NAME if part in model_name.lower())
    held = {"llava_hf": "llava_v1"}.get(template, template)  # llava-hf writes the 1.5 prompt without its system sentence (trap 2)
    return next(named, held if held in conv_templates else "llava_v0")


def prompt_of(query: str, mode: str, *, wrapped: bool) -> str:
    """The question with its pictures in place: where it marks them, otherwise one before it."""
    image = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN if wrapped else DEFAULT_IMAGE_TOKEN
    marked = IMAGE_PLACEHOLDER in query
    conversation = conv_templates[mode].copy()
    conversation.append_message(conversation.roles[0], query.replace(IMAGE_PLACEHOLDER, image) if marked else f"{image}\n{query}")
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def _fetched(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
            data: bytes = answer.read(LIMITS.max_bytes + 1)  # one more than is allowed, which open_image then refuses
    except (OSError, ValueError) as error:
        raise ImageError(
            f"cannot be fetched ({error})", code="image_not_found", where=url, remedy="download it and give the file"
        ) from error
    return data


def parser() -> argparse.ArgumentParser:
    """The old options and their defaults."""
    made = argparse.ArgumentParser(description="Ask one question about pictures.")
    made.add_argument("--model-path", help="checkpoint folder; without it the built-in model answers")
    made.add_argument("--model-base")
    made.add_argument("--image-file", required=True, help="paths or URLs")
    made.add_argument("--query", required=True)
    made.add_argument("--conv-mode", choices=sorted(conv_templates))
    made.add_argument("--sep", default=",", help="what stands between the pictures' names")
    made.add_argument("--temperature", type=float, default=0.2)
    made.add_argument("--top_p", type=float)
    made.add_argument("--num_beams", type=int, default=1)
    made.add_argument("--max_new_tokens", type=int, default=512)
    return made


if __name__ == "__main__":
    eval_model(parser().parse_args())
