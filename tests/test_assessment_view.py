"""The card of an answer's signals: directions, costs, sentences, and nothing unescaped."""

from analyzers.judging import p_true, token_signals
from analyzers.trace import Judgement, Token
from visualizations import assessment as view
from visualizations import inside


def token(pos, text):
    return Token(pos, 1, text, text.encode().hex(), -1.0, 1.0, 1, 0.5, 1.0, ())


def signal(name="mean_logprob", target="answer", score=-0.5, scale=None, **more):
    scale = scale or token_signals.SIGNALS[name]
    detail = {"first": 0, "last": 1, "unit": "nats"}
    return Judgement(
        f"{name} of {target}",
        target,
        name,
        score,
        scale,
        detail=detail | more.pop("detail", {}),
        **more,
    )


def asked(**more):
    return signal("p_true", score=0.62, scale=p_true.SIGNALS["p_true"], **more)


def test_every_signal_has_its_direction_and_cost():
    html = view.render([signal(), signal("mean_entropy", score=1.25), asked(passes=3, ms=120.4)])
    assert html.count("higher = surer") == 2
    assert html.count("lower = surer") == 1
    assert "−0.50 nats" in html
    assert "3 passes, 120 ms" in html
    assert html.count("free") == 2
    assert html.count("not measured yet") == 3


def test_a_probability_has_a_bar_and_both_orders():
    html = view.render([asked(label_mass=0.12, detail={"first": 0.9, "swapped": 0.34})])
    assert "width:62.0%" in html
    assert "true as (A) 90" in html and "as (B) 34" in html
    assert 'class="warn">label mass 12' in html
    assert "warn" not in view.render([asked(label_mass=0.9)])


def test_how_the_draws_fell_is_told_beside_their_agreement():
    votes = {"votes": (6, 3, 1)}
    scale = (0.0, 1.0, "surer", True)
    html = view.render([signal("self_consistency", score=0.6, scale=scale, detail=votes)])
    assert "3 different answers in 10 draws" in html


def test_a_score_that_could_not_be_read():
    assert "could not be read" in view.render([signal(score=None)])


def test_sentences_are_tinted_by_their_mean_and_lead_to_their_place():
    tokens = [token(pos, text) for pos, text in enumerate(["Sure.", " Not", " at", " <b>all</b>."])]
    events = [
        *tokens,
        signal(),
        signal(target="sentence 1", score=-0.05, detail={"first": 0, "last": 0}),
        signal(target="sentence 2", score=-2.0, detail={"first": 1, "last": 3}),
    ]
    html = view.render(events)
    assert 'class="d1" data-go="0"' in html
    assert 'class="d5" data-go="1"' in html
    assert "<b>all" not in html
    assert "Sentence by sentence" not in view.render(events[:-1])


def test_other_judgements_are_no_signals():
    other = Judgement("e", "answer", "a program", 1.0, (0.0, 1.0, "better", False))
    of_another = signal(target="q1")
    assert not view.fits([other, of_another])
    assert view.fits([signal()])
    assert view in inside.fitting([signal()])


def test_a_judge_with_a_wicked_name_is_text():
    wicked = Judgement("e", "answer", "<script>x</script>", 0.1, (0.0, 1.0, "surer", True))
    assert "<script>" not in view.render([wicked])


def known(auroc, lo, hi, **more):
    return {"trust": {"auroc": auroc, "lo": lo, "hi": hi, "data": "<i>", "n": 1860, **more}}


def test_the_badge_says_what_was_measured():
    good = view.render([asked(detail=known(0.83, 0.76, 0.88, ece=0.17))])
    assert 'class="badge ok">AUROC 0.83 [0.76, 0.88] · ECE 0.17<' in good
    assert "on &lt;i&gt;, n = 1,860" in good
    assert "at chance: AUROC 0.52" in view.render([asked(detail=known(0.52, 0.4, 0.6, ece=None))])
    assert "misleads: AUROC 0.35" in view.render([asked(detail=known(0.35, 0.3, 0.4))])
    assert "not measured yet" in view.render([asked(detail={"trust": {"auroc": "x"}})])
