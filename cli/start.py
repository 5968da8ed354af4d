"""What has to be in place before anything is imported that takes long or opens files."""

import os
import signal
import sys
from typing import NoReturn


def begin() -> None:
    """Open what is closed of the standard streams; let a signal end the program at once, while it is starting; and let
    OpenMP's threads sleep while they wait.
    """
    # They spin by default: as soon as another process wants a core, each short step waits for a thread that is not
    # running. OpenMP reads this when torch is loaded; what the user has set stays.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest that is free, so this one. Otherwise the next file that is opened would take its place, and
            # what a library prints would be written into it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    # The interpreter has none for a descriptor that was closed.
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, frame: object) -> NoReturn:
    # Nothing is open yet, and an exception amid an import would be a traceback.
    os.write(2, b"sppfeat: interrupted\n")
    os._exit(130)
