"""An export to the Hugging Face hub, with a card that holds what a bench measured of its files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qe_edge.bench.result import BenchResult
from qe_edge.console import note
from qe_edge.errors import BadArgument, BadInput, NotFound, QeEdgeError, require
from qe_edge.export.card import CARD
from qe_edge.export.verify import CHECKSUMS, check_sums, read_sums
from qe_edge.student.spec import is_hub_id
from qe_edge.work.runs import read_record


def push(
    folder: Path,
    repo: str,
    results: Iterable[BenchResult] = (),
    *,
    private: bool = False,
    revision: str | None = None,
) -> str:
    """Upload an export's folder to `repo` (owner/name), which is made if need be; returns the commit's URL.

    Rows of `results` whose file is one of the folder's become the card's `model-index`. `run.json` stays
    here: it names paths of this machine.

    Raises:
        NotFound, BadInput: there is no such folder, it is no export, or a file differs from its checksum.
        BadArgument: it is to be private, and is there and public.
        QeEdgeError: the hub refuses.
        NotInstalled: huggingface_hub is missing.
    """
    if not is_hub_id(repo):
        raise BadArgument(f"{repo!r} is no repository; write OWNER/NAME")
    if not folder.is_dir():
        raise NotFound(f"{folder}: no such folder; `qe-edge export` makes one")
    if read_record(folder).get("command") != "export":
        raise BadInput("holds no run.json of `qe-edge export`", path=folder)
    hub = require("huggingface_hub", "hub")
    sums = read_sums(folder)
    for name in dict.fromkeys(Path(listed).parts[0] for listed in sums):
        check_sums(folder / name)
    card = _card(hub, folder, repo, results).encode()
    sums[CARD] = hashlib.sha256(card).hexdigest()
    listed = "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode()
    contents: dict[str, str | bytes] = {name: str(folder / name) for name in sums}
    contents |= {CARD: card, CHECKSUMS: listed}
    operations = [
        hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in contents.items()
    ]
    api = hub.HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise BadArgument(f"{repo} is there already and public: make it private on the hub first")
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo, operations, commit_message="Upload a query expansion student", revision=revision
        )
    except BadArgument:
        raise
    except Exception as error:  # its errors come from several packages
        reason = " ".join(str(error).split())[:300]
        if not hasattr(error, "response"):
            raise QeEdgeError(f"the hub can't be reached: {reason}") from None
        raise QeEdgeError(
            f"the hub refuses it: {reason}. Log in with `hf auth login`, or set HF_TOKEN to a token "
            "that may write"
        ) from None
    return str(commit.commit_url)


def _card(hub: Any, folder: Path, repo: str, results: Iterable[BenchResult]) -> str:
    """The export's card, with what was measured in its metadata."""
    card = hub.ModelCard.load(folder / CARD)
    names = {digest: name for name, digest in read_sums(folder).items()}
    found = [
        hub.EvalResult(
            task_type="text-retrieval",
            task_name="BM25 with the expanded query",
            dataset_type=dataset.info.name,
            dataset_name=f"{dataset.info.name} ({dataset.info.queries} queries)",
            metric_type="ndcg_at_10",
            metric_name=f"{dataset.measure}, {system.name}, {names[system.sha256]}, joined by {system.join}",
            metric_value=round(system.ndcg.mean, 4),
        )
        for result in results
        for dataset in result.datasets
        for system in dataset.systems
        if system.sha256 in names
    ]
    if found:
        card.data.model_name, card.data.eval_results = repo.rsplit("/", 1)[-1], found
        note(f"push: {len(found)} results of this export's files go into its card")
    return str(card)
