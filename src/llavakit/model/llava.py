"""LLaVA: a vision tower, a projector and a language model that reads projected features as tokens (spec 1.1, 1.8).

    views V.3.S.S --tower--> features V.P.D --projector--> V.P.H --merge--> rows, in reading order --+
    input_ids B.T --embedding table--> B.T.H --------------------------------------------------------+--> language model --head--> logits
                     image positions hold a placeholder id                               filled by mask

How many tokens a picture takes was counted by ``tiling.Grid`` before; here the two counts are only compared. Image tokens have ordinary
consecutive positions and the causal mask. Parameter names are the names in published llava-hf files (spec 1.7, spelling A).

Packed examples (``Batch.segments``) share one row; the attention is told their borders and each sees itself alone.

Shapes: B rows, T positions, V views, P tokens of a view, D tower's width, H language model's width, N learned positions, W vocabulary.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModelForCausalLM

from llavakit.errors import PromptError
from llavakit.model.merge import merge
from llavakit.model.presets import ModelConfig
from llavakit.model.projector import Projector
from llavakit.model.vision import VisionTower

if TYPE_CHECKING:
    from llavakit.processor import Batch

IGNORED = -100  # a label that carries no loss


class Output(NamedTuple):
    """What a forward pass gives; a tuple, because FSDP looks for tensors in tuples.

    Sums, not means: the caller divides by the learned tokens of all ranks and micro-batches.
    """

    logits: Tensor | None  # B.T.W where asked for
    loss_sum: Tensor  # scalar fp32, summed cross-entropy over the learned tokens; always part of the graph
    learned: Tensor  # scalar int64, how many tokens that is


class Llava(nn.Module):
    """Tower, projector and any causal language model of transformers. New weights are random; ``checkpoint.store`` reads trained ones."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text = AutoConfig.for_model(**config.text)
        self.config = config
        self.vision_tower = VisionTower(config.vision, select_layer=config.select_layer, select_feature=config.select_feature)
        self.multi_modal_projector = Projector(
            config.projector, vision_width=int(config.vision["hidden_size"]), text_width=int(text.hidden_size)
        )
        self.language_model: Any = AutoModelForCausalLM.from_config(text)  # with the attention transformers finds best
        width = int(text.hidden_size)
        self.image_newline = nn.Parameter(torch.randn(width) / width**0.5) if config.has_newline else None  # spec 1.5

    @property
    def device(self) -> torch.device:
        """Where the embedding table lies."""
        return self._table.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the embedding table."""
        return self._table.weight.dtype

    @property
    def _table(self) -> nn.Embedding:
        return self.language_model.get_input_embeddings()  # type: ignore[no-any-return]

    def encode_views(self, views_v3ss: Tensor) -> Tensor:
        """Views, in the processor's normalised pixels, to embeddings V.P.H."""
        return self.project(self.vision_tower(views_v3ss))

    def project(self, features_vpd: Tensor) -> Tensor:
        """The tower's features to embeddings V.P.H."""
        linear = self.multi_modal_projector.linear_1
        return self.multi_modal_projector(features_vpd.to(linear.weight.device, linear.weight.dtype))  # type: ignore[no-any-return]

    def embed(self, batch: Batch) -> Tensor:
        """Embeddings B.T.H of a batch, its pictures in place.

        Raises PromptError ``image_token_count`` when placeholders, grids and views disagree.
        """
        embeddings: Tensor = self._table(batch.input_ids)
        places_bt = batch.input_ids == self.config.image_token_id
        placeholders, counted = int(places_bt.sum()), sum(grid.tokens for grid in batch.grids)
        expected, given = sum(grid.views for grid in batch.grids), (batch.views if batch.features is None else batch.features).shape[0]
        if placeholders != counted or given != expected:
            raise PromptError(
                f"{placeholders} image tokens in the text, {counted} counted for {len(batch.grids)} images; {given} views of {expected}",
                code="image_token_count",
                remedy="encode the conversation with this model's own processor",
            )
        if not placeholders and not self.training:
            return embeddings
        # In training a batch without pictures reads a blank view and keeps nothing of it (spec 1.8): tower and projector then get a
        # gradient of zero, not none, as distributed training needs.
        grid = replace(self.config.tiling, canvases=()).grid(1, 1)
        blank = batch.views.new_zeros(1, 3, self.config.image_size, self.config.image_size)
        views, grids = (batch.views, batch.grids) if batch.grids else (blank, (grid,))
        projected = self.encode_views(views) if batch.features is None else self.project(batch.features)
        rows = merge(projected, grids, self.image_newline)[:placeholders]
        return embeddings.masked_scatter(places_bt[..., None], rows.to(embeddings.device, embeddings.dtype))

    def forward(self, batch: Batch, *, full_logits: bool = False) -> Output:
        """The loss of a batch; with ``full_logits`` also the logits B.T.W of every position.

        Labels are unshifted: the label at t + 1 is predicted at t. The shift happens here and nowhere else. Without ``full_logits``
        only the positions that predict a learned token reach the head.
        """
        targets_n, predicts_bt = _learned(batch.labels)
        with nullcontext() if full_logits else _head_sees(self.language_model.get_output_embeddings(), predicts_bt):
            logits = self.language_model(
                inputs_embeds=self.embed(batch),
                attention_mask=None if batch.segments else batch.mask,
                position_ids=batch.positions,
                use_cache=False,
                **_borders(batch),
            ).logits
        learned = logits[predicts_bt] if full_logits else logits[0]
        loss = F.cross_entropy(learned.float(), targets_n, reduction="sum")
        count = torch.tensor(targets_n.numel(), device=targets_n.device)
        return Output(logits=logits if full_logits else None, loss_sum=loss, learned=count)

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Compute activations a second time in the backward pass instead of keeping them, in the language model and the tower."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # late releases of transformers 5 rename these; all of 5 know these names
            for part in (self.language_model, self.vision_tower.vision_model):
                if on:
                    part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                else:
                    part.gradient_checkpointing_disable()


def _borders(batch: Batch) -> dict[str, Any]:
    """Where packed examples begin and end, in the words that transformers' attention functions know (flash attention's)."""
    if not batch.segments:
        return {}
    ends = torch.tensor([0, *accumulate(batch.segments)], dtype=torch.int32, device=batch.input_ids.device)
    longest = max(batch.segments)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def _learned(labels_bt: Tensor) -> tuple[Tensor, Tensor]:
    """The learned labels N, and where they are predicted, B.T: one position earlier, never in the last."""
    wanted = labels_bt[:, 1:] != IGNORED
    return labels_bt[:, 1:][wanted], F.pad(wanted, (0, 1))


def _head_sees(head: nn.Module, rows_bt: Tensor) -> RemovableHandle:
    """Within this context only the chosen rows reach the head, as 1.N.H.

    Done at the head itself, because what a model does to its logits afterwards (Gemma caps them, Cohere scales them) is its own affair.
    """
    return head.register_forward_pre_hook(lambda _, inputs: (inputs[0][rows_bt][None], *inputs[1:]))
