"""Nodes whose texts say nearly the same learn from one another.

Source: the similarity update and the dynamic addition of RAIN (Li et al. 2024, arXiv:2309.07124),
as its code does them.
"""

from collections.abc import Collection, Mapping

import torch

from analyzers.common.embedding import Embedder
from analyzers.common.puct import learned
from analyzers.common.search_tree import Node
from analyzers.engine.signals import DIGITS

SPREAD = 0.03
"""Children whose vectors vary less than this, for each token that they add, are all alike."""


class Alike:
    """Keeps the mean vector of the texts behind each node. gamma: how much of a visit counts for a
    sibling, at most."""

    def __init__(self, embed: Embedder, gamma: float) -> None:
        self._embed = embed
        self._gamma = gamma
        self._means: dict[Node, torch.Tensor] = {}

    def hear(self, texts: Mapping[Node, str], value: float) -> None:
        """Before these nodes are visited: what was written behind each of them, and what it is
        worth. Siblings that are similar take a part of it. An empty text says nothing."""
        said = {node: text for node, text in texts.items() if text.strip()}
        vectors = self._embed(list(said.values())) if said else ()
        for node, vector in zip(said, vectors, strict=True):
            mean = self._means.get(node, vector)
            self._means[node] = mean + (vector - mean) / (node.real_visits + 1)
            for sibling in node.parent.children.values() if node.parent else ():
                if sibling is not node and sibling in self._means:
                    self._share(node, sibling, value)

    def _share(self, node: Node, sibling: Node, value: float) -> None:
        assert sibling.value is not None  # it has been visited
        cosine = float(torch.cosine_similarity(self._means[node], self._means[sibling], dim=0))
        if cosine >= self._embed.threshold:
            sibling.value, sibling.visits = learned(
                sibling.value, sibling.visits, value, cosine, self._gamma
            )
            sibling.detail["embedding_similarity"] = round(cosine, DIGITS)

    def all_bad(self, children: Collection[Node], length: int, middle: float) -> bool:
        """Whether two or more children, of `length` tokens each, were all visited, are all worth
        less than `middle`, and all have similar texts: then something else has to be tried."""
        if len(children) < 2 or any(child not in self._means for child in children):
            return False
        if any(child.value is None or child.value >= middle for child in children):
            return False
        means = torch.stack([self._means[child] for child in children])
        return float(means.var(dim=0).norm()) < SPREAD * length * self._embed.spread
