"""Notes and progress bars, all on stderr: stdout is for results."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from qe_edge.redact import redact

if TYPE_CHECKING:
    from rich.console import Console


@cache
def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def is_main_process() -> bool:
    """Whether this process speaks and writes: of those that `accelerate launch` starts, the first one."""
    return os.environ.get("RANK", "0") == "0"


def note(message: str) -> None:
    """Tell the user something on stderr."""
    if is_main_process():
        print(redact(message), file=sys.stderr, flush=True)


def quiet_transformers() -> None:
    """Keep transformers' bars and deprecation notes, which users can do nothing about, off the terminal."""
    import warnings

    import transformers

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl|peft")


@contextmanager
def progress(description: str, total: int, *, done: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar with rate and time left, drawn only on a terminal.

    Yields `advance(steps=1, info="")`; `done` steps count as already made and not into the rate.
    """
    if not sys.stderr.isatty() or not is_main_process():
        yield lambda steps=1, info="": None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(TaskProgressColumn):  # which itself shows one only where the total is unknown
        def render(self, task: Task) -> Text:
            return self.render_speed(task.finished_speed or task.speed)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
    )
    with Progress(*columns, console=_console(), transient=True) as bar:
        task = bar.add_task(description, total=total, completed=done, info="")

        def advance(steps: int = 1, info: str = "") -> None:
            bar.update(task, advance=steps, info=info)

        yield advance
