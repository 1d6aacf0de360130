"""Models on the Hugging Face hub: one file of a repository, kept in the hub's own cache."""

from __future__ import annotations

import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qe_edge.errors import BadArgument, BadInput, NotFound, require

PREFIX = "hf:"
PATIENCE = 10.0  # seconds for the hub's answer; `list_repo_files` would try for 23 without a network
_NAME = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:/(?P<file>[^@:]+\.gguf)|:(?P<kind>[\w.-]+))"
    r"(?:@(?P<revision>\S+))?"
)


def fetch(name: str) -> Path:
    """The GGUF that a name means: `hf:owner/name/file.gguf`, or `hf:owner/name:Q4_K_M` by its kind.

    `@REVISION` at the end picks a branch, tag or commit. What was fetched before is used without a network.

    Raises:
        BadArgument: the name has another form.
        NotFound: the hub has no such file, or can't be reached and it was never fetched.
        BadInput: several files fit.
        NotInstalled: huggingface_hub is missing.
    """
    named = _NAME.fullmatch(name)
    if not named:
        raise BadArgument(
            f"can't read {name!r}; a model on the hub is hf:OWNER/NAME/FILE.gguf or hf:OWNER/NAME:Q4_K_M, "
            "with @REVISION at its end if need be"
        )
    hub = require("huggingface_hub", "hub")
    repo, revision, kind = named["repo"], named["revision"], named["kind"]
    wanted = named["file"] or f"*{kind}.gguf"
    if not sys.stderr.isatty():
        require("huggingface_hub.utils", "hub").disable_progress_bars()
    try:
        info = hub.HfApi().model_info(repo, revision=revision, timeout=PATIENCE)
        kept, names = None, [file.rfilename for file in info.siblings or []]
    except Exception as error:  # its errors come from several packages
        kept, names = _kept(hub, name, repo, revision, error)
    # Not in folders: an export's adapter is no model.
    found = [file for file in names if file == wanted or (kind and "/" not in file and _is(file, wanted))]
    if not found:
        never = ", or it was never fetched" if kept else ""
        there = ", ".join(sorted(file for file in names if file.endswith(".gguf") and "/" not in file))
        raise NotFound(f"no model {name!r}: {repo} has no file {wanted}{never}; it has {there or 'no GGUF'}")
    if len(found) > 1:
        several = ", ".join(f"{PREFIX}{repo}/{file}" for file in sorted(found))
        raise BadInput(f"{name} means several files; name one of them: {several}")
    if kept:
        return kept / found[0]
    try:
        return Path(hub.hf_hub_download(repo, found[0], revision=revision))
    except Exception as error:
        raise NotFound(f"can't fetch {name}: {reason(error)}") from None


def check_is_gguf(path: Path, instead: str = "a .gguf file, a model folder or a hub id") -> None:
    """Refuse a file of another kind, by how it begins."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise BadInput(f"not a GGUF file; give {instead}", path=path)


def local_file(name: str | Path) -> Path:
    """A path as it is, or the hub's file that `hf:…` names, see `fetch`.

    Raises:
        NotFound: there is neither.
        BadInput: the file is no GGUF.
    """
    path = Path(name)
    if path.is_file():
        check_is_gguf(path, "a .gguf file or one of the hub (hf:OWNER/NAME:Q8_0)")
    if path.exists():
        return path
    if str(name).startswith(PREFIX):
        return fetch(str(name))
    raise NotFound(f"{name}: no such file; give an encoder's .gguf, or one of the hub (hf:OWNER/NAME:Q8_0)")


def _is(file: str, pattern: str) -> bool:
    return fnmatchcase(file.lower(), pattern.lower())


def _kept(hub: Any, name: str, repo: str, revision: str | None, why: Exception) -> tuple[Path, list[str]]:
    """What was fetched of a repository before, since the hub can't be asked."""
    try:
        folder = Path(hub.snapshot_download(repo, revision=revision, local_files_only=True))
    except Exception:
        raise NotFound(
            f"no model {name!r}: it was not fetched before, and {reason(why)}. "
            "Name a GGUF that is here, or try again with a network"
        ) from None
    return folder, [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


def reason(error: Exception) -> str:
    """Why the hub gave nothing, in our words and in its own."""
    answered = isinstance(error, require("huggingface_hub.errors", "hub").HfHubHTTPError)
    why = "the hub has none for you" if answered else "the hub can't be reached"
    return f"{why} ({' '.join(str(error).split())[:200]})"
