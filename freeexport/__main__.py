"""The `freeexport` command and `python -m freeexport`: what must hold before anything else is imported."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from freeexport import INTERRUPTED


def main() -> None:
    """Run the command line, whatever is closed and however soon it is interrupted."""
    _open_standard_streams()
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a shell lets its background jobs ignore it
        signal.signal(signal.SIGINT, _leave)
    from freeexport.cli import main as run

    signal.signal(signal.SIGINT, before)
    run(prog_name="freeexport")


def _leave(number: int, frame: FrameType | None) -> None:
    # Nothing has begun that must be undone, and an import that KeyboardInterrupt ends may hide it.
    os.write(2, b"error: interrupted\n")
    os._exit(INTERRUPTED)


def _open_standard_streams() -> None:
    """Open /dev/null for closed streams: else the next file opened gets their number, and what is printed."""
    closed = [
        (number, name)
        for number, name in enumerate(("stdin", "stdout", "stderr"))
        if getattr(sys, name) is None
    ]
    for number, _ in closed:
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(
                os.open(os.devnull, os.O_RDWR), True
            )  # it gets the lowest number that is free
    for number, name in closed:
        setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115


if __name__ == "__main__":
    main()
