"""The image, built by the Dockerfile's own commands, and run as a cluster runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import jsonschema_rs
import numpy
import pytest
from packaging.utils import canonicalize_name
from safetensors.numpy import save_file

from tests.conftest import command
from tests.image import ROOT
from tests.image.container import Build, Container
from tests.image.dockerfile import Dockerfile
from tests.image.running import Running
from tests.image.sizes import weights
from tests.image.test_locks import LOCKS, lock
from tests.image.tls import Terminator
from tests.node.adopting import ended
from tests.peers.fleet import from_peers, same
from tests.servers import Daemon, SeaweedFS, free_ports, until

USER = "65532"


@pytest.fixture(scope="module")
def image(build: Build) -> Container:
    return build.stage("weightd")


@pytest.fixture(scope="module")
def packages(image: Container) -> Path:
    (found,) = (image.root / "opt" / "weightd").glob("lib/python*/site-packages")
    return found


@pytest.fixture(scope="module")
def model(folder: Path, cuda: str) -> Path:
    """A checkpoint in a folder that is mounted into containers; there it is /model."""
    folder = folder / f"model-{cuda}"
    folder.mkdir()
    rng = numpy.random.default_rng(6)
    small = {f"w{i}": rng.standard_normal((300, 1000 + i), numpy.float32) for i in range(4)}
    large = {"big": rng.standard_normal((2048, 1024), numpy.float32)}
    for number, tensors in enumerate((small, large), 1):
        save_file(tensors, folder / f"model-0000{number}-of-00002.safetensors")
    (folder / "config.json").write_text("{}")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors makes them its writer's alone
    return folder


@pytest.fixture(scope="module")
def https(s3: SeaweedFS, folder: Path, cuda: str) -> Iterator[Terminator]:
    """The object store as companies have theirs: behind an authority of their own."""
    command("openssl", "apt-get install openssl")
    terminator = Terminator(int(s3.url.rpartition(":")[2]), folder / f"tls-{cuda}")
    yield terminator
    terminator.close()


@pytest.fixture(scope="module")
def running(
    image: Container, dockerfile: Dockerfile, s3: SeaweedFS, https: Terminator, folder: Path, model: Path, cuda: str
) -> Iterator[Running]:
    (port,) = free_ports(1)
    env = {
        **s3.env, "AWS_ENDPOINT_URL": https.url, "SSL_CERT_FILE": "/authority/ca.pem", "WEIGHTD_LISTEN": "",
        "WEIGHTD_PEERS": "static:127.0.0.1:1", "WEIGHTD_PEER_TOKEN": "fleet", "UCX_TLS": "tcp",
        "WEIGHTD_PEER_LISTEN": f"127.0.0.1:{port}",
    }  # fmt: skip
    stage = dockerfile.stages["weightd"]
    mounts = {"/model": model, "/authority": https.authority.parent}
    with Running(image, stage, folder / f"running-{cuda}", env=env, mounts=mounts) as daemon:
        yield daemon


def test_a_checkpoint_from_a_folder_and_from_s3_over_tls_is_staged_without_torch(
    running: Running, packages: Path, model: Path, s3: SeaweedFS
) -> None:
    assert not [path for path in packages.iterdir() if re.match(r"torch|google|azure", path.name)]
    local = running.stage("/model")
    assert (local["state"], local["error"]) == ("ready", None)
    remote = running.stage(s3.upload(model, "image"))
    assert (remote["state"], remote["error"]) == ("ready", None)
    assert remote["checkpoint_digest"] == local["checkpoint_digest"]
    assert same(running, remote["id"], model)
    maps = Path(f"/proc/{children(running.keeper_pid)[0]}/maps").read_text()
    assert "libstreamers3.so" in maps
    assert "torch" not in maps


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def status(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}


def test_pid_1_is_the_keeper_and_nobody_in_the_container_is_root(running: Running) -> None:
    keeper = running.keeper_pid
    assert status(keeper)["NSpid"][-1] == "1"
    assert b"weightd.daemon.keeper" in Path(f"/proc/{keeper}/cmdline").read_bytes()
    for pid in (keeper, *children(keeper)):
        assert set(status(pid)["Uid"] + status(pid)["Gid"]) == {USER}
        assert status(pid)["CapBnd"] == ["0" * 16]
    assert {path.name: path.stat().st_uid for path in running.runtime_dir.glob("*.sock")} == {
        "api.sock": int(USER), "lease.sock": int(USER)
    }  # fmt: skip


def test_an_orphan_is_reaped_by_pid_1(running: Running) -> None:
    keeper = running.keeper_pid
    before = set(children(keeper))
    # A shell that leaves a child behind: in the container the child's next parent is PID 1.
    assert running.execute("sh", "-c", "(sleep 0.2; exit 3) & echo started").stdout == "started\n"
    until(lambda: set(children(keeper)) == before, "the orphan has ended and is nobody's zombie")


def test_the_health_check_passes_while_the_daemon_serves_and_fails_without_it(
    running: Running, dockerfile: Dockerfile
) -> None:
    check = json.loads(dockerfile.stages["weightd"].last("HEALTHCHECK").command.removeprefix("CMD"))
    healthy = running.execute(*check)
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    daemon = children(running.keeper_pid)[0]
    os.kill(daemon, signal.SIGSTOP)
    try:
        assert running.execute("env", "WEIGHTD_RUNTIME_DIR=/nowhere", *check).returncode != 0
    finally:
        os.kill(daemon, signal.SIGCONT)


def test_doctor_finds_nothing_that_the_image_lacks(running: Running) -> None:
    done = running.execute("weightd", "doctor", "--json")
    found = {finding["what"]: finding for finding in json.loads(done.stdout)}
    for what in ("keeper", "daemon", "api.sock", "lease.sock", "streamer library", "cache"):
        assert found[what]["level"] == "ok", found[what]
    assert not [finding for finding in found.values() if finding["level"] == "error"], done.stdout


def test_it_gives_peers_what_it_has_and_writes_nowhere_but_to_its_two_folders(
    running: Running, model: Path, s3: SeaweedFS, folder: Path, cuda: str
) -> None:
    record = running.stage(s3.upload(model, "image-peer"))
    address = running.env["WEIGHTD_PEER_LISTEN"]
    env = {**s3.env, "WEIGHTD_PEERS": f"static:{address}", "WEIGHTD_PEER_TOKEN": "fleet", "UCX_TLS": "tcp"}
    with Daemon(folder / f"peer-{cuda}", env=env) as other:
        again = other.stage("s3://models/image-peer", sources=["peer"])
        assert (again["state"], again["error"]) == ("ready", None)
        assert again["checkpoint_digest"] == record["checkpoint_digest"]
        assert from_peers(other) >= record["bytes_total"]
    assert "Read-only file system" in running.execute("touch", "/opt/weightd/x").stderr


def test_an_aws_profile_in_the_home_is_used_and_roles_can_be_assumed(
    running: Running, image: Container, model: Path, s3: SeaweedFS
) -> None:
    uri = s3.upload(model, "image-profile")
    aws = image.root / "home" / "weightd" / ".aws"
    aws.mkdir()
    (aws / "credentials").write_text("[fleet]\naws_access_key_id = any\naws_secret_access_key = any\n")
    # The descriptions of services that boto3 asks for credentials are those that were left to it.
    script = (
        "import boto3; s = boto3.Session(profile_name='fleet', region_name='us-east-1');"
        "print([s.client(name).meta.service_model.service_name for name in ('sts', 'sso', 'sso-oidc', 'signin')]);"
        "from weightd.daemon.sources.object_store import open_source; from weightd.daemon.sources.uris import Allow;"
        f"print([f.name for f in open_source({uri!r}, Allow()).list()])"
    )
    drop = ["env", "--unset=AWS_ACCESS_KEY_ID", "--unset=AWS_SECRET_ACCESS_KEY", "AWS_PROFILE=fleet"]
    done = running.execute(*drop, "python", "-c", script)
    assert done.stdout.splitlines() == [
        "['sts', 'sso', 'sso-oidc', 'signin']",
        "['config.json', 'model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']",
    ], done.stderr  # fmt: skip


def test_the_image_holds_what_its_lock_names_and_misses_only_what_was_cut(
    cuda: str, build: Build, packages: Path
) -> None:
    held = {
        canonicalize_name(found.metadata["Name"]): found.version
        for found in metadata.distributions(path=[str(packages)])
    }
    (own,) = metadata.distributions(name="weightd", path=[str(packages)])
    assert held == {**lock(cuda), "weightd": own.version}
    application = build.stage("application")
    checked = subprocess.run(
        application.command("/build/bin/uv", "pip", "check", "--python", "/opt/weightd/bin/python"),
        env=application.env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = (ROOT / "requirements" / "cut.txt").read_text().splitlines()
    cut = {canonicalize_name(line) for line in lines if line and not line.startswith("#")}
    said = re.findall(r"requires `([\w.-]+).*but it's not installed", checked.stdout + checked.stderr)
    missed = {canonicalize_name(name) for name in said}
    assert "torch" in missed
    assert missed <= cut


def test_the_kernels_of_digests_compile_where_there_is_cuda_and_nothing_of_it_is_there_else(
    cuda: str, running: Running, packages: Path
) -> None:
    if cuda == "none":
        assert not [path for path in packages.iterdir() if re.match(r"cupy|nvidia|cuda", path.name)]
        return
    # For Hopper; no GPU is asked. CuPy's own way there begins with asking which one there is.
    script = (
        "from importlib import resources; from cupy.cuda import compiler; import weightd.daemon.devices.gpu_digests;"
        "source = resources.files('weightd.daemon.devices').joinpath('xxh3.cu').read_text();"
        "print(b'xxh3_lanes' in compiler._NVRTCProgram(source).compile(('-arch=sm_90',))[0])"
    )
    done = running.execute("python", "-c", script)
    assert done.stdout == "True\n", done.stderr


def test_every_library_finds_what_it_is_linked_to_and_every_module_is_compiled(build: Build, packages: Path) -> None:
    (printed,) = build.output["dependencies"]
    assert "nixl" in printed  # of trim.py, which exits where a library is missing
    sources = {path.with_suffix("") for path in packages.rglob("*.py")}
    compiled = {path.parent.parent / path.name.partition(".cpython")[0] for path in packages.rglob("*.pyc")}
    assert packages / "weightd" / "daemon" / "keeper" / "supervisor" in sources
    assert compiled == sources


def test_it_weighs_what_docs_image_md_says(cuda: str, packages: Path) -> None:
    text = (ROOT / "docs" / "image.md").read_text()
    (row,) = re.findall(r"^\| \*\*all\*\* \|(.*)\|$", text, re.MULTILINE)
    said = dict(zip(LOCKS, map(float, row.split("|")), strict=True))[cuda]
    assert weights(packages).total() / 1e6 == pytest.approx(said, rel=0.03), "make image-sizes"


def test_nothing_in_the_image_is_its_users_to_change_but_two_folders_and_the_home(image: Container) -> None:
    owned = subprocess.run(
        ["find", image.root, "(", "-user", USER, "-o", "-perm", "/022", "!", "-type", "l", ")", "-prune", "-print"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    found = {path.removeprefix(str(image.root)) for path in owned}
    assert found <= {"/run/weightd", "/var/cache/weightd", "/home/weightd", "/tmp"}
    passwd = (image.root / "etc" / "passwd").read_text()
    assert re.search(rf"^weightd:x:{USER}:{USER}:.*:/home/weightd:/usr/sbin/nologin$", passwd, re.MULTILINE)


def test_the_sbom_is_valid_and_names_every_package_with_its_version_and_licence(
    cuda: str, build: Build, image: Container, packages: Path
) -> None:
    bom = json.loads((image.root / "usr" / "share" / "sbom" / "weightd.cdx.json").read_text())
    # The schemas that the tool itself comes with; they name each other by their files' names.
    schemas = {
        path.name: json.loads(path.read_text())
        for path in (build.stage("tools").root / "build").glob("lib/python*/site-packages/cyclonedx/schema/_res/*.json")
    }
    named = [(f"http://cyclonedx.org/schema/{name}", schema) for name, schema in schemas.items()]
    registry = jsonschema_rs.Registry([pair for pair in named if "/bom-" not in pair[0]])
    schema = schemas[f"bom-{bom['specVersion']}.SNAPSHOT.schema.json"]
    jsonschema_rs.validator_for(schema, registry=registry).validate(bom)
    assert bom["metadata"]["component"]["name"] == "weightd"
    listed = {canonicalize_name(item["name"]): item for item in bom["components"]}
    assert {name: item["version"] for name, item in listed.items()} == lock(cuda)
    assert all(item["purl"].startswith("pkg:pypi/") for item in listed.values())
    # Where a package does not say by what licence it is, it has the licence's text.
    for name in (name for name, item in listed.items() if not item.get("licenses")):
        (information,) = packages.glob(f"{name.replace('-', '_')}-*.dist-info")
        assert (information / "LICENSE").is_file(), name


def test_a_stop_that_comes_before_the_keeper_is_up_is_not_lost(
    image: Container, dockerfile: Dockerfile, folder: Path, cuda: str
) -> None:
    early = Running(image, dockerfile.stages["weightd"], folder / f"early-{cuda}", env={}, mounts={})
    with early.log.open("ab") as log:
        early.process = process = subprocess.Popen(early._command, env=early.env, stdout=log, stderr=log)

    def held_back() -> bool:
        """From the command's first line on; before that, the interpreter starts."""
        (pid,) = children(process.pid) or (process.pid,)
        is_weightd = Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"/opt/weightd/bin/python")
        return is_weightd and bool(int(status(pid)["SigBlk"][0], 16) & 1 << (signal.SIGTERM - 1))

    try:
        until(held_back, "it holds SIGTERM back")
        os.kill(early.keeper_pid, signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        early.stop()


# The last one: it stops what the others use.
def test_a_killed_daemon_is_followed_by_one_that_adopts_and_sigterm_to_pid_1_ends_it_well(running: Running) -> None:
    record = running.stage("/model")
    os.kill(children(running.keeper_pid)[0], signal.SIGKILL)
    assert ended(running, record["id"])["state"] == "ready"
    assert running.process is not None
    os.kill(running.keeper_pid, signal.SIGTERM)
    assert running.process.wait(20) == 0
    assert not (running.runtime_dir / "keeper.json").exists()
