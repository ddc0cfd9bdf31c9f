"""Peers that find each other in a real etcd: who is there, what they have, and as whom they log in."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
import sys
import time
from base64 import b64encode
from pathlib import Path

import httpx
import pytest

from tests.conftest import command
from tests.peers.finding.directories import DEADLINE, addresses, eventually, opened, stages
from tests.peers.finding.etcd import Etcd, b64, entry
from tests.servers import Server
from weightd.daemon.peers.finding import directory as directory_module
from weightd.daemon.peers.finding import etcd as etcd_directory
from weightd.daemon.peers.finding.directory import Member


def test_daemons_find_each_other_and_what_they_have_in_etcd(etcd: Etcd) -> None:
    async def check() -> None:
        async with opened(f"etcd:{etcd.url}", "a", "127.0.0.1:1001") as a:
            assert "not connected yet" in a.status()
            async with opened(f"etcd:{etcd.url}", "b", "[::1]:1002") as b:
                await eventually(lambda: a.members() and b.members(), "both know each other")
                assert list(a.members()) == [Member("b", "[::1]:1002", {})]
                await eventually(lambda: a.status() == b.status() == "ok", "all is well")
                await b.publish({"xxh3:1/tp0": 0.259, "xxh3:2": 1.0, "xxh3:3": 0.999})
                await eventually(lambda: stages(a, "b"), "a knows what b has")
                assert stages(a, "b") == {"xxh3:1/tp0": 0.25, "xxh3:2": 1.0, "xxh3:3": 0.99}
                await b.publish({})
                await eventually(lambda: stages(a, "b") == {}, "b has nothing any more")
            await eventually(lambda: not a.members(), "b has withdrawn", deadline=5)
            assert len(etcd.entries()) == 1

    asyncio.run(check())


def test_changes_wake_the_one_who_waits(etcd: Etcd) -> None:
    async def check() -> None:
        async with opened(f"etcd:{etcd.url}") as directory:
            await eventually(lambda: directory.status() == "ok", "connected")
            assert not await directory.changed(0.05)
            waiting = asyncio.create_task(directory.changed(DEADLINE))
            await asyncio.to_thread(etcd.put, *entry("b", "h:1"))
            assert await waiting
            assert addresses(directory) == ["h:1"]
            await asyncio.to_thread(etcd.put, *entry("b", "h:1"))
            await asyncio.to_thread(etcd.put, *entry("c", "h:2"))
            assert await directory.changed(DEADLINE)
            await eventually(lambda: addresses(directory) == ["h:1", "h:2"], "c is known")
            assert not await directory.changed(0.05), "writing the same again is no change, and each is told once"

    asyncio.run(check())


_A_DAEMON = """
import asyncio, sys
from weightd.daemon.peers.finding import etcd
from weightd.daemon.peers.finding.directory import open_directory
etcd.TTL, etcd.KEEPALIVE = 3, 1.0
async def main():
    directory = open_directory("etcd:" + sys.argv[1], node="doomed", address="127.0.0.1:1")
    await directory.start()
    await directory.publish({"xxh3:1": 1})
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_a_daemon_that_is_killed_vanishes_when_its_lease_ends(etcd: Etcd) -> None:
    async def check(doomed: subprocess.Popen[bytes]) -> None:
        async with opened(f"etcd:{etcd.url}") as directory:
            await eventually(lambda: stages(directory, "doomed"), "it is there")
            while await directory.changed(3.5):  # longer than the lease: it is kept alive
                assert stages(directory, "doomed") == {"xxh3:1": 1.0}
            doomed.kill()
            await eventually(lambda: not directory.members(), "it is gone", deadline=15)

    with subprocess.Popen([sys.executable, "-c", _A_DAEMON, etcd.url]) as doomed:
        try:
            asyncio.run(check(doomed))
        finally:
            doomed.kill()


