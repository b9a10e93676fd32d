"""Reward heads: scores by hand, the loss and its gradient, what each penalty does, intervals, the file format."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import check_grad

from ctrlray.errors import ConfigError
from ctrlray.rewards import measure
from ctrlray.rewards.embedded import packaged_heads
from ctrlray.rewards.heads import (
    Answers,
    Heads,
    Objective,
    Penalties,
    Preferences,
    fit_heads,
    squared_cosine,
    within,
)

PLAIN = Penalties(l2=0.1, cross=0, length=0, pair_length=0, between=0)


def small_heads() -> Heads:
    arrays = {"mean": [1.0, 2.0], "scale": [2.0, 0.5], "weights": [[1.0, 3.0], [0.0, -1.0]], "bias": [0.5, 0.0]}
    return Heads(("a", "b"), (3,), ("last",), **{k: np.array(v, np.float32) for k, v in arrays.items()}, fingerprint="f00d")


def world(seed: int = 0, pairs: int = 300, prompts: int = 60, each: int = 4):
    """Two attributes that oppose each other: feature 0 is a's own, 1 b's own, 2 helps a and harms b, 3 is length."""
    rng = np.random.default_rng(seed)
    taste = {"a": np.array([1.0, 0, 2, 0.7, 0, 0]), "b": np.array([0, 1.0, -2, -0.7, 0, 0])}
    preferences = {}
    for name, w in taste.items():
        x, y = rng.normal(size=(2, pairs, 6))
        won = rng.random(pairs) < 1 / (1 + np.exp(-(x - y) @ w))
        chosen, rejected = np.where(won[:, None], x, y), np.where(won[:, None], y, x)
        preferences[name] = Preferences(chosen, rejected, chosen[:, 3] - rejected[:, 3])
    features = rng.normal(size=(prompts * each, 6))
    return preferences, Answers(features, np.repeat(np.arange(prompts), each), features[:, 3])


def fit(penalties: Penalties, pool: bool = True) -> tuple[Heads, dict[str, Preferences], Answers]:
    preferences, answers = world()
    heads = fit_heads(
        preferences, answers if pool else None, penalties, layers=[1], positions=["last"], fingerprint="x"
    )
    return heads, preferences, answers


def test_score_by_hand():
    # ((3, 1) - mean) / scale = (1, -2);  a: 1*1 + 3*-2 + 0.5 = -4.5;  b: 0*1 + -1*-2 + 0 = 2
    scores = small_heads().score(np.array([[3.0, 1.0]]))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [[-4.5, 2.0]])


def test_score_refuses_other_features():
    with pytest.raises(ConfigError, match="2 features"):
        small_heads().score(np.zeros((1, 3)))


def test_file_round_trip(tmp_path):
    heads, path = small_heads(), tmp_path / "h.safetensors"
    heads.save(path)
    again = Heads.load(path)
    for name in ("attributes", "layers", "positions", "fingerprint", "response_format"):
        assert getattr(again, name) == getattr(heads, name)
    for name in ("mean", "scale", "weights", "bias"):
        np.testing.assert_array_equal(getattr(again, name), getattr(heads, name))
    first = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "h.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="reward train"):
        Heads.load(path)


def test_within_by_hand():
    # Groups 7: (1 + 3) / 2 = 2; 9: 5.
    np.testing.assert_allclose(within(np.array([1.0, 5.0, 3.0]), np.array([7, 9, 7])), [-1, 0, 1])


def test_squared_cosine_by_hand():
    # u.v = 1, |u|^2 = 2, |v|^2 = 1: 1/2. Gradient in v: 2*1/(2*1) u - 2*(1/2)/1 v = (1, 1) - (1, 0) = (0, 1).
    value, _, by_v = squared_cosine(np.array([1.0, 1.0]), np.array([1.0, 0.0]))
    assert value == pytest.approx(0.5)
    np.testing.assert_allclose(by_v, [0.0, 1.0])
    assert squared_cosine(np.zeros(2), np.ones(2))[0] == 0.0


def test_bradley_terry_loss_by_hand():
    # One pair per attribute with feature gap 1 in one dimension, weight ln 3: margin ln 3, loss ln(1 + 1/3) = ln(4/3).
    objective = Objective([np.ones((1, 1))], [np.zeros(1)], np.zeros((0, 1)), np.zeros(0), replace(PLAIN, l2=0.2))
    loss, grad = objective(np.array([math.log(3)]))
    assert loss == pytest.approx(math.log(4 / 3) + 0.1 * math.log(3) ** 2)
    # d/dw: -sigmoid(-margin) + l2 * w = -1/4 + 0.2 ln 3
    assert grad == pytest.approx(-0.25 + 0.2 * math.log(3))


def test_gradient_of_all_terms():
    preferences, pool = world(pairs=20, prompts=6)
    gaps = [p.chosen - p.rejected for p in preferences.values()]
    lengths = [p.length_gap for p in preferences.values()]
    objective = Objective(
        gaps, lengths, within(pool.features, pool.prompt), within(pool.length, pool.prompt), Penalties(0.3, 0.7, 1.1, 0.9, 1.3)
    )
    for seed in range(3):
        at = np.random.default_rng(seed).normal(size=12)
        assert check_grad(lambda w: objective(w)[0], lambda w: objective(w)[1], at) < 1e-5


def test_chosen_scores_higher():
    """Fails when the sign of the margin is broken anywhere between the pairs and the scores."""
    heads, preferences, _ = fit(PLAIN)
    for i, pairs in enumerate(preferences.values()):
        assert measure.accuracy(measure.margin(heads, pairs)[:, i])[1] > 0.75
    assert heads.weights[0, 2] > 0 > heads.weights[1, 2]


def test_heads_oppose_without_the_penalty_and_not_with_it():
    plain, _, pool = fit(PLAIN)
    free, preferences, _ = fit(replace(PLAIN, between=3))
    assert measure.correlation(*plain.score(pool.features).T, pool.prompt, seed=0)[0] < -0.6
    assert abs(measure.correlation(*free.score(pool.features).T, pool.prompt, seed=0)[0]) < 0.15
    for i, pairs in enumerate(preferences.values()):
        assert measure.accuracy(measure.margin(free, pairs)[:, i])[1] > 0.6


def test_length_penalty():
    def r(heads: Heads, pool: Answers) -> float:
        return abs(measure.correlation(heads.score(pool.features)[:, 0], pool.length, pool.prompt, seed=0)[0])

    plain, _, pool = fit(PLAIN)
    free, _, _ = fit(replace(PLAIN, length=3))
    assert r(plain, pool) > 0.2 > 0.1 > r(free, pool)


def test_pair_length_penalty():
    def r(heads: Heads, preferences: dict[str, Preferences]) -> float:
        return max(squared_cosine(measure.margin(heads, p)[:, 0], p.length_gap)[0] for p in preferences.values())

    plain, preferences, _ = fit(PLAIN)
    free, _, _ = fit(replace(PLAIN, pair_length=3))
    assert r(plain, preferences) > 0.05 > 0.01 > r(free, preferences)


def test_cross_penalty_makes_heads_neutral_on_the_others_pairs():
    def bias(heads: Heads, preferences: dict[str, Preferences]) -> float:
        margins = measure.margin(heads, preferences["b"])[:, 0]
        return abs(float(margins.mean() / margins.std()))

    plain, preferences, _ = fit(PLAIN)
    free, _, _ = fit(replace(PLAIN, cross=3))
    assert bias(plain, preferences) > 0.5 > 0.1 > bias(free, preferences)


def test_scores_are_centred_and_pool_is_optional():
    heads, _, pool = fit(PLAIN)
    np.testing.assert_allclose(heads.score(pool.features).mean(0), 0, atol=1e-5)
    heads, preferences, _ = fit(PLAIN, pool=False)
    every = np.concatenate([x for p in preferences.values() for x in (p.chosen, p.rejected)])
    np.testing.assert_allclose(heads.score(every).mean(0), 0, atol=1e-5)


def test_fit_does_not_depend_on_scale_of_features():
    preferences, pool = world()
    factor = np.array([1, 10, 0.1, 3, 1, 7])
    scaled = {k: Preferences(p.chosen * factor, p.rejected * factor, p.length_gap) for k, p in preferences.items()}
    options = {"layers": [1], "positions": ["last"], "fingerprint": "x"}
    by = Penalties(0.1, 1, 1, 1, 1)
    one = fit_heads(preferences, pool, by, **options).score(pool.features)
    two = fit_heads(scaled, Answers(pool.features * factor, pool.prompt, pool.length), by, **options)
    np.testing.assert_allclose(two.score(pool.features * factor), one, atol=2e-3)


def test_constant_features_do_no_harm():
    preferences, _ = world()
    keep = np.array([1, 1, 1, 1, 1, 0])
    flat = {k: Preferences(p.chosen * keep, p.rejected * keep, p.length_gap) for k, p in preferences.items()}
    heads = fit_heads(flat, None, PLAIN, layers=[1], positions=["last"], fingerprint="x")
    assert np.isfinite(heads.weights).all() and heads.weights[0, 5] == 0


def test_wilson_by_hand():
    # 50 of 100, z = 1.96: centre 0.5, half = 1.96 / 1.038416 * sqrt(0.0025 + 3.8416 / 40000) = 0.0962 -> [0.4038, 0.5962]
    assert measure.wilson(50, 100) == pytest.approx([0.5, 0.4038, 0.5962], abs=1e-4)
    assert measure.wilson(0, 10)[1] == pytest.approx(0, abs=1e-9)


def test_accuracy_counts_ties_as_half():
    assert measure.accuracy(np.array([1.0, -1.0, 0.0, 2.0]))[0] == pytest.approx(2.5 / 4)


def test_correlation_ignores_differences_between_prompts():
    # Within both prompts v falls as u rises; across prompts both rise.
    u, v = np.array([0.0, 1.0, 10.0, 11.0]), np.array([1.0, 0.0, 11.0, 10.0])
    assert measure.correlation(u, v, np.array([0, 0, 1, 1]), seed=0)[0] == pytest.approx(-1)


def test_packaged_heads():
    path = packaged_heads()
    heads = Heads.load(path)
    assert path.stat().st_size < 1_000_000
    assert heads.attributes == ("helpfulness", "harmlessness")
    assert heads.weights.shape == (2, len(heads.layers) * len(heads.positions) * 576)
    assert all(np.isfinite(x).all() for x in (heads.mean, heads.scale, heads.weights, heads.bias))
    # Float32 in, float32 out, and no score explodes on the training distribution's own spread.
    spread = np.random.default_rng(0).normal(size=(50, heads.mean.size)) * heads.scale + heads.mean
    assert np.abs(heads.score(spread)).max() < 100
