"""What the chart tells containers to run, run here: its manifests' scripts, and its variables with real servers."""

from __future__ import annotations

import base64
import http.server
import json
import os
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.chart.cases import SINGLE, rendered
from tests.chart.helm import CHART, manifests
from tests.chart.manifests import container, env_of, find, is_tracing, pod_spec
from tests.checkpoint_files import write_checkpoint
from tests.conftest import command, lacking
from tests.servers import Daemon, Missing, SeaweedFS, free_ports, until

ENGINE = """
import os, signal
from weightd.ipc import attach
weights = attach(os.environ["MODEL"], timeout=120)
with open(os.environ["STARTED"], "a") as log:
    log.write(f"{os.getpid()} {weights.digest}\\n")
signal.pause()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {f"layer.{i}": ("U8", (1 << 20,), bytes([i]) * (1 << 20)) for i in range(8)}
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), {"model.safetensors": tensors})
    (folder / "config.json").write_text("{}")
    return folder


# ---------------------------------------------------------------------- one container


class Supervised:
    """The container of ``gpu.sharing: singleContainer``: its shell, the keeper, the daemon and an engine."""

    def __init__(self, folder: Path, model: Path, *, wait: bool) -> None:
        engine = container(manifests({**SINGLE, "startup": {"wait": wait}}), "engine")
        weightd = folder / "bin" / "weightd"
        weightd.parent.mkdir()
        weightd.write_text(f'#!/bin/sh\nexec {sys.executable} -m weightd.daemon.cli "$@"\n')
        weightd.chmod(0o755)
        (folder / "engine.py").write_text(ENGINE)
        self.started = folder / "started"
        self.runtime_dir = folder / "run"
        self.log = folder / "log"
        env = {
            "PATH": f"{weightd.parent}:{os.environ['PATH']}",
            "WEIGHTD_RUNTIME_DIR": str(self.runtime_dir),
            "WEIGHTD_CACHE_DIR": str(folder / "cache"),
            "WEIGHTD_LISTEN": "",
            "WEIGHTD_PRELOAD": json.dumps([{"model": str(model)}]),
            "MODEL": str(model),
            "STARTED": str(self.started),
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*engine["command"], sys.executable, str(folder / "engine.py")],
                env={**os.environ, **env}, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def engines(self) -> list[tuple[int, str]]:
        """The engines that have attached so far: pid and what they found."""
        lines = self.started.read_text().splitlines() if self.started.exists() else []
        return [(int(pid), digest) for pid, digest in map(str.split, lines)]

    def keeper(self) -> int:
        pid: int = json.loads((self.runtime_dir / "keeper.json").read_text())["pid"]
        return pid

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Callable[..., Supervised]]:
    running: list[Supervised] = []

    def start(model: Path, *, wait: bool) -> Supervised:
        running.append(Supervised(tmp_path, model, wait=wait))
        return running[-1]

    yield start
    for each in running:
        each.end()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()


def test_an_engine_that_dies_in_the_common_container_finds_its_weights_again(
    supervised: Callable[..., Supervised], model: Path
) -> None:
    running = supervised(model, wait=False)
    first = until(lambda: running.engines(), "an engine has attached", deadline=120)[0]
    keeper = running.keeper()
    os.kill(first[0], signal.SIGKILL)
    until(lambda: len(running.engines()) == 2, "it was started again", deadline=120)
    second = running.engines()[1]
    assert second[1] == first[1]
    assert running.keeper() == keeper, "weightd has not been restarted"
    assert "exit code 137" in running.log.read_text()
    # Kubernetes ends a container by its first process.
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(120) == 0
    until(lambda: gone(second[0]) and gone(keeper), "engine and keeper have ended", deadline=120)


def test_the_common_container_waits_for_what_is_preloaded_and_ends_with_weightd(
    supervised: Callable[..., Supervised], model: Path, tmp_path: Path
) -> None:
    later = tmp_path / "later"
    running = supervised(later, wait=True)
    until(lambda: "preload" in running.log.read_text(), "there is no such model", deadline=120)
    assert not running.engines()
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy").rename(later)
    (engine, _) = until(lambda: running.engines(), "an engine has attached", deadline=120)[0]
    os.kill(running.keeper(), signal.SIGKILL)
    assert running.process.wait(120) == 128 + signal.SIGKILL
    until(lambda: gone(engine), "the engine has ended", deadline=120)


# ---------------------------------------------------------------------- init containers and the example


def test_the_shim_is_all_that_an_engine_has_to_import(tmp_path: Path) -> None:
    place = f"/opt/{tmp_path.name}"
    script = container(manifests({"shim": {"path": place}}), "weightd-shim")["command"]
    assert script[:2] == ["python3", "-c"]
    subprocess.run([sys.executable, "-c", script[2].replace(place, str(tmp_path))], check=True)
    subprocess.run(
        [sys.executable, "-c", script[2].replace(place, str(tmp_path))], check=True
    )  # the Pod's second start
    (only,) = (tmp_path / "weightd").iterdir()
    assert only.name == "ipc"
    found = subprocess.run(
        [sys.executable, "-c", "import weightd.ipc as ipc; print(ipc.__file__, ipc.attach.__name__)"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert found.split() == [str(only / "__init__.py"), "attach"]
    listed = "from importlib.metadata import entry_points as e; print(*(p.value for g in GROUPS for p in e(group=g)))"
    plugins = subprocess.run(
        [sys.executable, "-S", "-c", f"GROUPS = ('vllm.general_plugins', 'sglang.srt.plugins'); {listed}"],
        env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert plugins.split() == [f"weightd.ipc.engines.plugins:{engine}" for engine in ("vllm", "sglang")]


def test_an_engine_is_not_held_up_by_what_cannot_be_traced(tmp_path: Path) -> None:
    values = {"engine": {"model": "s3://models/x"}, "trace": {"enabled": True, "processor": "cuda 9.0"}}
    tracer = container(manifests(values), "weightd-trace-0")
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        [*tracer["command"], *tracer["args"]],
        env={**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "this has to run in vllm's own image" in done.stderr
    assert "ended with exit code 1; the engine starts without it" in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="being the first process of a namespace takes root")
def test_where_all_is_traced_the_pod_stays_and_ends_when_it_is_told_to() -> None:
    (tracing,) = (
        document
        for document in rendered("layouts ahead on nodes")
        if document["kind"] == "DaemonSet" and is_tracing(document)
    )
    (traced,) = pod_spec(tracing)["containers"]
    assert traced["command"][0] == "python3"
    alone = [command("unshare", "apt-get install util-linux"), "--pid", "--fork"]
    process = subprocess.Popen([*alone, sys.executable, *traced["command"][1:]], start_new_session=True)

    def told() -> bool:
        # Until it is ready for it nothing comes of it: the first process is sent no signal by default.
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGTERM)
        return process.poll() is not None

    try:
        until(told, "it has ended", deadline=120)
        assert process.returncode == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_preparing_the_nodes_folders_takes_the_capability_to_chown_and_no_other(tmp_path: Path) -> None:
    script = container(manifests({"mode": "node"}), "prepare")["command"]
    folders = [tmp_path / "run", tmp_path / "cache"]
    for folder in folders:
        folder.mkdir(mode=0o755)
    uid, alone = os.getuid(), []
    if uid == 0:
        uid = 65532
        alone = [command("setpriv", "apt-get install util-linux"), "--bounding-set=-all,+chown", "--inh-caps=-all"]
    for _ in range(2):  # a second Pod finds them as the first has left them
        arguments = [str(uid), str(uid), *map(str, folders)]
        subprocess.run([*alone, sys.executable, "-c", script[2], *arguments], check=True)
    if alone:
        assert [folder.stat().st_uid for folder in folders] == [uid, uid]
        assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [0o750, 0o755]


def test_the_example_of_a_consumer_attaches(daemon: Daemon, model: Path) -> None:
    consumer = yaml.safe_load((CHART / "examples" / "consumer.yaml").read_text())
    (engine,) = consumer["spec"]["containers"]
    assert engine["command"][:2] == ["python3", "-c"]
    env = {"MODEL": str(model), "WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)}
    output = subprocess.run(
        [sys.executable, "-c", engine["command"][2]],
        env={**os.environ, **env}, check=True, capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    assert output.startswith("8 tensors, xxh3:")


@pytest.mark.skipif(os.getuid() != 0, reason="becoming other users takes root")
def test_an_engine_of_any_user_is_let_in_by_the_pods_group_and_reads_the_metadata(model: Path) -> None:
    setpriv = command("setpriv", "apt-get install util-linux")
    group = 4711  # the Pod's fsGroup

    def user(uid: int, *groups: int) -> list[str]:
        # Virtual environments may lie where other users cannot look; this helps nobody to write to a socket.
        look = "-all,+dac_read_search"
        ids = [f"--reuid={uid}", f"--regid={uid}", f"--groups={','.join(map(str, (uid, *groups)))}"]
        return [setpriv, *ids, f"--bounding-set={look}", f"--inh-caps={look}", f"--ambient-caps={look}"]

    folder = Path(tempfile.mkdtemp())  # pytest's own are root's alone
    try:
        folder.chmod(0o755)
        shutil.copytree(model, folder / "model")
        for volume in ("run", "cache"):  # as the kubelet makes an emptyDir in a Pod with an fsGroup
            (folder / volume).mkdir()
            os.chown(folder / volume, 0, group)
            (folder / volume).chmod(0o2777)
        (folder / "log").touch(mode=0o666)
        with Daemon(folder, command=user(65532, group)) as daemon:
            script = (
                "import os; from weightd.ipc import attach; print(os.listdir(attach(os.environ['MODEL']).metadata))"
            )
            env = {**os.environ, "MODEL": str(folder / "model"), "WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)}
            env["WEIGHTD_DAEMON_UID"] = env_of(container(manifests(), "engine"))["WEIGHTD_DAEMON_UID"]

            def engine(*groups: int) -> subprocess.CompletedProcess[str]:
                arguments = [*user(1234, *groups), sys.executable, "-c", script]
                return subprocess.run(arguments, env=env, capture_output=True, text=True, check=False)

            assert "config.json" in engine(group).stdout
            (metadata,) = (daemon.cache_dir / "checkpoints").iterdir()
            for path in (metadata / "config.json", metadata, *metadata.parents):
                assert path.stat().st_mode & 0o004, "others, too, may read it"
            refused = engine()
            assert refused.returncode
            assert "Permission denied" in refused.stderr
    finally:
        shutil.rmtree(folder)


# ---------------------------------------------------------------------- a private authority


class SecureSeaweedFS(SeaweedFS):
    """An S3 server over TLS, whose certificate is of an authority of its own, ``ca.pem`` in its folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        openssl = command("openssl", "apt-get install openssl")
        (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
        new = ["-newkey", "rsa:2048", "-nodes", "-days", "2"]
        for arguments in (
            ["req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=an authority of its own"],
            ["req", *new[:3], "-keyout", "key.pem", "-out", "request.pem", "-subj", "/CN=localhost"],
            ["x509", "-req", "-in", "request.pem", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
             "-extfile", "names", "-out", "cert.pem"],
        ):  # fmt: skip
            subprocess.run([openssl, *arguments], cwd=folder, check=True, capture_output=True)
        self.ca = folder / "ca.pem"
        self.tls = ssl.create_default_context(cafile=str(self.ca))
        self.url = self.url.replace("http://127.0.0.1", "https://localhost")
        self._command += [f"-s3.cert.file={folder / 'cert.pem'}", f"-s3.key.file={folder / 'key.pem'}"]

    def ready(self) -> bool:
        try:
            return httpx.put(f"{self.url}/models", timeout=5, verify=self.tls).status_code in (200, 409)
        except httpx.TransportError:
            return False

    def upload(self, folder: Path, prefix: str) -> str:
        for path in folder.iterdir():
            url = f"{self.url}/models/{prefix}/{path.name}"
            httpx.put(url, content=path.read_bytes(), verify=self.tls, timeout=120).raise_for_status()
        return f"s3://models/{prefix}"


def test_the_charts_variables_make_a_daemon_that_reads_from_that_store_and_answers_probes_and_prometheus(
    tmp_path: Path, model: Path, start_daemon: Callable[..., Daemon]
) -> None:
    try:
        server = SecureSeaweedFS(tmp_path / "s3")
    except Missing as error:
        lacking(str(error))
    health, metrics = free_ports(2)
    documents = manifests(
        {"ports": {"health": health, "metrics": metrics}, "preload": [{"model": "s3://models/x"}],
         "metrics": {"podMonitor": {"enabled": True}},
         "credentials": {"s3": {"existingSecret": "s3", "endpoint": server.url}, "caBundle": {"configMap": "ca"}}}
    )  # fmt: skip
    weightd = container(documents, "weightd")
    variables: dict[str, Any] = env_of(weightd)
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    elsewhere = {"WEIGHTD_RUNTIME_DIR", "WEIGHTD_CACHE_DIR", "HF_HOME", "CUPY_CACHE_DIR", "CUDA_CACHE_PATH"}
    env = {
        name: text.replace(variables["AWS_CA_BUNDLE"], str(server.ca))
        for name, text in {**variables, **keys}.items()
        if isinstance(text, str) and name not in elsewhere
    }
    # Obstore, which lists, and the streamer, which reads weights, each go by a variable of its own.
    assert list(env.values()).count(str(server.ca)) == 2
    numbers = {port["name"]: port["containerPort"] for port in weightd["ports"]}

    def asked(probe: str) -> httpx.Response:
        question = weightd[probe]["httpGet"]
        return httpx.get(f"http://127.0.0.1:{numbers[question['port']]}{question['path']}", timeout=30)

    with server:
        start_daemon(env=env)
        assert asked("livenessProbe").status_code == 200
        assert asked("startupProbe").status_code == 503, "the bucket is empty"
        server.upload(model, "x")
        until(lambda: asked("startupProbe").status_code == 200, "what is preloaded is ready", deadline=120)
    (endpoint,) = find(documents, "PodMonitor")["spec"]["podMetricsEndpoints"]
    scraped = httpx.get(f"http://127.0.0.1:{numbers[endpoint['port']]}/metrics", timeout=30)
    assert "weightd_" in scraped.text
    for port in (health, metrics):
        assert httpx.get(f"http://127.0.0.1:{port}/v1/stage", timeout=30).status_code == 404


# ---------------------------------------------------------------------- an upgrade


class _Cluster(http.server.BaseHTTPRequestHandler):
    """As much of a cluster's API as helm asks to render: it has one Secret, whatever its name."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        owner = {"meta.helm.sh/release-name": "llama", "meta.helm.sh/release-namespace": "models"}
        metadata = {"labels": {"app.kubernetes.io/managed-by": "Helm"}, "annotations": owner, "namespace": "models"}
        known = {"name": "secrets", "singularName": "secret", "namespaced": True, "kind": "Secret", "verbs": ["get"]}
        answers: dict[str, dict[str, Any]] = {
            "/version": {"major": "1", "minor": "37", "gitVersion": "v1.37.0"},
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
            "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [known]},
        }
        if "/namespaces/models/secrets/" in path:
            metadata["name"] = path.rpartition("/")[2]
            token = base64.b64encode(b"made long ago").decode()
            answers[path] = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": {"token": token}}
        body = json.dumps(answers.get(path, {"kind": "Status", "status": "Failure", "code": 404})).encode()
        self.send_response(200 if path in answers else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_an_upgrade_keeps_the_token_that_the_installation_has_made() -> None:
    # No Pods and Services, of which the server would have to know more; the token is made as it always is.
    etcd = {"directory": "etcd", "etcd": {"endpoints": ["http://etcd:2379"]}}
    values = {
        "engine": {"enabled": False}, "gpu": {"sharing": "none"}, "serviceAccount": {"create": False},
        "peers": {"enabled": True, **etcd},
    }  # fmt: skip
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Cluster) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        arguments = ["--dry-run=server", "--disable-openapi-validation"]
        there = ["--kube-apiserver", f"http://127.0.0.1:{server.server_port}"]
        (secret,) = manifests(values, arguments=[*arguments, *there])
        server.shutdown()
    assert base64.b64decode(secret["data"]["token"]) == b"made long ago"
    (secret,) = manifests(values)
    assert len(base64.b64decode(secret["data"]["token"])) == 48
