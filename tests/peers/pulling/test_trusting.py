"""What is believed of peers, and of whom: digests that are expected, the origin's own bytes, certificates."""

from __future__ import annotations

import datetime
import ipaddress
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.numpy import load_file, save_file

from tests.checkpoint_files import INDEX
from tests.fault_proxy import FaultProxy, Request
from tests.peers.fleet import Fleet, Start, from_peers, same, serve_events, weight_bytes
from tests.servers import Daemon, SeaweedFS, free_ports, until


@pytest.fixture
def forged(folder: Path, tmp_path: Path) -> Path:
    """The same checkpoint with other values: same names, shapes and sizes."""
    for file in folder.glob("*.safetensors"):
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, tmp_path / file.name)
    for name in ("config.json", INDEX):
        shutil.copy(folder / name, tmp_path)
    return tmp_path


class Impostor:
    """A daemon that has a forged checkpoint and serves it under the key of the true one, digests and all."""

    def __init__(self, start: Start, s3: SeaweedFS, forged: Path, uri: str, env: dict[str, str]) -> None:
        (port,) = free_ports(1)
        self.daemon = start(env={**env, "WEIGHTD_PEER_LISTEN": f"127.0.0.1:{port}"})
        self._inner = f"http://127.0.0.1:{port}"
        self.record = self.daemon.stage(s3.upload(forged, "peers-forged"))
        self.hold: Callable[[], object] = lambda: None
        """Called before it answers."""
        self._server = serve_events(self._answer)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    def _answer(self, path: str) -> Any:
        self.hold()
        query = path.partition("?")[2]
        own = f"{self._inner}/peer/v1/stages/{self.record['key']}?{query}"
        with httpx.stream("GET", own, headers={"Authorization": "Bearer fleet"}, timeout=60) as answer:
            yield from answer.iter_raw()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def base(origin: FaultProxy, s3: SeaweedFS) -> dict[str, str]:
    own = {"UCX_TLS": "tcp", "WEIGHTD_PEER_TOKEN": "fleet", "WEIGHTD_EXTENT": "1MiB"}
    return {**s3.env, "AWS_ENDPOINT_URL": origin.url, **own}


@pytest.mark.parametrize("known", [False, True])
def test_what_an_expected_digest_tells_apart_comes_from_the_origin_after_all(
    known: bool, origin: FaultProxy, s3: SeaweedFS, start_daemon: Start, folder: Path, forged: Path
) -> None:
    """Also where the leaves of the expected digest are not known, so that it shows only at the end."""
    uri = s3.upload(folder, "peers-expected")
    env = base(origin, s3)
    truth = start_daemon(env=env).stage(uri)
    impostor = Impostor(start_daemon, s3, forged, uri, env)
    try:
        fooled = start_daemon(env={**env, "WEIGHTD_PEERS": f"static:{impostor.address}"})
        if known:
            fooled.client.remove(fooled.stage(uri, sources=["origin"])["id"])
        record = fooled.stage(uri, expect_digest=truth["checkpoint_digest"])
        assert (record["state"], record["error"]) == ("ready", None)
        assert record["checkpoint_digest"] == truth["checkpoint_digest"]
        assert same(fooled, record["id"], folder)
        if known:
            (peer,) = record["peers"]
            assert "not the expected bytes" in peer["given_up"]
    finally:
        impostor.close()


def test_an_expected_digest_is_met_by_peers(
    fleet: Callable[[int], Fleet], origin: FaultProxy, s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "peers-met")
    both = fleet(2)
    first, second = both.start(), both.start()
    digest = first.stage(uri)["checkpoint_digest"]
    read = weight_bytes(origin)
    record = second.stage(uri, expect_digest=digest)
    assert (record["state"], record["checkpoint_digest"]) == ("ready", digest)
    assert weight_bytes(origin) == read
    assert record["bytes_by_source"]["peer"] == record["bytes_total"]


@pytest.mark.parametrize("late", ["the impostor", "the origin"])
def test_a_peer_that_the_origins_bytes_contradict_loses_all_that_it_brought(
    late: str, origin: FaultProxy, s3: SeaweedFS, start_daemon: Start, folder: Path, forged: Path
) -> None:
    """Its bytes and digests go together, so that only what this node has read itself tells."""
    uri = s3.upload(folder, "peers-contradicted")
    env = base(origin, s3)
    impostor = Impostor(start_daemon, s3, forged, uri, env)
    before = weight_bytes(origin)
    impostor.hold = lambda: until(lambda: weight_bytes(origin) > before, "the origin is read")
    try:
        peers = {"WEIGHTD_PEERS": f"static:{impostor.address}", "WEIGHTD_PEER_STALL": "3"}
        fooled = start_daemon(env={**env, **peers})
        passed: list[Request] = []
        passes = threading.Event()

        def watch() -> None:
            """One that asks, however many wait."""
            if late == "the origin":
                until(lambda: from_peers(fooled), "the impostor has brought something")
            else:
                until(lambda: 'reason="wrong_bytes"' in fooled.get("/metrics"), "the impostor is seen through")
            passes.set()

        def hold_back(request: Request) -> None:
            """All but the first range of the origin come after the impostor was seen through, or has brought some."""
            if request.nbytes > 300_000:
                passed.append(request)
                if late == "the origin" or len(passed) > 1:
                    passes.wait(120)

        threading.Thread(target=watch, daemon=True).start()
        origin.fault = hold_back
        record = fooled.stage(uri)
        assert (record["state"], record["error"]) == ("ready", None)
        assert same(fooled, record["id"], folder)
        (peer,) = record["peers"]
        assert "not the digest that the origin's bytes have" in peer["given_up"]
        assert record["bytes_by_source"]["peer"] == 0
        assert 'reason="wrong_bytes"' in fooled.get("/metrics")
    finally:
        impostor.close()


