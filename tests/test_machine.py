"""How much of the machine a process may use: the lowest limit of its control groups, of either version."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sppfeat import machine
from sppfeat.machine import available_cores, available_memory, control_group_values

V1 = "31 23 0:35 {root} {point} rw,relatime shared:9 - cgroup cgroup rw,memory\n"
V2 = "41 31 0:38 {root} {point} rw,relatime - cgroup2 cgroup2 rw\n"


def values(proc: Path) -> list[str]:
    return list(control_group_values("memory", "memory.max", "memory.limit_in_bytes", proc))


def limit(folder: Path, file: str, value: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(value + "\n")


@pytest.mark.parametrize(
    ("mount", "group", "file"),
    [(V1, "4:cpuacct,memory:/job/step", "memory.limit_in_bytes"), (V2, "0::/job/step", "memory.max")],
)
def test_a_group_and_all_that_it_lies_in(tmp_path: Path, mount: str, group: str, file: str) -> None:
    point = tmp_path / "groups"
    (tmp_path / "cgroup").write_text(f"9:name=systemd:/else\n{group}\n")
    (tmp_path / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mount.format(root="/", point=point))
    limit(point, file, "9000")
    limit(point / "job", file, "500")
    limit(point / "job" / "step", file, "max")
    limit(point / "job" / "other", file, "3")
    limit(tmp_path, file, "1")  # above the mount: no group
    assert values(tmp_path) == ["max", "500", "9000"]


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    point = tmp_path / "a group"
    limit(point, "memory.limit_in_bytes", "700")
    (tmp_path / "cgroup").write_text("4:memory:/docker/abc\n0::/\n")
    for root in ("/docker/abc", "/another"):
        escaped = str(point).replace(" ", "\\040")
        (tmp_path / "mountinfo").write_text(V1.format(root=root, point=escaped))
        assert values(tmp_path) == ["700"]


def test_without_control_groups(tmp_path: Path) -> None:
    assert values(tmp_path) == []
    (tmp_path / "cgroup").write_text("")
    (tmp_path / "mountinfo").write_text("")
    assert values(tmp_path) == []


def test_memory_is_the_least_of_all_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_limits(*texts: str) -> int:
        monkeypatch.setattr(machine, "control_group_values", lambda *names: iter(texts))
        return available_memory()

    whole = with_limits()
    assert whole > 1 << 26
    assert with_limits("max", "9223372036854771712") == whole
    assert with_limits("max", "50000000", "60000000") == 50_000_000


@pytest.mark.parametrize(
    ("outer", "inner", "cores"),
    [
        ("max 100000", "max 100000", 16),
        ("400000 100000", "max 100000", 4),
        ("800000 100000", "150000 100000", 2),
        ("1000 100000", "max 100000", 1),
        ("9900000 100000", "max 100000", 16),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_cores_of_nested_quotas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, outer: str, inner: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    group = tmp_path / "mount" / "a" / "b"
    for folder, text in ((group.parent, outer), (group, inner)):
        quota, period = text.split()
        if version == 2:
            limit(folder, "cpu.max", text)
        else:
            limit(folder, "cpu.cfs_quota_us", quota.replace("max", "-1"))
            limit(folder, "cpu.cfs_period_us", period)
    kind = "cgroup2 cgroup rw" if version == 2 else "cgroup cgroup rw,cpu,cpuacct"
    (tmp_path / "cgroup").write_text("0::/a/b\n" if version == 2 else "4:cpu,cpuacct:/a/b\n")
    (tmp_path / "mountinfo").write_text(f"30 20 0:1 / {tmp_path}/mount rw - {kind}\n")
    assert available_cores(tmp_path) == cores


def test_a_processor_held_to_less_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    whole = machine.processor()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine.processor() == [*whole, "held to AVX2"] and machine.integer_instructions() == []
    monkeypatch.setattr(machine, "processor", lambda: ["avx2 avx512_vnni", "held to AVX512_CORE_VNNI"])
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    assert machine.integer_instructions() == ["avx512_vnni"]
