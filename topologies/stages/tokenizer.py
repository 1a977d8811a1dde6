"""The tokenizer stage (3.1.6): learn it from the documents, prove the round trip, and tokenise every domain once."""

from __future__ import annotations

from typing import Any

from pretrain.token_corpus import write_corpus
from pretrain.tokenizer_training import train_tokenizer
from topologies.report_data import Figure, StageResult, Table
from topologies.stage_options import TokenizerStage
from topologies.stages.context import Context
from topologies.stages.lengths import check_lengths

#: Texts no tokenizer of the paper's kind may change: spaces, newlines, digits, its own signs, other scripts, markers.
HARD_TEXTS = (
    "",
    " ",
    "  a \n\n\tb\r\n",
    "\u2581",
    "x\u2581y",
    "3.14159",
    "<|user|>",
    "\u00e9e\u0301",
    "日本語 🙂",
    "\x00\x7f",
)


def run(ctx: Context, options: TokenizerStage) -> StageResult:
    """Train, check and use the tokenizer."""

    def train() -> dict[str, Any]:
        texts = [text for domain in ctx.data.documents.values() for text in domain]
        texts += [f"{d.prompt.messages[-1].content}\n{d.response}" for d in ctx.data.demonstrations]
        vocabulary = options.vocab_size or ctx.topology.model.config().vocab_size
        return {"size": train_tokenizer(texts, vocab_size=vocabulary, folder=ctx.run.tokenizer).vocab_size}

    size = ctx.once("tokenizer", train)["size"]
    check_lengths(ctx)
    rows = ctx.once("corpora", lambda: tokenise(ctx))
    trips = ctx.once("round trip", lambda: round_trips(ctx))
    return StageResult(
        name="tokenizer",
        title="Tokenizer",
        paper="3.1.6",
        figures=[
            Figure(label="vocabulary", value=size),
            Figure(
                label="exact round trips",
                value=f"{trips['exact']}/{trips['tried']}",
                note="held-out documents and hard cases, byte for byte",
            ),
        ],
        tables=[
            Table(title="Corpora", columns=["domain", "documents", "tokens", "held-out tokens", "bytes/token"], rows=rows)
        ],
    )


def tokenise(ctx: Context) -> list[list[Any]]:
    """Write the token corpus of every domain and its held-out side; one table row per domain."""
    rows = []
    for domain, texts in ctx.data.documents.items():
        held = ctx.data.heldout_documents.get(domain, [])
        tokens = write_corpus(ctx.corpora / domain, texts, ctx.tokenizer)
        held_tokens = write_corpus(ctx.corpora / f"heldout-{domain}", held, ctx.tokenizer)
        size = sum(len(text.encode()) for text in texts)
        rows.append([domain, len(texts), tokens, held_tokens, round(size / max(1, tokens), 2)])
    return rows


def round_trips(ctx: Context) -> dict[str, int]:
    """How many texts come back byte for byte."""
    texts = [*HARD_TEXTS, *(text for held in ctx.data.heldout_documents.values() for text in held)]
    exact = [ctx.tokenizer.decode(ctx.tokenizer.encode(text)) == text for text in texts]
    return {"exact": sum(exact), "tried": len(exact)}
