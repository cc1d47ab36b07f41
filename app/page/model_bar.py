"""The model bar: which model is at work, and the form below it that loads another one."""

from collections.abc import Iterator, Mapping
from dataclasses import astuple
from typing import Any

import gradio as gr
import torch

from analyzers.engine import builtin, memory, quantization, sources
from analyzers.engine.builtin import MODELS
from analyzers.engine.loading import DEFAULT
from analyzers.errors import BadInput, CandorError, Stopped
from analyzers.home import models_folder
from app.page.context import PageContext
from app.page.widgets import ENGINE, QUIET, chosen, words
from app.runner import ModelChoice
from visualizations import header, models, status
from visualizations.text import human_size

Outputs = dict[gr.components.Component, Any]
QUANTIZATIONS = [
    ("automatic", "auto"),
    ("none", "none"),
    ("int8", "int8"),
    ("nf4 (4 bit)", "nf4"),
    ("fp4 (4 bit)", "fp4"),
    ("int8 (bitsandbytes)", "int8-bnb"),
]
DTYPES = [("automatic", "auto"), *((name, name) for name in memory.DTYPES)]
COST_SECONDS = 2.0
"""How often the page asks whether a model is there and its cost has been measured."""

# The buttons of the list say what they do and with which model; Escape, and a click elsewhere,
# close the form.
_LIST = """
element.addEventListener('click', (event) => {
  const hit = event.target.closest('[data-use],[data-unload],[data-measure]');
  if (hit) trigger('select', {...hit.dataset});
});
const bar = element.closest('#model-bar');
const close = () => {
  bar.classList.remove('open');
  bar.querySelector('details')?.removeAttribute('open');
};
document.addEventListener('keydown', (event) => { if (event.key === 'Escape') close(); });
document.addEventListener('pointerdown', (event) => { if (!bar.contains(event.target)) close(); });
"""