def test_many_changes_are_few_writes_and_the_last_one_counts(etcd: Etcd) -> None:
    async def check() -> None:
        async with opened(f"etcd:{etcd.url}", "a", "h:1") as a, opened(f"etcd:{etcd.url}", "b", "h:2") as b:
            begin = time.monotonic()
            for done in range(2001):
                await a.publish({"xxh3:1": done / 2000})
                await asyncio.sleep(0.001)
            await eventually(lambda: stages(b, "a") == {"xxh3:1": 1.0}, "the last one")
            writes = int(etcd.entries()["/weightd/peers/a/h:1"]["version"])
            assert writes <= (time.monotonic() - begin) / etcd_directory.BETWEEN_WRITES + 3

    asyncio.run(check())


def test_a_lease_that_was_lost_is_granted_anew(etcd: Etcd, short_lease: None) -> None:
    async def check() -> None:
        async with opened(f"etcd:{etcd.url}", "a", "h:1") as a, opened(f"etcd:{etcd.url}", "b", "h:2") as b:
            await a.publish({"xxh3:1": 1.0})
            await eventually(lambda: stages(b, "a"), "a is known")
            lease = etcd.entries()["/weightd/peers/a/h:1"]["lease"]
            await asyncio.to_thread(etcd, "lease/revoke", ID=lease)
            await eventually(lambda: not b.members(), "it was lost")
            await eventually(lambda: stages(b, "a") == {"xxh3:1": 1.0}, "a is known again")
            assert a.status() == "ok"

    asyncio.run(check())


def test_clusters_under_different_prefixes_do_not_mix(etcd: Etcd) -> None:
    async def check() -> None:
        async with contextlib.AsyncExitStack() as stack:
            found = {}
            for prefix in ["", "/a", "/ab", "/a/b"]:
                for name in ["1", "2"]:
                    node = f"{prefix.replace('/', '-')}{name}"
                    found[prefix, name] = await stack.enter_async_context(
                        opened(f"etcd:{etcd.url}{prefix}", node, f"h:{len(found) + 1}")
                    )
            await eventually(lambda: all(each.members() for each in found.values()), "all have found their peer")
            for (prefix, name), each in found.items():
                other = "2" if name == "1" else "1"
                assert [member.node for member in each.members()] == [f"{prefix.replace('/', '-')}{other}"]

    asyncio.run(check())


