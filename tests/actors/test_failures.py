"""Budgets of failures: each kind has its own, progress restores it, and its end says what went wrong."""

from __future__ import annotations

import pytest

from actors.failures import DataError, FailureBudget, FailuresExhaustedError, InfrastructureError, failure_kind
from actors.group import GroupRestartedError
from actors.host import ActorLostError, DeadlineError
from actors.weights import WeightsRefusedError
from afm_rl.weights import DigestMismatchError


def test_kinds() -> None:
    """Guards against retrying what cannot succeed, and against swallowing a fault of the program."""
    lost = GroupRestartedError("learner", restarts=1, rank=0, cause="killed")
    for error in (ActorLostError("a"), DeadlineError("b"), DigestMismatchError("c"), lost):
        assert failure_kind(error) == "infrastructure"
    assert failure_kind(WeightsRefusedError("not finite")) == "data"
    for fault in (ValueError("x"), RuntimeError("y"), KeyError("z"), AssertionError()):
        assert failure_kind(fault) is None


def test_budgets_are_separate_and_progress_restores_them() -> None:
    """Guards a long run: failures far apart never end it, and one kind does not eat the other's budget."""
    budget = FailureBudget("the loop", infrastructure=2, data=1)
    for _ in range(3):
        for _ in range(2):
            with budget.any("an iteration") as attempt:
                raise ActorLostError("sampler-0 is gone")
            assert attempt.failed
        with budget.any("an iteration") as attempt:
            raise DataError("NaN")
        assert budget.left("infrastructure") == budget.left("data") == 0
        budget.progressed()
    assert budget.left("infrastructure") == 2
    assert budget.total == {"infrastructure": 6, "data": 3}


def test_the_end_names_the_last_causes() -> None:
    """Guards diagnosis: one error, what was tried, how often, the newest causes, raised from the last."""
    budget = FailureBudget("the loop", infrastructure=6)

    def deliver(number: int) -> None:
        with budget.infrastructure("a delivery"):
            raise InfrastructureError(f"cause {number}")

    for number in range(6):
        deliver(number)
    with pytest.raises(FailuresExhaustedError) as raised:
        deliver(6)
    message = str(raised.value)
    assert message.startswith("the loop: 7 infrastructure failures without progress, 6 allowed: 2 earlier; a delivery: ")
    assert "cause 6" in message
    assert "cause 1" not in message
    assert str(raised.value.__cause__) == "cause 6"
    assert raised.value.kind == "infrastructure"


def test_what_is_not_charged_is_raised() -> None:
    """Guards against hiding errors: a data failure passes through a block for infrastructure, a fault through any."""
    budget = FailureBudget("the loop", infrastructure=5, data=5)
    with pytest.raises(DataError), budget.infrastructure("x"):
        raise DataError("bad")
    with pytest.raises(ZeroDivisionError), budget.any("x"):
        raise ZeroDivisionError
    with budget.any("x") as attempt:
        pass
    assert not attempt.failed
    assert budget.total == {"infrastructure": 0, "data": 0}
