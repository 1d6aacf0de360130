"""Where outputs go, and how a command finds the newest output of the stage before it.

qe-edge-work/
    teach/<data set>/                            one folder a data set, which every `qe-edge teach` adds to
    pairs/001/ sft/ dpo/ merge/ prune/ export/ bench/     one numbered folder a run, newest = highest
    data/<folder>/ judged/<data set>/                made of notes by `qe-edge data make`; a teacher's grades
    base/ index/ generations/                                       caches; base/ is needed until merged
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Set
from pathlib import Path
from typing import Any

from qe_edge.console import warn
from qe_edge.errors import BadArgument, NotFound
from qe_edge.records import Expansion, read_jsonl
from qe_edge.work.files import MANIFEST, claim, read_json, recover_all

DEFAULT_WORKDIR = "qe-edge-work"
_COMMAND = {
    "pairs": "qe-edge pairs",
    "sft": "qe-edge train sft",
    "dpo": "qe-edge train dpo",
    "merge": "qe-edge merge",
    "prune": "qe-edge prune",
    "export": "qe-edge export",
    "bench": "qe-edge bench",
}


def user_folder() -> Path:
    """Where what belongs to a user, not to a work folder, lies."""
    import typer

    return Path(typer.get_app_dir("qe-edge"))


def is_numbered(out: Path) -> bool:
    """Whether a path is one of a work folder's numbered runs, such as `…/sft/001`."""
    return out.parent.name in _COMMAND and len(out.name) >= 3 and out.name.isdecimal()


