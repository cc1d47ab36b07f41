"""A tree of texts with numbers on its nodes: what every search grows."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from analyzers.common.budget import Budget
from analyzers.engine import Engine
from analyzers.engine.signals import DIGITS
from analyzers.trace import SearchNode

Status = Literal["open", "committed", "rewound", "pruned"]


@dataclass(eq=False)
class Node:
    """A piece of text behind its parent's.

    number: in the order of making; 0 is the root. ids: the tokens that it adds, never tokenised
    again. prior: how likely the proposal made it, 0..1. value: mean of what it was judged, in the
    method's range. visits may grow by fractions, real_visits counts. evals: keys of Judgements.
    """

    number: int
    parent: "Node | None"
    ids: tuple[int, ...] = ()
    text: str = ""
    prior: float | None = None
    value: float | None = None
    visits: float = 0.0
    real_visits: int = 0
    status: Status = "open"
    detail: dict[str, Any] = field(default_factory=dict)
    evals: list[str] = field(default_factory=list)
    children: dict[tuple[int, ...], "Node"] = field(default_factory=dict)

    @property
    def path(self) -> "list[Node]":
        """From the root to here."""
        nodes = [self]
        while (parent := nodes[-1].parent) is not None:
            nodes.append(parent)
        return nodes[::-1]

    @property
    def depth(self) -> int:
        return len(self.path) - 1

    @property
    def tokens(self) -> list[int]:
        """What stands behind the prompt here."""
        return [id for node in self.path for id in node.ids]

    def below(self) -> "Iterator[Node]":
        """This node and all that hang on it."""
        yield self
        for child in self.children.values():
            yield from child.below()

    def visit(self, value: float) -> None:
        """Take one more value into the mean."""
        self.visits += 1
        self.real_visits += 1
        self.value = (
            value if self.value is None else self.value + (value - self.value) / self.visits
        )


class SearchTree:
    """nodes: all of them, in the order of making."""

    def __init__(self, engine: Engine, budget: Budget) -> None:
        self._engine = engine
        self._budget = budget
        self.root = Node(0, None)
        self.nodes = [self.root]
        self._told: dict[int, SearchNode] = {}

    def add(
        self,
        parent: Node,
        ids: Sequence[int],
        prior: float | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> Node:
        """A child with these tokens; the one that is there when there is one.

        Raises: BudgetSpent."""
        if tuple(ids) in parent.children:
            return parent.children[tuple(ids)]
        self._budget.charge("nodes")
        text = self.text_behind(parent, ids)
        node = Node(len(self.nodes), parent, tuple(ids), text, prior, detail=dict(detail or {}))
        parent.children[node.ids] = node
        self.nodes.append(node)
        return node

    def text(self, node: Node) -> str:
        """Everything from the root to here, decoded once."""
        return self._engine.vocabulary.decode(node.tokens)

    def text_behind(self, node: Node, ids: Sequence[int]) -> str:
        """What these tokens add to the text; a character that they complete is theirs."""
        before, after = node.tokens, [*node.tokens, *ids]
        decode = self._engine.vocabulary.decode
        return decode(after)[len(decode(before)) :]

    def prune(self, node: Node, but: Node | None = None) -> None:
        """No open node below `node` is considered further, those below `but` excepted."""
        kept = set(map(id, but.below())) if but else set()
        for each in node.below():
            if each.status == "open" and id(each) not in kept and each is not node:
                each.status = "pruned"

    def news(self) -> Generator[SearchNode, None, None]:
        """Every node that is new or not what it was when it was last told of."""
        for node in self.nodes:
            event = _event(node)
            if self._told.get(node.number) != event:
                self._told[node.number] = event
                yield event


def _event(node: Node) -> SearchNode:
    return SearchNode(
        node=node.number,
        parent=node.parent.number if node.parent else None,
        text=node.text,
        prior=None if node.prior is None else round(node.prior, DIGITS),
        value=None if node.value is None else round(node.value, DIGITS),
        visits=round(node.visits, DIGITS),
        real_visits=node.real_visits,
        status=node.status,
        detail=dict(node.detail),
        evals=tuple(node.evals),
    )
