"""The one mechanism of contrast: worked numbers, and what must hold whatever is contrasted."""

import math
from dataclasses import replace

import pytest
import torch

from analyzers.common import contrast
from analyzers.common.contrast import Branch, Fused
from analyzers.context import Context
from analyzers.engine import Engine, Filters, Options, Step
from analyzers.engine.routing import rank, top
from analyzers.errors import BadInput
from analyzers.trace import Note, Token
from tests import tiny

IDS = list(b"A fox, a dog and a crow met.")
STRONG = torch.tensor([2.0, 1.0, 0.5, -2.0])
WEAK = torch.tensor([2.0, 0.0, 1.0, 0.0])


@pytest.fixture(scope="module")
def engine() -> Engine:
    """A model whose text no token ends."""
    made = tiny.engine()
    made._ends = frozenset()
    return made


def log(*p: float) -> torch.Tensor:
    return torch.tensor(p).log()


def weighted(*weights: float, alpha: float = 0.1):
    """A rule: the weighted sum over the branches."""

    def rule(steps: list[Step]) -> Fused:
        terms = [(weight, step.raw) for weight, step in zip(weights, steps, strict=True)]
        return contrast.fuse(steps[0].logits, terms, alpha)

    return rule


def two(engine: Engine, second: list[int] = IDS, **options: Options) -> list[Branch]:
    """Two branches; the second reads another prompt or has other options."""
    weak = options.get("weak", Options())
    return [
        Branch("strong", engine, engine.prefill(IDS)),
        Branch("weak", engine, engine.prefill(second, options=weak), weak),
    ]


def written(branches: list[Branch], rule, n: int = 12, seed: int = 3, **more) -> list[Token]:
    events = list(contrast.write(Context(seed), branches, rule, max_new=n, **more))
    return [event for event in events if isinstance(event, Token)]


def greedy(engine: Engine, n: int = 12, penalty: float = 1.0) -> list[int]:
    """The slow obvious version: the whole text is read again for every token."""
    ids = list(IDS)
    for _ in range(n):
        step = engine.step(engine.prefill(ids), filters=Filters(0.0, repetition_penalty=penalty))
        ids.append(int(step.logits.argmax()))
    return ids[len(IDS) :]


# Worked numbers


@pytest.mark.parametrize(
    ("terms", "kept", "p"),
    [
        ([(1.5, STRONG), (-0.5, WEAK)], 3, (0.5617, 0.3407, 0.0976, 0)),
        ([(3.0, STRONG), (-2.0, WEAK)], 3, (0.2631, 0.7153, 0.0216, 0)),
        ([(1.0, STRONG), (-1.0, WEAK)], 3, (0.2312, 0.6285, 0.1402, 0)),
        ([(1.0, STRONG), (3.0, torch.tensor([1.0, 2, 0, -2]))], 3, (0.1190, 0.8796, 0.0013, 0)),
        ([(1.0, STRONG)], 3, (0.6285, 0.2312, 0.1402, 0)),
    ],
)
def test_worked_combinations(terms, kept, p):
    fused = contrast.fuse(STRONG, terms, 0.1)
    assert fused.plausible == kept and not fused.null
    assert fused.scores.softmax(-1).tolist() == pytest.approx(p, abs=5e-5)


def test_a_worked_difference_of_log_probabilities():
    fused = contrast.fuse(STRONG, [(1.0, STRONG), (-1.0, WEAK)], 0.1)
    assert fused.scores.tolist() == pytest.approx([0.0180, 1.0180, -0.4820, -math.inf], abs=5e-5)
    assert STRONG.softmax(-1).tolist() == pytest.approx([0.6214, 0.2286, 0.1386, 0.0114], abs=5e-5)


def test_worked_divergences():
    p, q = log(0.7, 0.2, 0.1), log(0.1, 0.2, 0.7)
    assert float(contrast.jsd(p, q)) == pytest.approx(0.253102, abs=1e-6)
    final = log(0.90, 0.08, 0.02)
    others = torch.stack([log(1e-4, 1e-6, 0.999899), log(1e-6, 0.8, 0.199999)])
    assert contrast.jsd(others, final).tolist() == pytest.approx([0.6434, 0.5256], abs=5e-5)
    assert float(contrast.kl(p, q)) == pytest.approx(0.6 * math.log(7), abs=1e-6)


def test_divergences_at_their_ends():
    one, other = torch.tensor([0.0, -math.inf]), torch.tensor([-math.inf, 0.0])
    assert float(contrast.jsd(one, other)) == pytest.approx(math.log(2), abs=1e-6)
    assert float(contrast.jsd(one, one)) == float(contrast.kl(one, one)) == 0
    many = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)) * 100
    assert contrast.jsd(many, many).tolist() == pytest.approx([0] * 5, abs=1e-5)
    between = contrast.jsd(many, many.roll(1, 0))
    assert ((between >= 0) & (between <= math.log(2) + 1e-6)).all()


