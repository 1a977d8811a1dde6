"""Eight virtual devices against one: the same losses, gradients and updated weights on every shape of the mesh.

Float32 sums come in another order on every mesh; the tolerances are about ten times the differences seen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).parent / "programs" / "mesh_training.py"
MESHES = ("8x1x1x1", "1x8x1x1", "1x1x8x1", "1x1x1x8", "2x2x2x1", "1x2x2x2", "2x1x2x2")
#: Largest difference of an array, relative to the array's largest entry.
TOLERANCE = 2e-5

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the program wrote."""
    folder = tmp_path_factory.mktemp("mesh")
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # it compiles sixteen training steps
        "PYTHONPATH": str(PROGRAM.parents[2]),
    }
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("mesh", [*MESHES, "recomputing"])
def test_a_mesh_computes_what_one_device_does(trained: Path, mesh: str) -> None:
    """Guards every collective of a step: losses, gradients (dropout on, documents packed) and weights after two updates."""
    with np.load(trained / "1x1x1x1.npz") as one, np.load(trained / f"{mesh}.npz") as found:
        assert set(one) == set(found)
        for name in one:
            np.testing.assert_allclose(
                found[name], one[name], atol=TOLERANCE * np.abs(one[name]).max(), rtol=0, err_msg=name
            )


@pytest.mark.parametrize("mesh", MESHES)
def test_gradients_and_moments_lie_like_their_parameter(trained: Path, mesh: str) -> None:
    """Guards memory: nothing that is shaped like a parameter is whole on a device where the parameter is not."""
    layout = json.loads((trained / "layout.json").read_text())[mesh]
    data, fsdp, seq, tensor = (int(size) for size in mesh.split("x"))
    assert layout == {"params": True, "grads": True, "moments": True, "share_of_up": 1 / (fsdp * tensor)}
    assert data * fsdp * seq * tensor == 8
