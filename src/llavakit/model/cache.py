"""A key/value cache that writes in place.

transformers' ``DynamicCache`` builds a new tensor for every token (the whole cache is copied once a step). Here each layer owns a
buffer with spare room behind what was read; a new token is written into the room, and the buffer grows geometrically, so the
copying is a constant per token. What is handed to attention is a view of the buffer:

    buffer    [ B, H, capacity, D ]   contiguous
              |<----- length ---->|<-- spare, finite -->|
    view      [ B, H, length,   D ]   strides of the buffer

Matrix kernels copy such a view because its rows do not tile the memory; they do not copy the buffer. ``whole`` recovers the buffer
from a view, so an attention function can read it all and give the spare positions no weight (``model/cpu.py`` does).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin

_SPARE_SHARE = 16  # spare room is 1/16 of the length: about 3 % wasted reading on average, 16 copies of a position in its life
_SPARE_LEAST = 16


class InPlaceLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """One layer's keys and values, (B, H, capacity, D), of which the first ``length`` positions are real."""

    is_compileable = False
    is_croppable = True
    is_sliding = False  # windows are the mask's business; the buffer keeps every position

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.shared = 0  # positions equal in every row of a beam group; reordering leaves them where they are

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = _roomier(key_states[..., :0, :], 0), _roomier(value_states[..., :0, :], 0)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append (B, H, new, D) keys and values; return all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self.keys.shape[-2]:
            self.keys, self.values = _grown(self.keys, start, self.length), _grown(self.values, start, self.length)
        self.keys[..., start : self.length, :] = key_states
        self.values[..., start : self.length, :] = value_states
        if start == 0:
            return key_states, value_states  # the same numbers in a denser place
        return self.keys[..., : self.length, :], self.values[..., : self.length, :]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.length = self.shared = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` positions (transformers' sign: a negative number)."""
        assert tokens_to_remove <= 0, "crop takes minus the number of positions to forget"
        self.length = max(0, self.length + tokens_to_remove)
        self.shared = min(self.shared, self.length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times; the copies share their past, which later reordering need not move."""
        self.keys, self.values = self.keys.repeat_interleave(repeats, 0), self.values.repeat_interleave(repeats, 0)
        self.shared = self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows, in this order."""
        self.keys, self.values = self.keys[indices], self.values[indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row beam_idx[i]; rows move only within the group ``batch_repeat_interleave`` made."""
        live = slice(self.shared, self.length)
        self.keys[..., live, :] = self.keys[..., live, :].index_select(0, beam_idx.to(self.keys.device))
        self.values[..., live, :] = self.values[..., live, :].index_select(0, beam_idx.to(self.values.device))


def new_cache(config: PretrainedConfig) -> Cache:
    """An empty cache for a decoder with this text config: in place where every layer is attention, transformers' own otherwise."""
    kinds = set(getattr(config, "layer_types", None) or ())  # absent on configs whose layers are all alike
    if kinds <= {"full_attention", "sliding_attention"}:
        return Cache(layer_class_to_replicate=InPlaceLayer)
    return DynamicCache(config=config)


def whole(view: Tensor) -> Tensor | None:
    """The contiguous (B, H, capacity, D) buffer that a cache view was cut from, or None for any other tensor."""
    batch, heads, length, width = view.shape
    rows, height, step, unit = view.stride()
    capacity = height // width if width else 0
    if unit != 1 or step != width or height != capacity * width or rows != heads * height or capacity <= length:
        return None
    if view.storage_offset() + batch * rows > view.untyped_storage().nbytes() // view.element_size():
        return None
    return view.as_strided((batch, heads, capacity, width), (rows, height, step, unit))


def _roomier(states: Tensor, capacity: int) -> Tensor:
    """A buffer of that capacity beginning with ``states``; the rest is zero, because 0 * NaN would not be 0."""
    batch, heads, length, width = states.shape
    buffer = states.new_empty(batch, heads, capacity, width)
    buffer[..., :length, :] = states
    buffer[..., length:, :] = 0
    return buffer


def _grown(buffer: Tensor, length: int, needed: int) -> Tensor:
    return _roomier(buffer[..., :length, :], needed + max(_SPARE_LEAST, needed // _SPARE_SHARE))
