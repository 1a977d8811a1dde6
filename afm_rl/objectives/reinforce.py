"""REINFORCE with a running-average baseline (Williams, 1992), which the paper's leave-one-out is measured against (E.2).

    L = -(1/N) sum_i stop_grad[rho_i (R_i - b)] log pi_theta(y_i)

b is the average reward of the iterations before, decayed; rho_i, the sequence ratio to theta_k, is 1 at the first inner
step and keeps the gradient exact at later ones. It is MDLOO's surrogate without its KL (gamma 0) and with this baseline.
The first iteration has none before it and takes its own mean, which scales the expected gradient by 1 - 1/N.
Shapes: P prompts, G responses per prompt.
"""

from __future__ import annotations

import numpy as np


def running_average(
    reward_PG: np.ndarray, valid_PG: np.ndarray, average: float | None, *, decay: float
) -> tuple[np.ndarray, float | None]:
    """Advantages [P, G] against the average before this iteration (None: there is none), and the average after it.

    Zero where `valid_PG` is False or the reward not finite. One response to a prompt is enough here.
    """
    valid_PG = np.asarray(valid_PG, bool) & np.isfinite(reward_PG)
    if not valid_PG.any():
        return np.zeros_like(reward_PG), average
    mean = float(reward_PG[valid_PG].mean())
    baseline = mean if average is None else average
    return np.where(valid_PG, reward_PG - baseline, 0), decay * baseline + (1.0 - decay) * mean
