"""A tree as a checkpoint stores it: a row of JSON per leaf, and the arrays by name, which orbax writes and reads.

Nested dicts, tuples, optax states, Python scalars, bfloat16, typed PRNG keys, empty arrays. An array is stored whole, under
its path in the tree, whatever its sharding was; it is read in parts onto whatever sharding is asked for. orbax is imported
where it is used: it takes half a second, and nothing but reading and writing arrays needs it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afm_rl.checkpoint_folder import ARRAYS_FOLDER, Checkpoint, CheckpointError

#: Arrays are read in groups of about this size: beside the result, one group is all that the host holds.
GROUP_BYTES = 64 * 2**20
Row = dict[str, Any]


def describe(tree: Any) -> tuple[dict[str, Row], dict[str, Any]]:
    """(what metadata.json says of every leaf, the arrays to write by name). Raises TypeError for a foreign leaf."""
    rows: dict[str, Row] = {}
    arrays: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path)
        rows[name], array = _to_stored(name, leaf)
        if array is not None and array.size:  # what is empty is its shape
            arrays[name] = array
    return rows, arrays


def _to_stored(name: str, leaf: Any) -> tuple[Row, Any]:
    if is_key(leaf):
        data = jax.random.key_data(leaf)
        row = {"kind": "key", "key_dtype": str(leaf.dtype), "impl": str(jax.random.key_impl(leaf))}
        return row | _shape_of(data), _global_or_host(data)
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        dtype = np.dtype(leaf.dtype)
        if dtype.kind not in "biufc" and dtype.isbuiltin != 2:  # 2: registered, as bfloat16 and the float8s are
            raise TypeError(f"leaf {name} of dtype {dtype} cannot be stored; a checkpoint holds numbers and booleans")
        array = _global_or_host(leaf) if isinstance(leaf, jax.Array) else np.asarray(leaf)
        return {"kind": "array"} | _shape_of(leaf), array
    if isinstance(leaf, bool | int | float | str):
        return {"kind": type(leaf).__name__, "value": leaf}, None
    raise TypeError(f"leaf {name} is a {type(leaf).__name__}; a checkpoint holds arrays, PRNG keys and Python scalars")


def is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _shape_of(array: Any) -> Row:
    return {"shape": list(array.shape), "dtype": str(array.dtype)}


def _global_or_host(array: jax.Array) -> Any:
    """Among several processes, what each holds for itself (a step count) is the first one's to write."""
    return np.asarray(array) if jax.process_count() > 1 and array.is_fully_addressable else array


def difference(row: Mapping[str, Any], like: Any) -> str | None:
    """Why a stored leaf cannot take the place of `like`, or None."""
    wanted = "key" if is_key(like) else "array" if hasattr(like, "dtype") else type(like).__name__
    if row["kind"] != wanted:
        return f"is stored as {row['kind']}, expected {wanted}"
    if wanted == "key":
        return None if row["key_dtype"] == str(like.dtype) else f"is a {row['key_dtype']}, expected {like.dtype}"
    if wanted == "array" and (row["dtype"], row["shape"]) != (str(like.dtype), list(like.shape)):
        return f"is {row['dtype']}{row['shape']}, expected {like.dtype}{list(like.shape)}"
    return None


def read_leaves(checkpoint: Checkpoint, wanted: Sequence[tuple[str, Any]]) -> list[Any]:
    """The leaves named, each as its `like` asks; arrays are read group by group."""
    rows, found = checkpoint.leaves, dict[str, Any]()
    for name, like in wanted:
        if "shape" not in rows[name]:
            found[name] = rows[name]["value"]
        elif not _size_bytes(rows[name]):
            found[name] = _as_asked(rows[name], np.zeros(rows[name]["shape"], jnp.dtype(rows[name]["dtype"])), like)
    for group in _groups(rows, [(name, like) for name, like in wanted if name not in found]):
        arrays = _read_arrays(
            checkpoint.folder / ARRAYS_FOLDER, {name: _read_sharding(like) for name, like in group.items()}
        )
        for name, like in group.items():
            found[name] = _as_asked(rows[name], arrays.pop(name), like)
    return [found[name] for name, _ in wanted]


