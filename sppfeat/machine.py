"""The processor, and how much of the machine this process may use.

Control groups (containers, cluster jobs) may limit it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

# What holds oneDNN, and so PyTorch and OpenVINO, to fewer instructions than the processor has; values without VNNI.
_HELD: Final = "ONEDNN_MAX_CPU_ISA"
_WITHOUT_THEM: Final = ("SSE41", "AVX", "AVX2", "AVX512_CORE")

# Set by `limit_cores`.
_most_cores: int | None = None


def limit_cores(count: int) -> None:
    """Let this process use at most this many cores; for processes that share a machine by agreement."""
    global _most_cores
    _most_cores = count


def available_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or the lowest limit of its control groups."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # For no limit, version 2 has "max", and version 1 a number larger than any memory.
    limits = [
        int(text) for text in control_group_values("memory", "memory.max", "memory.limit_in_bytes") if text.isdigit()
    ]
    return min([whole, *(limit for limit in limits if limit > 0)])


def available_cores(proc: Path = Path("/proc/self")) -> int:
    """Cores that this process may use: those of its CPU affinity, up to the quotas of its control groups.

    A fraction of a core counts as one. See also `limit_cores`.
    """
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Version 2 has "QUOTA PERIOD" in one file, version 1 in two; without a limit the quota is "max" or -1.
    quotas = control_group_values("cpu", "cpu.max", "cpu.cfs_quota_us", proc)
    periods = control_group_values("cpu", "cpu.max", "cpu.cfs_period_us", proc)
    shares = [(quota.split()[0], period.split()[-1]) for quota, period in zip(quotas, periods, strict=False)]
    limits = [-(-int(quota) // int(period)) for quota, period in shares if quota.isdigit() and int(period) > 0]
    return max(1, min([mask, *limits, *([] if _most_cores is None else [_most_cores])]))


def control_group_values(controller: str, file: str, file_v1: str, proc: Path = Path("/proc/self")) -> Iterator[str]:
    """One setting in this process's control group and in each group above it, without the newline.

    controller: such as `memory` or `cpu`. file: the setting's name in version 2. file_v1: in version 1. A group without
    the setting, such as the root, yields nothing; neither does a system without control groups.
    """
    try:
        groups = (proc / "cgroup").read_text("utf-8", "surrogateescape").splitlines()
        mounts = (proc / "mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return
    # hierarchy:controllers:path; version 2 has no controllers there.
    paths = {name: path for _, names, path in (line.split(":", 2) for line in groups) for name in names.split(",")}
    for mount in mounts:
        # id parent device root mount-point options [optional ...] - type source super-options
        before, _, after = mount.partition(" - ")
        root, point = (
            re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field) for field in before.split(" ")[3:5]
        )
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup2":
            path, name = paths.get("", "/"), file
        elif kind == "cgroup" and controller in options.split(","):
            path, name = paths.get(controller, "/"), file_v1
        else:
            continue
        # In a container the mount may be its own group, while the group's path is the machine's.
        below = os.path.relpath(path, root)
        group = Path(point) if below.startswith("..") else Path(point, below)
        for folder in (group, *group.parents):
            if folder.is_relative_to(point):
                try:
                    yield (folder / name).read_text("utf-8").strip()
                except (OSError, UnicodeDecodeError):
                    continue


def processor() -> list[str]:
    """The processor, as far as compiled code depends on it."""
    found: list[str] = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "flags", "Features", "CPU implementer", "CPU part"):
                found.append(value.strip())
            elif not name and found:
                break  # the other cores are alike
    held = [f"held to {name}" for name in [os.environ.get(_HELD)] if name]
    return [platform.system(), platform.machine(), *(found or [platform.processor()]), *held]


def integer_instructions() -> list[str]:
    """The processor's instructions for products of bytes that may be used, by the kernel's names; none where the system
    does not say."""
    if os.environ.get(_HELD, "").upper() in _WITHOUT_THEM:
        return []
    flags = " ".join(processor()).split()
    return [name for name in ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm") if name in flags]
