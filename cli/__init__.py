"""The command line of sppfeat, installed as the package `sppfeat_cli`."""

import os
import signal
import sys
from typing import NoReturn

from sppfeat_cli.threads import _let_threads_block

__all__ = ["main"]


def main() -> None:
    """Run the command line; see `sppfeat_cli.app.main`."""
    _let_threads_block()
    _open_closed_streams()
    # While modules load there is nothing to clean up, and an exception would surface in the middle of any of them.
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)
    from sppfeat_cli.app import main as run

    run()


def _open_closed_streams() -> None:
    """Open the null device on descriptors 0 to 2 where they are closed.

    The next file opened would take their place: a store, say, into which a C library then writes its messages.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _leave(number: int, frame: object) -> NoReturn:
    os.write(2, b"sppfeat: interrupted\n")
    os._exit(130)
