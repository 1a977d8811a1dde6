"""The plan: costs against hand-computed numbers, and shortages found before anything starts."""

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from afm_rl.config import PRESETS, ModelConfig
from afm_rl.errors import UserError
from afm_rl.flops import forward_flops_per_token
from topologies import costs
from topologies import plan as plan_module
from topologies.costs import COMPILE_S, DECODE_OVERHEAD_S, STEP_OVERHEAD_S, Machine
from topologies.plan import plan
from topologies.plan_view import amount, duration, print_plan, size
from topologies.schema import load_topology, parse_topology

TOPOLOGIES = Path(__file__).parents[2] / "topologies"
MACHINE = Machine(2e11)
SMALL = ModelConfig(vocab_size=10, dim=4, ffn_dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2)


@pytest.fixture
def _ample(monkeypatch):
    monkeypatch.setattr(plan_module, "machine_cpus", lambda: 2)
    monkeypatch.setattr(plan_module, "machine_bytes", lambda: 16 * 2**30)


def test_memory_by_hand_on_a_mesh():
    """A device of a mesh holds its part of weights and positions, and the logits of one pass."""
    tiny = PRESETS["tiny"]
    whole, cut = (costs.training_bytes(tiny, batch=b, length=64, cut=costs.Cut(params=4, positions=b)) for b in (1, 8))
    assert whole == cut
    bounded = costs.training_bytes(tiny, batch=8, length=64, cut=costs.Cut(microbatch_tokens=64, logits_per_pass=10))
    assert costs.training_bytes(tiny, batch=1, length=64) - bounded == 8 * (64 * tiny.vocab_size - 10)


def test_memory_by_hand():
    """Weights, gradients and two moments are 16 bytes a parameter; a cache is keys and values of every layer."""
    assert costs.training_bytes(PRESETS["tiny"], batch=0, length=8) == 16 * PRESETS["tiny"].num_params
    assert costs.cache_bytes(SMALL, responses=3, length=5) == 4 * 3 * (2 * 5 * 2 * 1 * 2 + 2 * 10)


def test_seconds_grow_with_the_work():
    """Training is work over speed, plus a fixed cost a step; generating adds one for every token of a batch."""
    one = MACHINE.train(SMALL, steps=10, batch=2, length=6)
    flops = 3 * forward_flops_per_token(SMALL, 6) * 120
    assert one.train_tokens == 120
    expected = flops / (2e11 * costs.TRAIN_UTILIZATION) + 10 * STEP_OVERHEAD_S + COMPILE_S
    assert one.seconds == pytest.approx(expected)
    made = MACHINE.generate(SMALL, responses=65, prompt=8, max_tokens=4, max_batch=32)
    assert made.generated_tokens == 260
    assert made.seconds == pytest.approx(3 * 4 * DECODE_OVERHEAD_S + COMPILE_S, rel=1e-3)


@pytest.mark.usefixtures("_ample")
def test_tokens_of_every_stage():
    """Tokens are steps x batch x length, and what the options say is sampled."""
    topology = parse_topology(
        """
name: p
stages:
  - tokenizer
  - pretrain: {stages: [core, continued], core: {steps: 100, batch: 4, sequence_length: 32, warmup_steps: 0}}
  - sft: {steps: 7, batch: 3, sequence_length: 16}
  - itec:
      {rounds: 2, members: [sft, dpo], prompts_per_round: 5, responses_per_prompt: 3, rerank_prompts: 7, max_tokens: 9}
  - distill_committee: {prompts: 4, responses_per_member: 2, max_tokens: 10}
  - quantize
  - recover: {ranks: [4, 8], steps_pretrain: 2, steps_posttrain: 3, batch: 2, sequence_length: 8}
"""
    )
    stages = {stage.name: stage for stage in plan(topology, machine=MACHINE).stages}
    assert stages["pretrain"].train_tokens == 100 * 4 * 32 + 150 * 8 * 256
    assert stages["sft"].train_tokens == 7 * 3 * 16
    assert stages["itec"].generated_tokens == 2 * 5 * 3 * 9 + 7 * 2 * 2 * 9
    assert stages["itec"].train_tokens == 2 * 200 * 32 * 128 * (2 + 1 + 2)  # reward pairs, sft, dpo pairs
    assert stages["distill_committee"].generated_tokens == 4 * 2 * 2 * 10
    assert stages["recover"].train_tokens == (2 * 2) * 5 * 2 * 8  # two ranks at two bit widths
    assert all(stage.seconds > 0 for stage in stages.values())


