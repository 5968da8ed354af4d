"""How the threads of numerical libraries wait; set before any of these is loaded."""

import os


def _let_threads_block() -> None:
    """Let OpenMP's threads sleep while they wait for work.

    By default they spin: as soon as another process wants a core, each short step waits for a thread that is not
    running while the others burn their time. What the user has set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
