"""`qe-edge`, or `python -m qe_edge`. Importing the commands takes a moment, in which Ctrl-C may come."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line; a Ctrl-C during its import counts as one right after it."""
    came: list[int] = []
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else whoever called us ignores it
    if usual:
        signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    from qe_edge import cli

    if usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main(interrupted=bool(came))


if __name__ == "__main__":
    main()
