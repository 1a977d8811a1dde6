"""The run folder: two runs never mix, and a resume only continues what it was started as."""

from pathlib import Path

import pytest

from afm_rl.errors import UserError
from topologies.journal import JournalLockedError
from topologies.run_folder import RunFolder
from topologies.schema import Topology, parse_topology

TEXT = "{name: one, stages: [tokenizer, pretrain, {sft: {steps: 5}}]}"


def topology(text: str = TEXT) -> Topology:
    return parse_topology(text)


def begun(root: Path, text: str = TEXT) -> RunFolder:
    """A run that has done something."""
    run = RunFolder.create_or_open(root, topology(text))
    with run.open_journal() as journal:
        journal.once("stage/tokenizer", lambda: None)
    return run


def save_policy(run: RunFolder, name: str, version: int) -> Path:
    folder = run.policies / name / str(version)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_new_run_keeps_its_resolved_topology(tmp_path):
    """Everything a later command needs to know stands in the folder."""
    run = RunFolder.create_or_open(tmp_path / "runs", topology())
    assert run.path == tmp_path / "runs" / "one"
    assert run.topology == topology()
    assert "dropout: 0.1" in run.topology_file.read_text()
    assert not run.finished
    assert [p.name for p in run.path.iterdir()] == ["topology.yaml"]


def test_an_existing_run_needs_resume(tmp_path):
    """A second launch neither overwrites nor silently continues; the message differs for a finished run."""
    run = begun(tmp_path)
    with pytest.raises(UserError, match="unfinished; continue it with --resume"):
        RunFolder.create_or_open(tmp_path, topology())
    with run.open_journal() as journal:
        run.mark_finished(journal)
        run.mark_finished(journal)
        assert len(journal.records) == 2
    assert run.finished
    with pytest.raises(UserError, match=r"is finished \(see .*report.html\); start another with --set name"):
        RunFolder.create_or_open(tmp_path, topology())
    assert RunFolder.create_or_open(tmp_path, topology(), resume=True) == run


def test_resume_without_a_run_starts_one(tmp_path):
    """A script can always say --resume."""
    assert RunFolder.create_or_open(tmp_path, topology(), resume=True).topology == topology()


def test_a_launch_killed_in_its_first_moment_leaves_nothing_in_the_way(tmp_path):
    """Killed before topology.yaml was whole: the next launch needs no --resume."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "topology.yaml.tmp").write_text("name: o")
    assert RunFolder.create_or_open(tmp_path, topology()).topology == topology()


def test_a_launch_that_failed_before_its_first_stage_can_be_corrected(tmp_path):
    """Bad data or too few CPUs: the corrected topology starts afresh, but not once anything has been written."""
    run = RunFolder.create_or_open(tmp_path, topology())
    run.open_journal().close()
    corrected = topology(TEXT.replace("steps: 5", "steps: 6"))
    assert RunFolder.create_or_open(tmp_path, corrected).topology == corrected
    run.checkpoints.mkdir()
    with pytest.raises(UserError, match="unfinished"):
        RunFolder.create_or_open(tmp_path, topology())
    assert run.topology == corrected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{name: one, stages: [tokenizer, pretrain, {sft: {steps: 6}}]}", r"stages\[2\].sft.steps was 5 and is now 6"),
        ("{name: one, seed: 3, stages: [tokenizer, pretrain, {sft: {steps: 6}}]}", "seed was 0 and is now 3"),
        ("{name: one, model: {preset: tiny, dim: 64}, stages: [tokenizer]}", "model.dim was 'absent' and is now 64"),
        ("{name: one, stages: [tokenizer]}", "stages was "),
    ],
)
def test_another_topology_is_refused_by_its_first_difference(tmp_path, text, expected):
    """Resuming with other numbers would make a run that no topology describes."""
    begun(tmp_path)
    with pytest.raises(UserError, match=f"belongs to another topology: {expected}"):
        RunFolder.create_or_open(tmp_path, topology(text), resume=True)


def test_where_it_runs_may_change(tmp_path):
    """A run started locally can be continued inline or on a cluster."""
    run = begun(tmp_path)
    moved = TEXT.replace("{name: one", "{name: one, launcher: cluster, address: auto, run_root: elsewhere")
    assert RunFolder.create_or_open(tmp_path, topology(moved), resume=True) == run


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    """Neither a folder with other files nor a plain file becomes a run."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty and not a run folder"):
        RunFolder.create_or_open(tmp_path, topology(), resume=True)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "one").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create_or_open(tmp_path / "file", topology())


def test_one_launch_at_a_time(tmp_path):
    """Two launches of one run: the second is told which process has it."""
    run = RunFolder.create_or_open(tmp_path, topology())
    with run.open_journal():
        assert not run.finished
        with pytest.raises(JournalLockedError, match="the run is still going"):
            RunFolder.create_or_open(tmp_path, topology(TEXT.replace("steps: 5", "steps: 6")))
        run.metrics.mkdir()
        with pytest.raises(JournalLockedError, match="the run is still going"):
            RunFolder.create_or_open(tmp_path, topology(), resume=True).open_journal()


def test_open_takes_a_path_or_a_name_below_runs(tmp_path, monkeypatch):
    """`afm-rl report one` and `afm-rl report runs/one` are the same run."""
    monkeypatch.chdir(tmp_path)
    run = RunFolder.create_or_open("runs", topology())
    assert RunFolder.open("one") == RunFolder.open("runs/one") == RunFolder.open(run.path) == run
    with pytest.raises(UserError, match="no run at two or runs/two"):
        RunFolder.open("two")


def test_policies_by_name_and_version(tmp_path):
    """The newest version by number, not by spelling; a half-written one (no config.json) does not count."""
    run = RunFolder.create_or_open(tmp_path, topology())
    assert run.policy_names() == []
    with pytest.raises(UserError, match="no policy 'sft'; it has: none yet"):
        run.policy("sft")
    save_policy(run, "sft", 9)
    newest = save_policy(run, "sft", 10)
    save_policy(run, "base", 0)
    (run.policies / "sft" / "11").mkdir()
    (run.policies / "rs").mkdir()
    assert run.policy_names() == ["base", "sft"]
    assert run.policy("sft") == newest
    assert run.policy("sft", version=9).name == "9"
    with pytest.raises(UserError, match="no version 3; it has: 9, 10"):
        run.policy("sft", version=3)
    for name in ("stf", "..", "sft/9"):
        with pytest.raises(UserError, match="it has: base, sft"):
            run.policy(name)
