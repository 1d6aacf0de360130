"""Does a model answer the same with its weights laid out anew? A bad build ends the process.

python -m qe_edge.backends.amx_trial MODEL.gguf     # prints "agrees"
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from qe_edge.backends.llama_batch import free, put
from qe_edge.backends.llama_model import LlamaModel

PROMPT = 48  # tokens: more than the rows of a tile
LEAST_COSINE = 0.99  # the weights are the same, sums are rounded elsewhere


def trial(path: Path) -> bool:
    """Whether a model answers with its weights laid out anew as it does without."""
    plain, repacked = (_answers(path, repack) for repack in (False, True))
    norms = np.linalg.norm(plain, axis=1) * np.linalg.norm(repacked, axis=1)
    return bool(((plain * repacked).sum(1) >= LEAST_COSINE * norms).all())


def _answers(path: Path, repack: bool) -> np.ndarray:
    """What a model computes of a prompt and, unless it reads it as a whole, of one more token: [2, size]."""
    model = LlamaModel(path, threads=1, longest=4 * PROMPT, repack=repack)
    lib, size = model.lib, model.lib.llama_model_n_embd(model.pointer)
    context, batch = model.context_of(4 * PROMPT, batch=PROMPT, sequences=1, embeddings=True)
    tokens = [7919 * i % model.vocabulary for i in range(PROMPT)]
    rows = []
    for ids, position in ((tokens, 0), (tokens[:1], PROMPT)):
        batch.n_tokens = put(batch, 0, ids, position, 0)
        for place in range(len(ids)):
            batch.logits[place] = True
        model.decode(context, batch)
        pooled = lib.llama_get_embeddings_seq(context, 0)
        row = pooled or lib.llama_get_embeddings_ith(context, len(ids) - 1)
        rows.append(np.ctypeslib.as_array(row, (size,)).copy())
    free(lib, batch, context)
    model.lifetime.close()
    return np.stack(rows)


if __name__ == "__main__":
    with suppress(ImportError):  # Windows has no such module, and leaves no image of the memory
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if trial(Path(sys.argv[1])):
        print("agrees")
