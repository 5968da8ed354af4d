"""The command line of sppfeat, installed as the package `sppfeat_cli`."""

import os

__all__ = ["main"]


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 some images failed, 130 interrupted."""
    from sppfeat_cli.start import begin

    _let_threads_block()
    begin()
    from sppfeat_cli.app import run

    run()


def _let_threads_block() -> None:
    """Threads of OpenMP that wait give up their core at once; by default they spin for a while.

    Each product or loop ends when its last thread does. Where another process wants a core, the threads that spin keep
    that last one from running. OpenMP reads this when torch is loaded; what the user has set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
