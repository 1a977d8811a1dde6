"""Scaling a running launch: what another process asks for is done while the run goes on, or refused and nothing changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from actors.host import DeadlineError, call
from actors.streams import InlineStreamingHandle
from afm_rl.errors import UserError
from afm_rl.types import Group
from tests.actors.toy_policy import SPEC, request, weights
from topologies.cli import main
from topologies.control import Control, scale
from topologies.generators import Generators
from topologies.rewards import Rewards
from topologies.run_folder import RunFolder
from topologies.schema import load_topology
from topologies.system import System, start

SMOKE = Path(__file__).resolve().parents[2] / "topologies" / "smoke.yaml"


@contextmanager
def launched(folder: Path, launcher: str = "inline") -> Iterator[tuple[RunFolder, System, Generators, Control]]:
    """What a launch has: the run's journal, the system, the samplers, and the control that its calls poll."""
    engine = ["engine.page_size=8", "engine.kv_cache=1MiB", "max_batch=4"]
    settings = [f"launcher={launcher}", f"run_root={folder}", *(f"actors.sampler.{setting}" for setting in engine)]
    topology = load_topology(SMOKE, settings)
    run = RunFolder.create_or_open(folder, topology)
    with run.open_journal(), start(topology) as system:
        samplers = Generators(system.samplers, system.store, topology.actors.sampler)
        rewards = Rewards(system.rewards, topology.actors.reward)
        control = Control(run, system, {"sampler": samplers.roster, "reward": rewards.pool})
        samplers.between = control.poll
        yield run, system, samplers, control


class Command(threading.Thread):
    """`afm-rl scale`, in another terminal."""

    def __init__(self, run: RunFolder, role: str, count: int) -> None:
        super().__init__(daemon=True)
        self.run_folder, self.asked, self.said = run, (role, count), ""
        self.start()

    def run(self) -> None:
        try:
            self.said = scale(self.run_folder, *self.asked, timeout_s=60.0)
        except UserError as error:
            self.said = f"error: {error}"

    def done_by(self, step: Callable[[], None]) -> str:
        """What it says, with the launch doing `step` again and again meanwhile."""
        end_s = time.monotonic() + 60.0
        while self.is_alive() and time.monotonic() < end_s:
            step()
            time.sleep(0.02)
        self.join(5.0)
        return self.said


def names(system: System) -> list[str]:
    return [handle.name for handle in system.samplers]


def test_more_and_fewer_while_it_generates(tmp_path: Path) -> None:
    """Guards the order: started, given the weights, acknowledged, used; finished, then ended; names stay unique."""
    with launched(tmp_path) as (run, system, samplers, _):
        digest = call(system.store, "publish", weights("mdloo", 3))
        samplers.give("mdloo", 3, SPEC, digest=digest)
        batch = [request(f"r{i}", 5, i % 3) for i in range(8)]
        answered: list[Group] = []

        def step() -> None:
            answered.extend(samplers.answer("mdloo", batch))

        step()
        expected = {group.id: group.responses[0].tolist() for group in answered}
        assert Command(run, "sampler", 4).done_by(step) == "sampler: 2 -> 4"
        assert names(system) == [f"sampler-{i}" for i in range(4)]
        assert samplers.sync("mdloo").metrics() == {"weights_in_sync": 1.0, "actors_live": 4, "actors_lagging": 0}
        before = samplers.look()
        step()
        now = samplers.look()
        assert [now[name].since(before[name]).response_tokens > 0 for name in names(system)] == [True] * 4
        assert Command(run, "sampler", 1).done_by(step) == "sampler: 4 -> 1"
        assert names(system) == ["sampler-0"]
        assert call(system.store, "assigned", "sampler-3") == []
        assert Command(run, "sampler", 2).done_by(step) == "sampler: 1 -> 2"
        assert names(system) == ["sampler-0", "sampler-1"]
        assert all(group.responses[0].tolist() == expected[group.id] for group in answered)
        assert not list((run.path / "control").iterdir())


def test_what_cannot_be_done_is_said_and_changes_nothing(tmp_path: Path) -> None:
    """Guards the command's answers: no launch, no such role, none left, the present number; and stray files end no run."""
    with launched(tmp_path) as (run, system, _, control):
        with pytest.raises(UserError, match="no role 'learner' that can be scaled; there are: sampler, committee, reward"):
            scale(run, "learner", 2, timeout_s=1.0)
        with pytest.raises(UserError, match="sampler=0: a run needs at least one of each"):
            scale(run, "sampler", 0, timeout_s=1.0)
        with pytest.raises(UserError, match=r"has not taken the request up within 0\.1 s, and nothing was changed"):
            scale(run, "sampler", 4, timeout_s=0.1)
        assert not list((run.path / "control").iterdir())
        (run.path / "control" / "0.json").write_text("{")
        (run.path / "control" / "1.json").write_text('{"launch": 1, "role": "sampler", "count": 9}')
        assert Command(run, "reward", 2).done_by(control.poll) == "reward: 1 -> 2"
        assert Command(run, "reward", 2).done_by(control.poll) == "reward: 2 -> 2"
        assert names(system) == ["sampler-0", "sampler-1"]
        assert [handle.name for handle in system.rewards] == ["reward-0", "reward-1"]
    with pytest.raises(UserError, match=r"no launch of .* is running; continue it with"):
        scale(run, "sampler", 4, timeout_s=1.0)


