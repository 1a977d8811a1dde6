"""Packages and adapters on disk: exact round trips, honest sizes, and every damage found on load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.config import ModelConfig
from afm_rl.lora import attach, projection_shapes
from afm_rl.model import forward, logits
from afm_rl.parameters import ParamSpec, param_specs
from afm_rl.quantized import PalettizedWeight, dequantize_params
from afm_rl.safetensors_file import read_safetensors, write_safetensors
from quant.operations import operation_names, operations
from quant.package import (
    PackageError,
    is_package,
    pack_indices,
    read_adapter,
    read_package,
    unpack_indices,
    write_adapter,
    write_package,
)
from quant.palettize import palettize
from quant.recovery import palettize_operations, quantize_params, stack, unstack

CONFIG = ModelConfig(32, 16, 24, 2, 4, 2, 8)
#: Layers of one projection with different bits: every second operation is pushed to 2.
BITS = {name: 4 if i % 2 else 2 for i, name in enumerate(operation_names(2))}
TOKENS = np.arange(10).reshape(1, 10)


def random_params(config: ModelConfig = CONFIG) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def draw(spec: ParamSpec) -> np.ndarray:
        return (rng.normal(size=spec.shape) * (spec.std or 1.0)).astype(np.float32)

    return jax.tree.map(draw, param_specs(config), is_leaf=lambda leaf: isinstance(leaf, ParamSpec))


def random_adapter(rank: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    factors = {
        name: {"a": rng.normal(size=(2, rank, fan_in)), "b": 0.1 * rng.normal(size=(2, out, rank))}
        for name, (out, fan_in) in projection_shapes(CONFIG).items()
    }
    return {"layers": jax.tree.map(lambda leaf: leaf.astype(np.float32), factors)}


@pytest.fixture
def params() -> dict[str, Any]:
    return random_params()


@pytest.fixture
def quantized(params: dict[str, Any]) -> dict[str, Any]:
    return quantize_params(params, palettize_operations(params, BITS, group_size=8))


@pytest.fixture
def folder(tmp_path: Path, quantized: dict[str, Any]) -> Path:
    write_package(tmp_path / "package", params=quantized, config=CONFIG, bits=BITS, details={"target": 3.0, 4: "x"})
    return tmp_path / "package"


@jax.jit
def run(params: Any) -> jax.Array:
    hidden = forward(params, TOKENS, config=CONFIG)
    return logits(params, hidden, CONFIG)


def flip_bit(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_quantized_tree_holds_each_operation(params: dict[str, Any], quantized: dict[str, Any]) -> None:
    """Guards the stacking of layers with different bits: each dequantises to its own palettized matrix."""
    assert isinstance(quantized["layers"]["q"], PalettizedWeight)
    assert quantized["layers"]["q"].lut.shape == (2, 4, 16)
    plain = operations(dequantize_params(quantized))
    for name, weight in operations(params).items():
        expected = palettize(weight, bits=BITS[name], group_size=8)
        np.testing.assert_array_equal(plain[name], expected.dequantize())
        assert int(expected.indices.max()) < 2 ** BITS[name]
    step = np.abs(params["embed"]["weight"]).max(axis=1, keepdims=True) / 127
    error = np.abs(dequantize_params(quantized)["embed"]["weight"] - params["embed"]["weight"])
    assert (error <= 0.501 * step).all()
    np.testing.assert_array_equal(quantized["layers"]["attn_norm"], params["layers"]["attn_norm"])
    assert np.isfinite(run(jax.tree.map(jnp.asarray, quantized))).all()


def test_quantize_params_names_what_is_missing(params: dict[str, Any]) -> None:
    """Guards incomplete work of the quantizer actors, and matrices of another model."""
    done = palettize_operations(params, BITS)
    with pytest.raises(ValueError, match=r"layers\.1\.up has not been palettized"):
        quantize_params(params, {name: p for name, p in done.items() if name != "layers.1.up"})
    with pytest.raises(ValueError, match=r"layers\.0\.o is \(16, 32\), its indices \(32, 16\)"):
        quantize_params(params, {**done, "layers.0.o": done["layers.0.q"]})
    with pytest.raises(ValueError, match="one group size"):
        stack([done["layers.0.q"], palettize(params["layers"]["q"][1], bits=4, group_size=4)])


def test_stack_and_unstack_are_inverse() -> None:
    """Guards wider tables than 4 bits too."""
    rng = np.random.default_rng(2)
    layers = [palettize(rng.normal(size=(32, 16)), bits=b) for b in (2, 4, 5)]
    leaf = stack(layers)
    assert leaf.lut.shape == (3, 2, 32)
    for layer, found in zip(layers, unstack(leaf, [2, 4, 5]), strict=True):
        np.testing.assert_array_equal(found.lut, layer.lut)
        np.testing.assert_array_equal(found.indices, layer.indices)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_round_trip(bits: int) -> None:
    """Guards every width, a last byte that is not full, and an index that does not fit."""
    indices = np.random.default_rng(bits).integers(0, 2**bits, (7, 3)).astype(np.uint8)
    packed = pack_indices(indices, bits)
    assert packed.nbytes == -(-21 * bits // 8)
    np.testing.assert_array_equal(unpack_indices(packed, bits=bits, shape=(7, 3)), indices)
    with pytest.raises(ValueError, match="do not hold"):
        unpack_indices(packed[:-1], bits=bits, shape=(7, 3))


def test_packed_bits_by_hand() -> None:
    """Guards the order that other readers rely on: lowest bits of the byte first."""
    np.testing.assert_array_equal(pack_indices(np.array([1, 2, 3, 0, 2], np.uint8), 2), [0b00_11_10_01, 0b10])
    np.testing.assert_array_equal(pack_indices(np.array([5, 10], np.uint8), 4), [0xA5])
    with pytest.raises(ValueError, match="index 4 does not fit in 2 bits"):
        pack_indices(np.array([4], np.uint8), 2)


def test_package_round_trip(folder: Path, quantized: dict[str, Any]) -> None:
    """Guards every array, the configuration and the bits; loaded parameters run without conversion."""
    package = read_package(folder)
    assert package.config == CONFIG
    assert package.bits == BITS
    assert package.manifest["details"] == {"target": 3.0, "4": "x"}
    assert jax.tree.structure(package.params) == jax.tree.structure(quantized)
    jax.tree.map(np.testing.assert_array_equal, package.params, quantized)
    loaded = jax.tree.map(jnp.asarray, package.params)
    np.testing.assert_array_equal(run(loaded), run(jax.tree.map(jnp.asarray, quantized)))


def test_untied_package_round_trip(tmp_path: Path) -> None:
    """Guards the second table of models with their own output projection."""
    config = CONFIG.replace(tie_embeddings=False)
    tree = random_params(config)
    tree = quantize_params(tree, palettize_operations(tree, BITS))
    write_package(tmp_path / "untied", params=tree, config=config, bits=BITS)
    jax.tree.map(np.testing.assert_array_equal, read_package(tmp_path / "untied").params, tree)


def test_sizes_are_what_is_on_disk(folder: Path) -> None:
    """Guards the two figures: projections with tables by the formula, and the file by its real size."""
    package = read_package(folder)
    total = weights = 0
    for name in operation_names(2):
        out, fan_in = projection_shapes(CONFIG)[name.split(".")[2]]
        total += out * fan_in * BITS[name] + (out // 8) * 2 ** BITS[name] * 16
        weights += out * fan_in
    assert package.bits_per_weight == total / weights
    file = folder / "palettized.safetensors"
    assert package.file_bits_per_weight == file.stat().st_size * 8 / CONFIG.num_params
    stored = sum(
        a.nbytes for name, a in read_safetensors(file).items() if name.endswith((".indices", ".lut")) and "." in name
    )
    assert stored == total / 8


@pytest.mark.parametrize("at", [9, 2000, -1])
def test_flipped_bit_is_detected(folder: Path, at: int) -> None:
    """Guards the header, the middle and the last byte of the weights."""
    flip_bit(folder / "palettized.safetensors", at)
    with pytest.raises(PackageError, match=r"palettized\.safetensors is damaged: SHA-256"):
        read_package(folder)


def test_damaged_folders_are_named(folder: Path) -> None:
    """Guards truncation, a missing file, and a manifest that was edited, cut or is of another version."""
    weights, manifest = folder / "palettized.safetensors", folder / "manifest.json"
    whole, text = weights.read_bytes(), manifest.read_text()
    weights.write_bytes(whole[:-100])
    with pytest.raises(PackageError, match=r"palettized\.safetensors has \d+ bytes instead of \d+: it is truncated"):
        read_package(folder)
    weights.unlink()
    with pytest.raises(PackageError, match=r"palettized\.safetensors is missing"):
        read_package(folder)
    weights.write_bytes(whole)
    assert is_package(folder)
    for broken in (text.replace('"bits": 2', '"bits": 4', 1), text[:-40], "[]"):
        manifest.write_text(broken)
        with pytest.raises(PackageError, match=r"manifest\.json is damaged"):
            read_package(folder)
    manifest.unlink()
    assert not is_package(folder)
    with pytest.raises(PackageError, match=r"manifest\.json is missing"):
        read_package(folder)


def test_failed_write_leaves_the_old_package(folder: Path, params: dict[str, Any], quantized: dict[str, Any]) -> None:
    """Guards whole-or-not-at-all: refused input (not quantised, no bits) keeps what is there and leaves no litter."""
    with pytest.raises(ValueError, match=r"layers\.q must be palettized"):
        write_package(folder, params=params, config=CONFIG, bits=BITS)
    with pytest.raises(ValueError, match=r"no bits are given for layers\.0\.q"):
        write_package(folder, params=quantized, config=CONFIG, bits={})
    lower = dict.fromkeys(BITS, 2)
    with pytest.raises(ValueError, match="does not fit in 2 bits"):
        write_package(folder, params=quantized, config=CONFIG, bits=lower)
    assert read_package(folder).bits == BITS
    assert [path.name for path in folder.parent.iterdir()] == ["package"]


def test_adapter_round_trip_in_peft_layout(tmp_path: Path, quantized: dict[str, Any]) -> None:
    """Guards names, shapes, 16 bits and the options PEFT reads; the adapter attaches to the package it is for."""
    lora = random_adapter()
    write_adapter(tmp_path / "summary", lora, rank=4, alpha=8.0)
    stored = read_safetensors(tmp_path / "summary" / "adapter_model.safetensors")
    assert len(stored) == 2 * 7 * 2
    a = stored["base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"]
    np.testing.assert_array_equal(a, lora["layers"]["o"]["a"][1].astype(np.float16))
    assert stored["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].shape == (16, 4)
    options = json.loads((tmp_path / "summary" / "adapter_config.json").read_text())
    assert (options["peft_type"], options["r"], options["lora_alpha"]) == ("LORA", 4, 8.0)
    assert options["target_modules"] == [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]
    adapter = read_adapter(tmp_path / "summary")
    assert (adapter.rank, adapter.alpha) == (4, 8.0)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), adapter.params, lora)
    base = jax.tree.map(jnp.asarray, quantized)
    assert float(jnp.abs(run(attach(base, adapter.params, alpha=8.0, rank=4)) - run(base)).max()) > 0.01


def test_damaged_adapters_are_named(tmp_path: Path) -> None:
    """Guards both files of an adapter of ours, and truncation of one from elsewhere (which carries no digests)."""
    folder = tmp_path / "a"
    for file in ("adapter_model.safetensors", "adapter_config.json", "digests.json"):
        write_adapter(folder, random_adapter(), rank=4, alpha=8.0)
        flip_bit(folder / file, 40)
        with pytest.raises(PackageError, match=f"{file} is damaged"):
            read_adapter(folder)
    write_adapter(folder, random_adapter(), rank=4, alpha=8.0)
    (folder / "digests.json").unlink()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(PackageError, match=r"adapter_model\.safetensors"):
        read_adapter(folder)


def test_foreign_adapters_are_read_or_refused_by_name(tmp_path: Path) -> None:
    """Guards what PEFT can express: a subset of the projections is fine, anything of another meaning is not."""
    lora = {"layers": {"q": random_adapter()["layers"]["q"]}}
    write_adapter(tmp_path, lora, rank=4, alpha=8.0)
    (tmp_path / "digests.json").unlink()
    assert list(read_adapter(tmp_path).params["layers"]) == ["q"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for key, value in {"use_dora": True, "peft_type": "IA3", "bias": "all", "rank_pattern": {"q_proj": 2}}.items():
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(PackageError, match=f"adapter_config.json: {key} = "):
            read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model"
    name = f"{prefix}.layers.1.self_attn.q_proj.lora_A.weight"
    tensors = read_safetensors(tmp_path / "adapter_model.safetensors")
    for changed, message in [
        ({k: v for k, v in tensors.items() if k != name}, r"lora_A of q_proj is missing for layers \[1\]"),
        (
            {**tensors, f"{prefix}.embed_tokens.lora_A.weight": tensors[name]},
            "embed_tokens.lora_A.weight is not a LoRA",
        ),
        ({**tensors, name: tensors[name][:2]}, r"has shape \(2, 16\), the rank is 4"),
        ({}, "holds no LoRA factor"),
    ]:
        write_safetensors(tmp_path / "new", changed)
        (tmp_path / "new").replace(tmp_path / "adapter_model.safetensors")
        with pytest.raises(PackageError, match=message):
            read_adapter(tmp_path)


def test_adapter_that_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    """Guards a diverged adapter (infinite in 16 bits) and a wrong rank."""
    lora = random_adapter()
    with pytest.raises(ValueError, match=r"q\.a .* is not of rank 8"):
        write_adapter(tmp_path, lora, rank=8, alpha=8.0)
    lora["layers"]["up"]["b"][0, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"up\.b has values that are not finite in float16"):
        write_adapter(tmp_path, lora, rank=4, alpha=8.0)