class ModelBar:
    """The widgets of the bar, and what they do. Tabs listen to changes of `can_chat`, whether the
    model of this visitor has a chat template, and of `model`, which one that is and whether its
    cost is known."""

    def __init__(self, ctx: PageContext) -> None:
        self.ctx = ctx
        self.can_chat = gr.State(True)
        self.model = gr.State("")
        self.clock = gr.Timer(COST_SECONDS, active=False)
        with gr.Column(elem_id="model-bar"):
            self.top = words(_bar(None, ctx.model.ref), elem_id="top")
            with gr.Column(elem_id="model-panel", elem_classes="candor-card"):
                self._draw_form()
                self.list = gr.HTML(
                    "", js_on_load=_LIST, apply_default_css=False, elem_id="model-list"
                )
        form = (self.ref, self.kind, self.dtype, self.device, self.double, self.compute)
        self.fields: set[Any] = set(form)
        self._listen()

    # What is seen

    def _draw_form(self) -> None:
        first = self.ctx.model
        with gr.Row(elem_classes="candor-model-row"):
            self.ref = gr.Dropdown(
                choices(first.ref),
                value=first.ref,
                label="Model",
                info="Or type a folder, a .gguf file, or owner/name on the hub",
                allow_custom_value=True,
                scale=3,
                min_width=240,
                elem_id="model-ref",
            )
            self.kind = gr.Dropdown(
                QUANTIZATIONS,
                value=first.quantization,
                label="Quantization",
                info="Fewer bits for each weight",
                min_width=170,
                elem_id="model-quantization",
            )
            self.device = gr.Dropdown(
                _devices(),
                value=first.device,
                label="Device",
                info="Where it computes",
                min_width=110,
                elem_id="model-device",
            )
        with gr.Accordion("More", open=False, elem_id="model-more"):
            with gr.Row(elem_classes="candor-model-row"):
                self.dtype = gr.Dropdown(
                    DTYPES,
                    value=first.dtype,
                    label="Precision",
                    info="Without quantization",
                    min_width=150,
                    elem_id="model-dtype",
                )
                self.compute = gr.Dropdown(
                    DTYPES,
                    value=first.compute,
                    label="Computes in",
                    info="With 4-bit weights",
                    min_width=150,
                )
                self.double = gr.Checkbox(
                    first.double,
                    label="Double quantization",
                    info="Of the scales of 4-bit weights",
                    min_width=170,
                )
        with gr.Row(elem_classes="candor-model-row candor-model-go"):
            self.go = gr.Button("Load", variant="primary", size="sm", elem_id="model-load")
            self.halt = gr.Button("Cancel", size="sm", interactive=False, elem_id="model-cancel")
            self.said = words("", elem_id="model-said")

    def _listen(self) -> None:
        shown: list[Any] = [self.top, self.list, self.can_chat, self.model, self.clock]
        for field in self.fields:
            field.change(self.foresee, self.fields, [self.said], **QUIET)
        self.go.click(
            self.load,
            self.fields,
            [*shown, self.ref, self.said, self.go, self.halt],
            api_visibility="private",
            **ENGINE,
        )
        self.halt.click(self.cancel, None, None, **QUIET)
        self.list.select(self.act, None, [*shown, self.said], api_visibility="private", **ENGINE)
        self.clock.tick(self.look, None, shown, **QUIET)

    def greet(self, page: gr.Blocks) -> None:
        """Fill the bar when the page opens; call it at the end of the page's layout."""
        outputs = [self.top, self.list, self.can_chat, self.model, self.clock, self.ref]
        page.load(self.welcome, None, outputs, **QUIET)
        page.load(self.foresee, self.fields, [self.said], **QUIET)

    # What happens

    def welcome(self, request: gr.Request) -> Outputs:
        return self.look(request) | self._offered()

    def look(self, request: gr.Request) -> Outputs:
        """The bar and the list as they are now; asked again until the model is there and its cost
        is known."""
        choice = self.ctx.choice(request.session_hash)
        facts = self.ctx.runner.model_facts(choice)
        rows = [(_key(row["choice"]), _titled(row)) for row in self.ctx.runner.residents()]
        return {
            self.top: _bar(facts, choice.ref),
            self.list: models.residents(rows, _key(facts["choice"]) if facts else ""),
            self.can_chat: facts is None or facts["can_chat"],
            self.model: f"{_key(facts['choice'] if facts else choice)} {_stage(facts)}",
            self.clock: gr.Timer(active=not (facts and facts["cost"])),
        }

    def foresee(self, given: Mapping[Any, Any]) -> str:
        """What loading would take, from what is on the disk; nothing is fetched for it."""
        try:
            return _foreseen(self._choice(given))
        except CandorError as error:
            return models.hint(str(error))

    def load(self, given: Mapping[Any, Any], request: gr.Request) -> Iterator[Outputs]:
        """Load and use it. Whatever goes wrong is a sentence; the earlier model stays."""
        ctx, session = self.ctx, request.session_hash or ""
        ctx.cancel(session)
        try:
            choice = self._choice(given)
            loading = ctx.loading[session] = ctx.runner.load(choice, owner=request.username or "")
            yield self._buttons(going=True) | {self.said: status.waiting(0)}
            for update in loading.updates():
                said = status.waiting(update.ahead)
                if update.doing:
                    said = status.doing(update.doing, update.share)
                yield {self.said: said}
            ctx.chosen[session] = choice
            said = models.hint(f"{header.short_name(_title(choice.ref))} is ready.")
        except Stopped:
            said = models.hint("Loading was stopped.")
        except CandorError as error:
            said = status.problem(str(error))
        ctx.loading.pop(session, None)
        yield self.look(request) | self._offered() | self._buttons(going=False) | {self.said: said}

    def cancel(self, request: gr.Request) -> None:
        self.ctx.cancel(request.session_hash)

    def act(self, event: gr.EventData, request: gr.Request) -> Iterator[Outputs]:
        """Use one of the models in memory, measure its cost again, or unload it when the work
        before that is done."""
        said = ""
        there = {_key(row["choice"]): row["choice"] for row in self.ctx.runner.residents()}
        for name, key in chosen(event).items():
            if key not in there:
                said = models.hint("That model is no longer in memory.")
            elif name == "use":
                self.ctx.chosen[request.session_hash or ""] = there[key]
            elif name == "measure":
                self.ctx.runner.measure_again(there[key])
                said = models.hint("Measuring what a token costs, as soon as nothing else runs.")
            else:
                for update in self.ctx.runner.unload(there[key]).updates():
                    going = models.hint("Unloading …")
                    yield {self.said: status.waiting(update.ahead) if update.ahead else going}
                said = models.hint(f"{_title(there[key].ref)} is no longer in memory.")
        yield self.look(request) | ({self.said: said} if said else {})

    def _offered(self) -> Outputs:
        return {self.ref: gr.Dropdown(choices(self.ctx.model.ref))}

    def _buttons(self, going: bool) -> Outputs:
        return {
            self.go: gr.Button(interactive=not going),
            self.halt: gr.Button(interactive=going),
        }

    def _choice(self, given: Mapping[Any, Any]) -> ModelChoice:
        """Raises: BadInput where no model is named."""
        ref = (given[self.ref] or "").strip()
        if not ref:
            raise BadInput("Choose a model, or type a folder, a .gguf file or a hub name.")
        return ModelChoice(
            ref,
            quantization=given[self.kind],
            dtype=given[self.dtype],
            device=given[self.device],
            double=given[self.double],
            compute=given[self.compute],
        )