@pytest.mark.usefixtures("_ample")
@pytest.mark.parametrize("name", ["local", "smoke"])
def test_the_shipped_topologies_fit_two_cores(name):
    """What the README tells people to launch must be placeable on two CPUs, with every role present."""
    result = plan(load_topology(TOPOLOGIES / f"{name}.yaml"), machine=MACHINE)
    assert result.num_cpus <= 2
    roles = {actor.role for actor in result.actors}
    assert roles >= {"learner", "sampler", "reward", "committee", "annotator", "quantizer", "server", "weights"}
    data = result.to_json()
    assert data["totals"]["seconds"] == pytest.approx(sum(stage["seconds"] for stage in data["stages"]))
    assert [stage["name"] for stage in data["stages"]] == load_topology(TOPOLOGIES / f"{name}.yaml").stage_names


@pytest.mark.usefixtures("_ample")
def test_what_does_not_fit_is_one_error():
    """CPUs and memory that this machine lacks are reported together; a cluster is not judged here."""
    text = "{name: big, model: afm-on-device, actors: {sampler: {replicas: 9, num_cpus: 1.0}}, stages: [tokenizer]}"
    with pytest.raises(UserError) as caught:
        plan(parse_topology(text), machine=MACHINE)
    message = str(caught.value)
    assert "10 CPUs are asked for" in message
    assert "sampler 9 x 1" in message
    assert "this machine has 2" in message
    assert "GiB of memory are needed, most by sampler" in message
    assert "\n" not in message
    plan(parse_topology(text.replace("name: big", "name: big, launcher: cluster")), machine=MACHINE)


@pytest.mark.usefixtures("_ample")
def test_inline_needs_no_cpus_of_its_own():
    """Inline, actors share one process: fractions of CPUs are not reserved."""
    text = "{name: i, launcher: inline, actors: {sampler: {replicas: 9, num_cpus: 1.0}}, stages: [tokenizer]}"
    plan(parse_topology(text), machine=MACHINE)


@pytest.mark.usefixtures("_ample")
def test_tables_show_every_row():
    """What a person sees: every actor, every stage, and the totals."""
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115 (rich keeps it)
    print_plan(plan(load_topology(TOPOLOGIES / "local.yaml"), machine=MACHINE), console)
    text = console.export_text()
    for word in ("learner", "committee", "distill_committee", "recover", "together", "200 GFLOP/s"):
        assert word in text


def test_units():
    """Numbers are printed short."""
    assert [amount(n) for n in (0, 999, 1234, 6_300_000_000_000)] == ["-", "999", "1.2k", "6.3T"]
    assert [size(n) for n in (2**20, 3 * 2**30)] == ["1 MiB", "3.0 GiB"]
    assert [duration(s) for s in (5, 119, 120, 7200, 172800)] == ["5 s", "119 s", "2.0 min", "2.0 h", "2.0 days"]


def test_planning_imports_neither_ray_nor_jax():
    """`plan` starts nothing; importing Ray or JAX would take seconds and touch devices."""
    code = (
        "import sys; import topologies.cli;"
        "from topologies.schema import load_topology; from topologies.plan import plan;"
        f"plan(load_topology({str(TOPOLOGIES / 'local.yaml')!r}, ['launcher=cluster']));"
        "sys.exit(bool({'jax', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
