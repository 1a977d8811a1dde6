"""Our safetensors writer and reader: the library's format to the bit, and damage that is named."""

import hashlib
import json

import ml_dtypes
import numpy as np
import pytest

from afm_rl.safetensors_file import SafetensorsError, read_safetensors, write_safetensors


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
