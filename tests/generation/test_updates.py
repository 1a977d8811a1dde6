"""Weights that change: between requests, and while requests run under each of the three policies."""

from __future__ import annotations

import numpy as np
import pytest

from afm_rl.generate import Generator
from afm_rl.types import Group
from tests.generation.toy import PARAMS, ask, make, own_logps, prompt_of, random_params

NEW = random_params(seed=5)


def drain(generator: Generator) -> dict[str, Group]:
    groups: dict[str, Group] = {}
    while generator.unfinished:
        groups |= {group.id: group for group in generator.step()}
    return groups


def begun(on_update: str, **options: object) -> Generator:
    """An engine with two requests half done and a third that has not begun."""
    generator = make(on_update=on_update, max_batch=4, decode_steps=4, **options)
    for name in ("a", "b", "waits"):
        generator.submit(ask(prompt_of(20, seed=ord(name[0])), name, num_responses=2, max_tokens=30, seed=ord(name[0])))
    for _ in range(3):
        generator.step()
    assert generator.stats.running == 4
    return generator


def worst(group: Group, params: dict) -> float:
    return max(np.abs(own_logps(group, j, params=params) - group.logps[j]).max() for j in range(len(group.logps)))


def test_new_weights_need_no_new_program_and_forget_the_old_prefixes() -> None:
    """Guards the swap: the same programs, the new log-probabilities, and no page of the old version."""
    generator = make()
    request = ask(prompt_of(30), num_responses=2, max_tokens=12)
    [before] = generator.generate([request])
    programs, prefilled = generator.stats.compiled_programs, generator.stats.prompt_tokens
    generator.load(NEW, policy="p", version=2)
    [after] = generator.generate([request])
    assert (before.version, after.version) == (1, 2)
    assert worst(before, PARAMS) < 1e-4
    assert worst(after, NEW) < 1e-4
    assert generator.stats.compiled_programs == programs
    assert generator.stats.prompt_tokens == 2 * prefilled


def test_finish_lets_begun_requests_end_under_the_old_weights() -> None:
    """Guards `finish`: a begun group is of one version, and what waits is answered by the new one."""
    generator = begun("finish")
    generator.load(NEW, policy="p", version=2)
    groups = drain(generator)
    assert {name: group.version for name, group in groups.items()} == {"a": 1, "b": 1, "waits": 2}
    for name, group in groups.items():
        assert group.versions == ()
        assert worst(group, NEW if name == "waits" else PARAMS) < 1e-4


def test_restart_answers_everything_by_the_new_weights() -> None:
    """Guards `restart`: the same answers as if the new weights had been there from the beginning."""
    generator = begun("restart")
    generator.load(NEW, policy="p", version=2)
    groups = drain(generator)
    for group in groups.values():
        assert (group.version, group.versions) == (2, ())
        assert worst(group, NEW) < 1e-4
    fresh = begun("restart", params=NEW, version=2)
    for name, group in drain(fresh).items():
        for one, other in zip(group.responses, groups[name].responses, strict=True):
            np.testing.assert_array_equal(one, other)


def test_restart_keeps_responses_that_had_ended_and_stamps_them() -> None:
    """Guards a large group against never ending: what is done stays, by the weights that its stamps name."""
    generator = make(on_update="restart", max_batch=4)
    generator.submit(ask(prompt_of(20), "a", num_responses=6, max_tokens=5))
    while generator.stats.response_tokens < 4 * 5:
        generator.step()
    assert generator.unfinished == 1
    generator.load(NEW, policy="p", version=2)
    group = drain(generator)["a"]
    assert group.version == 2
    assert [set(versions.tolist()) for versions in group.versions] == [{1}] * 4 + [{2}] * 2
    for j, logps in enumerate(group.logps):
        np.testing.assert_allclose(logps, own_logps(group, j, params=PARAMS if j < 4 else NEW), atol=1e-4)


def test_continue_changes_weights_between_two_tokens_and_stamps_them() -> None:
    """Guards `continue`: each token carries the version that made it; equal weights change no token."""
    undisturbed = drain(begun("continue"))
    for params in (PARAMS, NEW):
        generator = begun("continue")
        generator.load(params, policy="p", version=2)
        groups = drain(generator)
        assert groups["waits"].version == 2
        for name in ("a", "b"):
            group = groups[name]
            assert group.version == 1
            for j, versions in enumerate(group.versions):
                assert len(versions) == len(group.responses[j]) == 30
                first = int((versions == 1).sum())
                assert 0 < first < 30
                np.testing.assert_array_equal(versions, [1] * first + [2] * (30 - first))
                same = group.responses[j] == undisturbed[name].responses[j]
                assert same[:first].all()
                assert same.all() == (params is PARAMS)


def test_weights_that_are_not_finite_leave_the_old_ones_at_work() -> None:
    """Guards against a NaN that spreads: found before anything is generated from it, while requests run."""
    generator = begun("restart")
    broken = {**NEW, "final_norm": np.full(16, np.inf, np.float32)}
    with pytest.raises(ValueError, match="'p' version 2 hold values that are not finite"):
        generator.load(broken, policy="p", version=2)
    groups = drain(generator)
    assert {group.version for group in groups.values()} == {1}
    assert worst(groups["a"], PARAMS) < 1e-4


def test_weights_of_another_shape_are_refused() -> None:
    """Guards running requests: what does not fit is found before anything is computed with it."""
    generator = begun("restart")
    layers = NEW["layers"]
    for broken, found in (({**layers, "up": layers["up"][:, 1:]}, r"\(2, 31, 16\)"), ({**layers, "up": None}, "missing")):
        with pytest.raises(ValueError, match=rf"'layers'\]\['up'\] is {found}, the model needs \(2, 32, 16\)"):
            generator.load({**NEW, "layers": broken}, policy="p", version=2)
    assert {group.version for group in drain(generator).values()} == {1}


def test_of_two_deliveries_only_the_newer_is_used() -> None:
    """Guards `finish` when updates come faster than requests end."""
    generator = begun("finish")
    generator.load(random_params(seed=6), policy="p", version=2)
    generator.load(NEW, policy="p", version=3)
    groups = drain(generator)
    assert groups["waits"].version == 3
    assert worst(groups["waits"], NEW) < 1e-4