def test_more_entries_than_one_answer_holds_are_all_known_up_to_the_limit(
    etcd: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    with httpx.Client() as client:
        for number in range(450):
            key, value = entry(f"n{number:03}", f"h{number:03}:1")
            body = {"key": b64(key), "value": b64encode(value).decode()}
            client.post(f"{etcd.url}/v3/kv/put", json=body).raise_for_status()

    async def check() -> None:
        async with opened(f"etcd:{etcd.url}") as directory:
            await eventually(lambda: directory.status() == "ok", "connected")
            assert addresses(directory) == [f"h{number:03}:1" for number in range(450)]
        monkeypatch.setattr(directory_module, "MAX_MEMBERS", 220)
        monkeypatch.setattr(etcd_directory, "MAX_MEMBERS", 220)
        async with opened(f"etcd:{etcd.url}") as directory:
            await eventually(lambda: directory.status() == "ok", "connected")
            assert len(directory.members()) == 220
            await asyncio.to_thread(etcd.put, *entry("zzz", "zzz:1"))
            await asyncio.to_thread(etcd.put, *entry("n000", "h000:1", {"xxh3:1": 1}))
            await eventually(lambda: stages(directory, "n000"), "a later change is known")
            assert len(directory.members()) == 220

    asyncio.run(check())


def test_a_revision_that_was_compacted_is_no_end_but_a_new_list(etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    etcd.put(*entry("b", "h:2"))
    etcd.put(*entry("c", "h:3"))
    revision = int(etcd("kv/range", key=b64("/"))["header"]["revision"])
    etcd("kv/compaction", revision=revision)
    begun: list[int] = []
    watch = etcd_directory.EtcdDirectory._watch

    async def late(self: etcd_directory.EtcdDirectory, start: int) -> None:
        begun.append(start)
        await watch(self, start if len(begun) > 1 else 1)  # the first time as if it had taken very long to get here

    monkeypatch.setattr(etcd_directory.EtcdDirectory, "_watch", late)

    async def check() -> None:
        async with opened(f"etcd:{etcd.url}") as directory:
            await eventually(lambda: len(begun) > 1 and directory.status() == "ok", "it has begun anew")
            await asyncio.to_thread(etcd.put, *entry("d", "h:4"))
            await eventually(lambda: addresses(directory) == ["h:2", "h:3", "h:4"], "it watches again")

    asyncio.run(check())


def certificates(folder: Path) -> dict[str, Path]:
    """A CA, and a certificate for both ends; without a CN, which etcd's gateway refuses beside users."""
    openssl = command("openssl", "apt-get install openssl")
    folder.mkdir()
    paths = {name: folder / name for name in ["ca.key", "ca.crt", "own.key", "own.csr", "own.crt", "extensions"]}
    paths["extensions"].write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    for arguments in (
        ["req", "-x509", *curve, "-keyout", paths["ca.key"], "-out", paths["ca.crt"], "-subj", "/CN=test CA", "-days",
         "2", "-addext", "keyUsage=critical,keyCertSign"],
        ["req", *curve, "-keyout", paths["own.key"], "-out", paths["own.csr"], "-subj", "/O=etcd"],
        ["x509", "-req", "-in", paths["own.csr"], "-CA", paths["ca.crt"], "-CAkey", paths["ca.key"], "-CAcreateserial",
         "-out", paths["own.crt"], "-days", "2", "-extfile", paths["extensions"]],
    ):  # fmt: skip
        subprocess.run([openssl, *map(str, arguments)], check=True, capture_output=True)
    return paths


def test_tls_and_a_user_come_from_the_variables_of_etcdctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = certificates(tmp_path / "certificates")
    server = Etcd(
        tmp_path / "etcd", "--cert-file", str(files["own.crt"]), "--key-file", str(files["own.key"]),
        "--trusted-ca-file", str(files["ca.crt"]), "--client-cert-auth", scheme="https",
    )  # fmt: skip
    monkeypatch.setenv("ETCDCTL_CACERT", str(files["ca.crt"]))
    monkeypatch.setenv("ETCDCTL_CERT", str(files["own.crt"]))
    monkeypatch.setenv("ETCDCTL_KEY", str(files["own.key"]))
    server.verify = ssl.create_default_context(cafile=str(files["ca.crt"]))
    server.verify.load_cert_chain(files["own.crt"], files["own.key"])

    async def check() -> None:
        async with opened(f"etcd:{server.url}", "a", "h:1") as a:
            await eventually(lambda: a.status() != "ok", "nobody has logged in")
            await eventually(lambda: "not connected yet" not in a.status(), "it was tried")
            monkeypatch.setenv("ETCDCTL_USER", "root:wrong")
            await eventually(lambda: "authentication failed" in a.status(), "the password is wrong")
            monkeypatch.setenv("ETCDCTL_USER", "root:secret:too")
            async with opened(f"etcd:{server.url}", "b", "h:2") as b:
                await eventually(lambda: a.status() == b.status() == "ok" and a.members() and b.members(), "logged in")
                server.kill()  # which forgets who was logged in
                await asyncio.to_thread(Server.start, server)
                await a.publish({"xxh3:1": 1.0})
                await eventually(lambda: stages(b, "a") and a.status() == "ok", "logged in again")
                assert "secret" not in a.status()

    with server:
        server("auth/user/add", name="root", password="secret:too")
        server("auth/role/add", name="root")
        server("auth/user/grant", user="root", role="root")
        server("auth/enable")
        server.ready = lambda: server.process is not None  # type: ignore[method-assign]  # it is no user
        asyncio.run(check())
