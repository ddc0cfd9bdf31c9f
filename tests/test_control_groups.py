"""What control groups leave of the memory: folders that look like the kernel's, since a test may make no real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightd.daemon import control_groups
from weightd.daemon.devices import cpu

GiB = 1 << 30


class Groups:
    """A process in a group, whose files are these."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "groups"
        self.root.mkdir()
        self.proc = folder / "proc"
        self.proc.mkdir()

    def put(self, path: str, **files: str | int) -> None:
        folder = self.root / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(f"{text}\n")

    def member(self, cgroup: str, root: str = "/", kind: str = "cgroup2", options: str = "rw") -> None:
        (self.proc / "cgroup").write_text(f"{cgroup}\n")
        line = f"30 24 0:26 {root} {self.root} rw,nosuid shared:9 - {kind} {kind} {options}\n"
        (self.proc / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda rw\n" + line)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    made = Groups(tmp_path)
    monkeypatch.setattr(control_groups, "PROC", str(made.proc))
    return made


def test_its_own_limit_counts(groups: Groups) -> None:
    groups.put("", memory__max="max", memory__current=0)
    groups.put("pod", memory__max=3 * GiB, memory__current=GiB)
    groups.member("0::/pod")
    assert control_groups.memory_left() == 2 * GiB


def test_so_does_that_of_a_parent(groups: Groups) -> None:
    groups.put("slice", memory__max=4 * GiB, memory__current=3 * GiB)
    groups.put("slice/pod", memory__max="max", memory__current=GiB)
    groups.put("slice/pod/ctr", memory__max=3 * GiB, memory__current=GiB)
    groups.member("0::/slice/pod/ctr")
    assert control_groups.memory_left() == GiB


def test_so_does_the_one_from_which_it_is_throttled(groups: Groups) -> None:
    groups.put("pod", memory__max="max", memory__high=2 * GiB, memory__current=GiB)
    groups.member("0::/pod")
    assert control_groups.memory_left() == GiB


def test_in_the_namespace_of_the_host_the_mount_is_the_group(groups: Groups) -> None:
    groups.put("", memory__max=2 * GiB, memory__current=GiB)
    groups.member("0::/kubepods/pod1/ctr", root="/kubepods/pod1/ctr")
    assert control_groups.memory_left() == GiB
    groups.member("0::/kubepods/pod1/ctr")  # a path that is not to be seen from here
    assert control_groups.memory_left() == GiB


def test_a_bind_mount_of_a_parent_shows_the_group_below_it(groups: Groups) -> None:
    groups.put("ctr", memory__max=2 * GiB, memory__current=GiB)
    groups.member("0::/kubepods/pod1/ctr", root="/kubepods/pod1")
    assert control_groups.memory_left() == GiB


def test_version_1_counts(groups: Groups) -> None:
    groups.put("", memory__limit_in_bytes=1 << 62, memory__usage_in_bytes=9 * GiB)
    groups.put("pod", memory__limit_in_bytes=4 * GiB, memory__usage_in_bytes=GiB)
    groups.put("pod/ctr", memory__limit_in_bytes=1 << 62, memory__usage_in_bytes=GiB, memory__oom_control="oom_kill 7")
    groups.member("5:cpu,cpuacct:/x\n4:memory:/pod/ctr\n0::/", kind="cgroup", options="rw,memory")
    assert control_groups.memory_left() == 3 * GiB
    assert control_groups.oom_kills() == 7


def test_pages_of_files_that_would_go_count_as_left(groups: Groups) -> None:
    groups.put("pod", memory__max=3 * GiB, memory__current=3 * GiB, memory__stat=f"file 9\ninactive_file {GiB}")
    groups.member("0::/pod")
    assert control_groups.memory_left() == GiB


def test_without_limits_or_groups_nothing_is_said(groups: Groups) -> None:
    assert control_groups.memory_left() is None
    assert control_groups.oom_kills() is None
    groups.put("", memory__max="max", memory__current=1)
    groups.member("0::/")
    assert control_groups.memory_left() is None


def test_the_default_capacity_is_half_of_what_a_parent_leaves(groups: Groups) -> None:
    groups.put("slice", memory__max=1 << 20, memory__current=0)
    groups.put("slice/pod", memory__max="max", memory__current=0)
    groups.member("0::/slice/pod")
    assert cpu.available_memory() == 1 << 20
    assert cpu.CpuDevice("cpu", None).capacity == 1 << 19
