"""The AFM optimizer against a float64 NumPy reference, its four traps and the skip rule; AdamW against torch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from afm_rl.optimizer import adamw, afm_optimizer, linear_scale_tree, skipped_steps
from afm_rl.schedules import constant, warmup_cosine

FIXTURES = Path(__file__).parent / "fixtures"
LR, DECAY, WIDTH = 0.01, 3.16e-4, 3072

Flat = dict[str, np.ndarray]


def nest(flat: Flat) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def make_params() -> Flat:
    rng = np.random.default_rng(0)
    shapes = {"embed/weight": (5, 4), "layers/attn_norm": (2, 4), "layers/q": (2, 3, 4), "final_norm": (4,)}
    return {path: rng.normal(size=shape) for path, shape in shapes.items()}


def make_grads(steps: int = 6) -> list[Flat]:
    """Sizes that change over the steps, and differently in the two layers: both clips act in some steps only."""
    rng = np.random.default_rng(1)
    grads = []
    for size in [0.01, 0.02, 0.1, 5.0, 0.3, 1e-4][:steps]:
        flat = {path: size * rng.normal(size=p.shape) for path, p in make_params().items()}
        flat["layers/q"][1] /= 1.0 + 100.0 * size
        grads.append(flat)
    return grads


def reference(params: Flat, grads: list[Flat], wrong: str = "") -> Flat:
    """Section 3.2.4 in NumPy, one named mistake at a time."""
    p = {k: v.copy() for k, v in params.items()}
    v, m = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
    for t, g in enumerate(grads, start=1):
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        s = min(t / 3, 1.0)
        for k in p:
            clipped = g[k] * min(1.0, 1.0 / norm)
            v[k] = 0.95 * v[k] + 0.05 * (clipped**2 + 1e-30)
            u = clipped / np.sqrt(v[k] / (1 if wrong == "v not corrected" else 1 - 0.95**t))
            axes = tuple(range(1, u.ndim)) if k.startswith("layers/") and wrong != "block over layers" else None
            size = (np.sum if wrong == "l2 block" else np.mean)(u**2, axis=axes, keepdims=True) ** 0.5
            u = u / np.maximum(1.0, size)
            m[k] = 0.95 * m[k] + 0.05 * u
            mup = 768 / WIDTH if k == "layers/q" else 1.0
            momentum = m[k] / (1 - 0.95**t) if wrong == "m corrected" else m[k]
            decay = DECAY * p[k] * (LR if wrong == "decay times lr" else 1.0)
            if wrong == "no decay of norms" and "norm" in k:
                decay = 0.0
            p[k] = p[k] - s * (LR * mup * momentum + decay)
    return p


def run(optimizer: optax.GradientTransformation, params: Any, grads: list[Any]) -> tuple[Any, Any]:
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    for g in grads:
        updates, state = step(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def afm(**changes: Any) -> optax.GradientTransformation:
    return afm_optimizer(**{"peak_lr": LR, "schedule": constant(3), "weight_decay": DECAY, "width": WIDTH, **changes})


@functools.cache
def afm_result(dtype: Any) -> dict[str, Any]:
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), nest(make_params()))
    return run(afm(), params, [jax.tree.map(lambda x: jnp.asarray(x, dtype), nest(g)) for g in make_grads()])[0]


def distance(tree: Any, flat: Flat) -> float:
    """Largest difference, relative to the largest movement of a parameter."""
    moved = max(np.abs(flat[k] - p).max() for k, p in make_params().items())
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), tree, nest(flat)))) / moved


def test_afm_optimizer_matches_the_reference() -> None:
    """Guards every line of 3.2.4: clip, corrected v, block clip, uncorrected m, muP, decay, schedule."""
    with jax.enable_x64(True):
        assert distance(afm_result(jnp.float64), reference(make_params(), make_grads())) < 1e-6
    assert distance(afm_result(jnp.float32), reference(make_params(), make_grads())) < 1e-4


@pytest.mark.parametrize(
    "wrong",
    ["l2 block", "block over layers", "decay times lr", "no decay of norms", "m corrected", "v not corrected"],
)
def test_the_reference_tells_the_usual_mistakes_apart(wrong: str) -> None:
    """Guards the test above: each trap moves the parameters by far more than its tolerance."""
    assert distance(afm_result(jnp.float32), reference(make_params(), make_grads(), wrong)) > 2e-3


def test_eps_is_inside_the_square_root() -> None:
    """Guards u = g / sqrt(g^2 + 1e-30): 1e-16 gives 1/sqrt(101), where eps outside the root gives 1, and 0 stays 0."""
    grads = {"w": jnp.float32([1e-16, 1e-10, 0.0])}
    params = {"w": jnp.zeros(3, jnp.float32)}
    moved, _ = run(afm(schedule=constant(), width=None, weight_decay=0.0), params, [grads])
    u = -np.asarray(moved["w"]) / (LR * 0.05)
    np.testing.assert_allclose(u, [101**-0.5, 1.0, 0.0], rtol=1e-5)


def test_block_clip_is_the_rms_of_each_layer() -> None:
    """Guards the layer axis: a burst in one stacked layer must not shrink the other layer's update."""
    quiet = jnp.full((1, 3, 4), 1e-3)
    burst = [{"layers": {"q": jnp.concatenate([size * quiet, quiet])}} for size in (1.0, 100.0)]
    params = {"layers": {"q": jnp.zeros((2, 3, 4))}}
    moved, _ = run(afm(schedule=constant(), weight_decay=0.0, width=None), params, burst)
    m = -np.asarray(moved["layers"]["q"]) / LR
    # Two updates of RMS 1: m = 0.05, then 0.95 * 0.05 + 0.05; the sum is what the parameters moved by.
    np.testing.assert_allclose(m, 0.05 + 0.0975, rtol=1e-5)


