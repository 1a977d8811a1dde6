"""Sequence-parallel attention on 8 virtual devices equals one device, and really cuts the sequence.

Outputs and gradients of q, k and v together, relative to the largest element of each; in float64 to the last digits, so that
no mask can be wrong in one place; in float32 within 2e-6.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "programs" / "mesh_attention.py"
FAST_MESHES = ("2x2x2x1", "1x1x8x1", "1x1x4x2", "2x1x2x2")
MESHES = ("1x8x1x1", "2x2x2x1", "1x2x2x2", "1x1x8x1", "1x1x4x2", "2x1x2x2")


def measured(kind: str) -> dict[str, Any]:
    """The program's facts, from a process of 8 devices."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(PROGRAM), kind]
    run = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return measured("fast")


@pytest.fixture(scope="module")
def slow_facts() -> dict[str, Any]:
    return measured("slow")


@pytest.mark.parametrize("mesh", FAST_MESHES)
def test_packed_documents_on_a_mesh(facts: dict[str, Any], mesh: str) -> None:
    """Guards the shard's offset in the causal mask, the gathered segments, and the sum of the key and value gradients."""
    assert facts["packed"][mesh]["difference"] < 1e-14


@pytest.mark.parametrize("mesh", FAST_MESHES)
def test_the_output_is_cut_like_the_activations(facts: dict[str, Any], mesh: str) -> None:
    """Guards the specs: batch over data and fsdp, time over seq, heads over tensor."""
    data, fsdp, seq, tensor = (int(size) for size in mesh.split("x"))
    assert facts["packed"][mesh]["parts"] == [data * fsdp, seq, tensor, 1]


def test_only_keys_and_values_are_gathered(facts: dict[str, Any]) -> None:
    """Guards the choice: [1, 1024, 2 kv heads, 16] is gathered, queries (4 heads) stay, and a device has its own scores."""
    compiled = facts["compiled"]["1x1x8x1"]
    assert compiled["gathered"] == [[1, 1024, 2, 16]]
    assert compiled["other_collectives"] == []
    assert compiled["largest_array"] == 4 * (1024 // 8) * 1024


def test_memory_shrinks_with_the_sequence_axis(facts: dict[str, Any]) -> None:
    """Guards against a sequence axis that is only a label: 8 devices need a third or less of one device's memory each."""
    one, eight = (facts["compiled"][mesh]["temp_bytes"] for mesh in ("1x1x1x1", "1x1x8x1"))
    assert eight * 3 < one


@pytest.mark.parametrize(("case", "parts"), [("batch and heads", [1, 2, 1, 1]), ("time", [2, 1, 2, 1])])
def test_what_does_not_divide_stays_whole(facts: dict[str, Any], case: str, parts: list[int]) -> None:
    """Guards odd evaluation batches and head counts: correct, and the other dimensions still cut."""
    assert facts["odd"][case]["difference"] < 1e-14
    assert facts["odd"][case]["parts"] == parts


def test_fewer_kv_heads_than_the_tensor_axis(facts: dict[str, Any]) -> None:
    """Guards which kv head a device takes: 8 query and 2 kv heads over 4 devices."""
    assert facts["few_kv_heads"]["difference"] < 1e-14
    assert facts["few_kv_heads"]["parts"] == [1, 2, 4, 1]


def test_inside_scan_checkpoint_and_grad(facts: dict[str, Any]) -> None:
    """Guards the use in the model: a scan over rematerialised layers, differentiated."""
    assert facts["layers"] < 1e-14


def test_chunks_of_a_shard(facts: dict[str, Any]) -> None:
    """Guards long context on a mesh: a shard's own chunks, with the shard's offset."""
    assert facts["chunked"]["difference"] < 1e-14


def test_types_pass_through(facts: dict[str, Any]) -> None:
    """Guards the compute type: bfloat16 in, bfloat16 out, gradients too."""
    assert facts["bfloat16"] == ["bfloat16"] * 4


def test_splash_over_a_mesh(slow_facts: dict[str, Any]) -> None:
    """Guards the block tables that each device gets: interpreted splash over seq 2, tensor 2, with packed documents."""
    assert slow_facts["splash"]["difference"] < 5e-6
    assert slow_facts["splash"]["parts"] == [1, 2, 2, 1]


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_without_segments_in_chunks_and_in_float32(slow_facts: dict[str, Any], mesh: str) -> None:
    """Guards the combinations that the fast tests leave out."""
    assert mesh in FAST_MESHES or slow_facts["packed"][mesh]["difference"] < 1e-14
    assert slow_facts["causal"][mesh]["difference"] < 1e-14
    assert slow_facts["chunked"][mesh]["difference"] < 1e-14
    assert slow_facts["float32"][mesh]["difference"] < 2e-6


@pytest.mark.parametrize("heads", ["K=1", "K=4"])
def test_one_and_as_many_kv_heads_as_devices(slow_facts: dict[str, Any], heads: str) -> None:
    """Guards both ends of the kv heads' cut over 4 devices."""
    assert slow_facts["few_kv_heads"][heads]["difference"] < 1e-14
