"""Which way bytes go, from what UCX says, and which better way there would have been. Real reads: test_nixl."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightd.daemon.peers.moving import paths
from weightd.daemon.peers.moving.paths import better_path, transport_of


@pytest.mark.parametrize(
    ("names", "gpus", "expected"),
    [
        ({"tcp"}, 0, "tcp"),
        ({"tcp"}, 2, "tcp"),
        ({"tcp", "cma"}, 0, "shm"),
        ({"tcp", "cma", "cuda_ipc", "cuda_copy"}, 0, "shm"),
        ({"tcp", "cma", "cuda_ipc", "cuda_copy"}, 2, "cuda_ipc"),
        ({"tcp", "cma", "cuda_ipc", "cuda_copy"}, 1, "unknown"),
        ({"tcp", "cuda_copy"}, 1, "tcp"),
        ({"posix", "sysv", "tcp"}, 0, "shm"),
        ({"xpmem"}, 0, "shm"),
        ({"knem"}, 0, "shm"),
        ({"rc_mlx5"}, 0, "rdma"),
        ({"rc_mlx5", "cma"}, 0, "rdma"),
        ({"rc_verbs", "ud_verbs", "tcp"}, 0, "rdma"),
        ({"rc_mlx5", "rc_gda", "gdr_copy", "cuda_copy"}, 1, "rdma"),
        ({"dc_mlx5"}, 0, "rdma"),
        ({"ud_mlx5"}, 2, "rdma"),
        ({"srd"}, 0, "rdma"),
        ({"self"}, 0, "unknown"),
        ({"rcfile", "", "TCP", "ibex"}, 0, "unknown"),
        (set(), 0, "unknown"),
    ],
)
def test_what_an_endpoint_is_made_of_says_by_what_it_reads(names: set[str], gpus: int, expected: str) -> None:
    assert transport_of(names, gpus=gpus) == expected


class FakeUCX:
    """Endpoints by address: what they are made of, and their estimate."""

    def __init__(self, **endpoints: tuple[set[str], int]) -> None:
        self.found = dict(enumerate(endpoints.values()))

    def endpoints(self, agent: str) -> list[int]:
        if agent == "strange":
            raise ValueError("invalid literal for int() with base 16")
        return list(self.found)

    def transports(self, endpoint: int) -> set[str]:
        return self.found[endpoint][0]

    def microseconds(self, endpoint: int, nbytes: int) -> int:
        return self.found[endpoint][1]


def test_the_endpoint_is_the_one_with_nixls_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeUCX(
        one=({"tcp", "cma"}, 5742), other=({"tcp"}, 900_000), same=({"tcp", "cma"}, 5742),
        far=({"rc_mlx5"}, 1300), near=({"rc_mlx5"}, 1300), twin=({"tcp"}, 77), odd=({"dc_mlx5"}, 77), gone=(set(), -1),
    )  # fmt: skip
    monkeypatch.setattr(paths, "_ucx", lambda: fake)
    for estimate, expected in {5742: "shm", 900_001: "tcp", 1300: "rdma", 77: "unknown", 40: "unknown"}.items():
        assert paths.transport("agent", 1 << 20, estimate) == expected
    assert paths.transport("strange", 1 << 20, 5742) == "unknown"


def test_another_ucx_or_none_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise AttributeError("undefined symbol: ucs_vfs_path_list_dir")

    monkeypatch.setattr(paths, "_ucx", missing)
    assert paths.transport("agent", 1, 1) == "unknown"


def machine(root: Path, *, ports: dict[str, str], uverbs: bool = True) -> Path:
    for port, state in ports.items():
        device, number = port.split(":")
        folder = root / "sys/class/infiniband" / device / "ports" / number
        folder.mkdir(parents=True)
        (folder / "state").write_text(state + "\n")
    if uverbs:
        (root / "dev/infiniband").mkdir(parents=True)
        (root / "dev/infiniband/uverbs0").touch()
    return root


UP = {"mlx5_0:1": "4: ACTIVE", "mlx5_1:1": "1: DOWN"}


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "mlx5_0:1 is up: see that the peer has RDMA too"),
        ({"UCX_TLS": "all"}, "mlx5_0:1 is up: see"),
        ({"UCX_TLS": "tcp"}, "UCX_TLS=tcp leaves it out: unset it"),
        ({"UCX_TLS": "tcp,sm,cuda"}, "UCX_TLS=tcp,sm,cuda leaves it out"),
        ({"UCX_TLS": "rc,tcp"}, "mlx5_0:1 is up: see"),
        ({"UCX_TLS": "\\rc_mlx5,tcp"}, "mlx5_0:1 is up: see"),
        ({"UCX_TLS": "^ib"}, "UCX_TLS=^ib leaves it out"),
        ({"UCX_TLS": "^cuda"}, "mlx5_0:1 is up: see"),
        ({"UCX_NET_DEVICES": "eth0"}, "UCX_NET_DEVICES=eth0 leaves out mlx5_0:1"),
        ({"UCX_NET_DEVICES": "mlx5_1:1"}, "UCX_NET_DEVICES=mlx5_1:1 leaves out mlx5_0:1"),
        ({"UCX_NET_DEVICES": "eth0,mlx5_0:1"}, "mlx5_0:1 is up: see"),
    ],
)
def test_tcp_where_a_port_for_rdma_is_up(tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    missed = better_path("tcp", same_host=False, environment=environment, root=machine(tmp_path, ports=UP))
    assert missed is not None
    assert missed.path == "rdma"
    assert missed.reason.startswith(reason)


def test_devices_that_the_container_was_not_given(tmp_path: Path) -> None:
    missed = better_path("tcp", same_host=False, environment={}, root=machine(tmp_path, ports=UP, uverbs=False))
    assert missed is not None
    assert "/dev/infiniband is not there" in missed.reason


def test_nothing_better_is_known(tmp_path: Path) -> None:
    root = machine(tmp_path, ports={"mlx5_0:1": "1: DOWN", "mlx5_1:1": "2: INIT"})
    assert better_path("tcp", same_host=False, environment={}, root=root) is None
    assert better_path("tcp", same_host=False, environment={}, root=tmp_path / "none") is None
    with_rdma = machine(tmp_path / "other", ports=UP)
    for transport in ("rdma", "shm", "cuda_ipc", "unknown"):
        for same_host in (False, True):
            assert better_path(transport, same_host=same_host, environment={}, root=with_rdma) is None


def test_tcp_within_one_machine(tmp_path: Path) -> None:
    for gpus, better in ((0, "shm"), (2, "cuda_ipc")):
        missed = better_path("tcp", same_host=True, gpus=gpus, environment={}, root=tmp_path)
        assert missed is not None
        assert missed.path == better
        missed = better_path("tcp", same_host=True, gpus=gpus, environment={"UCX_TLS": "tcp"}, root=tmp_path)
        assert missed is not None
        assert missed.reason == "UCX_TLS=tcp leaves it out: unset it"
    assert better_path("tcp", same_host=True, gpus=1, environment={}, root=tmp_path) is None