def test_a_node_without_a_way_to_the_origin_may_trust_peers(
    fleet: Callable[[int], Fleet], origin: FaultProxy, s3: SeaweedFS, folder: Path
) -> None:
    uri = s3.upload(folder, "peers-trusted")
    three = fleet(3)
    away = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "WEIGHTD_RETRY_DEADLINE": "3"}
    first, trusting, wary = three.start(), three.start(WEIGHTD_PEER_TRUST="true", **away), three.start(**away)
    truth = first.stage(uri)
    record = trusting.stage(uri)
    assert (record["state"], record["error"]) == ("ready", None)
    assert record["bytes_by_source"]["peer"] == record["bytes_total"]
    assert same(trusting, record["id"], folder)
    assert (Path(record["metadata"]) / "config.json").read_text() == "{}"
    assert wary.stage(uri)["error"]["code"] == "source_failed"
    told = wary.stage(uri, expect_digest=truth["checkpoint_digest"])
    assert (told["state"], told["checkpoint_digest"]) == ("ready", truth["checkpoint_digest"])
    wrong = wary.stage(uri, expect_digest="xxh3:" + "0" * 32)
    assert wrong["state"] == "failed"
    other = trusting.stage("s3://models/nobody-has-this")
    assert other["error"]["code"] == "source_failed"
    assert "no peer has it" in other["error"]["message"]


# ---------------------------------------------------------------------- mutual TLS


class Authority:
    """Makes certificates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, folder.name)])
        certificate = self._builder(self._name, self._key).add_extension(x509.BasicConstraints(True, None), True)
        signed = certificate.sign(self._key, hashes.SHA256())
        (folder / "ca.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder(self._name, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    def settings(self, name: str) -> dict[str, str]:
        """A node's certificate, as settings."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("192.0.2.1"))])
        signed = self._builder(subject, key).add_extension(address, False).sign(self._key, hashes.SHA256())
        (self.folder / f"{name}.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        (self.folder / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return {
            "WEIGHTD_PEER_TLS_CERT": str(self.folder / f"{name}.pem"),
            "WEIGHTD_PEER_TLS_KEY": str(self.folder / f"{name}.key"),
            "WEIGHTD_PEER_TLS_CA": str(self.folder / "ca.pem"),
        }


def test_only_who_shows_the_fleets_certificate_reads(
    fleet: Callable[[int], Fleet], origin: FaultProxy, s3: SeaweedFS, folder: Path, tmp_path: Path
) -> None:
    uri = s3.upload(folder, "peers-tls")
    ours, others = Authority(tmp_path / "ours"), Authority(tmp_path / "others")
    three = fleet(3)
    first = three.start(WEIGHTD_PEER_TOKEN="", **ours.settings("first"))
    second = three.start(WEIGHTD_PEER_TOKEN="", **ours.settings("second"))
    stranger = three.start(WEIGHTD_PEER_TOKEN="", **others.settings("stranger"))
    truth = first.stage(uri)
    record = second.stage(uri)
    assert record["bytes_by_source"]["peer"] == record["bytes_total"]
    assert from_peers(second)
    assert stranger.stage(uri)["state"] == "ready"
    assert from_peers(stranger) == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{three.addresses[0]}/peer/v1/stages")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"https://{three.addresses[0]}/peer/v1/stages", verify=False)
    assert truth["state"] == "ready"


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"WEIGHTD_PEER_LISTEN": "0.0.0.0:7999"}, "WEIGHTD_PEER_TOKEN"),
        ({"WEIGHTD_PEER_TLS_CERT": __file__}, "WEIGHTD_PEER_TLS_KEY is missing"),
        ({"WEIGHTD_PEER_TLS_CERT": "/nowhere"}, "peer_tls_cert"),
        ({"WEIGHTD_PEER_ADDRESS": "0.0.0.0:1"}, "no address that one can connect to"),
    ],
)
def test_a_port_for_everybody_and_half_a_certificate_are_refused(
    env: dict[str, str], words: str, start_daemon: Start
) -> None:
    with pytest.raises(RuntimeError, match=words):
        start_daemon(env=env)


def test_names_are_of_one_spelling(start_daemon: Start) -> None:
    daemon = start_daemon(env={"WEIGHTD_PEER_LISTEN": "[::1]:17402", "WEIGHTD_PEER_ADDRESS": "[0:0:0:0:0:0:0:1]:17402"})
    assert daemon.client.node()["peers"] == {"state": "ok", "reason": None, "address": "[::1]:17402"}
    assert daemon.client.peers()["off"] is None


def test_where_nixl_does_not_work_peers_are_off_and_that_is_said(start_daemon: Start, folder: Path) -> None:
    (port,) = free_ports(1)
    daemon: Daemon = start_daemon(env={"WEIGHTD_PEER_LISTEN": f"127.0.0.1:{port}", "UCX_TLS": "nonsense"})
    until(lambda: daemon.client.node()["peers"]["state"] == "off", "its self-test has failed")
    assert "UCX_TLS" in daemon.client.node()["peers"]["reason"]
    assert daemon.stage(str(folder))["state"] == "ready"
    answer = httpx.get(f"http://127.0.0.1:{port}/peer/v1/stages/{'0' * 32}", params={"format": 1})
    assert (answer.status_code, answer.json()["code"]) == (503, "peers_off")