def test_weight_decay_follows_the_schedule_not_the_rate() -> None:
    """Guards decoupled decay: with zero gradients p shrinks by s_t * decay for every parameter, whatever the rate."""
    params = nest(make_params())
    zeros = jax.tree.map(jnp.zeros_like, params)
    moved, _ = run(afm(peak_lr=123.0, schedule=constant(2)), params, [zeros, zeros])
    expected = jax.tree.map(lambda p: p * (1 - 0.5 * DECAY) * (1 - DECAY), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), moved, expected)


def test_the_first_update_uses_the_first_warmup_step() -> None:
    """Guards the schedule's count: update 1 of a warm-up of 4 has factor 1/4, and the last one the end fraction."""
    params, grads = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}
    schedule = warmup_cosine(4, 5, end_fraction=0.1)
    sizes = []
    optimizer = afm(schedule=schedule, width=None, b1=0.0)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(5):
        updates, state = update(grads, state, params)
        sizes.append(-float(updates["w"][0]) / LR)
    np.testing.assert_allclose(sizes, [0.25, 0.5, 0.75, 1.0, 0.1], rtol=1e-5)


@pytest.mark.parametrize("optimizer", [afm(), adamw(peak_lr=LR, schedule=constant(3), skip_norm=100.0)])
def test_a_bad_step_is_skipped_and_counted(optimizer: optax.GradientTransformation) -> None:
    """Guards the skip rule: norm >= 100 or not finite leaves parameters, state and schedule as if it never came."""
    params = {"w": jnp.ones(4)}
    good = [{"w": jnp.full(4, x)} for x in (0.1, 0.2)]
    expected, clean = run(optimizer, params, good)
    for bad in (np.nan, np.inf, 60.0):
        actual, state = run(optimizer, params, [good[0], {"w": jnp.array([bad, 80.0, 0.0, 0.0])}, good[1]])
        np.testing.assert_array_equal(actual["w"], expected["w"])
        jax.tree.map(np.testing.assert_array_equal, state.inner, clean.inner)
        assert (int(skipped_steps(clean)), int(skipped_steps(state))) == (0, 1)


def test_a_norm_just_below_the_limit_is_clipped_not_skipped() -> None:
    """Guards the boundary of the skip rule at 100."""
    _, state = run(afm(), {"w": jnp.ones(1)}, [{"w": jnp.array([99.9])}, {"w": jnp.array([100.0])}])
    assert int(skipped_steps(state)) == 1
    _, state = run(adamw(peak_lr=LR, schedule=constant()), {"w": jnp.ones(1)}, [{"w": jnp.array([1e6])}])
    assert int(skipped_steps(state)) == 0


def test_mup_scales_linear_layers_only() -> None:
    """Guards muParam (simple): 768/width for matrices of models, adapters, heads; 1 for embeddings, norms, biases."""
    tree = {
        "trunk": {
            "embed": {"weight": np.zeros((7, 4))},
            "lm_head": {"weight": np.zeros((7, 4))},
            "layers": {"attn_norm": np.zeros((2, 4)), "q": {"a": np.zeros((2, 1, 4)), "b": np.zeros((2, 4, 1))}},
            "final_norm": np.zeros(4),
        },
        "heads": {"reward": np.zeros((1, 4)), "bias": np.zeros(3)},
        "scores": np.zeros((2, 9)),
    }
    assert linear_scale_tree(tree, 3072) == {
        "trunk": {
            "embed": {"weight": 1.0},
            "lm_head": {"weight": 1.0},
            "layers": {"attn_norm": 1.0, "q": {"a": 0.25, "b": 0.25}},
            "final_norm": 1.0,
        },
        "heads": {"reward": 0.25, "bias": 1.0},
        "scores": 1.0,
    }
    with pytest.raises(ValueError, match="width"):
        linear_scale_tree(tree, 0)


def test_adamw_matches_torch() -> None:
    """Guards AdamW with clipping against five float64 steps of torch.optim.AdamW."""
    z = np.load(FIXTURES / "adamw.npz")
    options = {name: float(z[name]) for name in ("b1", "b2", "eps", "weight_decay")}
    with jax.enable_x64(True):
        optimizer = adamw(peak_lr=float(z["lr"]), schedule=constant(), clip_norm=float(z["clip"]), **options)
        params = {"w": jnp.asarray(z["weights_f64"][0])}
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for step, g in enumerate(z["grads_f64"], start=1):
            updates, state = update({"w": jnp.asarray(g)}, state, params)
            params = optax.apply_updates(params, updates)
            np.testing.assert_allclose(params["w"], z["weights_f64"][step], rtol=0, atol=1e-8)
