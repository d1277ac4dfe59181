"""Model classes by their old names. Which language model is inside follows from the checkpoint, not from the class."""

from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM

__all__ = ["LlavaLlamaForCausalLM", "LlavaMistralForCausalLM"]
