"""LLaVA on Mistral, by its old name."""

from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM


class LlavaMistralForCausalLM(LlavaLlamaForCausalLM):
    """The same object: the language model inside is whichever the checkpoint holds."""
