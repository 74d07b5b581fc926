"""The `freeexport` command and `python -m freeexport`: setup that precedes all other imports."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from freeexport import INTERRUPTED


def main() -> None:
    """Run the command line, even with closed standard streams or an early interrupt."""
    _open_standard_streams()
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # background jobs of a shell ignore SIGINT
        signal.signal(signal.SIGINT, _leave)
    from freeexport.cli import main as run

    signal.signal(signal.SIGINT, before)
    run(prog_name="freeexport")


def _leave(number: int, frame: FrameType | None) -> None:
    # Nothing needs cleaning up yet, and an import interrupted by KeyboardInterrupt may hide it.
    os.write(2, b"error: interrupted\n")
    os._exit(INTERRUPTED)


def _open_standard_streams() -> None:
    """Open /dev/null for closed standard streams.

    Otherwise the next file opened gets their descriptor, and output is written to it.
    """
    closed = [
        (number, name)
        for number, name in enumerate(("stdin", "stdout", "stderr"))
        if getattr(sys, name) is None
    ]
    for number, _ in closed:
        try:
            os.fstat(number)
        except OSError:
            # open() returns the lowest free descriptor.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number, name in closed:
        setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115


if __name__ == "__main__":
    main()
