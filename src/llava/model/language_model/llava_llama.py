"""The model object of the old package: a llavakit ``Llava`` that is called as the original was.

model(input_ids with -200, labels=, images=, image_sizes=)     -> loss, logits
model.generate(input_ids with -200, images=, image_sizes=)     -> the new tokens alone, B.N
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava.model.llava_arch import LlavaMetaForCausalLM, padded
from llava.model.multimodal_encoder.clip_encoder import tower_name
from llavakit.checkpoint import store
from llavakit.errors import SamplingError
from llavakit.model.generation import Past, beam_search, check_context, context_length, decode_many, prefill_embeddings
from llavakit.model.llava import Llava
from llavakit.processor import Processor
from llavakit.types import Sampling

_log = logging.getLogger(__name__)

# Words that ``generate`` takes and need not obey: what they ask for is always so, or changes no token.
_HARMLESS = frozenset({"use_cache", "modalities", "tokenizer", "cache_position", "low_memory"})
_NEUTRAL = {"top_k": 0, "repetition_penalty": 1, "length_penalty": 1, "min_new_tokens": 0, "num_return_sequences": 1}


class LlavaLlamaForCausalLM(LlavaMetaForCausalLM, nn.Module):
    """LLaVA as old scripts hold it. ``llava`` and ``processor`` are llavakit's; ``config`` has the old keys and may be written to."""

    def __init__(self, llava: Llava, processor: Processor, fields: Mapping[str, Any] | None = None) -> None:
        """fields: what the checkpoint's own config.json says in the old keys; it counts before what follows from the model."""
        super().__init__()
        self.llava = llava
        self.processor = processor
        self.config = _config(llava, processor, type(self).__name__, fields or {})

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device_map: Any = None, **more: Any) -> LlavaLlamaForCausalLM:
        """The model of a checkpoint folder, on the CPU unless ``device_map`` says otherwise; more: as of ``load_pretrained_model``."""
        from llava.model.builder import load_pretrained_model

        return load_pretrained_model(path, None, "", device_map=device_map or "cpu", **more)[1]

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write a checkpoint in the llava-hf layout, tokenizer and processor included. Raises CheckpointError."""
        store.save(self.llava, self.processor, Path(folder))

    @property
    def language_model(self) -> Any:
        return self.llava.language_model

    @property
    def model(self) -> Any:
        return self.get_model()

    @property
    def lm_head(self) -> nn.Module:
        return self.language_model.get_output_embeddings()  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self.llava.device

    @property
    def dtype(self) -> torch.dtype:
        return self.llava.dtype

    @property
    def generation_config(self) -> Any:
        """transformers' record; ``generate`` here reads its own arguments only."""
        return self.language_model.generation_config

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.get_input_embeddings()  # type: ignore[no-any-return]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def tie_weights(self) -> None:
        self.language_model.tie_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        return_dict: bool | None = None,
        **more: Any,
    ) -> Any:
        """transformers' output: ``loss``, the mean over the labels that are not -100, and ``logits`` B.T.W, picture rows included."""
        if inputs_embeds is None:
            assert input_ids is not None, "give input_ids or inputs_embeds"
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = self.prepare_inputs_labels_for_multimodal(
                input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes
            )
        wanted = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states, "return_dict": return_dict}
        return self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **{name: value for name, value in wanted.items() if value is not None},
            **more,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        do_sample: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
        num_beams: int = 1,
        max_new_tokens: int = 512,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        stopping_criteria: Any = None,
        streamer: Any = None,
        **more: Any,
    ) -> Tensor:
        """The new tokens of every row, its end token included, padded at the end to the longest: (B, N).

        Rows are read with their padding on the left, whatever side it came on. Sampling follows torch's global seed, row after row, and
        weighs all tokens: there is no silent ``top_k`` of 50. Stopping criteria are asked about one row at a time, with its new tokens
        alone; after a beam search they only shorten its result. More new tokens than the context has room for are not made.
        Raises ContextError, PromptError, and SamplingError for what is not supported.
        """
        _check_known(more)
        ids = inputs if inputs is not None else input_ids
        assert ids is not None, "give the prompt's ids"
        sampling = Sampling(
            temperature=(1.0 if temperature is None else temperature) if do_sample else 0.0,
            top_p=1.0 if top_p is None or not do_sample else top_p,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
        )
        embeddings, mask = self._read_rows(ids, attention_mask, position_ids, images, image_sizes)
        room = context_length(self.llava) - embeddings.shape[1]
        if 0 < room < max_new_tokens:
            _log.warning("the context has room for %d of %d new tokens", room, max_new_tokens)
        sampling = sampling.but(max_new_tokens=max(1, min(room, max_new_tokens)))
        check_context(self.llava, prompt=embeddings.shape[1], new=sampling.max_new_tokens)
        ends = (
            self.processor.stop_ids
            if eos_token_id is None
            else frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)
        )
        judge = _Judge(ends, stopping_criteria, streamer, self.device)
        with _not_training(self):
            rows = self._chosen(embeddings, mask, sampling, judge)
        judge.close()
        tokenizer = self.processor.tokenizer
        pads = (pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
        pad = next((token for token in pads if token is not None), 0)
        return padded([torch.tensor(row, dtype=torch.long, device=self.device) for row in rows], pad, left=False)

    def _read_rows(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, images: Any, sizes: Sequence[tuple[int, int]] | None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings B.T.H of the prompts, padded on the left, and the mask of what is no padding."""
        mask = torch.ones_like(ids) if mask is None else mask
        words, _, given, _, made, _ = self.prepare_inputs_labels_for_multimodal(ids, positions, mask, None, None, images, sizes)
        embeddings = self.get_input_embeddings()(words) if made is None else made
        kept = (mask if given is None else given).bool()
        rows = [row[real] for row, real in zip(embeddings, kept, strict=True)]
        return padded(rows, 0, left=True), padded([torch.ones(len(row), device=ids.device) for row in rows], 0, left=True).bool()

    def _chosen(self, embeddings: Tensor, mask: Tensor, sampling: Sampling, judge: _Judge) -> list[list[int]]:
        judge.begin(len(mask) * sampling.num_beams)
        past = Past.empty(self.llava, len(mask))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        scores = prefill_embeddings(self.llava, embeddings, mask=mask, positions=positions, past=past)
        if sampling.num_beams == 1:
            drawn_from = [torch.default_generator] * len(mask)
            return decode_many(self.llava, scores, past, sampling=sampling, stop_ids=frozenset(), ends=judge.over, generators=drawn_from)
        rows = beam_search(self.llava, scores, past, beams=sampling.num_beams, new=sampling.max_new_tokens, stop_ids=judge.ends)
        end = sorted(judge.ends)[:1]
        return [judge.cut(row if len(row) == sampling.max_new_tokens else row + end) for row in rows]


@contextmanager
def _not_training(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in eval mode; afterwards each part is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Judge:
    """Says after every token whether its row is over, and passes the token on to a streamer."""

    def __init__(self, ends: frozenset[int], criteria: Any, streamer: Any, device: torch.device) -> None:
        self.ends = ends
        self._criteria = [] if criteria is None else list(criteria) if isinstance(criteria, Sequence) else [criteria]
        self._streamer = streamer
        self._device = device
        self._rows: list[list[int]] = []

    def begin(self, rows: int) -> None:
        self._rows = [[] for _ in range(rows)]
        if self._streamer is not None:
            if rows > 1:
                raise SamplingError("a streamer for several rows", code="not_supported", where="streamer", remedy="one row, one beam")
            self._streamer.put(torch.zeros(1, 0, dtype=torch.long))  # the prompt, of which nothing is repeated

    def over(self, row: int, token: int) -> bool:
        self._rows[row].append(token)
        if self._streamer is not None:
            self._streamer.put(torch.tensor([token]))
        return self._ended(self._rows[row])

    def cut(self, tokens: list[int]) -> list[int]:
        """The tokens up to where a criterion ends them."""
        if not self._criteria:
            return tokens
        return next((tokens[:count] for count in range(1, len(tokens)) if self._ended(tokens[:count])), tokens)

    def _ended(self, tokens: list[int]) -> bool:
        if tokens[-1] in self.ends:
            return True
        row = torch.tensor([tokens], device=self._device) if self._criteria else None
        return any(bool(torch.as_tensor(criterion(row, None)).all()) for criterion in self._criteria)

    def close(self) -> None:
        if self._streamer is not None:
            self._streamer.end()


def _check_known(more: Mapping[str, Any]) -> None:
    """Words that ask for nothing pass; others would change the reply and are refused by name."""
    unknown = [name for name, value in more.items() if name not in _HARMLESS and value not in (None, False, _NEUTRAL.get(name))]
    if unknown:
        raise SamplingError(
            f"generate does not know {', '.join(unknown)}",
            code="not_supported",
            where=unknown[0],
            remedy="leave it out or use transformers",
        )


def _config(llava: Llava, processor: Processor, architecture: str, fields: Mapping[str, Any]) -> Any:
    """The language model's config with LLaVA's old keys (spec 1.6) beside its own."""
    config, made = copy.deepcopy(llava.language_model.config), llava.config
    tiled = bool(made.canvases)
    old: dict[str, Any] = {
        "architectures": [architecture],
        "mm_vision_tower": tower_name(llava),
        "mm_hidden_size": int(made.vision["hidden_size"]),
        "mm_projector_type": made.projector,
        "mm_vision_select_layer": made.select_layer,
        "mm_vision_select_feature": made.select_feature,
        "mm_patch_merge_type": made.merge,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "anyres" if tiled else processor.preprocess.aspect,
        "tokenizer_padding_side": "right",
    }
    old |= {"image_grid_pinpoints": [list(canvas) for canvas in made.canvases]} if tiled else {}
    for name, value in {**old, **fields}.items():
        setattr(config, name, value)
    return config
