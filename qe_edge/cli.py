"""The command line: `qe-edge`. The commands themselves are in `qe_edge.commands`."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from contextlib import nullcontext
from difflib import get_close_matches
from typing import Annotated, Any

import typer

from qe_edge.commands.bench import bench_app
from qe_edge.commands.common import emit
from qe_edge.commands.data import data_app
from qe_edge.commands.doctor import doctor
from qe_edge.commands.expand import expand
from qe_edge.commands.export import export
from qe_edge.commands.mcp import mcp
from qe_edge.commands.merge import merge
from qe_edge.commands.pairs import pairs
from qe_edge.commands.prune import prune
from qe_edge.commands.push import push
from qe_edge.commands.report import report
from qe_edge.commands.run import demo, run
from qe_edge.commands.search import search
from qe_edge.commands.serve import serve
from qe_edge.commands.teach import teach
from qe_edge.commands.train import train_app
from qe_edge.commands.verify import verify
from qe_edge.console import prepare_streams, still_at_work, warned
from qe_edge.errors import DEBUG, Interrupted, PartlyDone, QeEdgeError, explained
from qe_edge.redact import redact
from qe_edge.work.machine import drowsy_threads

UsageError: Any = typer.BadParameter.__base__  # Typer gives it no name of its own

app = typer.Typer(
    help="Train, export and measure a small model that expands search queries on your own device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from qe_edge import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    """Holds the options that need no command."""
    warned.clear()  # a program may call several commands


_FIRST = (demo, doctor, teach, pairs, merge, prune, export, verify, push, report)
for command in (*_FIRST, expand, search, serve, mcp, run):
    app.command()(command)
app.add_typer(train_app, name="train")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")


def main(*, interrupted: bool = False) -> None:
    """Run the CLI; an error becomes one line and its exit code, with QE_EDGE_DEBUG after its trace.

    Where Ctrl-C has come already, it was `interrupted`, and nothing is run.
    """
    prepare_streams()
    # Read when these libraries are imported, which happens later: keep their chatter off the terminal.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # As after Ctrl-C: children are ended, and what is half-written is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if interrupted:
            raise KeyboardInterrupt
        serves = _command() in ("serve", "mcp")  # they wait for requests
        with drowsy_threads(), nullcontext() if serves else still_at_work(_command()):
            code = app(standalone_mode=False) or 0
        if code == 130:  # as Typer returns Ctrl-C
            _interrupted()
        sys.exit(code)
    except UsageError as error:  # it shows the usage, and the options that are like it
        error.message = _plain(error.message)
        error.possibilities = _options_like(error)
        if not error.possibilities:
            error.message += _remedy(error)
        error.show()
        if "--json" in sys.argv:
            emit(True, _command(), "", status="error", errors=[redact(error.format_message())])
        sys.exit(error.exit_code)
    except BrokenPipeError:  # such as `qe-edge data list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        _interrupted()
        sys.exit(130)
    except Exception as error:
        if os.environ.get(DEBUG):
            traceback.print_exc()
        sys.exit(_fail(error))


# What pydantic says, which reads Typer's numbers and choices, and what we say.
_PYDANTIC = {
    "Value error, ": "",
    "Input should be a valid integer, unable to parse string as an integer": "this must be a whole number",
    "Input should be a valid number, unable to parse string as a number": "this must be a number",
    "Input should be": "this must be",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}


# By which options commands are told what to work on.
_INPUTS = ("--dataset", "--expansions", "--pairs", "--index")
# What stands for an option that a command lacks on purpose.
_CORES = ". It takes the cores that are free; `serve` and Python's Expander take a number"
_LIMIT = ". `serve` and Python's expand take a deadline"
_FEWER = ". Ctrl-C, --max-tokens-total and --max-cost end it early, and what came is kept"
_KINDS = ". --quant takes other kinds, such as Q5_K_M or Q6_K"
_RESULTS = ". -k says how many results to show"
_INSTEAD = {
    ("export", "--q5"): _KINDS,
    ("export", "--q6"): _KINDS,
    ("expand", "--threads"): _CORES,
    ("search", "--threads"): _CORES,
    ("expand", "--deadline-ms"): _LIMIT,
    ("search", "--deadline-ms"): _LIMIT,
    ("teach", "--max-queries"): _FEWER,
    ("teach", "--limit"): _FEWER,
    ("run", "--print-config"): ". --show prints the recipe",
    ("bench", "--limit"): ". --max-queries takes some of the queries only",
    ("search", "--limit"): _RESULTS,
    ("search", "--top"): _RESULTS,
    ("search", "--top-k"): _RESULTS,
    ("report", "--format"): ". It writes HTML; --markdown, --latex, --csv and --png are others",
}


def _options_like(error: Any) -> list[str]:
    """The command's options that an unknown one may stand for: those it begins, or else those it is like."""
    if not hasattr(error, "possibilities"):  # it is another mistake
        return []
    if error.option_name in _INPUTS or (_command(), error.option_name) in _INSTEAD:
        return []  # what is like it means something else
    asked = error.option_name.removeprefix("--")
    options = [option for param in error.ctx.command.params for option in param.opts]
    known = [option.removeprefix("--") for option in options if option.startswith("--")]
    if f"-{asked}" in options:
        return [f"-{asked}"]
    found = [name for name in known if name.startswith(asked)] or get_close_matches(asked, known, cutoff=0.7)
    return [f"--{name}" for name in found]