def _bar(facts: Mapping[str, Any] | None, ref: str) -> str:
    if facts is None:
        return header.render(None, _title(ref))
    return header.render(_titled(facts), quality=_quality(facts))


def choices(first: str) -> list[tuple[str, str]]:
    """What the picker offers, with what is ready and what comes from afar; `first` always is."""
    found = {each.ref: f"{each.title} · {_state(each)}" for each in sources.listed()}
    return [(label, ref) for ref, label in ({first: first} | found).items()]


def _stage(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return "not loaded"
    return "measured" if facts["cost"] else "loaded"


def _state(each: sources.Listed) -> str:
    if each.ready:
        return "ready"
    return f"fetched on demand, {human_size(each.size)}" if each.size else "made on demand"


def _devices() -> list[tuple[str, str]]:
    cuda = [(f"GPU {i}", f"cuda:{i}") for i in range(torch.cuda.device_count())]
    mps = [("Apple GPU", "mps")] if torch.backends.mps.is_available() else []
    several = [("all GPUs", "split")] if len(cuda) > 1 else []
    return [("automatic", "auto"), ("CPU", "cpu"), *cuda, *mps, *several]


def _foreseen(choice: ModelChoice) -> str:
    listed = next((each for each in sources.listed() if each.ref == choice.ref), None)
    about = models.hint(listed.about) if listed and listed.about else ""
    source = sources.find(choice.ref)
    if source:
        plan = memory.plan(source, choice.quantization, choice.dtype, choice.device, choice.double)
        kind = str(plan.dtype).removeprefix("torch.")
        if plan.quantization != "none":
            kind = plan.quantization
        return about + models.needs(kind, plan.weights, plan.peak, memory.free(plan.device))
    if listed is None:
        return models.hint("Not on this computer: Load looks for it on the Hugging Face hub.")
    return about + (models.download(listed.size) if listed.size else models.made())


def _titled(facts: Mapping[str, Any]) -> dict[str, Any]:
    known = facts["name"] in MODELS
    about = builtin.about(facts["name"], models_folder()) if known else ""
    return dict(facts) | {"name": _title(facts["name"]), "about": about}


def _title(ref: str) -> str:
    return MODELS[ref].title if ref in MODELS else ref


def _quality(facts: Mapping[str, Any]) -> tuple[float, str] | None:
    """What the quantization costs in perplexity on the default model, where that was measured."""
    kind = facts["quantization"]
    if kind == "none" or kind not in quantization.COST:
        return None
    return quantization.COST[kind], MODELS[DEFAULT].title


def _key(choice: ModelChoice) -> str:
    return " ".join(map(str, astuple(choice)))
