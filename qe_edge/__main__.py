"""`qe-edge`, or `python -m qe_edge`. Importing the commands takes a moment, in which Ctrl-C may come."""

from __future__ import annotations

import signal

from qe_edge.interrupt import held


def main() -> None:
    """Run the command line; a Ctrl-C during its import counts as one right after it."""
    interrupted = False
    try:
        with held():
            from qe_edge import cli
    except KeyboardInterrupt:
        interrupted = True
    try:
        cli.main(interrupted=interrupted)
    finally:  # the work is done: a Ctrl-C while Python ends must not say that it isn't
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    main()
