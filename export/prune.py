"""A model folder -> the same model with fewer tokens: those that given texts are made of.

The output matrix of a small model is a third of it, holds a row for every token, and is read whole for each
token that is written. Of byte-level BPE, tokens can be left out without harm: a text all of whose tokens stay
is still cut into them, since the merges that make them stay too; any other text is cut finer, down to bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from qe_edge.errors import BadArgument, BadInput, NotFound, QeEdgeError, require
from qe_edge.export.config import PruneConfig
from qe_edge.export.lineage import training_data
from qe_edge.export.probes import HOSTILE, QUERIES
from qe_edge.export.source import Source
from qe_edge.export.streamed import Streamed
from qe_edge.records import Expansion, read_jsonl
from qe_edge.retrieval.datasets import load_collection
from qe_edge.student.prompt import clean_text, hugging_face
from qe_edge.student.spec import ModelSpec, read_spec
from qe_edge.train.base_model import load_model, load_tokenizer, save_student
from qe_edge.work.files import MANIFEST, atomic_path, read_json, sha256, write_json
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import check_output, learnt_by, run_record

BATCH = 1000  # texts that are tokenized together
PROBES = 4  # texts that both models are asked
PROBE_LENGTH = 200  # characters of each
# Both compute the same numbers, in matrices of other shapes.
MOST_DIFFERENCE = 1e-3


def prune(model: Path, config: PruneConfig, *, out: Path | None = None, workdir: Workdir) -> Path:
    """Write a model folder that has the tokens that `config` names and no others; returns it.

    Raises:
        BadArgument: no texts are named, and what the model was trained on isn't known or gone.
        NotFound, BadInput, QeEdgeError: see `prune_vocabulary`.
    """
    sources = config.vocab_of or tuple(map(str, training_data(model)))
    if not sources:
        raise BadArgument(
            f"{model} doesn't say what it was trained on; name expansions or data sets with --vocab-of"
        )
    readers = [_texts_of(source) for source in sources]  # a wrong name is found before the work
    out = out or workdir.new("prune")
    inputs = {f"texts-{number}": source for number, source in enumerate(sources)}
    prune_vocabulary(model, out, chain.from_iterable(readers), size=config.vocab_size, inputs=inputs)
    return out


def verify_pruned(folder: Path, source: Path) -> dict[str, Any]:
    """Compare a model that `prune` wrote with the one it was made from, in float32.

    Returns:
        `probes` (prompts whose tokens stay, asked of both) and `max_logit_difference` over all that stay.

    Raises:
        NotFound, BadInput: one of them is missing, is no model folder or has no spec.
        QeEdgeError: a text is cut otherwise, or logits differ.
    """
    models = Source(source), Source(folder)  # first: what is no model at all has no spec either
    specs = [read_spec(path) for path in (folder, source)]
    if specs[0] is None or specs[0] != specs[1]:
        raise BadInput(f"carries another qe-edge spec than {source}; prune it again", path=folder)
    names = [load_tokenizer(str(path)) for path in (folder, source)]
    tokens: Any = names[0].convert_ids_to_tokens(list(range(len(names[0]))))
    kept: Any = names[1].convert_tokens_to_ids(tokens)
    return _check(*models, specs[0], kept, QUERIES)


def _texts_of(source: str) -> Iterator[str]:
    """Queries and expansions of a file, or the passages of a data set."""
    if Path(source).is_file():
        return (text for row in read_jsonl(source, Expansion) for text in (row.query, row.text))
    documents = load_collection(source).documents
    return (text for _, text in documents())


def fingerprint_of(source: str) -> str:
    """What changes when the texts of a file or a data set do."""
    return sha256(source) if Path(source).is_file() else load_collection(source).collection_hash()


def prune_vocabulary(
    model: Path, out: Path, texts: Iterable[str], *, size: int | None = None, inputs: Mapping[str, Path | str]
) -> dict[str, Any]:
    """Write `model` to `out` with the tokens of `texts` and of its prompt, all bytes and all markup.

    With `size`, at most about so many stay, the most frequent ones. They keep their order and get new ids
    from 0 on. `inputs` names the files of the texts, for run.json.

    Returns:
        `tokens` and `of_tokens` (before), `parameters` and `of_parameters`, `counted` (tokens in the texts)
        and `covered` (their share that stays as it is).

    Raises:
        NotFound, BadInput: `model` is missing, has no spec, or its tokenizer is no byte-level BPE; no text.
        QeEdgeError: the pruned model answers differently.
    """
    if not model.is_dir():
        raise NotFound(f"{model}: no such model folder")
    spec, source = read_spec(model), Source(model)
    if spec is None:
        raise BadInput("has no qe_edge.json, which holds its prompt; `qe-edge merge` writes it", path=model)
    check_output(out, "prune", [model, *inputs.values()])
    tokenizer = load_tokenizer(str(model))
    texts = iter(texts)
    first = list(islice(texts, PROBES))
    if not first:
        raise BadInput("holds no text to count tokens in", path=" ".join(map(str, inputs.values())))
    probes = [*QUERIES, *(clean_text(text)[:PROBE_LENGTH] or "?" for text in first)]
    tokenize = hugging_face(tokenizer)
    needed = {token for probe in probes for token in spec.prompt.encode(probe, tokenize)}
    counts = count_tokens(tokenizer, chain(first, texts))
    frequent = [token for token in np.argsort(-counts, kind="stable").tolist() if counts[token]]
    described = read_json(model / "tokenizer.json")
    kept = closed(described, needed, frequent, size or len(counts), path=model / "tokenizer.json")
    with atomic_path(out) as partial:
        _save(model, spec, described, kept, partial)
        checks = _check(source, Source(partial), spec, kept, probes)
        found = {
            "tokens": len(kept),
            "of_tokens": source.config.vocab_size,
            "parameters": Source(partial).parameters,
            "of_parameters": source.parameters,
            "counted": int(counts.sum()),
            "covered": round(float(counts[kept].sum() / counts.sum()), 4),
        }
        record = run_record(
            "prune",
            {"vocab_size": size},
            {"model": model, **inputs},
            checks=checks,
            **found,
            **learnt_by(model),
        )
        write_json(partial / MANIFEST, record)
    return found


def count_tokens(tokenizer: Any, texts: Iterable[str]) -> np.ndarray:
    """How often each token stands in `texts`; int64, by token id."""
    counts = np.zeros(len(tokenizer), np.int64)
    for batch in _batches(map(clean_text, texts)):
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            np.add.at(counts, encoding.ids, 1)
    return counts


def closed(
    described: dict[str, Any], needed: Iterable[int], frequent: Iterable[int], size: int, *, path: Path
) -> list[int]:
    """The ids to keep, in order: bytes, added tokens and `needed`, then `frequent` until there are `size`.

    Each comes with all that it is merged of. `described` is the content of the tokenizer.json at `path`.

    Raises:
        BadInput: not a byte-level BPE.
    """
    model = described.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise BadInput("not a byte-level BPE tokenizer, the only kind that can be pruned", path=path)
    vocabulary: dict[str, int] = model["vocab"]
    texts = {number: text for text, number in vocabulary.items()}
    parts = {left + right: (left, right) for left, right in map(_pair, model["merges"])}
    kept = {number for text, number in vocabulary.items() if len(text) == 1}
    kept |= {token["id"] for token in described["added_tokens"]}

    def keep(number: int) -> None:
        waiting = [texts[number]] if number in texts else []
        while waiting:
            text = waiting.pop()
            if vocabulary[text] not in kept:
                kept.add(vocabulary[text])
                waiting += parts.get(text, ())

    for number in needed:
        keep(number)
    for number in frequent:
        if len(kept) < size:
            keep(number)
    return sorted(kept)


def pruned_tokenizer(described: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The content of a tokenizer.json with the tokens `kept`, renumbered."""
    new = {old: number for number, old in enumerate(kept)}
    model = described["model"]
    vocabulary = {text: new[old] for text, old in model["vocab"].items() if old in new}
    pairs = [(merge, *_pair(merge)) for merge in model["merges"]]
    merges = [merge for merge, *parts in pairs if {*parts, "".join(parts)} <= vocabulary.keys()]
    added = [token | {"id": new[token["id"]]} for token in described["added_tokens"]]
    return described | {"added_tokens": added, "model": model | {"vocab": vocabulary, "merges": merges}}


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge's two parts; tokenizer.json has both spellings."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _save(model: Path, spec: ModelSpec, described: dict[str, Any], kept: list[int], folder: Path) -> None:
    torch = require("torch", "train")
    network = load_model(str(model), dtype="auto")
    rows = torch.tensor(kept)
    weights = [table.weight.detach()[rows].clone() for table in _tables(network)]
    network.resize_token_embeddings(len(kept))
    with torch.no_grad():
        for table, weight in zip(_tables(network), weights, strict=True):
            table.weight.copy_(weight)
    new = {old: number for number, old in enumerate(kept)}
    for config in (network.config, network.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            old: Any = getattr(config, name, None)
            setattr(config, name, [new[i] for i in old] if isinstance(old, list) else new.get(old))
    with TemporaryDirectory() as scratch:
        settings = read_json(model / "tokenizer_config.json")
        settings.pop("added_tokens_decoder", None)  # tokenizer.json has them, too
        write_json(Path(scratch) / "tokenizer_config.json", settings)
        write_json(Path(scratch) / "tokenizer.json", pruned_tokenizer(described, kept))
        save_student(network, load_tokenizer(scratch), spec, folder)


def _tables(network: Any) -> list[Any]:
    """The embeddings and the output layer; once where they are tied."""
    tables = {id(t.weight): t for t in (network.get_input_embeddings(), network.get_output_embeddings())}
    return list(tables.values())


def _check(
    before: Source, after: Source, spec: ModelSpec, kept: list[int], probes: Sequence[str]
) -> dict[str, Any]:
    """Both models on the same prompts: the same tokens by other ids, the same logits of those that stay."""
    whole, pruned = (load_tokenizer(str(source.model)) for source in (before, after))
    for text in HOSTILE:
        if pruned.decode(pruned.encode(text)) != whole.decode(whole.encode(text)):
            raise QeEdgeError(f"the pruned tokenizer doesn't give {text!r} back; please report it")
    old, new = hugging_face(whole), hugging_face(pruned)
    prompts = [(spec.prompt.encode(probe, old), spec.prompt.encode(probe, new)) for probe in probes]
    for probe, (ids, renumbered) in zip(probes, prompts, strict=True):
        if [kept[i] for i in renumbered] != ids:
            raise QeEdgeError(f"the pruned tokenizer cuts {probe!r} in another way; please report it")
    expected = Streamed(before).logits([ids for ids, _ in prompts])
    found = Streamed(after).logits([ids for _, ids in prompts])
    differences = [float((a[:, kept] - b).abs().max()) for a, b in zip(expected, found, strict=True)]
    if not max(differences) <= MOST_DIFFERENCE:
        raise QeEdgeError(
            f"the pruned model's logits differ by {max(differences):.4f} from the whole one's: don't use it"
        )
    return {"probes": len(probes), "max_logit_difference": round(max(differences), 6)}


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    texts = iter(texts)
    while batch := list(islice(texts, BATCH)):
        yield batch
