"""One forward pass of the model, and what a call may change or see in it.

The blocks, attentions, feed-forwards and routers are wrapped once, at loading. A wrapper does
nothing but look whether the pass that is going on has something for it, so options live exactly as
long as their pass, and interleaved runs do not meet.
"""

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from analyzers.engine.adapters import Parts
from analyzers.engine.lora import Adapter
from analyzers.engine.masks import Mask
from analyzers.engine.routing import (
    DEFAULT,
    Policy,
    chosen,
    entropy,
    experts_of_row,
    reroute,
)
from analyzers.engine.values import PLAIN, Experts, Options
from analyzers.errors import BadInput


class Pass:
    """What one pass changes, and what it has seen.

    given: hidden states that replace the input of block `first` (None: the model's own). Blocks
    before `first` and from `last` on are not run. hidden: layer -> (rows, tokens, d_model).
    positions: (rows, tokens). experts: layer -> the router's experts and weights,
    (rows * tokens, k) each; router_entropy: layer -> (rows * tokens,), nats. attention:
    layer -> (rows, heads, tokens, keys) or None, as the module gave it; kept where `weights` asks.
    """

    def __init__(
        self,
        layers: int,
        options: Options = PLAIN,
        taps: Collection[int] = (),
        *,
        first: int = 0,
        last: int | None = None,
        given: torch.Tensor | None = None,
        adapter: Adapter | None = None,
        weights: bool = False,
    ) -> None:
        self.options = options
        self.taps = frozenset(taps)
        self.first = first
        self.last = last or options.upto or layers
        self.given = given
        self.adapter = adapter
        self.weights = weights
        self.rows = 1
        self.positions: torch.Tensor | None = None
        self.hidden: dict[int, torch.Tensor] = {}
        self.experts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.router_entropy: dict[int, torch.Tensor] = {}
        self.attention: dict[int, torch.Tensor | None] = {}

    @property
    def policies(self) -> tuple[Policy, ...]:
        """One for every row of the batch."""
        policy = self.options.policy or DEFAULT
        many = policy if isinstance(policy, tuple) else (policy,) * self.rows
        if len(many) != self.rows:
            raise BadInput(f"There are {len(many)} routing policies for {self.rows} texts.")
        return many

    def hidden_at(self, row: int, token: int) -> dict[int, torch.Tensor]:
        """The tapped states of one token, layer -> (d_model,)."""
        return {layer: states[row, token] for layer, states in self.hidden.items()}

    def experts_at(self, row: int, token: int) -> dict[int, Experts]:
        """What the routers chose for one token of the pass, largest weight first."""
        found = {}
        for layer, (experts, weights) in self.experts.items():
            place = row * (len(experts) // self.rows) + token
            found[layer] = experts_of_row(experts[place], weights[place])
        return found

    def router_entropy_at(self, row: int, token: int) -> dict[int, float]:
        """How undecided the routers were about one token of the pass, nats."""
        return {
            layer: float(values[row * (len(values) // self.rows) + token])
            for layer, values in self.router_entropy.items()
        }


class Passes:
    """The model with its wrapped parts; `run` is the one place where it is called."""

    def __init__(self, model: PreTrainedModel, parts: Parts) -> None:
        self.model = model
        self.parts = parts
        self.layers = len(parts.blocks)
        self.count = 0
        takes = inspect.signature(model.forward).parameters
        self._cache_name = "cache_params" if "cache_params" in takes else "past_key_values"
        self._takes_positions = "position_ids" in takes
        self._now: Pass | None = None
        self._shapes: dict[nn.Module, Callable[[torch.Tensor], Any]] = {}
        for index, block in enumerate(parts.blocks):
            self._wrap(block, self._block(index))
        for index, module in enumerate(parts.attention):
            self._wrap(module, self._sub_layer(index + 1, "attention"))
        for index, module in enumerate(parts.feed_forward):
            self._wrap(module, self._sub_layer(index + 1, "feed_forward"))
        for index, module in parts.routers.items():
            self._wrap(module, self._router(index + 1))

    @property
    def adapter(self) -> Adapter | None:
        """The one that the pass that is going on asked for."""
        return self._now.adapter if self._now else None

    def run(
        self,
        this: Pass | None,
        cache: Cache | None,
        positions: torch.Tensor,
        *,
        ids: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
        mask: Mask | None = None,
        keep: int | None = None,
    ) -> torch.Tensor:
        """One pass over ids (rows, tokens) or embeddings (rows, tokens, d_model): logits
        (rows, keep, vocab) of the last `keep` tokens, 0 = all; None runs no head and gives the
        normed states (rows, tokens, d_model)."""
        self.count += 1
        if this is not None:
            this.rows, this.positions = positions.shape[0], positions
        given: dict[str, Any] = {"input_ids": ids} if ids is not None else {}
        given |= {"inputs_embeds": embeddings} if embeddings is not None else {}
        given |= {self._cache_name: cache, "use_cache": cache is not None}
        given |= {"position_ids": positions} if self._takes_positions else {}
        self._now = this
        try:
            if keep is None:
                return self.model.base_model(attention_mask=mask, **given).last_hidden_state
            return self.model(attention_mask=mask, logits_to_keep=keep, **given).logits
        finally:
            self._now = None

    # The wrappers

    def _wrap(self, module: nn.Module, make: Callable[..., Callable[..., Any]]) -> None:
        """On the instance, as accelerate does: a plain call costs one look at `_now`."""
        module.forward = make(module, module.forward)

    def _block(self, index: int) -> Callable[..., Callable[..., Any]]:
        def make(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def block(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                now = self._now
                if now is None:
                    return forward(hidden_states, *args, **kwargs)
                if not now.first <= index < now.last:
                    return self._like(module, hidden_states)
                if index == now.first and now.given is not None:
                    hidden_states = now.given
                if index in now.taps:
                    now.hidden.setdefault(index, hidden_states)
                output = forward(hidden_states, *args, **kwargs)
                if index + 1 in now.taps:
                    now.hidden[index + 1] = self._first(module, output)
                return output

            return block

        return make

    def _sub_layer(self, layer: int, kind: Any) -> Callable[..., Callable[..., Any]]:
        def make(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def sub_layer(*args: Any, **kwargs: Any) -> Any:
                now = self._now
                if now is None:
                    return forward(*args, **kwargs)
                if (layer, kind) in now.options.skip:
                    given = args[0] if args else kwargs["hidden_states"]
                    # Not `zeros_like`: OPT's part takes the inner, wider states.
                    nothing = given.new_zeros(*given.shape[:-1], self.model.config.hidden_size)
                    return self._like(module, nothing)
                output = forward(*args, **kwargs)
                if now.weights and kind == "attention" and isinstance(output, tuple):
                    now.attention[layer] = output[1]
                self._first(module, output)
                return output

            return sub_layer

        return make

    def _router(self, layer: int) -> Callable[..., Callable[..., Any]]:
        def make(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def router(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                now = self._now
                if now is None:
                    return output
                config = self.model.config
                output = reroute(
                    module, config, output, now.policies, layer=layer, positions=now.positions
                )
                if now.options.experts:
                    now.experts[layer] = chosen(output)
                    now.router_entropy[layer] = entropy(config, output)
                return output

            return router

        return make

    def _first(self, module: nn.Module, output: Any) -> torch.Tensor:
        """The hidden states in a module's output; remembers what stands around them."""
        if module not in self._shapes:
            rest = (None,) * (len(output) - 1) if isinstance(output, tuple) else None
            self._shapes[module] = lambda states: states if rest is None else (states, *rest)
        return output[0] if isinstance(output, tuple) else output

    def _like(self, module: nn.Module, states: torch.Tensor) -> Any:
        """`states` in the form in which the module returns its own; known since the first pass
        with taps, which is the check at loading."""
        return self._shapes[module](states)


def used(layers: int, options: Options) -> list[int] | None:
    """Indices of the blocks whose attention runs, and so writes into the cache; None = all."""
    if options.upto is None and not options.skip:
        return None
    return [
        index
        for index in range(min(options.upto or layers, layers))
        if (index + 1, "attention") not in options.skip
    ]
