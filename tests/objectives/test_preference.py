"""DPO and IPO against TRL's values and the formulas' own float64 ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.objectives.dpo import dpo_loss
from afm_rl.objectives.ipo import ipo_loss

FIXTURES = Path(__file__).parents[1] / "fixtures"


def make_pairs() -> tuple[dict[str, jax.Array], Any]:
    """The fixture's six pairs (call under x64), and the fixture."""
    z = np.load(FIXTURES / "preference_losses.npz")
    policy, ref = jnp.asarray(z["policy_logps_f64"]), jnp.asarray(z["ref_logps_f64"])
    names = ("policy_chosen_B", "policy_rejected_B", "ref_chosen_B", "ref_rejected_B")
    return dict(zip(names, (policy[:6], policy[6:], ref[:6], ref[6:]), strict=True)), z


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_matches_trl(beta: float) -> None:
    """Guards the sign, beta and the mean over pairs."""
    with jax.enable_x64(True):
        pairs, z = make_pairs()
        loss = dpo_loss(**pairs, beta=beta)
    np.testing.assert_allclose(loss, z[f"dpo_per_pair/beta{beta}"].mean(), rtol=1e-12)
    np.testing.assert_allclose(loss, z[f"trl_loss/sigmoid/beta{beta}"], rtol=2e-4)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_ipo_uses_sums_not_means(beta: float) -> None:
    """Guards the IPO paper's formula: TRL's length-normalised value is a different number."""
    with jax.enable_x64(True):
        pairs, z = make_pairs()
        loss = ipo_loss(**pairs, beta=beta)
    np.testing.assert_allclose(loss, z[f"ipo_sum_per_pair/beta{beta}"].mean(), rtol=1e-12)
    assert abs(float(loss) / z[f"trl_loss/ipo/beta{beta}"] - 1) > 0.5


def test_dpo_stays_finite_far_from_the_reference() -> None:
    """Guards log sigmoid: a margin of -1e4 nats is a loss of beta * 1e4 with a gradient, not inf."""
    zero = jnp.zeros(1)
    far = {"policy_rejected_B": zero, "ref_chosen_B": zero, "ref_rejected_B": zero, "beta": 0.1}
    loss, slope = jax.value_and_grad(lambda c: dpo_loss(policy_chosen_B=c, **far))(jnp.array([-1e4]))
    np.testing.assert_allclose(loss, 1e3, rtol=1e-6)
    np.testing.assert_allclose(slope, -0.1, rtol=1e-6)


def test_ipo_is_zero_at_its_target_margin() -> None:
    """Guards the target 1/(2 beta), whichever side moved."""
    zero = jnp.zeros(2)
    loss = ipo_loss(
        policy_chosen_B=jnp.array([5.0, 0.0]),
        policy_rejected_B=jnp.array([0.0, -5.0]),
        ref_chosen_B=zero,
        ref_rejected_B=zero,
        beta=0.1,
    )
    assert float(loss) == 0.0


@pytest.mark.parametrize("objective", [dpo_loss, ipo_loss])
def test_bad_arguments_are_refused(objective: Any) -> None:
    """Guards against a beta of zero and against silent broadcasting of the reference."""
    pair = dict.fromkeys(("policy_chosen_B", "policy_rejected_B", "ref_chosen_B", "ref_rejected_B"), jnp.zeros(3))
    with pytest.raises(ValueError, match="beta"):
        objective(**pair, beta=0.0)
    with pytest.raises(ValueError, match="ref_chosen_B must have shape"):
        objective(**{**pair, "ref_chosen_B": jnp.zeros((3, 1))}, beta=0.1)
