"""llama.cpp by its C interface: llama-cpp-python's own `Llama` decodes one sequence at a time."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.workload import Job, Sequences, shared_beginning

_BATCH = 2048  # tokens a call
_Row = tuple[int, int, int, bool]  # token, position, sequence, whether to go on from it


class LlamaCpp:
    """All sequences in parallel, each with cells of its own; prompts packed into full batches, and what they
    share computed once and copied."""

    def __init__(self, job: Job) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)  # C keeps a pointer to it
        llama_cpp.llama_log_set(self._silence, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            job.paths["gguf"].encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {job.paths['gguf']}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._shape, self._made = (0, 0), None
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)

    def run(self, sequences: Sequences) -> None:
        context = self._context(len(sequences), max(len(p) + n for p, n in sequences))
        memory = self._lib.llama_get_memory(context)
        self._lib.llama_memory_clear(memory, True)
        shared = shared_beginning(sequences)
        self._prefill(context, [(t, i, 0, False) for i, t in enumerate(shared)])
        for sequence in range(1, len(sequences) if shared else 0):
            self._lib.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        own = [(s, range(len(shared), len(p)), p) for s, (p, _) in enumerate(sequences)]
        last = self._prefill(context, [(p[i], i, s, i == len(p) - 1) for s, places, p in own for i in places])
        lengths = [len(p) for p, _ in sequences]
        for made in range(1, max(n for _, n in sequences)):
            rows = [(last[s], lengths[s] + made - 1, s, True) for s, (_, n) in enumerate(sequences) if made < n]
            last |= self._decode(context, rows)

    def _prefill(self, context: Any, rows: list[_Row]) -> dict[int, int]:
        last: dict[int, int] = {}
        for first in range(0, len(rows), _BATCH):
            last |= self._decode(context, rows[first : first + _BATCH])
        return last

    def _context(self, num_seqs: int, longest: int) -> Any:
        """Of this shape; the run that is not measured makes it."""
        if self._shape == (num_seqs, longest):
            return self._made
        if self._made is not None:
            self._lib.llama_free(self._made)
        params = self._lib.llama_context_default_params()
        params.n_seq_max = num_seqs
        params.kv_unified = False  # recommended where sequences share no prefix
        params.n_ctx = num_seqs * -(-longest // 256) * 256
        params.n_batch, params.n_ubatch = _BATCH, 512
        params.n_threads = params.n_threads_batch = os.cpu_count()
        params.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._shape, self._made = (num_seqs, longest), self._lib.llama_init_from_model(self._model, params)
        if not self._made:
            raise SystemExit(f"llama.cpp makes no context of {num_seqs} x {longest} tokens")
        return self._made

    def _decode(self, context: Any, rows: list[_Row]) -> dict[int, int]:
        """The likeliest next token of each sequence that goes on."""
        import numpy as np

        batch, going_on = self._batch, [s for _, _, s, wanted in rows if wanted]
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted
        status = self._lib.llama_decode(context, batch)
        if status:
            raise SystemExit(f"llama_decode ended with {status}")
        if not going_on:
            return {}
        logits = np.ctypeslib.as_array(self._lib.llama_get_logits(context), (len(going_on), self._vocab_size))
        return dict(zip(going_on, logits.argmax(axis=1).tolist(), strict=True))