def test_divergence_equals_its_definition():
    rows = torch.randn(6, 300, generator=torch.Generator().manual_seed(1)) * 4
    p, q = rows[:3].double(), rows[3:].double()
    m = ((p.softmax(-1) + q.softmax(-1)) / 2).log()
    expected = (contrast.kl(p, m) + contrast.kl(q, m)) / 2
    assert torch.allclose(contrast.jsd(rows[:3], rows[3:]).double(), expected, atol=1e-5)


# Plausibility


def test_plausibility_cuts_where_it_says_and_is_never_empty():
    assert contrast.plausible(STRONG, 0.1).tolist() == [True, True, True, False]
    assert contrast.plausible(STRONG, 1).tolist() == [True, False, False, False]
    assert contrast.plausible(STRONG, 0).all()
    barred = torch.tensor([1.0, -math.inf])
    assert contrast.plausible(barred, 0).tolist() == [True, False]
    for scale in (1e-3, 1.0, 1e3):
        rows = torch.randn(20, 40, generator=torch.Generator().manual_seed(2)) * scale
        assert all(contrast.plausible(row, 1.0)[row.argmax()] for row in rows)


def test_a_constant_changes_nothing():
    plain = contrast.fuse(STRONG, [(1.5, STRONG), (-0.5, WEAK)], 0.1)
    moved = contrast.fuse(STRONG + 7, [(1.5, STRONG + 7), (-0.5, WEAK - 3)], 0.1)
    assert torch.allclose(plain.scores, moved.scores, atol=1e-5)


def test_null_only_where_nothing_is_left():
    assert contrast.fuse(STRONG, [(1.0, STRONG), (-1.0, STRONG + 1e-5)], 0.1).null
    assert not contrast.fuse(STRONG, [(1.0, STRONG), (-1.0, WEAK)], 0.1).null
    assert not contrast.fuse(STRONG, [(2.0, STRONG), (-1.0, STRONG)], 0.1).null
    assert not contrast.fuse(STRONG, [(1.0, STRONG), (-1.0, STRONG)], 1.0).null  # one token left


# Writing


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_strength_0_is_greedy(engine, penalty):
    """Of the model whose logits are log-probabilities: the penalty looks at the sign."""
    rule = weighted(1.0, 0.0)
    found = written(two(engine, IDS[::-1]), rule, repetition_penalty=penalty)
    ids, cursor = list(IDS), engine.prefill(IDS)
    for _ in range(12):
        scores = engine.step(cursor).logits.log_softmax(-1)
        id = int(Filters(0.0, repetition_penalty=penalty).apply(ids, scores).argmax())
        engine.push(cursor, id)
        ids.append(id)
    assert [token.id for token in found] == ids[len(IDS) :]
    if penalty == 1.0:
        assert ids[len(IDS) :] == greedy(engine)
        assert {token.rank for token in found} == {1}


def test_alpha_1_is_greedy_whatever_the_contrast(engine):
    found = written(two(engine, IDS[::-1]), weighted(5.0, -4.0, alpha=1.0))
    assert [token.id for token in found] == greedy(engine)


def test_a_contrast_changes_the_text(engine):
    found = written(two(engine, IDS[::-1]), weighted(2.0, -1.0, alpha=0.0))
    assert [token.id for token in found] != greedy(engine)
    assert any(token.rank > 1 for token in found)


def test_equal_branches_of_weight_1_sample_the_plausible(engine):
    """The same draws from the model's own distribution, restricted."""
    both = written(two(engine), weighted(2.0, -1.0), temperature=1.0)
    alone = written([Branch("strong", engine, engine.prefill(IDS))], weighted(1.0), temperature=1.0)
    assert [token.id for token in both] == [token.id for token in alone]
    assert [token.p_sampled for token in both] == pytest.approx(
        [token.p_sampled for token in alone], abs=1e-4
    )
    step = engine.step(engine.prefill(IDS))
    kept = contrast.plausible(step.logits, 0.1)
    p = step.logits.masked_fill(~kept, -math.inf).softmax(-1)
    assert both[0].p_sampled == pytest.approx(float(p[both[0].id]), abs=1e-4)


def test_agreement_is_noticed_once_and_the_strong_branch_decides(engine):
    branches = two(engine)
    events = list(contrast.write(Context(1), branches, weighted(1.0, -1.0), max_new=8))
    assert [event.id for event in events if isinstance(event, Token)] == greedy(engine, 8)
    assert len([event for event in events if isinstance(event, Note)]) == 1


def test_branches_go_on_together_with_the_one_chosen_token(engine):
    branches = two(engine, IDS[:9])
    start = [branch.cursor.pos for branch in branches]
    run = contrast.write(Context(1), branches, weighted(2.0, -1.0), max_new=6)
    for n, event in enumerate(run, start=1):
        grown = [branch.cursor.pos - at for branch, at in zip(branches, start, strict=True)]
        assert grown == [n, n]
        assert [branch.cursor.ids[-1] for branch in branches] == [event.id] * 2
        cached = [branch.cursor.cached for branch in branches]
        assert cached == [branch.cursor.pos - 1 for branch in branches]


