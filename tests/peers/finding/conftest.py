from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers.finding.etcd import Etcd, b64
from weightd.daemon.peers.finding import etcd as etcd_directory


@pytest.fixture(scope="module")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with Etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def etcd(shared_etcd: Etcd) -> Etcd:
    """An empty etcd that nobody kills."""
    shared_etcd("kv/deleterange", key=b64("/"), range_end=b64("\x7f"))
    return shared_etcd


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[Etcd]:
    """An etcd that may be killed."""
    with Etcd(tmp_path / "etcd") as server:
        yield server


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_directory, "TTL", 3)
    monkeypatch.setattr(etcd_directory, "KEEPALIVE", 1.0)
    monkeypatch.setattr(etcd_directory, "BETWEEN_WRITES", 0.2)
