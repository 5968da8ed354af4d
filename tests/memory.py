"""The memory that a process took, for the tests of several rooms."""

from __future__ import annotations

import contextlib
import resource


def peak_kb() -> int:
    """The peak of this process alone, in kB.

    `ru_maxrss` also counts what the process that started it had taken by then, which hides what a child takes.
    """
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
