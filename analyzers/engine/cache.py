"""The key-value cache: transformers' own, with layers that append and rewind without copying.

transformers' `DynamicLayer` concatenates, so every step copies the whole past. Here keys and values
lie in buffers that double when they are full; a step writes one row, a rewind moves a length.
Every layer keeps the whole past, also where the model attends through a sliding window (the model's
own mask limits what is seen), so that a rewind across the window is exact.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer

FIRST_ROOM = 256


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, (batch, heads, length, head_dim); views into larger buffers."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows and return all keys and values, as `Cache.update` expects."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        length = past + key_states.shape[-2]
        keys, values = self._room(past, length, key_states, value_states)
        keys[:, :, past:length] = key_states
        values[:, :, past:length] = value_states
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        return self.keys, self.values

    def _room(
        self, past: int, length: int, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._buffers is None or length > self._buffers[0].shape[-2]:
            room = max(FIRST_ROOM, 2 * length)
            grown = (_empty_like(key_states, room), _empty_like(value_states, room))
            if past:
                grown[0][:, :, :past] = self.keys
                grown[1][:, :, :past] = self.values
            self._buffers = grown
        return self._buffers

    def copy(self, length: int) -> "GrowingLayer":
        """A layer of its own with the first `length` rows."""
        twin = GrowingLayer()
        if length:
            twin.update(self.keys[:, :, :length], self.values[:, :, :length])
        return twin


def _empty_like(states: torch.Tensor, room: int) -> torch.Tensor:
    batch, heads, _, dim = states.shape
    return states.new_empty((batch, heads, room, dim))


def new_cache(layers: int) -> Cache:
    return Cache(layers=[GrowingLayer() for _ in range(layers)])


def copy_cache(cache: Cache, length: int) -> Cache:
    return Cache(layers=[layer.copy(length) for layer in cache.layers])


def crop_cache(cache: Cache, length: int) -> None:
    """Forget everything after the first `length` rows, layer by layer (a failed step may have
    left the layers at different lengths)."""
    for layer in cache.layers:
        if (extra := layer.get_seq_length() - length) > 0:
            layer.crop(-extra)


def padded_batch(caches: list[Cache]) -> tuple[Cache, torch.Tensor]:
    """One left-padded cache for many sequences, and its mask (batch, longest + 1) with room for
    the token to come; padding is 0 in the mask, so it never changes a number."""
    lengths = [cache.get_seq_length() for cache in caches]
    longest = max(lengths)
    batch = new_cache(len(caches[0].layers))
    if longest:
        for index, layer in enumerate(batch.layers):
            parts = [cache.layers[index] for cache in caches]
            layer.update(
                _left_padded([part.keys for part in parts], longest),
                _left_padded([part.values for part in parts], longest),
            )
    mask = torch.zeros(len(caches), longest + 1, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, longest - length :] = 1
    return batch, mask


def _left_padded(rows: list[torch.Tensor | None], longest: int) -> torch.Tensor:
    """(rows, heads, longest, head_dim); None is a sequence with nothing cached yet."""
    some = next(row for row in rows if row is not None)
    padded = some.new_zeros((len(rows), some.shape[1], longest, some.shape[3]))
    for into, row in zip(padded, rows, strict=True):
        if row is not None:
            into[:, longest - row.shape[-2] :] = row[0]
    return padded