def test_it_ends_where_the_model_does_or_the_context_is_full():
    engine = tiny.engine()
    engine._ends = frozenset(greedy(engine, 3)[2:])
    run = contrast.write(Context(1), two(engine), weighted(1.0, 0.0), max_new=9)
    events, why = [], ""
    try:
        while True:
            events.append(next(run))
    except StopIteration as stop:
        why = stop.value
    assert why == "end token" and len(events) <= 3
    engine._ends = frozenset()
    long = (IDS * 30)[: engine.context - 2]
    events = list(contrast.write(Context(1), two(engine, long), weighted(1.0, 0.0), max_new=9))
    assert len(events) == 2


# Branches


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2_moe"])
def test_a_batch_equals_one_by_one(family):
    engine = tiny.engine(family)
    weak = Options() if family == "llama" else Options(policy=rank(2))
    branches = two(engine, IDS[:11], weak=weak)
    if family != "llama":
        branches.append(Branch("one", engine, engine.prefill(IDS), Options(policy=top(1))))
    together = contrast.step_all(branches, together=True)
    apart = contrast.step_all(branches, together=False)
    for one, other in zip(together, apart, strict=True):
        assert torch.allclose(one.raw, other.raw, atol=1e-4 * float(other.raw.abs().max()))
    assert len({round(float(step.raw[0]), 3) for step in apart}) == len(branches)


def test_different_vocabularies_are_refused(engine):
    class Larger:
        """An engine whose vocabulary has one token more."""

        def __getattr__(self, name: str):
            return getattr(engine, name)

        def step(self, cursor, **options) -> Step:
            step = engine.step(cursor, **options)
            more = torch.cat([step.raw, torch.zeros(1)])
            return Step(step.pos, more, more, step.before, {})

        def verify(self, cursor, tree, **options):
            checked = engine.verify(cursor, tree, **options)
            more = torch.cat([checked.raw, checked.raw[:, :1]], dim=1)
            return replace(checked, raw=more)

    branches = two(engine)
    branches[1].engine = Larger()
    with pytest.raises(BadInput, match="different vocabularies"):
        next(contrast.write(Context(1), branches, weighted(1.0, -0.5), max_new=2))
    with pytest.raises(BadInput, match="different vocabularies"):
        contrast.score(branches, [[1, 2]], weighted(1.0, -0.5))


# Scoring


def test_scores_equal_teacher_forcing(engine):
    """The tree against a loop that steps each branch through each continuation."""
    branches, rule = two(engine, IDS[::-1]), weighted(2.0, -1.0, alpha=0.0)
    continuations = [list(b" yes"), list(b" yet"), list(b" no")]
    found = contrast.score(branches, continuations, rule)
    for ids, value in zip(continuations, found, strict=True):
        cursors = [engine.fork(branch.cursor) for branch in branches]
        total = 0.0
        for id in ids:
            total += float(rule([engine.step(cursor) for cursor in cursors]).scores[id])
            for cursor in cursors:
                engine.push(cursor, id)
        assert value == pytest.approx(total, abs=1e-2, rel=1e-4)
    assert [branch.cursor.ids for branch in branches] == [IDS, IDS[::-1]]
    assert contrast.score(branches, continuations, rule) == pytest.approx(found, abs=1e-3)


def test_what_is_not_plausible_has_a_finite_score(engine):
    least = int(engine.step(engine.prefill(IDS)).logits[: engine.vocabulary.size].argmin())
    (found,) = contrast.score(two(engine), [[least]], weighted(1.0, 0.0, alpha=0.5))
    assert found == contrast.MASKED


# Events


def test_the_table_shows_every_branch_and_their_contrast(engine):
    tables, numbers = [], []

    def say(at):
        tables.append((contrast.table(at), at))
        numbers.append(contrast.number(at.token.pos, "a", "nats", 1 / 3))
        return (tables[-1][0], numbers[-1])

    branches = two(engine, IDS[::-1])
    events = list(contrast.write(Context(1), branches, weighted(1.5, -0.5), max_new=2, say=say))
    assert [type(event).__name__ for event in events] == ["Token", "Lens", "Scores"] * 2
    table, at = tables[0]
    assert table.name == "branches" and table.rows == ("strong", "weak", "contrast")
    assert [id for id, _, _ in table.top[0]] == [id for id, _, _ in at.token.top]
    assert table.scores[0] == pytest.approx(at.token.logprob, abs=1e-5)
    assert table.top[2][0][0] == at.token.id  # greedy
    assert len(table.top[2]) == min(10, at.fused.plausible)
    assert all(math.isfinite(score) for score in table.scores)
    assert numbers[0].over == (at.token.pos,) and numbers[0].values == (0.333333,)
