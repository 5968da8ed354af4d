"""Set-up that must come before any slow import and before any file is opened."""

import os
import signal
import sys
from typing import NoReturn


def begin() -> None:
    """Open standard streams that are closed, let a signal end the program at once while it starts, and let OpenMP's
    threads sleep while they wait.
    """
    # They spin by default: once another process needs a core, each short step waits for a thread that is not running.
    # OpenMP reads this when torch is loaded; a value set by the user is kept.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free descriptor, so this one. Otherwise the next file that is opened would get it, and what a
            # library prints would be written into that file.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    # Python has no stream for a descriptor that was closed.
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, frame: object) -> NoReturn:
    # Nothing is open yet, and an exception during an import would print a traceback.
    os.write(2, b"sppfeat: interrupted\n")
    os._exit(130)
