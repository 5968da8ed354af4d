"""A server as a process of its own."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def running(*given: str | Path) -> Iterator[str]:
    """The address of a server of its own; it must end without a traceback."""
    code = "import sys; from sppfeat_cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", *map(str, given), "--port", "0", "--device", "cpu"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        line = child.stdout.readline()
        assert line.startswith(f"{given[0]}: http://127.0.0.1:") and line.endswith("  (Ctrl-C ends it)\n"), line
        yield line.split()[1]
    finally:
        child.send_signal(signal.SIGINT)
        _, error = child.communicate(timeout=20)
    assert "Traceback" not in error and child.returncode in (0, 130), (child.returncode, error)
