"""Environments: exact bounded arithmetic, the calculator's protocol, and hosts whose episodes fail one by one."""

from __future__ import annotations

import ast
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from afm_rl.data.checks import passes
from afm_rl.environments.calculator import Calculator
from afm_rl.environments.expressions import ExpressionError, evaluate, show
from afm_rl.environments.hosts import Episode, LocalHost, WorkerHost
from afm_rl.environments.interface import SingleTurn
from afm_rl.types import Message, Prompt
from afm_rl.workers.pool import Task, WorkerStartError

PROMPT = Prompt("p", (Message("user", "What is 37*12+58?"),), checks=({"type": "answer", "value": "502"},))
MODULE = """
import os, time
from afm_rl.environments.interface import StepResult
from afm_rl.types import Message

class Counting:
    def __init__(self, start=0):
        self.start = start

    def reset(self, prompt, seed):
        self.seed, self.turns = seed, []
        return [Message("user", f"{prompt.id} {seed} {self.start}")]

    def step(self, action):
        self.turns.append(action)
        if action == "hang":
            time.sleep(1000)
        if action == "die":
            os._exit(1)
        if action == "nan":
            return StepResult(reward=float("nan"))
        if action == "nothing":
            return None
        done = len(self.turns) == 3
        return StepResult(" ".join(self.turns), reward=float(len(self.turns)), done=done, info={"seed": self.seed})

class NoStep:
    def reset(self, prompt, seed):
        return []
"""


@pytest.mark.parametrize("seed", range(3))
def test_arithmetic_is_exact(seed: int) -> None:
    """Guards the calculator against an independent evaluation: Python's own, over exact fractions."""
    rng = np.random.default_rng(seed)

    def draw(depth: int) -> str:
        if depth == 0 or rng.random() < 0.2:
            return str(rng.integers(0, 999))
        left, right = draw(depth - 1), draw(depth - 1)
        text = f"{left}{rng.choice(['+', '-', '*', '/', ' - '])}{right}"
        return f"({text})" if rng.random() < 0.5 else f"-({text})" if rng.random() < 0.2 else text

    for _ in range(100):
        text = draw(3)
        fractions = ast.unparse(_Wrap().visit(ast.parse(text, mode="eval")))
        try:
            expected = eval(fractions, {"Fraction": Fraction})
        except ZeroDivisionError:
            with pytest.raises(ExpressionError, match="division by zero"):
                evaluate(text)
            continue
        assert evaluate(text) == expected, text


class _Wrap(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return ast.Call(ast.Name("Fraction", ast.Load()), [node], [])


def test_results_as_text() -> None:
    """Guards what the policy reads: decimals as written, no float's digits, negative ones too."""
    shown = {"37*12": "444", "0.1+0.2": "0.3", "1/3": "0.333333", "-1/8": "-0.125", "2/3": "0.666667", "7/7": "1"}
    assert {text: show(evaluate(text)) for text in shown} == shown
    assert evaluate("0.1+0.2") == Fraction(3, 10)


@pytest.mark.parametrize(
    "text", ["9**9**9", "7//2", "__import__('os')", "a+1", "1e9", "", "1+", "(" * 150, "1+" * 120, "1 2"]
)
def test_what_is_no_arithmetic_is_refused(text: str) -> None:
    """Guards against attacks: no power, no names, no long text; an error and nothing else."""
    with pytest.raises(ExpressionError):
        evaluate(text)


def test_the_calculator_answers_calls_and_pays_for_the_answer() -> None:
    """Guards the worked example's protocol, turn by turn."""
    environment = Calculator(call_cost=0.125, max_calls=3)
    assert environment.reset(PROMPT, 0) == PROMPT.messages
    first = environment.step("<call>37*12</call>")
    assert (first.observation, first.reward, first.done) == ("<result>444</result>", -0.125, False)
    assert environment.step("<call>444+x</call>").observation == "<result>error: not arithmetic</result>"
    last = environment.step("answer 502")
    assert (last.reward, last.done) == (1.0, True)
    environment.reset(PROMPT, 0)
    assert environment.step("answer 501").reward == 0.0
    environment.reset(PROMPT, 0)
    assert [environment.step("<call>1</call>").done for _ in range(4)] == [False, False, False, True]


def test_a_verifier_is_an_environment_of_one_turn() -> None:
    """Guards the simplest case: the prompt's own conversation, one step, the function's value."""
    environment = SingleTurn(passes)
    assert environment.reset(PROMPT, 0) == PROMPT.messages
    result = environment.step("answer 502")
    assert (result.reward, result.done) == (1.0, True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("user")
    (path / "my_environments.py").write_text(MODULE)
    return str(path)


def host(folder: str, name: str = "Counting", **options: object) -> WorkerHost:
    task = Task(f"my_environments:{name}", options, search_path=(folder,))
    return WorkerHost(task, limit_s=0.5, workers=2)


def test_a_users_environment_fails_by_itself(folder: str) -> None:
    """Guards the loop: one that hangs, dies, pays nonsense; an episode whose process was killed goes on from the start."""
    workers = host(folder, start=7)
    episodes = [Episode(f"e{i}", PROMPT, seed=i) for i in range(6)]
    assert [p.messages[0].content for p in workers.play(episodes)] == [f"p {i} 7" for i in range(6)]
    turns = ["a", "hang", "die", "nan", "nothing", "b"]
    played = workers.play([Episode(e.key, PROMPT, e.seed, (t,)) for e, t in zip(episodes, turns, strict=True)])
    assert [p.problem[0] if p.problem else None for p in played] == [None, "timeout", "died", "raised", "raised", None]
    going_on = [Episode("e0", PROMPT, 0, ("a", "c")), Episode("e5", PROMPT, 5, ("b", "d"))]
    first, second = workers.play(going_on)
    assert (first.result.observation, first.result.reward, first.result.info) == ("a c", 2.0, {"seed": 0})
    assert second.result.observation == "b d"
    (last,) = workers.play([Episode("e0", PROMPT, 0, ("a", "c", "d"))])
    assert last.result.done
    workers.close()


def test_our_environments_fail_by_themselves() -> None:
    """Guards the loop in the driver's process: a prompt without checks cannot be paid for, its neighbours can."""
    local = LocalHost(Calculator)
    unchecked = Prompt("q", (Message("user", "?"),))
    good, bad = local.play([Episode("a", PROMPT, 0, ("answer 502",)), Episode("b", unchecked, 0, ("answer 1",))])
    assert good.result.reward == 1.0
    assert bad.problem is not None
    assert bad.problem[0] == "raised"
    assert "has no check" in bad.problem[1]


@pytest.mark.parametrize(
    ("name", "message"), [("Nothing", "has no 'Nothing'"), ("NoStep", "an environment has reset.* and step")]
)
def test_a_path_that_is_no_environment_is_refused(folder: str, name: str, message: str) -> None:
    """Guards the start of a run."""
    with pytest.raises(WorkerStartError, match=message):
        host(folder, name)


def test_options_that_an_environment_refuses_are_its_problem(folder: Path) -> None:
    """Guards the message: the constructor's own words, with the first episode."""
    workers = host(str(folder), strat=1)
    (played,) = workers.play([Episode("a", PROMPT, 0)])
    assert played.problem is not None
    assert "unexpected keyword argument 'strat'" in played.problem[1]
    workers.close()
