"""What the doctor finds of who may come in, each with its remedy."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from weightd.daemon.doctor.access import examine_access
from weightd.daemon.doctor.report import Finding
from weightd.daemon.lending.token import own_token
from weightd.ipc import trust


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "run"
    folder.mkdir(0o750)
    own_token(folder)
    monkeypatch.setenv("WEIGHTD_RUNTIME_DIR", str(folder))
    monkeypatch.delenv("WEIGHTD_LISTEN", raising=False)
    return folder


def found() -> dict[str, Finding]:
    findings = {finding.what: finding for finding in examine_access()}
    for finding in findings.values():
        assert finding.level == "ok" or finding.remedy, finding
    return findings


def test_a_folder_a_port_and_a_token_as_they_should_be_are_well(folder: Path) -> None:
    findings = found()
    assert [finding.level for finding in findings.values()] == ["ok", "ok", "ok"]
    assert f"{folder}, uid {os.geteuid()}, mode 750" in findings["runtime directory"].found
    assert "every user of the machine may read" in findings["TCP port"].found


def test_a_folder_that_clients_do_not_believe_is_named_with_what_to_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.chmod(0o777)
    finding = found()["runtime directory"]
    assert (finding.level, "mode 777" in finding.found) == ("error", True)
    assert f"chmod go-w {folder}" in finding.remedy
    if os.getuid() == 0:
        os.chown(folder, 1234, 1234)
        finding = found()["runtime directory"]
        assert finding.level == "error"
        assert "WEIGHTD_DAEMON_UID=1234" in finding.remedy
    monkeypatch.setenv("WEIGHTD_DAEMON_UID", "1234")
    finding = found()["runtime directory"]
    assert finding.level == "ok"
    assert "uid 0, 1234 " in finding.found or os.getuid()


def test_a_token_that_others_may_know_is_an_error(folder: Path) -> None:
    token = folder / "token"
    token.chmod(0o640)
    finding = found()["token"]
    assert (finding.level, "mode 640" in finding.found) == ("error", True)
    assert "weightd reload" in finding.remedy
    token.unlink()
    assert found()["token"].level == "warning"
    token.symlink_to(folder)
    assert found()["token"].level == "error"


def test_a_port_is_as_open_as_its_token_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTD_LISTEN", "0.0.0.0:7400")
    monkeypatch.setenv("WEIGHTD_TOKEN", "s3cret")
    findings = found()
    assert "whoever shows WEIGHTD_TOKEN" in findings["TCP port"].found
    assert "token" not in findings
    monkeypatch.setenv("WEIGHTD_LISTEN", "")
    assert "none" in found()["TCP port"].found


def test_a_stranger_at_the_port_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("WEIGHTD_LISTEN", f"127.0.0.1:{listener.getsockname()[1]}")
        assert found()["TCP port"].level == "ok"
        monkeypatch.setattr(trust, "trusted", lambda: frozenset({os.getuid() + 1}))
        finding = found()["TCP port"]
    assert (finding.level, f"uid {os.getuid()} listens" in finding.found) == ("error", True)


def test_the_s3_endpoint_is_for_host_memory_and_says_for_whom_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "S3 endpoint" not in found()
    monkeypatch.setenv("WEIGHTD_S3_LISTEN", "127.0.0.1:7404")
    assert found()["S3 endpoint"].level == "ok"
    assert "every user of the machine" in found()["S3 endpoint"].found
    monkeypatch.setenv("WEIGHTD_S3_ACCESS_KEY", "engine")
    monkeypatch.setenv("WEIGHTD_S3_SECRET_KEY", "secret")
    assert "whoever signs" in found()["S3 endpoint"].found
    monkeypatch.setenv("WEIGHTD_S3_DEVICE", "cuda:0")
    assert (found()["S3 endpoint"].level, "WEIGHTD_S3_DEVICE=cpu" in str(found()["S3 endpoint"])) == ("warning", True)
