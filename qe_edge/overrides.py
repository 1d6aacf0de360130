"""What a run takes instead of what its recipe names."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from qe_edge.errors import BadArgument
from qe_edge.records import Count, said
from qe_edge.work.folder import Workdir


class Overrides(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Each is empty where the recipe's stays."""

    student: Annotated[str, said("Hub id, folder or GGUF, in place of the recipe's student.")] = ""
    dataset: Annotated[
        str, said("Judged training queries, or a folder of notes, in place of the recipe's.", short="-d")
    ] = ""
    expansions: Annotated[
        tuple[str, ...], said("Their expansions (default: what `teach` collected).", short="-e")
    ] = ()
    test: Annotated[tuple[str, ...], said("Data to measure the student on, in place of the recipe's.")] = ()
    teacher: Annotated[tuple[str, ...], said("A teacher's expansions of the test queries.")] = ()
    model: Annotated[str, said("Model that writes queries and expansions for notes.", short="-m")] = ""
    endpoint: Annotated[
        str, said("Its OpenAI-compatible URL (default: the model is loaded here).", env="OPENAI_BASE_URL")
    ] = ""
    extra: Annotated[
        dict[str, Any], said("More fields of its requests as JSON, as `teach --extra` takes them.")
    ] = {}
    passages: Annotated[Count | None, said("Passages of the notes that get a query; 60 are a small try.")] = (
        None
    )

    def sections(self, content: dict[str, Any], workdir: Workdir) -> dict[str, dict[str, Any]]:
        """As `load_recipe` takes it: settings by section of the recipe with this `content`.

        Raises:
            BadArgument: the recipe has no use for one of them.
            NotFound: there are no expansions of `dataset`.
        """
        from qe_edge.retrieval.datasets import load_dataset

        own, notes = "samples" in content, "notes" in content
        if notes and (self.expansions or self.test or self.teacher):
            raise BadArgument(
                "this recipe makes its own data of a folder of notes: name that with --dataset alone"
            )
        for name in ("model", "passages", "extra"):
            if getattr(self, name) and not notes:
                raise BadArgument(f"this recipe takes no notes and asks no model: leave --{name} out")
        if own and self.expansions:
            raise BadArgument("this recipe's student learns from its own texts: leave --expansions out")
        expansions = self.expansions
        pairs = content.get("pairs", {})
        named = self.dataset or ("" if "expansions" in pairs else pairs.get("dataset", ""))
        if named and not (expansions or own or notes):
            expansions = (str(workdir.taught(str(load_dataset(named)))),)
        given: dict[str, dict[str, Any]] = {
            "samples": {"dataset": [self.dataset] if own and self.dataset else None},
            "pairs": {"dataset": None if own or notes else self.dataset, "expansions": expansions},
            "sft": {"expansions": expansions, "student": self.student},
            "bench": {"dataset": self.test, "teacher": self.teacher},
        }
        if notes:
            asked = {"model": self.model, "endpoint": self.endpoint, "extra": self.extra}
            given |= {"notes": {"folder": self.dataset}, "queries": asked | {"passages": self.passages}}
            given |= {"teach": asked}
        return {name: {key: value for key, value in part.items() if value} for name, part in given.items()}
