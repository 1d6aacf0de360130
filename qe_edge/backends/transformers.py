"""Hugging Face folders and hub ids on transformers: the reference that the exports are checked against."""

from __future__ import annotations

import inspect
import os
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from qe_edge.backends.lifetime import Lifetime
from qe_edge.backends.pretrained import load_pretrained
from qe_edge.backends.protocol import Batch, OneByOne, groups, whole
from qe_edge.errors import BadInput, NotFound, require
from qe_edge.student.models import Engine, ModelRef, default_spec
from qe_edge.student.prompt import hugging_face
from qe_edge.student.spec import read_spec


class TransformersBackend:
    engine: Engine = "transformers"
    parallel = 1

    def __init__(self, ref: ModelRef, *, threads: int):
        self._torch = torch = require("torch", "train")
        transformers = require("transformers", "train")
        torch.set_num_threads(threads)
        try:
            self._tokenizer = load_pretrained(transformers.AutoTokenizer, ref.source)
            # On a CPU in float32, whatever the file holds: bf16 is emulated there, slower and less exact.
            self._model = load_pretrained(
                transformers.AutoModelForCausalLM,
                ref.source,
                dtype="auto" if torch.cuda.is_available() else torch.float32,
                device_map="auto" if torch.cuda.is_available() else None,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            if ref.path is None:
                hint = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
                raise NotFound(f"can't load {ref.name} from the hub{hint}: {reason}") from None
            raise BadInput(f"transformers can't load this model folder: {reason}", path=ref.path) from None
        self._encode = hugging_face(self._tokenizer)
        self._lifetime = Lifetime(self, lambda: None)  # only so that all engines end alike
        self._model.eval()
        self.context = self._model.config.max_position_embeddings
        self.spec = (read_spec(Path(ref.path)) if ref.path else None) or default_spec(
            ref, self._tokenizer.chat_template
        )

    def tokenize(self, text: str, special: bool) -> list[int]:
        with self._lifetime:
            return self._encode(text, special)

    def detokenize(self, tokens: list[int]) -> str:
        with self._lifetime:
            return whole(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def batch(self, slots: int) -> Batch:
        return OneByOne(self._generate, self.context)

    def _generate(
        self, prompt: Sequence[int], *, temperature: float, seed: int
    ) -> Generator[int, None, None]:
        torch = self._torch
        generator = torch.Generator(self._model.device).manual_seed(seed)
        # transformers 5.24 gave it a new name; before, the new one would be ignored without a word.
        takes = inspect.signature(self._model.forward).parameters
        name = "cache" if "cache" in takes else "past_key_values"
        step, cache = torch.tensor([list(prompt)], device=self._model.device), None
        while True:
            with self._lifetime, torch.inference_mode():
                output = self._model(step, **{name: cache}, use_cache=True, logits_to_keep=1)
            logits, cache = output.logits[:, -1].float(), getattr(output, name)
            if temperature > 0:
                step = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            else:
                step = logits.argmax(-1, keepdim=True)
            yield int(step)

    def reader(self) -> _Reader:
        with self._lifetime:
            return _Reader(self._model, self._lifetime)

    def close(self) -> None:
        self._lifetime.close()
        self._model = None


class _Reader:
    """A loaded model that reads."""

    def __init__(self, model: Any, lifetime: Lifetime):
        self._torch, self._model, self._lifetime = require("torch", "train"), model, lifetime

    def log_likelihoods(
        self, prompts: Sequence[list[int]], answer: list[int], *, prefix: int
    ) -> Iterator[list[float]]:
        torch, device = self._torch, self._model.device
        wanted = torch.tensor(answer, device=device)[:, None]
        for group in groups(prompts, answer, prefix):
            longest = max(map(len, group))
            # What follows a sequence is seen by nothing before it.
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in group], device=device)
            found = []
            with self._lifetime, torch.inference_mode():
                logits = self._model(ids, use_cache=False).logits
                for row, tokens in zip(logits, group, strict=True):
                    foretold = row[len(tokens) - len(answer) - 1 : len(tokens) - 1].float().log_softmax(-1)
                    found.append(float(foretold.gather(1, wanted).sum()))
            yield found

    def forget(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """It is the backend's model."""
