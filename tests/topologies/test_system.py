"""The running topology: the same actors by the same names inline and under Ray, visible as the YAML draws them."""

from pathlib import Path

import pytest

from actors.host import call
from topologies.schema import load_topology
from topologies.system import declare, start

SMOKE = Path(__file__).resolve().parents[2] / "topologies" / "smoke.yaml"
NAMES = {
    "weights",
    "learner",
    "sampler-0",
    "sampler-1",
    "reward-0",
    "committee-0",
    "annotator",
    "quantizer-0",
    "quantizer-1",
}


def test_declared_actors_are_those_of_the_yaml():
    """Guards names, replicas and resources: what the topology says is what is started."""
    topology = load_topology(SMOKE, ["actors.sampler.replicas=3", "actors.sampler.num_cpus=0.3"])
    declared = declare(topology)
    assert [d.name for d in declared["sampler"]] == ["sampler-0", "sampler-1", "sampler-2"]
    assert {d.num_cpus for d in declared["sampler"]} == {0.3}
    assert declared["annotator"][0].kwargs["kind"] == "simulated"
    assert {d.name for ds in declare(load_topology(SMOKE)).values() for d in ds} == NAMES


def test_inline_actors_answer_in_this_process():
    """Guards the inline launcher: the same handles, no Ray."""
    with start(load_topology(SMOKE, ["launcher=inline"])) as system:
        assert {h.name for h in system.handles} == NAMES
        assert call(system.committee[0], "members") == []
        assert system.dashboard is None
        assert {s.role for s in system.stats()} >= {"Learner", "Sampler", "Reward"}


@pytest.mark.slow
def test_ray_shows_the_topology_as_the_yaml_drew_it(monkeypatch):
    """Guards `ray list actors` and the dashboard: one named actor per declaration, its class the role's."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    from ray.util.state import list_actors

    with start(load_topology(SMOKE, ["launcher=local"])) as system:
        assert system.dashboard is not None
        found = {a.name: a.class_name for a in list_actors(address=system.dashboard) if a.state == "ALIVE"}
        assert set(found) == NAMES
        assert found["learner"] == "Learner"
        assert found["sampler-1"] == "Sampler"
        assert found["weights"] == "WeightStore"
        assert call(system.samplers[1], "members") == []