def test_one_that_was_given_up_does_not_count(tmp_path: Path) -> None:
    """Guards a run with a lost sampler: fewer never leaves the lost one alone, and asking for two gives two that work."""
    with launched(tmp_path) as (run, system, samplers, control):
        digest = call(system.store, "publish", weights("mdloo", 3))
        samplers.give("mdloo", 3, SPEC, digest=digest)
        first = system.samplers[0]
        while not samplers.roster.given_up(first.name):
            samplers.roster.lost(first, "its process is gone")
            pending = samplers.roster.away(first)
            assert pending is None or pending.what == "sampler-0.held"
            if pending is not None:
                samplers.roster.returned(first, pending)
        assert Command(run, "sampler", 1).done_by(control.poll) == "sampler: 1 -> 1"
        assert names(system) == ["sampler-1"]
        assert Command(run, "sampler", 2).done_by(control.poll) == "sampler: 1 -> 2"
        assert names(system) == ["sampler-1", "sampler-0"]
        assert len(samplers.answer("mdloo", [request("r", 5)])) == 1


def test_an_actor_that_does_not_end_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the launch: what goes wrong with an actor that nobody asks any more is a warning."""

    def stays(handle: InlineStreamingHandle) -> None:
        raise DeadlineError(f"waited 30 s for the end of {handle.name}, which still has its name")

    monkeypatch.setattr(InlineStreamingHandle, "close", stays)
    with launched(tmp_path) as (run, system, _, control):
        assert Command(run, "sampler", 1).done_by(control.poll) == "sampler: 2 -> 1"
        assert names(system) == ["sampler-0"]


def test_a_launch_that_ends_is_noticed(tmp_path: Path) -> None:
    """Guards the waiting command: it does not wait out its time for a launch that is gone."""
    with launched(tmp_path) as (run, _, _, _):
        command = Command(run, "sampler", 3)
        while not list((run.path / "control").glob("*.json")):
            time.sleep(0.01)
    command.join(10.0)
    assert command.said.startswith("error: no launch of")
    assert not list((run.path / "control").iterdir())


def test_the_command_says_what_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards `afm-rl scale` itself: what was done on stdout, a mistake as one line and code 2, before anything is asked."""
    with launched(tmp_path) as (run, _, _, control):
        codes: list[int] = []
        command = threading.Thread(target=lambda: codes.append(main(["scale", str(run.path), "reward=2", "sampler=2"])))
        command.start()
        while command.is_alive():
            control.poll()
            time.sleep(0.02)
        assert codes == [0]
        assert capsys.readouterr().out == "reward: 1 -> 2\nsampler: 2 -> 2\n"
        assert main(["scale", str(run.path), "reward=3", "sampler=0"]) == 2
        assert not list((run.path / "control").iterdir())
    assert main(["scale", str(run.path), "reward=3"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("afm-rl: sampler=0: a run needs at least one")
    assert "is running" in said[1]
    with pytest.raises(SystemExit):
        main(["scale", str(run.path), "sampler"])


@pytest.mark.slow
def test_ray_actors_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards `afm-rl scale` under Ray: processes start, hold the weights, are used, and end; too many are refused."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    import ray

    with launched(tmp_path, "local") as (run, system, samplers, control):
        digest = call(system.store, "publish", weights("mdloo", 3))
        samplers.give("mdloo", 3, SPEC, digest=digest)
        batch = [request(f"r{i}", 5, i % 3) for i in range(12)]

        def step() -> None:
            assert len(samplers.answer("mdloo", batch)) == len(batch)

        said = Command(run, "sampler", 400).done_by(control.poll)
        assert said.startswith("error: 398 more of Sampler ask for ")
        assert names(system) == ["sampler-0", "sampler-1"]
        assert Command(run, "sampler", 3).done_by(step) == "sampler: 2 -> 3"
        before = samplers.look()
        step()
        assert samplers.look()["sampler-2"].since(before["sampler-2"]).response_tokens > 0
        free = ray.available_resources()["CPU"]
        assert Command(run, "sampler", 1).done_by(step) == "sampler: 3 -> 1"
        for name in ("sampler-1", "sampler-2"):
            with pytest.raises(ValueError, match=name):
                ray.get_actor(name)
        assert ray.available_resources()["CPU"] > free