class Workdir:
    """The work folder. Nothing is created until something is written."""

    def __init__(self, root: Path | str | None = None):
        self.root = Path(root or os.environ.get("QE_EDGE_WORKDIR") or DEFAULT_WORKDIR)

    def _numbers(self, stage: str) -> list[int]:
        folder = self.root / stage
        recover_all(folder)
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal())

    def new(self, stage: str) -> Path:
        """The folder of a stage's next run, which no other process is given until this one ends.

        An interrupted run's folder is given again, to be resumed.
        """
        number = max(self._numbers(stage), default=0) + 1
        # The processes of one training must get the same folder; its first one claims it later on.
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        while alone:
            folder = self._run(stage, number)
            if not claim(folder):
                warn(f"another command is writing {folder}; this one takes the next number")
            elif not folder.exists():
                break
            number += 1
        return self._run(stage, number)

    def _run(self, stage: str, number: int) -> Path:
        return self.root / stage / f"{number:03d}"

    def teach_folder(self, dataset: str) -> Path:
        """Where a data set's candidates are collected."""
        return self.root / "teach" / dataset.replace("/", "-")

    def made_folder(self, notes: Path) -> Path:
        """Where the collection of a folder of notes goes."""
        return self.root / "data" / (notes.resolve().name or "notes")

    def judged_folder(self, dataset: str) -> Path:
        """Where the grades of a data set are collected."""
        return self.root / "judged" / dataset.replace("/", "-")

    def taught(self, dataset: str) -> Path:
        """The candidates that `teach` collected for a data set."""
        file = self.teach_folder(dataset) / "expansions.jsonl"
        if not file.is_file():
            of_others = self.root.glob(f"teach/{_base(dataset)}@*/expansions.jsonl")
            known = ", ".join(sorted(other.parent.name for other in of_others))
            there = f" (there is one of {known}: name the split, too)" if known else ""
            raise NotFound(
                f"{file}: no such file{there}; run `qe-edge teach`, or name a file with --expansions"
            )
        return file

    def taught_in(self, lang: str) -> Path | None:
        """Candidates that `teach` collected for queries in a language, but not for test queries."""
        for file in sorted(self.root.glob("teach/*/expansions.jsonl")):
            first = next(iter(read_jsonl(file, Expansion)), None)
            if first and first.lang == lang and not file.parent.name.endswith("@test"):
                return file
        return None

    def only_taught(self) -> Path:
        """The candidates that `teach` collected, but for those of test queries, beside others.

        Raises:
            NotFound: there are none.
            BadArgument: they are of several data sets.
        """
        files = sorted(self.root.glob("teach/*/expansions.jsonl"))
        if not files:
            raise NotFound(
                f"{self.root} holds no output of `qe-edge teach`; "
                "run it first, or name a file with --expansions"
            )
        files = [file for file in files if not file.parent.name.endswith("@test")] or files
        taught = {file.parent.name: file for file in files}
        _refuse_several("`qe-edge teach` collected texts", taught, "--expansions")
        return files[0]

    def newest_pairs(self, student: Path | None = None) -> Path:
        """The newest output of `pairs`; for a `student` of what it learnt from, where there is one.

        Raises:
            NotFound: there is none.
            BadArgument: there is one of another data set, too.
        """
        self.newest("pairs", named="a file with --pairs")  # or says that there is none
        learnt = read_json(student / MANIFEST).get("learnt", ()) if student else ()
        every = [(record["settings"]["dataset"], folder) for folder, record in self._records("pairs")]
        fit = [(name, folder) for name, folder in every if _base(name) in map(_base, learnt)] or every
        _refuse_several(
            "`qe-edge pairs` made pairs", {name: folder / "pairs.jsonl" for name, folder in fit}, "--pairs"
        )
        return fit[-1][1]

    def newest_sft(self, datasets: Set[str]) -> Path:
        """The newest output of `train sft`, to go on with pairs of these data sets.

        Raises:
            NotFound: there is none.
            BadArgument: there is one that learnt from another data set, too, or it learnt from other ones.
        """
        newest = self.newest("sft", named="one with --adapter")
        found = {
            " + ".join(record.get("learnt", ["unknown"])): folder for folder, record in self._records("sft")
        }
        _refuse_several("`qe-edge train sft` made students", found, "--adapter")
        check_learnt(newest, datasets)
        return newest

    def _records(self, stage: str) -> list[tuple[Path, dict[str, Any]]]:
        folders = [self._run(stage, number) for number in self._numbers(stage)]
        return [(folder, read_json(folder / MANIFEST)) for folder in folders]

    def newest(self, *stages: str, named: str = "one") -> Path:
        """The newest finished output of any of the stages; an error says to name `named` instead."""
        last = [
            self.root / stage / f"{numbers[-1]:03d}" for stage in stages if (numbers := self._numbers(stage))
        ]
        if last:
            return max(last, key=lambda folder: folder.stat().st_mtime)
        wanted = " or ".join(f"`{_COMMAND[stage]}`" for stage in stages)
        first = "run it first" if len(stages) == 1 else "run one of them first"
        raise NotFound(f"{self.root} holds no output of {wanted}; {first}, or name {named}")


def _base(name: str) -> str:
    """A data set's name, without its split and the folders above its own."""
    return Path(name.partition("@")[0]).name


def check_learnt(student: Path, datasets: Set[str]) -> None:
    """Refuse pairs of these data sets for a student that learnt from others, unless somebody named both.

    Raises:
        BadArgument: it learnt from none of them.
    """
    learnt = read_json(student / MANIFEST).get("learnt", datasets)
    if datasets.isdisjoint(name.partition("@")[0] for name in learnt):
        of_pairs = ", ".join(sorted(datasets))
        raise BadArgument(
            f"{student} learnt from {' + '.join(learnt)}, and the pairs are of {of_pairs}; "
            f"make pairs of what it learnt from (`qe-edge pairs`), or, if {of_pairs} is meant and the "
            "student knows its language, name both with --adapter and --pairs"
        )


def _refuse_several(made: str, found: dict[str, Path], flag: str) -> None:
    """What to train on is not to be guessed: there is only one of each data set, the newest."""
    if len(found) > 1:
        choices = " or ".join(f"{flag} {shlex.quote(str(found[name]))}" for name in sorted(found))
        raise BadArgument(f"{made} of several data sets ({', '.join(sorted(found))}); give {choices}")
