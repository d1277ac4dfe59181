"""The names of the original LLaVA package, on llavakit: scripts written for it run as they are.

    from llava.constants import ...                         numbers and markers
    from llava.conversation import conv_templates           prompts as mutable conversations
    from llava.mm_utils import process_images, ...          pictures and ids as the old scripts hand them over
    from llava.model.builder import load_pretrained_model   any checkpoint that llavakit reads
    from llava.eval.run_llava import eval_model             one question, printed answer

Names and adapters only. What a picture, a prompt or a weight is, llavakit knows; llavakit does not know this package.

Where the original fails or misleads, this differs: any number of pictures with any numbers of tiles is answered; padding may lie on
either side; a checkpoint is known by its files, its name only chooses the conversation; too few pictures, a prompt that fills the context
and words that ``generate`` does not know are typed errors; sampling has no unasked ``top_k``.
"""

from __future__ import annotations

from typing import Any

__all__ = ["LlavaLlamaForCausalLM"]


def __getattr__(name: str) -> Any:
    """``llava.LlavaLlamaForCausalLM``, fetched when asked for: ``import llava`` itself loads nothing."""
    if name in __all__:
        from llava import model

        return getattr(model, name)
    raise AttributeError(f"module 'llava' has no attribute '{name}'")
