"""llama.cpp's side of `benchmarks/sampler.py`, through llama-cpp-python's C interface, in an environment of its own.

    /path/to/llamacpp/python benchmarks/peers/generate_llamacpp.py '{"model": FILE.gguf, "threads": 2}'

All sequences decode in one batch, one `llama_decode` a step; each token is drawn by a C sampler chain (temperature, draw). A
prompt with several responses is decoded once and its cache copied to the other sequences: what llama.cpp offers for it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import llama_cpp as llama
import numpy as np
from workload import Workload, make_prompts, serve

BATCH_TOKENS = 4096
LOG_ERROR = 4


@llama.llama_log_callback
def log_errors(level: int, text: bytes, _: Any) -> None:
    """llama.cpp reports every step of its own; only what went wrong is passed on."""
    if level == LOG_ERROR:
        sys.stderr.write(text.decode(errors="replace"))


class Engine:
    """One model, and a context (a cache) for every number of sequences and length that was asked for."""

    def __init__(self, path: str, threads: int) -> None:
        llama.llama_log_set(log_errors, None)
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.threads = threads
        self.batch = llama.llama_batch_init(BATCH_TOKENS, 0, 1)
        arrays = [self.batch.token, self.batch.pos, self.batch.n_seq_id, self.batch.logits]
        self.token, self.position, self.count, self.wanted = (np.ctypeslib.as_array(a, (BATCH_TOKENS,)) for a in arrays)
        self.count[:] = 1
        self.sampler = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        llama.llama_sampler_chain_add(self.sampler, llama.llama_sampler_init_temp(1.0))
        llama.llama_sampler_chain_add(self.sampler, llama.llama_sampler_init_dist(0))
        self.contexts: dict[tuple[int, int], Any] = {}

    def prepare(self, sequences: int, length: int) -> None:
        """An empty cache for so many sequences of so many tokens."""
        if (sequences, length) not in self.contexts:
            options = llama.llama_context_default_params()
            options.n_ctx, options.n_seq_max = sequences * length, sequences
            options.n_batch, options.n_ubatch = BATCH_TOKENS, 512
            options.n_threads = options.n_threads_batch = self.threads
            options.kv_unified = False
            self.contexts[sequences, length] = llama.llama_init_from_model(self.model, options)
        self.context = self.contexts[sequences, length]
        self.memory = llama.llama_get_memory(self.context)
        llama.llama_memory_clear(self.memory, True)

    def decode(self, ids_NT: np.ndarray, sequences: Sequence[int], start: int) -> None:
        """Append T tokens to each of the sequences, the first at position `start`; logits of each one's last."""
        N, T = ids_NT.shape
        self.batch.n_tokens = N * T
        self.token[: N * T] = ids_NT.reshape(-1)
        self.position[: N * T] = np.tile(np.arange(start, start + T), N)
        self.wanted[: N * T] = np.tile(np.arange(T) == T - 1, N)
        for i, sequence in enumerate(np.repeat(sequences, T).tolist()):
            self.batch.seq_id[i][0] = sequence
        code = llama.llama_decode(self.context, self.batch)
        if code:
            raise RuntimeError(f"llama_decode: code {code}")

    def sample(self, index: int) -> int:
        """A token from the logits of the batch's token `index`."""
        return llama.llama_sampler_sample(self.sampler, self.context, index)

    def generate(self, workload: Workload) -> None:
        """Prompts first, as many as fit a batch at a time, then one token of every sequence a step."""
        ids_PS, G, new = make_prompts(workload, self.vocab_size), workload["responses"], workload["new_tokens"]
        P, S = ids_PS.shape
        self.prepare(P * G, S + new)
        tokens = np.zeros((P * G, 1), np.int32)
        for first in range(0, P, max(1, BATCH_TOKENS // S)):
            chunk = ids_PS[first : first + max(1, BATCH_TOKENS // S)]
            self.decode(chunk, [(first + i) * G for i in range(len(chunk))], 0)
            for i in range(len(chunk)):
                row = (first + i) * G
                tokens[row : row + G, 0] = [self.sample((i + 1) * S - 1) for _ in range(G)]
                for copy in range(row + 1, row + G):
                    llama.llama_memory_seq_cp(self.memory, row, copy, -1, -1)
        everyone = range(P * G)
        for step in range(1, new):
            self.decode(tokens, everyone, S + step - 1)
            tokens[:, 0] = [self.sample(i) for i in everyone]

    def score(self, ids: Sequence[int]) -> np.ndarray:
        """The logits after `ids`."""
        self.prepare(1, len(ids))
        self.decode(np.array([ids], np.int32), [0], 0)
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(self.context, len(ids) - 1), (self.vocab_size,)).copy()


def main() -> None:
    """Load the model once, then answer requests."""
    job = json.loads(sys.argv[1])
    engine = Engine(job["model"], job["threads"])
    serve(engine.generate, engine.score)


if __name__ == "__main__":
    main()
