"""Checkpoints: exact resume of any tree, and no failure of disk or process that costs more than the newest one."""

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from afm_rl import checkpoint as checkpoint_module
from afm_rl.checkpoint import CheckpointError, latest, restore, save
from afm_rl.safetensors_file import SafetensorsError, read_safetensors, write_safetensors


class Pair(NamedTuple):
    left: Any
    right: Any


def tree_of_everything():
    params = {"layers": {"q": jnp.arange(6, dtype=jnp.float32).reshape(2, 3)}, "norm": jnp.ones(3, jnp.bfloat16) / 3}
    return {
        "params": params,
        "opt_state": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params),
        "pair": Pair(jnp.int32(7), (np.float64(0.1), [np.zeros((0, 4), np.int8)])),
        "scalars": (3, -(2**70), 0.1, float("inf"), True, "word", None),
        "key": jax.random.key(5),
        "host": np.array([[1.5]], ml_dtypes.bfloat16),
    }


def assert_same(a, b):
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


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def flip_bit(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


def test_any_tree_comes_back_bit_for_bit(tmp_path):
    """Nested dicts, tuples, optax states, NamedTuples, scalars, bfloat16, empty arrays, PRNG keys, types included."""
    tree = tree_of_everything()
    save(tmp_path, step=12, tree=tree, metadata={"groups": ["a", "b"], "cursor": {"epoch": 1}})
    found = latest(tmp_path)
    assert (found.step, found.folder.name) == (12, "step-000000000012")
    assert found.metadata == {"groups": ["a", "b"], "cursor": {"epoch": 1}}
    assert_same(restore(found, like=tree), tree)


def test_restore_like_shapes_only(tmp_path):
    """`like` may be abstract (jax.eval_shape), so that no second copy of the state need exist."""
    tree = {"w": jnp.arange(4.0), "key": jax.random.key(1)}
    save(tmp_path, step=0, tree=tree)
    assert_same(restore(latest(tmp_path), like=jax.eval_shape(lambda: tree)), tree)


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
    save(tmp_path, step=3, tree=run(start, optimizer.init(start), range(3)))
    resumed = restore(latest(tmp_path), like=(start, optimizer.init(start)))
    assert_same(run(*resumed, range(3, 5)), expected)


def test_restored_arrays_may_be_donated_and_meet_others(tmp_path):
    """A restored array is an ordinary uncommitted one: it survives its folder, donation, and arithmetic anywhere."""
    save(tmp_path, step=1, tree={"w": jnp.arange(1000.0)})
    w = restore(latest(tmp_path), like={"w": jnp.zeros(1000)})["w"]
    save(tmp_path, step=2, tree={}, keep=1)
    assert jax.jit(lambda x: x + 1, donate_argnums=0)(w)[-1] == 1000.0
    assert not restore(latest(tmp_path), like={})


def test_keeps_the_newest(tmp_path):
    """`keep` bounds the folder; nothing temporary is left."""
    for step in range(5):
        save(tmp_path, step=step, tree={"x": jnp.float32(step)}, keep=2)
    assert names(tmp_path) == ["step-000000000003", "step-000000000004"]


def test_no_checkpoint_is_none(tmp_path):
    """A fresh run starts from nothing without an error."""
    assert latest(tmp_path) is None
    assert latest(tmp_path / "absent") is None


@pytest.mark.parametrize("file", ["arrays.safetensors", "metadata.json"])
@pytest.mark.parametrize("damage", ["first", "middle", "last", "truncated", "empty", "gone"])
def test_a_damaged_newest_is_reported_and_the_previous_used(tmp_path, caplog, file, damage):
    """Any flipped bit or lost byte in either file is noticed, logged with path and reason, and survived."""
    for step in (1, 2):
        save(tmp_path, step=step, tree={"x": jnp.arange(100.0) + step}, metadata={"step": step})
    path = tmp_path / "step-000000000002" / file
    size = path.stat().st_size
    if damage == "gone":
        path.unlink()
    elif damage in ("truncated", "empty"):
        os.truncate(path, size - 1 if damage == "truncated" else 0)
    else:
        flip_bit(path, {"first": 0, "middle": size // 2, "last": size - 1}[damage])
    with caplog.at_level(logging.WARNING):
        found = latest(tmp_path)
    assert (found.step, found.metadata) == (1, {"step": 1})
    assert "step-000000000002 is damaged and not used: " in caplog.text
    assert file in caplog.text


def test_all_damaged_is_an_error(tmp_path):
    """A run whose every checkpoint is lost must not silently start over."""
    save(tmp_path, step=1, tree={"x": jnp.ones(3)})
    flip_bit(tmp_path / "step-000000000001" / "arrays.safetensors", -1)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        latest(tmp_path)


def test_integer_metadata_keys_do_not_look_like_damage(tmp_path):
    """JSON turns them into strings, also for the digest (2 < 10 but "10" < "2": the order changes too)."""
    save(tmp_path, step=1, tree={}, metadata={"seen": {10: "b", 2: "a"}})
    assert latest(tmp_path).metadata == {"seen": {"10": "b", "2": "a"}}


def test_full_disk_keeps_the_previous(tmp_path, monkeypatch):
    """ENOSPC anywhere in the write: a clear error, the previous checkpoint whole, nothing temporary left."""
    save(tmp_path, step=1, tree={"x": jnp.ones(3)})
    real = os.fsync

    for failing_call in (1, 2, 3):
        calls = iter(range(1, 100))

        def fsync(descriptor, failing_call=failing_call, calls=calls):
            if next(calls) == failing_call:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(checkpoint_module.os, "fsync", fsync)
        with pytest.raises(CheckpointError, match=r"no space left .* step 2 .*step-000000000001 is untouched"):
            save(tmp_path, step=2, tree={"x": jnp.zeros(3)})
        assert names(tmp_path) == ["step-000000000001"]
    assert restore(latest(tmp_path), like={"x": jnp.ones(3)})["x"].tolist() == [1, 1, 1]


KILLED_SAVES = """
import os, pathlib, shutil, sys
import numpy as np
from afm_rl import checkpoint

def dying(real, die_at):
    calls = 0
    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == die_at:
            os._exit(9)
        return real(*args, **kwargs)
    return call

for moment in ("write_safetensors", "_publish", "_sync_folder", "_remove", "rename", "rmtree", "unlink"):
    owner = {"rename": pathlib.Path, "rmtree": shutil, "unlink": os}.get(moment, checkpoint)
    for die_at in range(1, 7):
        folder = f"{sys.argv[1]}/{moment}-{die_at}"
        checkpoint.save(folder, step=1, tree={"x": np.ones(3)}, keep=1)
        if not (child := os.fork()):
            setattr(owner, moment, dying(getattr(owner, moment), die_at))
            checkpoint.save(folder, step=1, tree={"x": np.full(3, 2.0)}, keep=1)
            checkpoint.save(folder, step=2, tree={"x": np.full(3, 3.0)}, keep=1)
            os._exit(0)
        print(moment, die_at, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """A process dies at the nth call of each kind while it replaces step 1 and moves on: one is there, entire."""
    arguments = [sys.executable, "-c", KILLED_SAVES, str(tmp_path)]
    printed = subprocess.run(arguments, check=True, timeout=60, capture_output=True, text=True).stdout.split("\n")
    exits = [line.split() for line in printed if line]
    assert {code for _, _, code in exits} == {"0", "9"}
    assert {moment for moment, _, code in exits if code == "9"} == {moment for moment, _, _ in exits}
    for folder in tmp_path.iterdir():
        value = restore(latest(folder), like={"x": np.ones(3)})["x"]
        assert value.tolist() in ([1, 1, 1], [2, 2, 2], [3, 3, 3]), folder
        assert all(names(step) == ["arrays.safetensors", "metadata.json"] for step in folder.glob("step-*")), folder
        save(folder, step=3, tree={"x": np.zeros(3)}, keep=1)
        assert names(folder) == ["step-000000000003"]


def test_same_step_replaces_and_later_steps_are_refused(tmp_path):
    """A resumed run may write its step again; one that would go backwards under a later checkpoint may not."""
    save(tmp_path, step=1, tree={"x": np.ones(1)})
    save(tmp_path, step=3, tree={"x": np.ones(1)})
    save(tmp_path, step=3, tree={"x": np.zeros(1)})
    assert restore(latest(tmp_path), like={"x": np.ones(1)})["x"] == 0
    with pytest.raises(CheckpointError, match=r"cannot save step 2: .*step-000000000003 is later"):
        save(tmp_path, step=2, tree={"x": np.ones(1)})
    assert names(tmp_path) == ["step-000000000001", "step-000000000003"]


def test_a_damaged_later_step_makes_way(tmp_path, caplog):
    """After a fall back to step 1, the damaged step 3 must not outlive the new step 2."""
    for step in (1, 3):
        save(tmp_path, step=step, tree={"x": np.full(1, step)})
    flip_bit(tmp_path / "step-000000000003" / "metadata.json", 40)
    save(tmp_path, step=2, tree={"x": np.full(1, 2)})
    assert latest(tmp_path).step == 2
    assert "step-000000000003 is removed" in caplog.text


def test_restore_names_what_differs(tmp_path):
    """A changed model is an error that names leaves and shapes, never a partial or reshaped load."""
    save(tmp_path, step=1, tree={"a": jnp.ones((2, 3)), "b": jnp.ones(2), "n": 3})
    found = latest(tmp_path)
    for like, message in (
        ({"a": jnp.ones((3, 2)), "b": jnp.ones(2), "n": 3}, r"\['a'\] is float32\[2, 3\], expected float32\[3, 2\]"),
        ({"a": jnp.ones((2, 3)), "b": jnp.ones(2, jnp.int32), "n": 3}, r"\['b'\] is float32\[2\], expected int32"),
        ({"a": jnp.ones((2, 3)), "c": jnp.ones(2), "n": 3}, r"\['c'\] is not in .* \['b'\] is in the checkpoint only"),
        ({"a": jnp.ones((2, 3)), "b": jnp.ones(2), "n": 3.0}, r"\['n'\] is stored as int, expected float"),
    ):
        with pytest.raises(CheckpointError, match=message):
            restore(found, like=like)


def test_what_cannot_be_stored_is_refused_and_leaves_nothing(tmp_path):
    """Foreign leaves and metadata that is not JSON fail before the folder has a checkpoint."""
    with pytest.raises(TypeError, match=r"leaf \['f'\] is a function"):
        save(tmp_path, step=1, tree={"f": save})
    with pytest.raises(TypeError, match="metadata of the checkpoint is not JSON"):
        save(tmp_path, step=1, tree={}, metadata={"x": b"bytes"})
    with pytest.raises(TypeError, match="complex64 cannot be stored"):
        save(tmp_path, step=1, tree={"c": np.ones(1, np.complex64)})
    assert names(tmp_path) == []


def test_safetensors_file_matches_the_library(tmp_path):
    """Our writer and reader against the safetensors library, over every dtype both know, and its padding rule."""
    library = pytest.importorskip("safetensors.numpy")
    dtypes = [np.float64, np.float32, np.float16, np.int64, np.int8, np.uint8, np.uint32, np.bool_]
    arrays = {f"x.{np.dtype(d).name}": np.arange(6).reshape(2, 3).astype(d) for d in dtypes}
    arrays |= {"scalar": np.float32(3.0), "empty": np.zeros((0, 2), np.float32)}
    digest = write_safetensors(tmp_path / "ours", arrays, metadata={"format": "np"})
    theirs = library.load_file(tmp_path / "ours")
    library.save_file({name: np.asarray(array) for name, array in arrays.items()}, tmp_path / "theirs")
    assert digest == hashlib.sha256((tmp_path / "ours").read_bytes()).hexdigest()
    for found in (theirs, read_safetensors(tmp_path / "ours"), read_safetensors(tmp_path / "theirs")):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            assert found[name].shape == array.shape
            np.testing.assert_array_equal(found[name], array)


def test_safetensors_bfloat16_and_damage(tmp_path):
    """bfloat16 keeps its bits; a file that lies about its sizes is an error naming it, not a crash."""
    path = tmp_path / "x.safetensors"
    bf16 = (np.arange(5) / 3).astype(ml_dtypes.bfloat16)
    write_safetensors(path, {"b": bf16})
    assert read_safetensors(path)["b"].tobytes() == bf16.tobytes()
    whole = path.read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    header["b"]["data_offsets"] = [0, 400]
    text = json.dumps(header).encode()
    lie = len(text).to_bytes(8, "little") + text + bytes(10)
    for content in (b"", whole[:-1], whole[:20], b"\xff" * 8 + whole[8:], lie, whole[:8] + b"[]" + whole[10:]):
        path.write_bytes(content)
        with pytest.raises(SafetensorsError, match=r"x\.safetensors"):
            read_safetensors(path)
