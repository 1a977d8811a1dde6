"""From the topology's `data` section to a `Dataset`: the embedded world, or the user's own files."""

from __future__ import annotations

from afm_rl.data.dataset import Dataset, from_files
from afm_rl.worlds.calculator_world import build_calculator_world
from afm_rl.worlds.python_world import build_world
from topologies.schema import CALCULATOR_SIZES, Topology


def load_dataset(topology: Topology) -> Dataset:
    """All records and documents of a run. Raises UserError naming the file and line of what is malformed."""
    if topology.data.files is None:
        sizes = topology.data.sizes.model_dump()
        if topology.data.world == "calculator":
            return build_calculator_world(seed=topology.seed, **{name: sizes[name] for name in CALCULATOR_SIZES})
        return build_world(seed=topology.seed, flip_rate=topology.actors.annotator.flip_rate, **sizes)
    files = topology.data.files.model_dump(exclude_none=True)
    return from_files(**files)