def _size_bytes(row: Mapping[str, Any]) -> int:
    return int(np.prod(row["shape"], dtype=np.int64)) * jnp.dtype(row["dtype"]).itemsize


def _groups(rows: Mapping[str, Row], wanted: Sequence[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    group, size = dict[str, Any](), 0
    for name, like in wanted:
        if group and size + _size_bytes(rows[name]) > GROUP_BYTES:
            yield group
            group, size = {}, 0
        group[name] = like
        size += _size_bytes(rows[name])
    if group:
        yield group


def placement(like: Any) -> jax.sharding.Sharding | None:
    """Where an array goes that takes the place of `like`; None leaves it uncommitted on the default device.

    Uncommitted as fresh arrays are, so that it may meet arrays anywhere: a committed one could not.
    """
    sharding = getattr(like, "sharding", None)
    if isinstance(sharding, jax.sharding.SingleDeviceSharding) and sharding.device_set == {jax.local_devices()[0]}:
        return None
    return sharding


def _read_sharding(like: Any) -> jax.sharding.Sharding | None:
    """The sharding to read onto; keys, and what stays on the host or uncommitted, come as NumPy."""
    return None if is_key(like) else placement(like)


def _as_asked(row: Mapping[str, Any], array: Any, like: Any) -> Any:
    if row["kind"] == "key":
        keys, where = jax.random.wrap_key_data(jnp.array(array), impl=row["impl"]), placement(like)
        return keys if where is None else jax.device_put(keys, where)
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        if isinstance(array, jax.Array):
            return array
        where = placement(like)
        return jnp.array(array) if where is None else jax.device_put(array, where)
    return array[()] if isinstance(like, np.generic) else array


def _read_arrays(folder: Path, shardings: Mapping[str, jax.sharding.Sharding | None]) -> dict[str, Any]:
    """Arrays by name: a jax.Array where a sharding is given, of which every process reads its own shards, else NumPy."""
    import orbax.checkpoint as ocp

    def args(sharding: jax.sharding.Sharding | None) -> ocp.RestoreArgs:
        return ocp.RestoreArgs(restore_type=np.ndarray) if sharding is None else ocp.ArrayRestoreArgs(sharding=sharding)

    request = ocp.args.PyTreeRestore(
        item=dict.fromkeys(shardings, 0),
        restore_args={name: args(sharding) for name, sharding in shardings.items()},
        partial_restore=True,
    )
    return ocp.PyTreeCheckpointHandler().restore(folder, args=request)


def iterator_file(process: int, processes: int) -> str:
    return f"iterator-{process:05d}-of-{processes:05d}.json"


def iterator_text(data_iterator: Any) -> str:
    """The state of a grain-style iterator (bytes or JSON) as text."""
    state = data_iterator.get_state()
    if isinstance(state, bytes):
        return json.dumps({"base64": base64.b64encode(state).decode("ascii")})
    return json.dumps({"json": state})


def restore_iterator(checkpoint: Checkpoint, data_iterator: Any) -> None:
    """Set a grain-style iterator to the state this process saved. Raises CheckpointError when there is none."""
    name = iterator_file(jax.process_index(), jax.process_count())
    path = checkpoint.folder / name
    if not path.exists():
        saved = sorted(path.name for path in checkpoint.folder.glob("iterator-*")) or "none"
        raise CheckpointError(
            f"{checkpoint.folder} has no data iterator {name} (it has {saved}): the state of an iterator belongs to one "
            "process of as many as saved it. Resume with as many processes, or with batches that are a function of the step"
        )
    state = json.loads(path.read_text(encoding="utf-8"))
    data_iterator.set_state(base64.b64decode(state["base64"]) if "base64" in state else state["json"])
