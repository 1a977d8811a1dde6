"""Checkpoints: any tree comes back exactly, in the background, onto the devices asked for; what differs is named."""

import logging
import threading
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from afm_rl import checkpoint_folder
from afm_rl.checkpoint import CheckpointError, Checkpoints, latest, restore


class Pair(NamedTuple):
    left: Any
    right: Any


def tree_of_everything() -> dict[str, Any]:
    params = {"layers": {"q/k": jnp.arange(6, dtype=jnp.float32).reshape(2, 3)}, "norm.": jnp.ones(3, jnp.bfloat16) / 3}
    return {
        "params": params,
        "opt_state": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params),
        "pair": Pair(jnp.int32(7), (np.float64(0.1), [np.zeros((0, 4), np.int8), jnp.zeros((3, 0))])),
        "scalars": (3, -(2**70), 0.1, float("inf"), True, "word", None),
        "key": jax.random.key(5),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
        "host": np.array([[1.5]], ml_dtypes.bfloat16),
        "zero_dimensional": np.array(2.5, np.float16),
        "small": [np.arange(3).astype(d) for d in (ml_dtypes.float8_e4m3fn, ml_dtypes.int4, np.bool_, np.complex64)],
    }


def assert_same(a: Any, b: Any) -> None:
    a_leaves, a_structure = jax.tree.flatten(a)
    b_leaves, b_structure = jax.tree.flatten(b)
    assert a_structure == b_structure
    for x, y in zip(a_leaves, b_leaves, strict=True):
        assert type(x) is type(y)
        if not hasattr(x, "dtype"):
            assert x == y
            continue
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def written(folder: Path, step: int, tree: Any, metadata: dict[Any, Any] | None = None, **options: Any) -> None:
    with Checkpoints(folder, **options) as checkpoints:
        checkpoints.save(step, tree, metadata)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_any_tree_comes_back_bit_for_bit(tmp_path):
    """Nested dicts, tuples, optax states, scalars, every dtype, empty arrays, PRNG keys of two kinds, types included."""
    tree = tree_of_everything()
    written(tmp_path, 12, tree, {"groups": ["a", "b"], "cursor": {"epoch": 1}})
    found = latest(tmp_path)
    assert (found.step, found.folder.name) == (12, "step-000000000012")
    assert found.metadata == {"groups": ["a", "b"], "cursor": {"epoch": 1}}
    assert_same(restore(found, like=tree), tree)


def test_restore_like_shapes_only(tmp_path):
    """`like` may be abstract (jax.eval_shape), so that no second copy of the state need exist; NumPy asks for NumPy."""
    tree = {"w": jnp.arange(4.0), "key": jax.random.key(1)}
    written(tmp_path, 0, tree)
    assert_same(restore(latest(tmp_path), like=jax.eval_shape(lambda: tree)), tree)
    on_host = restore(latest(tmp_path), like={"w": np.zeros(4, np.float32), "key": jax.random.key(0)})["w"]
    on_host += 1
    assert on_host.tolist() == [1, 2, 3, 4]


