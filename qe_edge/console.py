"""Notes and progress bars, all on stderr, since stdout is for results; and what a console can show."""

from __future__ import annotations

import codecs
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any, TextIO, TypeVar

import msgspec

from qe_edge.redact import redact

T = TypeVar("T")

warned: dict[str, None] = {}  # what `warn` was told in this process, each once
FIRST = 10  # seconds until the first word of long work, where no bar is drawn
SILENCE = 20  # seconds without a word or a bar, after which a command tells how far it is
_last_word = time.monotonic()  # when `note` told something
_speakers = 0  # how many `speaking` there are


def prepare_streams() -> None:
    """Let stdout and stderr take any text: what their encoding lacks is escaped, and a file's name is printed
    in the bytes that it has, as `os.fsencode` gives them."""
    codecs.register_error("qe-edge", _escape)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # somebody may have put another object there
            stream.reconfigure(errors="qe-edge")


def _escape(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    # Python holds a byte that is no text, of an argument or a file's name, as half a surrogate pair.
    parts = (
        bytes([ord(c) - 0xDC00]) if "\udc80" <= c <= "\udcff" else c.encode("ascii", "backslashreplace")
        for c in error.object[error.start : error.end]
    )
    return b"".join(parts), error.end


def shown(text: str) -> str:
    """The text as UTF-8 can hold it, with U+FFFD for each half of a surrogate pair."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def json_bytes(value: Any) -> bytes:
    """Any value as JSON in UTF-8; texts as `shown`, and what JSON doesn't know as its `str`."""
    try:
        return msgspec.json.encode(value, enc_hook=str)
    except UnicodeEncodeError:
        return msgspec.json.encode(_all_shown(msgspec.to_builtins(value, enc_hook=str)))


def _all_shown(value: Any) -> Any:
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, dict):
        return {_all_shown(name): _all_shown(part) for name, part in value.items()}
    return list(map(_all_shown, value)) if isinstance(value, list | tuple) else value


def print_json(value: Any) -> None:
    """One JSON value and a line end on stdout, in UTF-8 whatever the console's encoding is."""
    sys.stdout.flush()
    sys.stdout.buffer.write(json_bytes(value) + b"\n")
    sys.stdout.buffer.flush()


def several(count: int, one: str, many: str = "") -> str:
    """`1 query`, `1,200 queries`."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def is_main_process() -> bool:
    """Whether this process speaks and writes: of those that `accelerate launch` starts, the first one."""
    return os.environ.get("RANK", "0") == "0"


def note(message: str, stream: TextIO | None = None) -> None:
    """Tell the user something, on stderr."""
    global _last_word
    _last_word = time.monotonic()
    if is_main_process():
        print(redact(message), file=stream or sys.stderr, flush=True)


def warn(message: str) -> None:
    """Tell the user what may be amiss: on stderr, and among the `warnings` of --json."""
    note(f"warning: {message}")
    warned[message] = None


def quiet_transformers() -> None:
    """Keep transformers' bars and deprecation notes, which users can do nothing about, off the terminal."""
    import warnings

    import transformers

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl|peft")


@contextmanager
def speaking(*, by_note: bool = False) -> Iterator[None]:
    """While something tells how far the work is, a bar or a process of ours, nothing else need to.

    What doesn't speak `by_note` was heard until its end.
    """
    global _last_word, _speakers
    _speakers += 1
    try:
        yield
    finally:
        _speakers -= 1
        if not by_note:
            _last_word = time.monotonic()


@contextmanager
def still_at_work(name: str) -> Iterator[None]:
    """A line wherever a command is silent for long, as while a library works that says nothing."""
    start, ended, stream = time.monotonic(), Event(), sys.stderr

    def tell() -> None:
        while not ended.wait(SILENCE / 10):
            now = time.monotonic()
            if not _speakers and now - max(start, _last_word) > SILENCE:
                minutes, seconds = divmod(round(now - start), 60)
                note(f"{name}: {minutes:02d}:{seconds:02d} so far", stream)

    teller = Thread(target=tell, name="qe-edge at work", daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


@contextmanager
def progress(description: str, total: int | None, *, done: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar with rate and time left; where there is no terminal, a line soon and after each silence.

    Yields `advance(steps=1, info="")`; `done` steps count as already made and not into the rate. A `total`
    that nobody knows is None.
    """
    from tqdm import tqdm

    bar_shown = sys.stderr.isatty() and is_main_process()
    start = time.monotonic()
    made, at, known = 0, start, ""  # `at`: when the last step was
    ended = Event()
    stream = sys.stderr  # which a library's own chatter may be kept from meanwhile

    def tell() -> None:
        """Also while a step lasts: one may take minutes, and the first one longest."""
        wait = min(FIRST, max(SILENCE - (start - _last_word), 1))
        while not ended.wait(wait):
            took, wait = time.monotonic() - start, SILENCE
            if total is None:
                where = f"{made}, " if made else ""
                when = f"{tqdm.format_interval(took)} so far"
            elif made and done + made < total:
                # By what the steps took that are made. The one under way has had its time since; where it
                # takes much longer than they did, nobody knows.
                step, since, after = (at - start) / made, time.monotonic() - at, total - done - made - 1
                left = step * after + max(step - since, 0)
                late = f"nothing new for {tqdm.format_interval(since)}"
                unknown = since > max(2 * step if after else step, FIRST)
                when = late if unknown else f"{tqdm.format_interval(left)} left"
                where = f"{done + made} of {total}, "
            else:
                where, when = f"{done + made} of {total}, ", f"{tqdm.format_interval(took)} so far"
            note(f"{description}: {where}{when}{known and f', {known}'}", stream)

    with (
        speaking(by_note=not bar_shown),
        tqdm(desc=description, total=total, initial=done, leave=False, disable=not bar_shown) as bar,
    ):

        def advance(steps: int = 1, info: str = "") -> None:
            nonlocal made, at, known
            bar.set_postfix_str(info, refresh=False)
            bar.update(steps)
            made, at, known = made + steps, time.monotonic(), info

        teller = Thread(target=tell, name="qe-edge progress", daemon=True)
        if not bar_shown:
            teller.start()
        try:
            yield advance
        finally:
            ended.set()
            if not bar_shown:
                teller.join()  # nothing more is said of what has ended


def counting(items: Iterable[T], advance: Callable[[int], None]) -> Iterator[T]:
    """The items, `advance` being called after each thousand: there may be millions."""
    for number, item in enumerate(items, 1):
        yield item
        if number % 1000 == 0:
            advance(1000)
