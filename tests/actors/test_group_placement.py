"""What a group asks of a cluster: resources, environment, strategy; and TPU slices, against Ray's own tables."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from actors.group_member import Process, end_process, identity_of
from actors.group_placement import GroupSpec, environment, slice_environment
from actors.jax_train import scaling
from afm_rl.errors import UserError
from afm_rl.malloc import ACTOR_TUNABLES, LEARNER_TUNABLES


def test_virtual_devices_keep_the_flags_already_there() -> None:
    """Guards the user's XLA flags, and that an inherited device count does not decide ours."""
    spec = GroupSpec(processes=2, devices_per_process=4)
    assert environment(spec, {})["XLA_FLAGS"] == "--xla_force_host_platform_device_count=4"
    present = {"XLA_FLAGS": "--xla_dump_to=x --xla_force_host_platform_device_count=8"}
    assert environment(spec, present)["XLA_FLAGS"] == "--xla_dump_to=x --xla_force_host_platform_device_count=4"
    assert environment(spec, present)["JAX_PLATFORMS"] == "cpu"
    assert environment(GroupSpec(accelerator="gpu", num_gpus=1), present) == {"JAX_PLATFORMS": "cuda"}


def test_gpu_groups_ask_for_a_device_or_a_node_per_process() -> None:
    """Guards the two GPU layouts: what a process gets, and where the processes go."""
    device = GroupSpec(processes=8, num_gpus=1, num_cpus=2, accelerator="gpu")
    assert (device.resources, device.strategy) == ({"CPU": 2, "GPU": 1}, "PACK")
    node = GroupSpec(processes=2, num_gpus=8, num_cpus=2, accelerator="gpu", spread="one_per_node")
    assert (node.resources["GPU"], node.strategy) == (8, "STRICT_SPREAD")
    assert node.asks == "2 process(es) with 2 CPU, 8 GPU each on nodes of their own"
    assert scaling(node).num_workers == 2
    assert (scaling(node).use_gpu, scaling(node).placement_strategy) == (True, "STRICT_SPREAD")
    assert GroupSpec(num_cpus=0).resources["CPU"] > 0  # Ray refuses an empty bundle


def test_a_tpu_group_is_one_process_per_host_of_whole_slices() -> None:
    """Guards the slice's arithmetic (v6e 4x4: 16 chips, 4 a host) and what libtpu is told about several slices."""
    spec = GroupSpec(processes=8, accelerator="tpu", tpu_topology="4x4", tpu_version="v6e", tpu_slices=2)
    assert spec.resources["TPU"] == 4
    assert "as 2 slice(s) v6e 4x4" in spec.asks
    ids = [slice_environment(spec, "10.0.0.1:8476", rank)["MEGASCALE_SLICE_ID"] for rank in range(8)]
    assert ids == ["0"] * 4 + ["1"] * 4
    assert slice_environment(spec, "10.0.0.1:8476", 5)["MEGASCALE_COORDINATOR_ADDRESS"] == "10.0.0.1"
    one = GroupSpec(processes=4, accelerator="tpu", tpu_topology="4x4", tpu_version="v6e")
    assert slice_environment(one, "10.0.0.1:8476", 0) == {}
    trained = scaling(one)
    assert (trained.use_tpu, trained.topology, trained.accelerator_type) == (True, "4x4", "TPU-V6E")
    assert GroupSpec(accelerator="tpu", devices_per_process=8).resources["TPU"] == 8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"processes": 3, "accelerator": "tpu", "tpu_topology": "4x4", "tpu_version": "v6e"},
            "have 4 hosts.*set processes to 4",
        ),
        ({"accelerator": "tpu", "tpu_topology": "four", "tpu_version": "v6e"}, "no TPU slice v6e four"),
        ({"accelerator": "tpu", "tpu_topology": "4x4"}, "both tpu_topology"),
        ({"processes": 4, "tpu_topology": "4x4", "tpu_version": "v6e"}, "not cpu"),
        ({"accelerator": "gpu"}, "num_gpus > 0"),
        ({"processes": 0}, "at least 1 process"),
        ({"heartbeat_s": 0.1}, "heartbeat_s >= 1"),
    ],
)
def test_a_group_that_does_not_fit_together_is_refused(wrong: dict[str, object], message: str) -> None:
    """Guards the user: what is wrong is said before anything is asked of the cluster."""
    with pytest.raises(UserError, match=message):
        GroupSpec(**wrong)  # type: ignore[arg-type]


def test_a_stopped_process_is_ended_and_another_of_its_pid_is_not() -> None:
    """Guards the kill: SIGKILL reaches a stopped process; a pid that now belongs to somebody else is left alone."""
    with subprocess.Popen(["sleep", "60"]) as child:
        born = identity_of("here", child.pid)
        os.kill(child.pid, signal.SIGSTOP)
        assert end_process(Process("here", child.pid, born.started - 1))
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=0.3)
        began_s = time.monotonic()
        assert end_process(born)
        assert time.monotonic() - began_s < 2
        assert child.wait(timeout=5) == -9
    assert not Path(f"/proc/{child.pid}").exists()


@pytest.mark.slow
def test_a_slice_is_reserved_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the TPU path on a Ray whose two nodes carry a slice's labels and resources, but no chips."""
    import ray
    from ray.cluster_utils import Cluster

    from actors.group_placement import reserve

    monkeypatch.setenv("TPU_NAME", "slice")  # what a TPU host says of itself
    Path("/tmp/ray").mkdir(exist_ok=True)  # the cluster utility expects it
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for worker in range(2):
            labels = {
                "tpu-slice-name": "slice",
                "tpu-worker-id": str(worker),
                "tpu-pod-type": "v4-16",
                "tpu-topology": "2x2x2",
            }
            resources = {"TPU": 4} | ({"TPU-v4-16-head": 1} if worker == 0 else {})
            cluster.add_node(
                num_cpus=1, resources=resources, labels={f"ray.io/{name}": value for name, value in labels.items()}
            )
        ray.init(address=cluster.address, log_to_driver=False)
        spec = GroupSpec(processes=2, accelerator="tpu", tpu_topology="2x2x2", tpu_version="v4", start_deadline_s=20)
        first = reserve(spec, "learner")
        assert first.group.wait(20)
        assert [bundle["TPU"] for bundle in first.group.bundle_specs] == [4, 4]
        assert ray.available_resources().get("TPU", 0) == 0
        with pytest.raises(UserError, match="no such slice was free within 1 s"):
            reserve(GroupSpec(**{**spec.__dict__, "start_deadline_s": 1}), "another")
        first.remove()
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_learner_on_cpu_keeps_its_memory() -> None:
    """Guards the allocator: set for the learner unless the user set one; the other actors' default is no such wish."""
    assert environment(GroupSpec(), {})["GLIBC_TUNABLES"] == LEARNER_TUNABLES
    assert environment(GroupSpec(), {"GLIBC_TUNABLES": ACTOR_TUNABLES})["GLIBC_TUNABLES"] == LEARNER_TUNABLES
    assert "GLIBC_TUNABLES" not in environment(GroupSpec(), {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=2"})
