"""SGLang as it is installed, with the daemon's memory as its parameters: what it holds, and generates, is what it does
with its own loader."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.environment import HERE, beside, environment, python
from tests.engines.models import make
from tests.engines.starting import Engine, ahead
from tests.servers import Daemon, SeaweedFS, free_ports

PROMPTS = [[1, 5, 9, 100 + number] for number in range(3)]
PRIVATE = {"load_format": "private", "log_level": "info"}
SURE = {**PRIVATE, "model_loader_extra_config": json.dumps({"fallback": False})}

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return beside(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture(scope="module")
def truths(folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """(tokens, digests of each rank's parameters and buffers) as SGLang has them by itself."""
    known: dict[str, Any] = {}

    def truth(name: str, tp_size: int = 1, **arguments: Any) -> Any:
        at = f"{name} {tp_size} {sorted(arguments.items())}"
        if at not in known:
            home = tmp_path_factory.mktemp("truth") / "home"
            with Engine("sglang", str(folders(name)), home, PROMPTS, plan(tp_size) | arguments, env_of(tp_size)) as own:
                tokens = own.tokens()
                known[at] = tokens, [own.found(rank)["tensors"] for rank in range(tp_size)]
                assert own.found()["loader"] == "DefaultModelLoader"
        return known[at]

    return truth


def plan(tp_size: int) -> dict[str, Any]:
    return {"tp_size": tp_size}


def env_of(tp_size: int) -> dict[str, str]:
    return {} if tp_size == 1 else {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, range(tp_size)))}


@pytest.fixture
def environ(daemon_of: Daemon, path: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(path), "WEIGHTD_RUNTIME_DIR": str(daemon_of.runtime_dir)}


@pytest.fixture
def daemon_of(start_daemon: Callable[..., Daemon]) -> Iterator[Daemon]:
    return start_daemon()


@pytest.mark.parametrize(
    ("name", "tp_size", "arguments"),
    [("llama", 1, {}), ("llama", 2, {}), ("tied", 1, {}), ("tied", 2, {}), ("moe", 1, {}), ("moe", 2, {}),
     ("even", 1, {"model_impl": "transformers"})],
    ids=lambda value: str(value) if not isinstance(value, dict) else "-".join(value) or "own",
)  # fmt: skip
def test_parameters_are_the_daemons_memory_and_tokens_are_those_of_its_own_loader(
    name: str,
    tp_size: int,
    arguments: dict[str, Any],
    folders: Callable[[str], Path],
    truths: Callable[..., Any],
    daemon_of: Daemon,
    environ: dict[str, str],
    tmp_path: Path,
) -> None:
    tokens, tensors = truths(name, tp_size, **arguments)
    asked = plan(tp_size) | SURE | arguments
    with Engine("sglang", str(folders(name)), tmp_path / "home", PROMPTS, asked, environ | env_of(tp_size)) as engine:
        assert engine.tokens() == tokens
        (stage,) = daemon_of.client.stages()
        assert len(daemon_of.client.leases()) == tp_size
        for rank in range(tp_size):
            found = engine.found(rank)
            assert found["tensors"] == tensors[rank]
            assert found["weights"]["share"] == 1.0
            assert found["weights"]["stage"] == stage["id"]
            assert found["weights"]["preloaded"] == 0  # it came after SGLang had looked how much memory there is
        assert engine.said().count("weightd: the engine loads") == 0
    assert daemon_of.client.leases() == []


