"""The base models of the miniature, trained here from nothing: what CLIP and Vicuna are to LLaVA.

    tokenizer  a LLaMA-style BPE with byte fallback, on the words of the drawn world and of the prompts
    pictures   scenes -> pixels, held in memory for the tower
    tower      a tiny CLIP, image-text contrastive on short statements with near misses; its vision tower is kept, frozen
    decoder    a small Llama decoder on text only: captions, and questions about a scene told in words

Everything is the class that the big models use (CLIPModel, LlamaForCausalLM, PreTrainedTokenizerFast), only smaller.
"""
