"""The `reward` and `environment` of a stage: what may be written, what it means, and what a mistake is answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from afm_rl.errors import UserError
from afm_rl.rewards.limits import PerToken, SoftOverlong, Truncation
from topologies.environment_options import EnvironmentOptions
from topologies.reward_options import RewardWeights
from topologies.schema import Topology, load_topology, parse_topology

TOPOLOGY = """name: t
stages:
  - tokenizer
  - pretrain
  - sft
  - reward_model
  - rl:
      reward:
        {reward}
      environment: {environment}
"""


def load(tmp_path: Path, reward: str, environment: str = "null") -> Topology:
    path = tmp_path / "t.yaml"
    path.write_text(TOPOLOGY.replace("{reward}", reward).replace("{environment}", environment))
    return load_topology(path)


@pytest.mark.parametrize(
    ("written", "weights"),
    [
        ("{}", {"model": 1.0}),
        ("{model: 0.3, verifier: 1.0}", {"model": 0.3, "verifier": 1.0}),
        ("{verifier: 1.0}", {"verifier": 1.0}),
        ("{math: 2}", {"math": 2.0}),
        ("{model: 1.0, format: {tags: [think], weight: 0.2}}", {"model": 1.0, "format": 0.2}),
        ("{function: 'json:dumps'}", {"dumps": 1.0}),
        ("{function: [{path: 'json:dumps', weight: 3, name: size}, 'json:loads']}", {"size": 3.0, "loads": 1.0}),
        ("{verifier: 1, length: {kind: per_token, weight: 0.01}}", {"verifier": 1.0, "length": 0.01}),
    ],
)
def test_components_and_their_weights(tmp_path: Path, written: str, weights: dict[str, float]) -> None:
    """Guards the YAML: short and long forms, the model alone where nothing is named; a run folder keeps it as it was."""
    topology = load(tmp_path, written)
    assert {name: weight for name, weight in topology.stage("rl").reward.weights().items() if weight} == weights
    assert parse_topology(topology.to_yaml()) == topology


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{verifyer: 1.0}", "t.yaml:9: stages[4].rl.reward.verifyer: unknown key 'verifyer'; did you mean 'verifier'?"),
        ("{format: {tgs: [a]}}", "reward.format.tgs: unknown key 'tgs'; did you mean 'tags'?"),
        ("{format: {regex: '('}}", "reward.format.regex: not a regular expression: missing )"),
        ("{format: {}}", "reward.format: no rule given; the rules are regex, contains"),
        ("{function: 'json:dumpz'}", "t.yaml:9: stages[4].rl.reward.function[0].path: 'json:dumpz': 'json' has no 'dumpz'"),
        ("{function: 'no_such:f'}", "'no_such:f': there is no module 'no_such'; install its package"),
        ("{function: ['json:dumps', 'marshal:dumps']}", "a component 'dumps' already; give this one another name"),
        ("{verifier: 1, length: {}}", "reward.length.buffer_tokens: missing"),
        ("{model: 0}", "every weight is 0"),
        ("{environment: 1}", "there is none; add one"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, written: str, message: str) -> None:
    """Guards the user: file, line, place and the nearest right thing, before anything starts."""
    with pytest.raises(UserError) as error:
        load(tmp_path, written)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_an_actor_loads() -> None:
    """Guards the way from YAML to the reward actor: functions with their limits, length by the stage's, truncation."""
    options = RewardWeights.model_validate(
        {
            "math": {"timeout_s": 2.0, "workers": 3},
            "length": {"buffer_tokens": 8},
            "truncated": {"penalty": 0.5},
            "end": "turn",
        }
    )
    spec = options.spec(tokenizer_folder="t", model_folder=None, max_tokens=32)
    (function,) = spec.functions
    assert (function.name, function.limit_s, function.workers) == ("math", 2.0, 3)
    assert function.task.memory_bytes == 2**30
    assert spec.length == SoftOverlong(max_tokens=32, buffer_tokens=8)
    assert spec.truncation == Truncation("penalty", 0.5, "turn")
    with pytest.raises(UserError, match=r"reward\.length: there is no max_tokens here"):
        options.spec(tokenizer_folder="t", model_folder=None)
    per_token = RewardWeights.model_validate({"verifier": 1.0, "length": {"kind": "per_token"}})
    assert per_token.spec(tokenizer_folder="t", model_folder=None).length == PerToken()
    with pytest.raises(ValueError, match="there is no reward model yet"):
        RewardWeights().spec(tokenizer_folder="t", model_folder=None)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{kind: calculatr}", "unknown environment 'calculatr'; did you mean 'calculator'?"),
        ("{max_turns: 3}", "give kind (one of calculator) or path (package.module:Class), and only one"),
        ("{kind: calculator, options: {cost: 1}}", "environment.options: calculator: "),
        ("{path: 'json:dumps'}", "'json:dumps' has no method 'reset'"),
    ],
)
def test_an_environment_that_cannot_be(tmp_path: Path, written: str, message: str) -> None:
    """Guards the start: a wrong kind, path or option is an error of the file."""
    with pytest.raises(UserError) as error:
        load(tmp_path, "{environment: 1.0}", written)
    assert message in str(error.value)


def test_the_shipped_example_reads() -> None:
    """Guards topologies/calculator.yaml."""
    topology = load_topology(Path(__file__).parents[2] / "topologies" / "calculator.yaml")
    environment = topology.stage("rl").environment
    assert isinstance(environment, EnvironmentOptions)
    assert environment.kind == "calculator"
