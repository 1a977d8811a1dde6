"""Every record against the sequence lengths of the stages that will read it, as soon as there is a tokenizer.

A record that is too long for a stage is found here, seconds into a run, and not by that stage after all of pre-training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from afm_rl.errors import UserError
from afm_rl.types import Prompt
from topologies.stages.context import Context
from topologies.stages.examples import num_tokens

#: How many records an error names.
SHOWN = 5


def check_lengths(ctx: Context) -> None:
    """Raises UserError naming the stage, its limit and the first records that exceed it."""
    for stage, limit, records in _readers(ctx):
        long = [prompt.id for prompt, response in records if num_tokens(ctx.tokenizer, prompt, response) > limit]
        if long:
            raise UserError(
                f"{stage}: {len(long)} records take more than its {limit} tokens ({', '.join(long[:SHOWN])}): shorten them, "
                "or raise the limit and launch under another name"
            )


def _readers(ctx: Context) -> Iterator[tuple[str, int, Sequence[tuple[Prompt, str | None]]]]:
    """(where the limit stands, tokens, records) of every stage that trains on records or answers prompts."""
    data, topology = ctx.data, ctx.topology
    shown = [(d.prompt, d.response) for d in data.demonstrations]
    compared = [(p.prompt, text) for p in data.preferences for text in (p.chosen, p.rejected)]
    if ctx.has("sft"):
        yield "stages.sft.sequence_length", topology.stage("sft").sequence_length, shown
    if ctx.has("distill_committee"):
        yield "stages.distill_committee.sequence_length", topology.stage("distill_committee").sequence_length, shown
    if ctx.has("reward_model"):
        yield "stages.reward_model.sequence_length", topology.stage("reward_model").sequence_length, compared
    if ctx.has("itec"):
        yield "stages.itec (reward, dpo, ipo) sequence_length", topology.stage("itec").preference_length, compared
    if ctx.has("adapters"):
        feature = [(d.prompt, d.response) for d in data.feature_demonstrations]
        yield "stages.adapters.sequence_length", topology.stage("adapters").sequence_length, feature
    room = topology.model.config().max_positions - ctx.max_tokens
    yield "model.max_positions less max_tokens", room, [(prompt, None) for prompt in (*data.prompts, *data.eval_prompts)]
