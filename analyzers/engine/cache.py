"""The key-value cache: transformers' own kind, with layers that append and rewind without copying.

transformers' `DynamicLayer` concatenates, so every step copies the whole past. Here keys and values
lie in buffers that double when they are full; a step writes one row, a rewind moves a length.
Every layer keeps the whole past, also where the model attends through a sliding window (a mask
limits what is seen), so that a rewind across the window is exact. Layers may be of different
lengths: an early exit leaves the later ones behind.

Models with a recurrent state cannot go back row by row: `StatePast` keeps snapshots instead.
"""

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

FIRST_ROOM = 256
# Bytes of buffers that wait for the next cache of an engine.
SPARE = 256_000_000
# Columns a batch has beyond its longest row before it must be gathered again.
BATCH_ROOM = 128
SNAPSHOT_EVERY = 64
SNAPSHOTS = 8


Buffers = tuple[torch.Tensor, torch.Tensor]


class Spare:
    """Buffers of caches that are gone, for the next ones.

    Copying 1,000 tokens into new memory costs four times what the copying costs: the system hands
    it out page by page, each of them zeroed first. Rooms are powers of two, so that they fit again.
    """

    def __init__(self) -> None:
        self._there: dict[object, list[Buffers]] = {}
        self._bytes = 0

    def take(self, key_states: torch.Tensor, value_states: torch.Tensor, length: int) -> Buffers:
        """Buffers like the states (1, heads, tokens, dim) with room for more than `length` rows;
        what is in them is undefined."""
        room = max(FIRST_ROOM, 1 << (length + length // 4).bit_length())
        kind = _kind(key_states, value_states, room, torch.is_inference_mode_enabled())
        if waiting := self._there.get(kind):
            found = waiting.pop()
            self._bytes -= _bytes(found)
            return found
        return _rows_like(key_states, room), _rows_like(value_states, room)

    def give(self, buffers: Buffers) -> None:
        """Nobody uses these any more."""
        if self._bytes + _bytes(buffers) <= SPARE:
            kind = _kind(*buffers, buffers[0].shape[-2], buffers[0].is_inference())
            self._there.setdefault(kind, []).append(buffers)
            self._bytes += _bytes(buffers)


def _kind(keys: torch.Tensor, values: torch.Tensor, room: int, inference: bool) -> object:
    """What buffers must have in common to stand for each other. A tensor made in inference mode
    may not be written to outside of it."""
    shapes = [(each.shape[1], each.shape[3]) for each in (keys, values)]
    return (*shapes, room, keys.dtype, keys.device, inference)


def _bytes(buffers: Buffers) -> int:
    return sum(buffer.nbytes for buffer in buffers)


class GrowingLayer(CacheLayerMixin):
    """Keys and values of one layer: the first `length` rows of buffers (1, heads, room, dim).

    spare: where buffers come from and go to. home: the batch layer and row whose buffers these are
    a view of, if any."""

    is_sliding = False
    is_croppable = True
    is_initialized = True

    def __init__(self, spare: Spare) -> None:
        self.spare = spare
        self.length = 0
        self.buffers: Buffers | None = None
        self.home: tuple[BatchLayer, int] | None = None

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Let go of the buffers; those of a batch are the batch's."""
        if self.buffers is not None and self.home is None:
            self.spare.give(self.buffers)
        self.buffers = self.home = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the first update makes the buffers."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows and return all keys and values, as `Cache.update` expects."""
        past, length = self.length, self.length + key_states.shape[-2]
        keys, values = self._room(length, key_states, value_states)
        keys[:, :, past:length] = key_states
        values[:, :, past:length] = value_states
        self.length = length
        return keys[:, :, :length], values[:, :, :length]

    def _room(self, length: int, key_states: torch.Tensor, value_states: torch.Tensor) -> Buffers:
        if self.buffers is None or length > self.buffers[0].shape[-2]:
            grown = self.spare.take(key_states, value_states, length)
            if self.buffers is not None:
                for new, old in zip(grown, self.buffers, strict=True):
                    new[:, :, : self.length] = old[:, :, : self.length]
            # What was outgrown is not kept: a text that only grows would hold itself twice.
            self.buffers, self.home = grown, None
        return self.buffers

    def copy(self, length: int) -> "GrowingLayer":
        """A layer of its own with the first `length` rows."""
        twin = GrowingLayer(self.spare)
        if self.buffers is not None and length:
            twin.update(*(buffer[:, :, :length] for buffer in self.buffers))
        return twin

    def keep(self, base: int, rows: Sequence[int]) -> None:
        """The first `base` rows and then `rows` (increasing, each >= base); the others go. A layer
        that was skipped when those were computed does not have them, and stays behind."""
        if rows and self.length <= rows[-1]:
            self.length = min(self.length, base)
            return
        if self.buffers is not None and list(rows) != list(range(base, base + len(rows))):
            index = torch.tensor(rows, device=self.buffers[0].device)
            for buffer in self.buffers:
                buffer[:, :, base : base + len(rows)] = buffer[:, :, index]
        self.length = min(self.length, base + len(rows))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class Past(Cache):
    """What a cursor has computed: one GrowingLayer a block."""

    layers: list[GrowingLayer]

    def __init__(self, layers: Iterable[GrowingLayer]) -> None:
        super().__init__(layers=list(layers))

    @property
    def cache(self) -> Cache:
        """What the model is given."""
        return self

    def length(self, used: Sequence[int] | None = None) -> int:
        """Rows that all of the `used` layers have (block indices; None = all)."""
        layers = self.layers if used is None else [self.layers[index] for index in used]
        return min((layer.length for layer in layers), default=0)

    def crop_to(self, length: int, *, failed: bool = False) -> None:
        """Forget everything after the first `length` rows, in every layer. failed: a pass broke
        off; a layer may have more rows than the others, which this mends."""
        for layer in self.layers:
            layer.length = min(layer.length, length)

    def copy(self, length: int) -> "Past":
        """Its own rows: the first `length` of every layer that has so many."""
        return Past(layer.copy(min(layer.length, length)) for layer in self.layers)

    def keep(self, base: int, rows: Sequence[int]) -> None:
        for layer in self.layers:
            layer.keep(base, rows)

    def passed(self, length: int) -> None:
        """A pass went through; the rows are already there."""


class StatePast:
    """The past of a model with a recurrent state, which a pass overwrites.

    Every 64 tokens a snapshot is kept (at most 8, then every second one goes); going back restores
    the last one before the place, and the tokens after it are computed again by the next pass.
    """

    def __init__(self, make: Callable[[], Cache]) -> None:
        self.cache = make()
        self._make = make
        self._length = 0
        self._saved: list[tuple[int, Cache]] = []

    def length(self, used: Sequence[int] | None = None) -> int:
        return self._length

    def crop_to(self, length: int, *, failed: bool = False) -> None:
        """At most `length` rows stay; fewer where no snapshot was taken. failed: the state is that
        of a pass that broke off and must be thrown away."""
        if length >= self._length and not failed:
            return
        self._saved = [(at, state) for at, state in self._saved if at <= length]
        self._length, state = self._saved[-1] if self._saved else (0, None)
        self.cache = copy.deepcopy(state) if state is not None else self._make()

    def copy(self, length: int) -> "StatePast":
        twin = StatePast(self._make)
        twin.cache, twin._length = copy.deepcopy(self.cache), self._length
        twin._saved = list(self._saved)  # snapshots are never written to
        twin.crop_to(length)
        return twin

    def passed(self, length: int) -> None:
        """A pass went through and has taken the state to `length` tokens."""
        self._length = length
        if length - (self._saved[-1][0] if self._saved else 0) >= SNAPSHOT_EVERY:
            self._saved.append((length, copy.deepcopy(self.cache)))
        if len(self._saved) > SNAPSHOTS:
            del self._saved[-2::-2]


class BatchLayer(CacheLayerMixin):
    """One layer of many sequences: each row of the buffers (rows, heads, room, dim) is one of
    theirs, begins at column 0 and has its own length; what lies behind it must be masked."""

    is_sliding = False
    is_initialized = True

    def __init__(self, members: list[GrowingLayer]) -> None:
        self.members = members
        self.buffers: Buffers | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the first update gathers the rows."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one token to every row; states are (rows, heads, 1, dim)."""
        keys, values = self.buffers or self._gather(key_states, value_states)
        columns = [member.length for member in self.members]
        rows = torch.arange(len(columns), device=keys.device)
        at = torch.tensor(columns, device=keys.device)
        keys[rows, :, at] = key_states[:, :, 0]
        values[rows, :, at] = value_states[:, :, 0]
        for member in self.members:
            member.length += 1
        longest = max(columns) + 1
        return keys[:, :, :longest], values[:, :, :longest]

    def _gather(self, key_states: torch.Tensor, value_states: torch.Tensor) -> Buffers:
        room = max(member.length for member in self.members) + BATCH_ROOM
        # Zeros, not whatever is in memory: a masked NaN would still be a NaN.
        self.buffers = (
            _rows_like(key_states, room).zero_(),
            _rows_like(value_states, room).zero_(),
        )
        for row, member in enumerate(self.members):
            mine = tuple(buffer[row : row + 1] for buffer in self.buffers)
            if member.buffers is not None:
                for new, old in zip(mine, member.buffers, strict=True):
                    new[:, :, : member.length] = old[:, :, : member.length]
            member.release()
            member.buffers, member.home = (mine[0], mine[1]), (self, row)
        return self.buffers

    def serves(self, members: list[GrowingLayer]) -> bool:
        """Whether these are its rows still, in this order, with room for one more token."""
        return (
            self.buffers is not None
            and len(members) == len(self.members)
            and all(member.home == (self, row) for row, member in enumerate(members))
            and max(member.length for member in members) < self.buffers[0].shape[-2]
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return max(member.length for member in self.members)

    def get_max_length(self) -> int:
        return -1


def batch_of(pasts: Sequence[Past]) -> Cache:
    """One cache for one token of many sequences.

    The first time their rows are copied into common buffers; as long as the same sequences step
    together, nothing is copied again. Each stays usable by itself: its buffers are views."""
    layers = []
    for members in zip(*(past.layers for past in pasts), strict=True):
        home = members[0].home
        there = home is not None and home[0].serves(list(members))
        layers.append(home[0] if home and there else BatchLayer(list(members)))
    return Cache(layers=layers)


def _rows_like(states: torch.Tensor, room: int) -> torch.Tensor:
    batch, heads, _, dim = states.shape
    return states.new_empty((batch, heads, room, dim))
