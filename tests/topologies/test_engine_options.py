"""The engine of samplers in the YAML: amounts of memory, speculation, mistakes, and what the engine gets."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from afm_rl.config import PRESETS
from afm_rl.errors import UserError
from afm_rl.generation.options import EngineOptions, Speculation
from afm_rl.huggingface import save_pretrained
from afm_rl.parameters import param_specs
from topologies.costs import Machine
from topologies.plan import plan
from topologies.schema import Topology, parse_topology
from topologies.system import declare


def topology(engine: str = "{}", *, more: str = "", role: str = "sampler") -> Topology:
    return parse_topology(f"{{name: t, stages: [tokenizer], {more} actors: {{{role}: {{engine: {engine}}}}}}}")


def mistake(engine: str, **where: str) -> str:
    with pytest.raises(UserError) as caught:
        topology(engine, **where)
    return str(caught.value)


def test_defaults_are_those_of_the_schema() -> None:
    """An empty file gives the engine every option by name; the engine's own defaults are for whoever builds one by hand."""
    declared = declare(topology())
    for role in ("sampler", "committee"):
        assert declared[role][0].kwargs["engine"] == EngineOptions(max_batch=256, kv_cache_bytes=256 * 2**20)


def test_options_reach_the_engine() -> None:
    """What the file says is what is built; `deterministic` and the type of the products are the topology's."""
    engine = "{kv_cache: 1.5GiB, page_size: 32, prefill_chunk: 64, max_context: 100, on_update: continue}"
    computed = "deterministic: true, compute: {dtype: bfloat16}"
    actors = f"{{sampler: {{max_batch: 8, engine: {engine}}}}}"
    text = f"{{name: t, {computed}, stages: [tokenizer], actors: {actors}}}"
    assert declare(parse_topology(text))["sampler"][1].kwargs["engine"] == EngineOptions(
        max_batch=8,
        kv_cache_bytes=3 * 2**29,
        page_size=32,
        prefill_chunk=64,
        max_context=100,
        on_update="continue",
        compute_dtype="bfloat16",
        deterministic=True,
    )


@pytest.mark.parametrize(
    ("written", "expected"),
    [("1GiB", 2**30), ("512 MiB", 2**29), ("0.5kB", 500), ("64B", 64), ("2TB", 2 * 10**12), ("4096", 4096)],
)
def test_amounts_are_read_as_people_write_them(written: str, expected: int) -> None:
    """Binary and decimal units, with or without a space; a number alone is bytes."""
    assert topology(f"{{kv_cache: {written}}}").actors.sampler.engine.kv_cache == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("off", None),
        ("{kind: off}", None),
        ("ngram", Speculation(kind="ngram")),
        ("{kind: ngram, tokens: 2, max_ngram: 5}", Speculation(kind="ngram", tokens=2, max_ngram=5)),
        ("{kind: draft, draft: small}", Speculation(kind="draft", draft=str(Path("small").absolute()))),
    ],
)
def test_speculation(written: str, expected: Speculation | None) -> None:
    """A word is enough where nothing else is said; a folder is found from wherever the actors run."""
    assert topology(f"{{speculative: {written}}}").actors.sampler.engine.speculative.options() == expected


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("{kv_cache: 1Gib}", "'1Gib' is no amount of memory; write bytes, or a number with one of B, KiB, MiB"),
        ("{kv_cache: 0}", "greater than or equal to 1"),
        ("{kv_cash: 1GiB}", "unknown key 'kv_cash'; did you mean 'kv_cache'?"),
        ("{page_size: 12}", "multiple of 8"),
        ("{on_update: wait}", "'finish', 'restart' or 'continue'"),
        ("{speculative: {kind: draft}}", "the folder of a small policy goes with kind: draft"),
        ("{speculative: {kind: ngram, draft: x}}", "the folder of a small policy goes with kind: draft"),
        ("{max_context: 99999}", "actors.sampler.engine.max_context: more than model.max_positions, "),
    ],
)
def test_mistakes_say_what_is_right(engine: str, said: str) -> None:
    """Each mistake is one line with its place and the way out."""
    assert said in mistake(engine)


def test_speculation_and_determinism_exclude_each_other() -> None:
    """A deterministic engine has one shape for everything; the file says so before anything starts."""
    said = mistake("{speculative: ngram}", more="deterministic: true,", role="committee")
    assert "actors.committee.engine.speculative: not with deterministic: true" in said


def test_a_draft_that_is_not_there_is_found_at_once(tmp_path: Path) -> None:
    """The folder is looked at when the file is read, where paths are checked."""
    from topologies.schema import load_topology

    path = tmp_path / "t.yaml"
    path.write_text(
        "{name: t, stages: [tokenizer], actors: {sampler: {engine: {speculative: {kind: draft, draft: /nowhere}}}}}"
    )
    with pytest.raises(UserError, match="/nowhere is no policy folder"):
        load_topology(path)


def test_the_plan_counts_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`afm-rl plan`: a sampler needs its cache beside its weights, the committee one cache for all its members;
    a model that guesses has weights and pages of its own."""
    from topologies import plan as plan_module

    monkeypatch.setattr(plan_module, "machine_bytes", lambda: 2**40)
    monkeypatch.setattr(plan_module, "machine_cpus", lambda: 2)

    def memory(role: str, cache: str) -> int:
        found = plan(topology(f"{{kv_cache: {cache}}}", role=role), machine=Machine(1e11))
        return next(actor.memory_bytes for actor in found.actors if actor.role == role)

    for role in ("sampler", "committee"):
        assert memory(role, "3GiB") - memory(role, "1GiB") == 2 * 2**30
    small = PRESETS["tiny"].replace(num_layers=1)
    params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), param_specs(small), is_leaf=lambda x: hasattr(x, "std"))
    save_pretrained(params, tmp_path / "small", config=small)
    draft = memory("sampler", f"3GiB, speculative: {{kind: draft, draft: {tmp_path / 'small'}}}") - memory("sampler", "3GiB")
    assert draft == 4 * small.num_params + 3 * 2**30 // PRESETS["tiny"].num_layers
