"""How OpenMP's threads wait under the command line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

RUN = """
import sys
sys.argv = ["sppfeat", "--version"]
from sppfeat_cli import main
try:
    main()
finally:
    import torch
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks GNU's OpenMP, which torch brings on Linux")
@pytest.mark.parametrize("users", [None, "ACTIVE"])
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(users: str | None) -> None:
    """OpenMP itself tells what it goes by; torch takes some seconds to load."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({"OMP_WAIT_POLICY": users} if users else {})
    done = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("sppfeat")
    assert f"OMP_WAIT_POLICY = '{users or 'PASSIVE'}'" in done.stderr
