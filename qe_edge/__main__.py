"""`qe-edge`, or `python -m qe_edge`. Importing the commands takes a moment, in which Ctrl-C may come."""

from __future__ import annotations

from qe_edge.interrupt import held


def main() -> None:
    """Run the command line; a Ctrl-C during its import counts as one right after it."""
    interrupted = False
    try:
        with held():
            from qe_edge import cli
    except KeyboardInterrupt:
        interrupted = True
    cli.main(interrupted=interrupted)


if __name__ == "__main__":
    main()
