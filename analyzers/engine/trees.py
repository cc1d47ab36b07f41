"""Trees of drafts: what is proposed behind a cursor, and what one pass over all of it says.

Source: tree attention as in SpecInfer (Miao et al. 2024, arXiv:2305.09781) and Medusa: every node
sees the committed text and its own ancestors, and stands at the position of its depth.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from analyzers.engine.filters import Filters
from analyzers.engine.values import PLAIN, PLAIN_FILTERS, Options, Step, step_after
from analyzers.errors import BadInput


@dataclass(frozen=True)
class Tree:
    """ids: the tokens of the nodes. parents: of each node, an earlier node or -1 for the root,
    which is the last committed token and no node itself.

    Raises: BadInput for unequal lengths, a cycle, or a parent that does not come first."""

    ids: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.parents):
            raise BadInput(
                f"A tree needs a parent for every node: it has {len(self.ids)} nodes "
                f"and {len(self.parents)} parents."
            )
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise BadInput(
                    f"Node {node} of the tree has the parent {parent}: "
                    "a parent is -1 (the root) or an earlier node."
                )

    @staticmethod
    def chain(ids: Sequence[int]) -> "Tree":
        """Every node the child of the one before."""
        return Tree(tuple(ids), tuple(range(-1, len(ids) - 1)))

    @staticmethod
    def merged(sequences: Sequence[Sequence[int]]) -> tuple["Tree", list[tuple[int, ...]]]:
        """The tree of all sequences, equal beginnings shared; and the path of each of them."""
        ids: list[int] = []
        parents: list[int] = []
        there: dict[tuple[int, int], int] = {}
        paths = []
        for sequence in sequences:
            path, parent = [], -1
            for id in sequence:
                if (parent, id) not in there:
                    there[parent, id] = len(ids)
                    ids.append(id)
                    parents.append(parent)
                parent = there[parent, id]
                path.append(parent)
            paths.append(tuple(path))
        return Tree(tuple(ids), tuple(parents)), paths

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Of each node, 1 for a child of the root."""
        found: list[int] = []
        for parent in self.parents:
            found.append(1 + (found[parent] if parent >= 0 else 0))
        return tuple(found)

    def path(self, node: int) -> tuple[int, ...]:
        """The nodes from the root to `node`, without the root; () for -1."""
        found = []
        while node >= 0:
            found.append(node)
            node = self.parents[node]
        return tuple(reversed(found))

    def along(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The nodes that spell the beginning of `ids`, as far as there are some."""
        found: list[int] = []
        for id in ids:
            at = found[-1] if found else -1
            for node in range(at + 1, len(self)):
                if self.parents[node] == at and self.ids[node] == id:
                    found.append(node)
                    break
            else:
                break
        return tuple(found)

    def begins_with(self, other: "Tree") -> bool:
        n = len(other)
        return self.ids[:n] == other.ids and self.parents[:n] == other.parents

    @cached_property
    def ancestors(self) -> torch.Tensor:
        """(nodes, nodes) bool: [i, j] whether j is i or an ancestor of i."""
        seen = np.eye(len(self), dtype=bool)  # numpy: its row operations cost a fifth of torch's
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return torch.from_numpy(seen)


@dataclass(frozen=True, eq=False)
class Checked:
    """What one pass said about a tree behind a text.

    raw: (1 + nodes, vocab), the model's logits in its own precision: row 0 at the root, row i + 1
    behind node i, each for the token to come there. hidden: layer -> (1 + nodes, d_model).
    text: the committed ids. vocabulary: how many ids are tokens.
    """

    tree: Tree
    raw: torch.Tensor
    hidden: Mapping[int, torch.Tensor]
    text: tuple[int, ...]
    vocabulary: int
    options: Options = PLAIN

    def goes_on_to(self, tree: Tree, taps: Collection[int], options: Options) -> bool:
        """Whether this is the beginning of what would be said of `tree`."""
        same = set(self.hidden) == set(taps) and self.options == options
        return same and tree.begins_with(self.tree)

    def path(self, node: int) -> tuple[int, ...]:
        """The nodes to commit so that `node` is the last one; () keeps none."""
        return self.tree.path(node)

    def step(
        self, node: int, *, ban: Collection[int] = (), filters: Filters = PLAIN_FILTERS
    ) -> Step:
        """The distribution behind `node` (-1 = the root), as `Engine.step` would give it there.

        Raises: ModelBroken when it is not finite."""
        before = [*self.text, *(self.tree.ids[i] for i in self.path(node))]
        hidden = {layer: states[node + 1] for layer, states in self.hidden.items()}
        return step_after(before, self.raw[node + 1], self.vocabulary, hidden, ban, filters)
