"""From decoded tokens to answers: tokens to their responses, stop strings, and the `Group` that a caller gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from afm_rl.generation.programs import Decoded
from afm_rl.generation.sampling_rows import MAX_TOP
from afm_rl.generation.sequences import Job, Response
from afm_rl.types import Group, TopLogprobs


def take_tokens(rows: Sequence[Response], decoded: Decoded, *, version: int, text: Callable[[list[int]], str] | None) -> int:
    """Give the rows their new tokens, made by weights `version`, and mark those that ended; returns how many were given."""
    taken = 0
    for r, row in enumerate(rows):
        count, before = int(decoded.count_R[r]), len(row.tokens)
        row.tokens += decoded.token_RS[r, :count].tolist()
        row.logps += decoded.logp_RS[r, :count].tolist()
        row.versions += [version] * count
        if row.request.options.logprobs:
            row.top_ids += list(decoded.top_ids_RSN[r, :count])
            row.top_logps += list(decoded.top_logps_RSN[r, :count])
        row.stopped = bool(decoded.stopped_R[r])
        if row.request.options.stop and text is not None:
            _cut_at_stop_string(row, before, text)
        row.done = row.stopped or row.left == 0
        taken += len(row.tokens) - before
    return taken


def _cut_at_stop_string(row: Response, before: int, text: Callable[[list[int]], str]) -> None:
    """End a response with the token that completes a stop string; `before` tokens have been looked at already."""
    stops = row.request.options.stop
    if not any(stop in text(row.tokens) for stop in stops):
        return
    for count in range(max(before + 1, row.request.options.min_tokens), len(row.tokens) + 1):
        so_far = text(row.tokens[:count])
        if any(stop in so_far for stop in stops):
            row.cut(count)
            row.stopped = True
            return


def group_of(job: Job, *, policy: str) -> Group:
    """The answer to a request whose responses are all done."""
    request, responses, scores = job.request, job.responses, job.prompt_scores
    mixed = any(version != job.version for response in responses for version in response.versions)
    top = request.options.logprobs
    return Group(
        request.id,
        np.asarray(request.prompt_T, np.int32),
        tuple(np.array(r.tokens, np.int32) for r in responses),
        tuple(np.array(r.logps, np.float32) for r in responses),
        tuple(r.stopped for r in responses),
        policy,
        job.version,
        versions=tuple(np.array(r.versions, np.int32) for r in responses) if mixed else (),
        top=tuple(_alternatives(r, top) for r in responses) if top else (),
        prompt_logp_T=scores.logp_T if scores else None,
        prompt_top=TopLogprobs(scores.top_ids_TN, scores.top_logps_TN) if scores else None,
    )


def _alternatives(response: Response, top: int) -> TopLogprobs:
    """The `top` best alternatives of each token; a response may have no tokens."""
    ids_TN, logps_TN = (np.reshape(kept, (-1, MAX_TOP))[:, :top] for kept in (response.top_ids, response.top_logps))
    return TopLogprobs(ids_TN.astype(np.int32), logps_TN.astype(np.float32))
