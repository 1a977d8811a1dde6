"""Metrics: what is written is what is read, through kills and resumes, and every sink gets the same row."""

import json
import logging
import sys
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from actors.metrics import JsonlSink, Metrics, RaySink, TensorBoardSink, read_metrics


def log(folder, step, *, stage="sft", task="sft", **values):
    Metrics([JsonlSink(folder)]).log(stage=stage, task=task, step=step, values=values)


def test_rows_come_back_with_their_types(tmp_path):
    """A row keeps stage, task, step, time and every number, whichever library made it."""
    log(tmp_path, np.int64(3), loss=np.float32(0.5), n=np.int32(7), lr=jnp.bfloat16(2), ok=True)
    (row,) = read_metrics(tmp_path)
    assert 1.6e9 < row.pop("time") < 1e11
    assert row == {"stage": "sft", "task": "sft", "step": 3, "loss": 0.5, "n": 7, "lr": 2.0, "ok": 1}


def test_non_finite_values_are_null_in_strict_json(tmp_path):
    """NaN and infinities never reach the file as the words that strict JSON readers refuse."""
    log(tmp_path, 1, loss=float("nan"), norm=np.inf, ok=1.0)

    def refuse(word):
        raise AssertionError(word)

    row = json.loads((tmp_path / "sft.jsonl").read_text(), parse_constant=refuse)
    assert row["loss"] is None
    assert row["norm"] is None
    assert row["ok"] == 1.0


def test_resume_replaces_repeated_steps(tmp_path):
    """After a resume the repeated steps count once, with the later value, in the order of the steps."""
    for step in (1, 2, 3):
        log(tmp_path, step, loss=float(step))
    log(tmp_path, 2, loss=20.0)
    log(tmp_path, 2, task="other", loss=7.0)
    rows = read_metrics(tmp_path)
    assert [(row["task"], row["step"], row["loss"]) for row in rows] == [
        ("sft", 1, 1.0),
        ("sft", 2, 20.0),
        ("sft", 3, 3.0),
        ("other", 2, 7.0),
    ]


def test_a_torn_line_costs_only_itself(tmp_path, caplog):
    """A kill in mid-line loses that row, is reported with file and line, and leaves the next rows whole."""
    log(tmp_path, 1, loss=1.0)
    with (tmp_path / "sft.jsonl").open("a") as file:
        file.write('{"stage": "sft", "task": "sf')
    log(tmp_path, 2, loss=2.0)
    with caplog.at_level(logging.WARNING):
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert "sft.jsonl:2" in caplog.text


def test_stages_have_their_own_files_and_a_missing_folder_is_empty(tmp_path):
    """One file a stage; a report of a run that logged nothing still opens."""
    assert read_metrics(tmp_path / "none") == []
    log(tmp_path / "metrics", 1, stage="pretrain", task="core", loss=1.0)
    log(tmp_path / "metrics", 1, stage="sft", loss=1.0)
    assert sorted(path.name for path in (tmp_path / "metrics").iterdir()) == ["pretrain.jsonl", "sft.jsonl"]


@pytest.mark.parametrize(
    ("stage", "values", "said"),
    [
        ("../up", {"loss": 1.0}, "names a file"),
        ("sft", {"step": 1.0}, "rename the metric"),
        ("sft", {"loss": "high"}, "'loss' must be one number"),
        ("sft", {"loss": np.zeros(3)}, "(3,)"),
        ("sft", {"loss": None}, "'loss' must be one number"),
    ],
)
def test_what_is_not_a_number_is_refused_by_name(tmp_path, stage, values, said):
    """A wrong value is an error where it is logged, not a hole in the report an hour later."""
    with pytest.raises((ValueError, TypeError)) as error:
        Metrics([JsonlSink(tmp_path)]).log(stage=stage, task="t", step=1, values=values)
    assert said in str(error.value)
    assert not list(tmp_path.iterdir())


def test_every_sink_gets_the_row_and_is_closed():
    """Metrics fans out to all sinks and releases them on leaving the block."""

    class Fake:
        def __init__(self):
            self.calls = []

        def log(self, **row):
            self.calls.append(row)

        def close(self):
            self.calls.append("closed")

    first, second = Fake(), Fake()
    with Metrics([first, second]) as metrics:
        metrics.log(stage="itec", task="round 1 mdloo", step=4, values={"reward": 1})
    assert (
        first.calls
        == second.calls
        == [
            {"stage": "itec", "task": "round 1 mdloo", "step": 4, "values": {"reward": 1}},
            "closed",
        ]
    )


def test_tensorboard_events_carry_tag_step_and_value(tmp_path):
    """The event file holds the scalar under STAGE/TASK/METRIC (framing read by hand: length, crc, payload, crc)."""
    with Metrics([TensorBoardSink(tmp_path)]) as metrics:
        metrics.log(stage="pretrain", task="core", step=12, values={"loss": 2.5})
    (path,) = tmp_path.glob("events.out.tfevents.*")
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        at += 16 + size
    assert found == [("pretrain/core/loss", 12, 2.5)]


def test_ray_gauges_have_legal_names_and_tags(monkeypatch):
    """One gauge a metric, made once, with a name Prometheus accepts (a fake stands for ray.util.metrics)."""
    made = []

    class Gauge:
        def __init__(self, name, **kwargs):
            self.name, self.tag_keys, self.values = name, kwargs["tag_keys"], []
            made.append(self)

        def set(self, value, tags):
            self.values.append((value, tags))

    module = ModuleType("ray.util.metrics")
    module.Gauge = Gauge
    monkeypatch.setitem(sys.modules, "ray.util.metrics", module)
    metrics = Metrics([RaySink()])
    for step in (1, 2):
        metrics.log(stage="itec", task="mdloo", step=step, values={"reward/mean": 0.5})
    assert [gauge.name for gauge in made] == ["afm_rl_reward_mean", "afm_rl_step"]
    assert made[0].tag_keys == ("stage", "task")
    assert made[1].values == [(1.0, {"stage": "itec", "task": "mdloo"}), (2.0, {"stage": "itec", "task": "mdloo"})]