def _remedy(error: Any) -> str:
    """What to write instead, where Typer doesn't say it."""
    if not error.message:  # an argument is missing, and Typer says no more than its name
        return getattr(getattr(error, "param", None), "help", None) or ""
    unknown_option = error.message.startswith("No such option")
    if unknown_option and "--split" in error.message:
        return ". A split is named with its data set: NAME@SPLIT"
    if unknown_option and not getattr(error.ctx.command, "invoke_without_command", True):
        return f". Options come after one of the commands: {', '.join(error.ctx.command.commands)}"
    if unknown_option and (instead := _INSTEAD.get((_command(), error.option_name))):
        return instead
    params = error.ctx.command.params if error.ctx else []  # an option without its value comes without
    arguments = [param.name for param in params if param.param_type_name == "argument"]
    if unknown_option and (name := error.option_name.removeprefix("--")) in arguments:
        return f". Name it without an option: qe-edge {_command()} {name.upper()}"
    options = {option for param in params for option in param.opts}
    inputs = " and ".join(option for option in _INPUTS if option in options)
    if unknown_option and error.option_name in _INPUTS and (inputs or arguments):
        how = (
            f"with {inputs}" if inputs else f"without an option: qe-edge {_command()} {arguments[0].upper()}"
        )
        return f". What it works on is named {how}"
    like_a_flag = unknown_option and (" " in error.option_name or not error.option_name.startswith("--"))
    if like_a_flag and _command() in ("expand", "search"):
        return ". A query that begins with - comes last, after --, as in: -- '-5 degrees'"
    if error.message.startswith("Got unexpected extra argument"):
        if "--" in sys.argv:
            return ". Options stand before the --, which only a query comes after"
        if _command() == "search":
            return ". A query of several words stands in quotes"
        if inputs:
            return f". What it works on is named with {inputs}"
        if not arguments:
            return ". It takes options only"
    if error.message.startswith("No such command") and "Did you mean" not in error.message:
        known = f" There are: {', '.join(error.ctx.command.commands)}."
        return f"{known} A data set is named with --dataset." if _command() == "bench" else known
    return ""


def _plain(message: str) -> str:
    for theirs, ours in _PYDANTIC.items():
        message = message.replace(theirs, ours)
    return message


def _interrupted() -> None:
    """Say so, and what comes of the work that was done."""
    same, whole = "; the same command goes on", "; no half-written file is left: give the same command again"
    resumed = ("teach", "train sft", "train dpo", "data queries", "data judge", "run", "demo")
    written_whole = ("export", "prune", "merge", "data make", "data import", "report")
    goes_on = {
        **dict.fromkeys(resumed, same),
        **dict.fromkeys(written_whole, whole),
        "bench": f"{same} with what was written",
        "pairs": f"{same} with what was scored",
        "verify": "; nothing was changed: give the same command again",
    }
    message = f"interrupted{goes_on.get(_command(), '')}"
    print(f"error: {message}", file=sys.stderr)
    if "--json" in sys.argv:
        emit(True, _command(), "", status="partial", errors=[message])


def _command() -> str:
    """The whole name of the command that is asked for, such as `train sft`."""
    return _asked_for()[0]


def _asked_for() -> tuple[str, Any]:
    """The command that is asked for: its whole name, and what Typer made of it."""
    names, group = [], typer.main.get_command(app)
    for word in sys.argv[1:]:
        found = getattr(group, "commands", {}).get(word)
        if found:
            names.append(word)
            group = found
        elif not word.startswith("-"):
            break
    return " ".join(names) or "qe-edge", group


def _with_flag(message: str) -> str:
    """What is wrong with an argument of ours (`budget_tokens must be …`), by the name of its option."""
    name, verb, rest = message.partition(" must be ")
    options = {param.name: param.opts[0] for param in _asked_for()[1].params}
    return f"{options[name]}{verb}{rest}" if verb and options.get(name, "").startswith("--") else message


def _fail(error: Exception) -> int:
    """Say what went wrong; returns the exit code."""
    message = redact(_with_flag(explained(error)))
    print(f"error: {message}", file=sys.stderr)
    if "--json" in sys.argv:
        status = "partial" if isinstance(error, PartlyDone | Interrupted) else "error"
        emit(True, _command(), "", status=status, errors=[message])
    return error.exit_code if isinstance(error, QeEdgeError) else QeEdgeError.exit_code
