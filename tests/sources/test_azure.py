"""Staging from Azure Blob Storage: a real Azurite, over TLS, as the native library takes nothing else.

The library builds the name of the endpoint from the account's and trusts the system's certificates, so daemon and
upload run in a mount namespace of their own, where the name is in /etc/hosts and the test's authority is trusted.
"""

from __future__ import annotations

import base64
import os
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from tests.conftest import command, lacking
from tests.servers import Daemon, Server, free_ports

ACCOUNT = "weightdtest"
KEY = base64.b64encode(b"a key that opens nothing but this").decode()


class Azurite(Server):
    """Azure's own emulator of Blob Storage."""

    def __init__(self, folder: Path, program: str, certificate: Path, key: Path) -> None:
        (self.port,) = free_ports(1)
        super().__init__(
            [program, "--silent", "--skipApiVersionCheck", "--blobHost", "127.0.0.1", "--blobPort", str(self.port),
             "--location", str(folder / "data"), "--cert", str(certificate), "--key", str(key)],
            folder,
            {"AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"},
        )  # fmt: skip

    def ready(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 5) as plain:
                context = ssl.create_default_context()
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                with context.wrap_socket(plain):
                    return True
        except OSError:
            return False


@dataclass
class Azure:
    """Where Azurite is and how to see it: ``command`` puts a process into the namespace."""

    env: dict[str, str]
    command: list[str]


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azure]:
    if os.getuid():
        lacking("Azurite's name and authority need a mount namespace: root")
    for program, how in (("unshare", "apt-get install util-linux"), ("openssl", "apt-get install openssl")):
        command(program, how)
    own = Path(sys.prefix) / "azurite" / "node_modules" / ".bin" / "azurite-blob"
    azurite = str(own) if own.exists() else shutil.which("azurite-blob")
    if not azurite or not shutil.which("node"):
        lacking("Azurite: npm install azurite (make test does, where there is npm)")
    assert azurite
    folder = tmp_path_factory.mktemp("azurite")
    host = f"{ACCOUNT}.blob.azurite.test"

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "rsa:2048", "-nodes")
    openssl(
        "req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test authority"
    )
    openssl("req", *new_key, "-keyout", "key.pem", "-out", "request.pem", "-subj", f"/CN={host}")
    (folder / "names").write_text(f"subjectAltName=DNS:{host}")
    openssl("x509", "-req", "-in", "request.pem", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
            "-extfile", "names", "-out", "cert.pem")  # fmt: skip
    trusted = Path("/etc/ssl/certs/ca-certificates.crt")
    if not trusted.exists():
        lacking(f"{trusted}: apt-get install ca-certificates")
    (folder / "trusted.pem").write_text(trusted.read_text() + (folder / "ca.pem").read_text())
    (folder / "hosts").write_text(Path("/etc/hosts").read_text() + f"\n127.0.0.1 {host}\n")
    script = f'mount --bind {folder}/hosts /etc/hosts && mount --bind {folder}/trusted.pem {trusted} && exec "$@"'
    inside = ["unshare", "--mount", "sh", "-c", script, "sh"]
    with Azurite(folder, azurite, folder / "cert.pem", folder / "key.pem") as server:
        env = {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT_SUFFIX": f"blob.azurite.test:{server.port}",
        }
        yield Azure(env, inside)


UPLOAD = """
import base64, hashlib, hmac, os, sys, httpx, obstore
from email.utils import formatdate
from pathlib import Path
from obstore.store import AzureStore

account, key = os.environ["AZURE_STORAGE_ACCOUNT_NAME"], os.environ["AZURE_STORAGE_ACCOUNT_KEY"]
endpoint = f"https://{account}.{os.environ['AZURE_STORAGE_ENDPOINT_SUFFIX']}"
date = formatdate(usegmt=True)
# obstore makes no containers; the signature is the Shared Key one of the Blob service's REST API.
text = f"PUT" + 12 * chr(10) + f"x-ms-date:{date}\\nx-ms-version:2021-08-06\\n/{account}/models\\nrestype:container"
signature = base64.b64encode(hmac.new(base64.b64decode(key), text.encode(), hashlib.sha256).digest()).decode()
headers = {"x-ms-date": date, "x-ms-version": "2021-08-06", "Authorization": f"SharedKey {account}:{signature}"}
answer = httpx.put(f"{endpoint}/models?restype=container", headers=headers, verify="/etc/ssl/certs/ca-certificates.crt")
assert answer.status_code in (201, 409), answer.text
store = AzureStore("models", endpoint=endpoint)
for path in Path(sys.argv[1]).iterdir():
    obstore.put(store, f"m/{path.name}", path)
"""


def test_a_container_gives_the_same_bytes_and_digest_as_the_disk(
    azure: Azure, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, daemon: Daemon
) -> None:
    rng = numpy.random.default_rng(2)
    tensors = {"w": rng.standard_normal((3000, 1111), numpy.float32)}
    tensors |= {f"b{i}": rng.standard_normal(i + 1, numpy.float32) for i in range(20)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "test"}')
    env = {**os.environ, **azure.env}
    upload = subprocess.run(
        [*azure.command, sys.executable, "-c", UPLOAD, str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert upload.returncode == 0, upload.stderr
    with Daemon(tmp_path_factory.mktemp("azure"), env=azure.env, command=azure.command) as cloud:
        record = cloud.stage("az://models/m")
        assert record["state"] == "ready", record["error"]
        assert record["checkpoint_digest"] == daemon.stage(tmp_path)["checkpoint_digest"]
        with cloud.attach("az://models/m") as weights:
            for name, expected in tensors.items():
                assert bytes(weights.raw(name)) == expected.tobytes()
            assert weights.metadata is not None
            assert (weights.metadata / "config.json").exists()
        missing = cloud.stage("az://models/nothing")
        assert missing["error"]["code"] == "checkpoint_not_found"
