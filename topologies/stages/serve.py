"""The serve stage (5): put the package behind Ray Serve and ask it real questions through the `openai` client."""

from __future__ import annotations

from typing import Any

import openai

from topologies.report_data import Figure, StageResult, Table
from topologies.serving import Serving, serve_run
from topologies.stage_options import ServeStage
from topologies.stages.context import Context

#: Seconds one answer may take.
ANSWER_DEADLINE_S = 60.0


def run(ctx: Context, options: ServeStage) -> StageResult:
    """Ask every model name every question, plain and streamed, and print the answers."""
    answers = ctx.once("serve/answers", lambda: _serve_and_ask(ctx, options))
    rows = [[a["question"], a["model"], a["answer"]] for a in answers["answers"]]
    return StageResult(
        name="serve",
        title="Serving on Ray Serve",
        paper="5.1",
        figures=[
            Figure(label="models", value=", ".join(answers["models"]), note="the adapter is chosen by the model name"),
            Figure(label="streamed equals whole", value="yes" if answers["streamed_equal"] else "no"),
        ],
        tables=[
            Table(
                title="Questions and answers through the openai client",
                columns=["question", "model", "answer"],
                rows=rows,
            )
        ],
    )


def _serve_and_ask(ctx: Context, options: ServeStage) -> dict[str, Any]:
    server = ctx.topology.actors.server
    with serve_run(
        ctx.run.path,
        host=server.host,
        port=0,
        replicas=server.replicas,
        num_cpus=server.num_cpus,
        compute_dtype=ctx.topology.compute.dtype,
    ) as serving:
        return ask(ctx, serving, options)


def ask(ctx: Context, serving: Serving, options: ServeStage) -> dict[str, Any]:
    """Every question to every model, greedily; streamed answers must equal the whole ones."""
    # A proxy from the environment must not come between us and the loopback interface.
    direct = openai.DefaultHttpxClient(trust_env=False)
    # No key is checked by this server, and the client will not start without one.
    client = openai.OpenAI(base_url=f"{serving.address}/v1", api_key="unused", timeout=ANSWER_DEADLINE_S, http_client=direct)
    models = [model.id for model in client.models.list()]
    answers, equal = [], True
    for question in options.questions:
        for model in models:
            call: dict[str, Any] = {
                "model": model,
                "messages": [{"role": "user", "content": question}],
                "max_tokens": options.max_tokens,
                "temperature": 0,
            }
            whole = client.chat.completions.create(**call).choices[0].message.content or ""
            chunks = client.chat.completions.create(**call, stream=True)
            streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            equal = equal and streamed == whole
            ctx.progress.say(f"  {model}: {question} -> {whole}")
            answers.append({"question": question, "model": model, "answer": whole})
    return {"models": models, "answers": answers, "streamed_equal": equal}
