"""What a topology's mesh must divide (3.3): devices would idle, or all do the same, where an axis has to be left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from topologies.strict import problem
from topologies.yaml_source import Loc, show

if TYPE_CHECKING:
    from topologies.schema import Topology


def check_mesh(topology: Topology) -> None:
    """Every dimension that the learner's mesh cuts must divide. Raises as every check of a topology (`strict.problem`)."""
    mesh, config = topology.actors.learner.mesh, topology.model.config()
    at: Loc = ("actors", "learner", "mesh")
    if topology.launcher == "inline" and topology.actors.learner.processes > 1:
        raise problem("the inline launcher is one process; use launcher: local", at=("actors", "learner", "processes"))
    for axis, what in (("tensor", "num_heads"), ("tensor", "ffn_dim"), ("fsdp", "dim")):
        if getattr(config, what) % getattr(mesh, axis):
            raise problem(f"does not divide model.{what}, {getattr(config, what)}", at=(*at, axis))
    if config.num_kv_heads % mesh.tensor and mesh.tensor % config.num_kv_heads:
        raise problem(f"neither divides model.num_kv_heads, {config.num_kv_heads}, nor is a multiple", at=(*at, "tensor"))
    if "prune" in topology.stage_names and topology.small_model.ffn_dim % mesh.tensor:
        raise problem(f"must be a multiple of mesh tensor, {mesh.tensor}", at=("small_model", "ffn_dim"))
    if topology.compute.attention not in ("auto", "xla") and topology.actors.learner.accelerator == "cpu":
        raise problem("does not run on CPU; use auto or xla, or give the learner GPUs or a TPU", at=("compute", "attention"))
    for i, stage in enumerate(topology.stages):
        at = ("stages", i, stage.name)
        _check_rows(topology, stage, at)
        for name, part in stage:
            _check_rows(topology, part, (*at, name))


def _check_rows(topology: Topology, training: Any, at: Loc) -> None:
    """Rows that pass through the learner together, and their length, divide over the mesh."""
    mesh, limit = topology.actors.learner.mesh, topology.compute.microbatch_tokens
    parts = mesh.data * mesh.fsdp
    for key, multiple, what in (
        ("batch", parts, "data x fsdp"),
        ("microbatch", parts, "data x fsdp"),
        ("sequence_length", mesh.seq, "seq"),
    ):
        value = getattr(training, key, None)
        if isinstance(value, int) and value % multiple:
            raise problem(f"must be a multiple of mesh {what}, {multiple}", at=(*at, key))
    length = getattr(training, "sequence_length", None)
    if limit is not None and parts > 1 and isinstance(length, int) and limit < length * parts:
        message = f"less than one row of {length} tokens for each of mesh data x fsdp, {parts}, as {show(at)} needs"
        raise problem(message, at=("compute", "microbatch_tokens"))