def test_donating_at_once_does_not_reach_the_checkpoint(tmp_path):
    """`save` returns while the write goes on: the training step may donate the arrays, the caller change its own."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x + 1, tree), donate_argnums=0)
    jax.block_until_ready(step({f"w{i}": jnp.zeros(1_000_000) for i in range(8)}))
    tree, host = {f"w{i}": jnp.full(1_000_000, float(i)) for i in range(8)}, np.arange(1000)
    expected = {name: np.array(array) for name, array in tree.items()} | {"host": host.copy()}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree | {"host": host})
        host += 1
        for _ in range(3):
            tree = step(tree)
        jax.block_until_ready(tree)
    assert_same(restore(latest(tmp_path), like=expected), expected)


def test_the_write_goes_on_behind_and_waits_have_deadlines(tmp_path, monkeypatch):
    """`save` returns before the checkpoint is there; `wait` blocks until it is, or says what it waited for."""
    go, real = threading.Event(), checkpoint_folder.seal

    def held_back(temporary: Path) -> None:
        assert go.wait(30)
        real(temporary)

    monkeypatch.setattr(checkpoint_folder, "seal", held_back)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"x": jnp.ones(3)})
    assert latest(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"checkpoint-3 of .* not done after 0.5 s: hashing and publishing"):
        checkpoints.wait(0.5)
    go.set()
    checkpoints.wait()
    assert latest(tmp_path).step == 3
    checkpoints.close()


@pytest.mark.parametrize("then", ["save", "wait", "close"])
def test_an_error_in_the_background_is_raised_at_the_next_call(tmp_path, monkeypatch, caplog, then):
    """Nothing is lost silently: once logged, once raised; the writer goes on afterwards."""
    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, "seal", lambda _: 1 / 0)
        checkpoints.save(1, {"x": jnp.ones(3)})
        calls = {"save": lambda: checkpoints.save(2, {}), "wait": checkpoints.wait, "close": checkpoints.close}
        with pytest.raises(ZeroDivisionError):
            calls[then]()
    assert "the checkpoint of step 1" in caplog.text
    assert names(tmp_path) == []
    checkpoints.save(2, {"x": jnp.zeros(3)})
    checkpoints.close()
    assert latest(tmp_path).step == 2


def test_training_resumes_exactly(tmp_path):
    """Five steps equal three, a save, a restore into a fresh state, and two: bit for bit."""
    optimizer = optax.adam(0.1)
    start = {"w": jnp.array([1.0, -2.0, 0.5])}

    def run(params, state, steps):
        for step in steps:
            grads = jax.grad(lambda p, s=step: jnp.sum(jnp.sin(p["w"] * (s + 1))))(params)
            updates, state = optimizer.update(grads, state)
            params = optax.apply_updates(params, updates)
        return params, state

    expected = run(start, optimizer.init(start), range(5))
    written(tmp_path, 3, run(start, optimizer.init(start), range(3)))
    resumed = restore(latest(tmp_path), like=(start, optimizer.init(start)))
    assert_same(run(*resumed, range(3, 5)), expected)


def test_restored_arrays_may_be_donated_and_meet_others(tmp_path):
    """A restored array is an ordinary uncommitted one: it survives its folder, donation, and arithmetic anywhere."""
    written(tmp_path, 1, {"w": jnp.arange(1000.0)})
    w = restore(latest(tmp_path), like={"w": jnp.zeros(1000)})["w"]
    assert not w.committed
    written(tmp_path, 2, {}, keep=1)
    assert jax.jit(lambda x: x + 1, donate_argnums=0)(w)[-1] == 1000.0
    assert not restore(latest(tmp_path), like={})


@pytest.mark.parametrize(
    ("keep", "keep_every", "expected"), [(2, None, [6, 7]), (1, 3, [0, 3, 6, 7]), (3, 4, [0, 4, 5, 6, 7])]
)
def test_keeps_the_newest_and_every_mth(tmp_path, keep, keep_every, expected):
    """`keep` bounds the folder, multiples of `keep_every` stay; nothing temporary is left."""
    with Checkpoints(tmp_path, keep=keep, keep_every=keep_every) as checkpoints:
        for step in range(8):
            checkpoints.save(step, {"n": step})
    assert names(tmp_path) == [f"step-{step:012d}" for step in expected]


def test_no_checkpoint_is_none(tmp_path):
    """A fresh run starts from nothing without an error."""
    assert latest(tmp_path) is None
    assert latest(tmp_path / "absent") is None
    assert Checkpoints(tmp_path / "absent").latest() is None


def test_metadata_comes_back_as_json_gives_it(tmp_path):
    """Integer keys turn into strings."""
    written(tmp_path, 1, {}, {"seen": {10: "b", 2: "a"}})
    assert latest(tmp_path).metadata == {"seen": {"10": "b", "2": "a"}}


def test_same_step_replaces_and_later_steps_are_refused(tmp_path):
    """A resumed run may write its step again; one that would go backwards under a later checkpoint may not."""
    with Checkpoints(tmp_path) as checkpoints:
        for step, value in ((1, 1.0), (3, 1.0), (3, 0.0)):
            checkpoints.save(step, {"x": np.full(1, value)})
        with pytest.raises(CheckpointError, match=r"cannot save step 2: .*step-000000000003 is later"):
            checkpoints.save(2, {"x": np.ones(1)})
    assert restore(latest(tmp_path), like={"x": np.ones(1)})["x"] == 0
    assert names(tmp_path) == ["step-000000000001", "step-000000000003"]


def test_restore_names_what_differs(tmp_path):
    """A changed model is an error that names leaves and shapes, never a partial or reshaped load."""
    written(tmp_path, 1, {"a": jnp.ones((2, 3)), "b": jnp.ones(2), "n": 3, "k": jax.random.key(0)})
    found, key = latest(tmp_path), jax.random.key(0)
    for like, message in (
        (
            {"a": jnp.ones((3, 2)), "b": jnp.ones(2), "n": 3, "k": key},
            r"\['a'\] is float32\[2, 3\], expected float32\[3, 2\]",
        ),
        ({"a": jnp.ones((2, 3)), "b": jnp.ones(2, jnp.int32), "n": 3, "k": key}, r"\['b'\] is float32\[2\], expected int32"),
        (
            {"a": jnp.ones((2, 3)), "c": jnp.ones(2), "n": 3, "k": key},
            r"\['c'\] is not in .* \['b'\] is in the checkpoint only",
        ),
        ({"a": jnp.ones((2, 3)), "b": jnp.ones(2), "n": 3.0, "k": key}, r"\['n'\] is stored as int, expected float"),
        ({"a": jnp.ones((2, 3)), "b": jnp.ones(2), "n": 3, "k": jnp.ones(2)}, r"\['k'\] is stored as key, expected array"),
    ):
        with pytest.raises(CheckpointError, match=message):
            restore(found, like=like)


def test_what_cannot_be_stored_is_refused_and_leaves_nothing(tmp_path):
    """Foreign leaves and metadata that is not JSON fail at once, before the folder has a checkpoint."""
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match=r"leaf \['f'\] is a function"):
            checkpoints.save(1, {"f": written})
        with pytest.raises(TypeError, match="metadata of the checkpoint is not JSON"):
            checkpoints.save(1, {}, {"x": b"bytes"})
        with pytest.raises(TypeError, match=r"leaf \['c'\] of dtype <U1 cannot be stored"):
            checkpoints.save(1, {"c": np.array(["a"])})
    assert names(tmp_path) == []


def map_dataset() -> Any:
    return iter(grain.MapDataset.source(range(10)).seed(3).shuffle().repeat(2).to_iter_dataset().batch(2))


def data_loader() -> Any:
    sampler = grain.samplers.IndexSampler(10, shard_options=grain.sharding.NoSharding(), shuffle=True, num_epochs=2, seed=3)
    return iter(grain.DataLoader(data_source=list(range(10)), sampler=sampler, worker_count=0))


@pytest.mark.parametrize("make", [map_dataset, data_loader])
def test_a_grain_iterator_goes_on_where_it_was(tmp_path, make):
    """Both of grain's iterators, one with a dict for a state, one with bytes."""
    iterator = make()
    for _ in range(3):
        next(iterator)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, {"x": jnp.ones(2)}, data_iterator=iterator)
        expected = [np.asarray(batch).tolist() for batch in iterator]
    resumed = make()
    restore(latest(tmp_path), like={"x": jnp.ones(2)}, data_iterator=resumed)
    assert [np.asarray(batch).tolist() for batch in resumed] == expected
    assert len(expected) > 3


def test_a_missing_iterator_state_is_named(tmp_path):
    """Guards against a data stream that starts over without a word."""
    written(tmp_path, 1, {})
    with pytest.raises(CheckpointError, match=r"no data iterator iterator-00000-of-00001.json \(it has none\)"):
        restore(latest(tmp_path), like={}, data_iterator=map_dataset())


def test_a_plain_orbax_reader_reads_the_arrays(tmp_path):
    """The arrays are orbax's own format: other tools need none of our code."""
    import orbax.checkpoint as ocp

    written(tmp_path, 1, {"w": jnp.arange(3.0)})
    found = ocp.PyTreeCheckpointer().restore(tmp_path / "step-000000000001" / "arrays")
    assert {name: value.tolist() for name, value in found.items()} == {"['w']": [0.0, 1.0, 2.0]}


def test_the_log_stays_quiet(tmp_path, caplog):
    """A save and a restore that go well warn of nothing."""
    with caplog.at_level(logging.WARNING):
        written(tmp_path, 1, tree_of_everything())
        restore(latest(tmp_path), like=tree_of_everything())
    assert caplog.records == []
