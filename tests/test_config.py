"""Presets: exact parameter counts by an independent count, the paper's own figures, and a source for every value."""

import dataclasses
import math
import re

import pytest

from afm_rl.config import PRESETS, SOURCES, ModelConfig
from afm_rl.parameters import ParamSpec, param_specs
from afm_rl.weights import leaves

#: preset: (embedding, everything else), exact, computed by hand from Table 1 and the sources in afm_rl/config.py.
COUNTS = {
    "afm-on-device": (150_994_944, 2_586_744_320),
    "afm-on-device-teacher": (150_994_944, 6_297_916_928),
    "afm-server": (822_083_584, 33_219_694_592),
    "tiny": (262_144, 738_368),
}


def count(c: ModelConfig) -> tuple[int, int]:
    """(embedding, everything else), matrix by matrix as section 2 lists them."""
    layer = sum(
        [
            c.dim * c.num_heads * c.head_dim,  # query
            c.dim * c.num_kv_heads * c.head_dim,  # key
            c.dim * c.num_kv_heads * c.head_dim,  # value
            c.num_heads * c.head_dim * c.dim,  # output
            2 * c.head_dim,  # gains of the query and key norms
            2 * c.dim,  # gains before attention and before the feed-forward
            3 * c.dim * c.ffn_dim,  # gate, up, down
        ]
    )
    return c.vocab_size * c.dim * (1 if c.tie_embeddings else 2), c.num_layers * layer + c.dim


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts(name):
    """Guards every dimension: the declared parameters, the formula and an independent count give one exact number."""
    config = PRESETS[name]
    assert count(config) == COUNTS[name]
    assert config.num_params == sum(COUNTS[name])
    specs = dict(leaves(param_specs(config)))
    assert all(isinstance(spec, ParamSpec) for spec in specs.values())
    assert sum(math.prod(spec.shape) for spec in specs.values()) == sum(COUNTS[name])


def test_counts_are_the_papers():
    """Table 1: 2.58B + 0.15B, pruned from 6.4B; the FFN of 8064 is within 0.3 % of the former."""
    embedding, rest = COUNTS["afm-on-device"]
    assert rest / 1e9 == pytest.approx(2.58, abs=0.01)
    assert round(embedding / 1e9, 2) == 0.15
    assert round(sum(COUNTS["afm-on-device-teacher"]) / 1e9, 1) == 6.4


def test_only_the_ffn_is_pruned():
    """3.2.1: the teacher is the on-device model with a wider FFN."""
    assert PRESETS["afm-on-device-teacher"].replace(ffn_dim=8064) == PRESETS["afm-on-device"]
    assert PRESETS["afm-on-device"].ffn_dim == 8064


def test_every_value_has_a_source():
    """Machine-readable provenance: each field of each preset is tagged, a choice of ours with its reason."""
    assert SOURCES.keys() == PRESETS.keys()
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    for name, sources in SOURCES.items():
        assert sources.keys() == fields, name
        for field, source in sources.items():
            assert re.fullmatch(r"paper \d(\.\d)*(, Table 1)?|axlearn|ours: .{10,}", source), (name, field, source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "model.dim must be at least 1"),
        ({"num_kv_heads": 3}, "must be a multiple of model.num_kv_heads"),
        ({"head_dim": 33}, "head_dim must be even"),
    ],
)
def test_impossible_shapes(changes, message):
    """Errors name the key of the topology file."""
    with pytest.raises(ValueError, match=message):
        PRESETS["tiny"].replace(**changes)