def another(about: dict[str, Any]) -> dict[str, Any]:
    """A layout that goes by the key of one that is not it."""
    return {
        "key": about, "entries": [["model.norm.weight", "BF16", [256]]], "boxes": [[[256], [1], [1]]],
        "copies": [[0, 0, 0, 0, 0]], "casts": [], "constants": [],
    }  # fmt: skip


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_an_object_uri_is_served_to_engines_that_cannot_read_it_and_outlives_the_daemon(
    folders: Callable[[str], Path],
    truths: Callable[..., Any],
    s3: SeaweedFS,
    path: Path,
    start_daemon: Callable[..., Daemon],
    tmp_path: Path,
) -> None:
    """A bare ``s3://`` model: recipes made ahead, configuration and weights from the daemon, two engines on them."""
    tokens, (tensors,) = truths("llama")
    uri = s3.upload(folders("llama"), "sglang")
    daemon = start_daemon(env=s3.env)
    environ = {"PYTHONPATH": str(path), "WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)}
    (told,) = ahead("sglang", path, daemon, tmp_path / "ahead", "--model", uri, "--dtype", "bfloat16")
    assert told["opaque"] == []
    assert daemon.client.stages() == []
    with contextlib.ExitStack() as stack:
        engines = []
        for home in ("first", "second"):
            engine = Engine("sglang", uri, tmp_path / home, PROMPTS, {"log_level": "info"}, environ)
            engines.append(stack.enter_context(engine))
            assert engine.tokens() == tokens, engine.said()
            found = engine.found()
            assert found["tensors"] == tensors
            assert found["weights"]["share"] == 1.0
            # What was there before the engine is memory that it misses, and does not need again.
            assert found["weights"]["preloaded"] == (found["weights"]["footprint"] if home == "second" else 0)
        (stage,) = daemon.client.stages()
        assert [layout["key"] for layout in daemon.client.layouts()] == [told["key"]]
        assert len(daemon.client.leases()) == 2

        os.kill(daemon.pid, signal.SIGKILL)
        assert engines[0].ask(PROMPTS) == tokens
        wait_for(lambda: daemon.ready() and len(daemon.client.leases()) == 2)

        # Another model's weights are written to memory that is lent: it becomes this process's own.
        other = make("llama", tmp_path / "other", seed=61)
        assert engines[1].ask(str(other)) != tokens
        assert engines[0].ask(PROMPTS) == tokens
        assert engines[1].ask(str(folders("llama"))) == tokens

        engines[1].kill()
        wait_for(lambda: len(daemon.client.leases()) == 1)
        assert engines[0].ask(PROMPTS) == tokens
    assert daemon.client.leases() == []
    assert [one["state"] for one in daemon.client.stages()] == ["ready"]
    assert daemon.client.stages()[0]["id"] == stage["id"]


@pytest.mark.parametrize("why", ["absent", "refused", "late", "another"])
def test_sglang_loads_by_itself_where_the_daemon_cannot_serve_it(
    why: str,
    folders: Callable[[str], Path],
    truths: Callable[..., Any],
    path: Path,
    start_daemon: Callable[..., Daemon],
    tmp_path: Path,
) -> None:
    tokens, (tensors,) = truths("llama")
    model, options = str(folders("llama")), {}
    environ = {"PYTHONPATH": str(path), "WEIGHTD_RUNTIME_DIR": str(tmp_path / "nobody")}
    daemon = None
    if why != "absent":
        daemon = start_daemon(*(["--capacity", "cpu=1MiB"] if why == "refused" else []))
        environ["WEIGHTD_RUNTIME_DIR"] = str(daemon.runtime_dir)
    if why == "late":
        options["timeout"] = 0.001
    if why == "another":
        assert daemon is not None
        (told,) = ahead("sglang", path, start_daemon(), tmp_path / "ahead", "--model", model, "--dtype", "bfloat16")
        daemon.client.put_layout(told["key"], another(told["about"]))
    asked = {**PRIVATE, "model_loader_extra_config": json.dumps(options)}
    with Engine("sglang", model, tmp_path / "home", PROMPTS, asked, environ) as engine:
        assert engine.tokens() == tokens
        found = engine.found()
        assert found["tensors"] == tensors
        assert found["weights"] is None
        (line,) = (line for line in engine.said().splitlines() if "weightd: the engine loads" in line)
        kind = {"absent": "DaemonUnavailable", "late": "AttachTimeout"}.get(why, "RequestRefused")
        assert kind in line
        assert daemon is None or daemon.client.leases() == []


def test_no_process_of_an_engine_is_lent_what_another_one_loads_itself(
    folders: Callable[[str], Path],
    truths: Callable[..., Any],
    path: Path,
    start_daemon: Callable[..., Daemon],
    tmp_path: Path,
) -> None:
    tokens, tensors = truths("llama", 2)
    model, daemon = str(folders("llama")), start_daemon()
    options = ["--model", model, "--dtype", "bfloat16", "--tp-size", "2"]
    _, second = ahead("sglang", path, start_daemon(), tmp_path / "ahead", *options)
    daemon.client.put_layout(second["key"], another(second["about"]))
    environ = {"PYTHONPATH": str(path), "WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)} | env_of(2)
    with Engine("sglang", model, tmp_path / "home", PROMPTS, plan(2) | PRIVATE, environ) as engine:
        assert engine.tokens() == tokens
        for rank in range(2):
            assert engine.found(rank)["tensors"] == tensors[rank]
            assert engine.found(rank)["weights"] is None
        lines = [line for line in engine.said().splitlines() if "weightd: the engine loads" in line]
        assert len(lines) == 2
        assert all("another one is there" in line for line in lines)
        assert daemon.client.leases() == []


@pytest.mark.parametrize(
    ("options", "said"),
    [({"fallback": False}, "no daemon answers"), ({"mod": "clone"}, "weightd knows no option 'mod'")],
    ids=["alone", "unknown"],
)
def test_an_engine_that_may_not_load_by_itself_ends_with_the_reason(
    options: dict[str, Any], said: str, folders: Callable[[str], Path], path: Path, tmp_path: Path
) -> None:
    environ = {"PYTHONPATH": str(path), "WEIGHTD_RUNTIME_DIR": str(tmp_path / "nobody")}
    asked = {**PRIVATE, "model_loader_extra_config": json.dumps(options)}
    with (
        pytest.raises(AssertionError, match="the engine has ended"),
        Engine("sglang", str(folders("llama")), tmp_path / "home", PROMPTS, asked, environ) as engine,
    ):
        engine.tokens()
    assert said in engine.said()


@pytest.mark.parametrize("mode", ["clone", "stream"])
def test_weights_are_the_engines_own_where_that_is_asked_for(
    mode: str,
    folders: Callable[[str], Path],
    truths: Callable[..., Any],
    environ: dict[str, str],
    tmp_path: Path,
) -> None:
    tokens, (tensors,) = truths("llama")
    asked = {**PRIVATE, "model_loader_extra_config": json.dumps({"fallback": False, "mode": mode})}
    with Engine("sglang", str(folders("llama")), tmp_path / "home", PROMPTS, asked, environ) as engine:
        assert engine.tokens() == tokens
        found = engine.found()
        assert found["tensors"] == tensors
        assert found["loader"] == "WeightdLoader"
        if mode == "stream":
            assert found["weights"] is None
        else:
            assert found["weights"]["share"] == 0.0
            assert found["weights"]["modes"]["clone"] == len(tensors) - 1  # and a buffer that is computed


def test_its_http_server_serves_from_the_daemons_memory(
    folders: Callable[[str], Path],
    truths: Callable[..., Any],
    daemon_of: Daemon,
    environ: dict[str, str],
    tmp_path: Path,
) -> None:
    import httpx

    tokens, _ = truths("llama")
    (port,) = free_ports(1)
    options = [
        "--model-path", str(folders("llama")), "--load-format", "private", "--host", "127.0.0.1", "--port", str(port),
        "--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--grammar-backend",
        "none", "--skip-tokenizer-init", "--disable-cuda-graph", "--disable-radix-cache", "--disable-overlap-schedule",
        "--mem-fraction-static", "0.3", "--max-total-tokens", "2048", "--dtype", "bfloat16", "--skip-server-warmup",
    ]  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [python("sglang"), HERE / "run_sglang.py", "serve", *options],
            env=environment("sglang", tmp_path, []) | environ, cwd=tmp_path, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 600
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health").is_success:
                        break
                assert server.poll() is None, (tmp_path / "log").read_text()[-5000:]
                assert time.monotonic() < deadline
                time.sleep(0.5)
            sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
            said = client.post("/generate", json={"input_ids": PROMPTS[0], "sampling_params": sampling}).json()
            assert said["output_ids"] == tokens[0]
        assert len(daemon_of.client.leases()) == 1
        assert "(100.0%) are the daemon's memory" in (tmp_path / "log").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_an_update_of_weights_that_are_lent_on_a_gpu_is_refused_before_it_writes(path: Path, tmp_path: Path) -> None:
    program = """if True:
        import runpy, sys
        sys.argv = [sys.argv[1], "nothing"]
        runpy.run_path(sys.argv[0], run_name="stubs")
        from types import SimpleNamespace
        import torch
        from weightd.ipc.engines import binding, sglang
        model = torch.nn.Linear(1, 1)
        updater = SimpleNamespace(get_model=lambda: model)
        write = lambda *_: (True, "written")
        print(sglang._update(write, updater, "somewhere"))
        for device, lent in (("cuda:0", 8), ("cuda:0", 0), ("cpu", 8)):
            binding._bound[model] = SimpleNamespace(
                device=device, report=SimpleNamespace(lent_nbytes=lent), manifest=SimpleNamespace(model="s3://models/m")
            )
            print(sglang._update(write, updater, "somewhere"))
    """
    done = subprocess.run(
        [python("sglang"), "-c", program, HERE / "run_sglang.py"],
        env=environment("sglang", tmp_path, [path]),
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("(")]
    assert [line.startswith("(True") for line in lines] == [True, False, True, True]
    assert '"mode": "clone"' in lines[1]
