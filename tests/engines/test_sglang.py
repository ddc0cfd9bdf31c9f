"""SGLang as it is installed, with the daemon's memory as its parameters: what it holds, and generates, is what it does
with its own loader."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.environment import HERE, environment, python
from tests.engines.hosts import Engine, Host
from tests.engines.models import make
from tests.engines.starting import another
from tests.fault_proxy import FaultProxy
from tests.servers import Daemon, SeaweedFS, free_ports, until

PROMPTS = [[1, 5, 9, 100 + number] for number in range(3)]
PRIVATE = {"load_format": "private", "log_level": "info"}
SURE = {**PRIVATE, "model_loader_extra_config": json.dumps({"fallback": False})}

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with Host("sglang", "run_sglang.py", tmp_path_factory.mktemp("host")) as host:
        yield host


@pytest.fixture(scope="module")
def truths(models: Callable[[str], str], host: Host, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """(tokens, digests of each process's parameters and buffers) as SGLang has them by itself."""
    known: dict[str, Any] = {}

    def truth(name: str, **arguments: Any) -> Any:
        at = f"{name} {sorted(arguments.items())}"
        if at not in known:
            home = tmp_path_factory.mktemp("truth")
            with host.engine(models(name), home, PROMPTS, arguments, env_of(arguments)) as own:
                tokens = own.tokens()
                known[at] = tokens, [own.found(rank)["tensors"] for rank in range(processes(arguments))]
                assert own.found()["loader"] == "DefaultModelLoader"
        return known[at]

    return truth


def processes(arguments: dict[str, Any]) -> int:
    return int(arguments.get("tp_size", 1) * arguments.get("pp_size", 1))


def env_of(arguments: dict[str, Any]) -> dict[str, str]:
    count = processes(arguments)
    return {} if count == 1 else {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, range(count)))}


def served_by(daemon: Daemon, shim: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(shim), "WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)}


@pytest.mark.parametrize(
    ("name", "origin", "arguments"),
    [
        ("llama", "folder", {"tp_size": 2}),
        ("tied", "folder", {}),
        ("tied", "s3", {"tp_size": 2}),
        ("moe", "folder", {}),
        ("moe", "s3", {"tp_size": 2}),
        ("llama", "folder", {"pp_size": 2}),
        ("gemma3", "folder", {}),  # with what it sees by
        ("even", "folder", {"model_impl": "transformers"}),
    ],
    ids=lambda value: "-".join(f"{name}={is_}" for name, is_ in value.items()) if isinstance(value, dict) else value,
)
def test_parameters_are_the_daemons_memory_and_tokens_are_those_of_its_own_loader(
    name: str,
    origin: str,
    arguments: dict[str, Any],
    models: Callable[[str], str],
    truths: Callable[..., Any],
    host: Host,
    shim: Path,
    s3: SeaweedFS,
    start_daemon: Callable[..., Daemon],
    tmp_path: Path,
) -> None:
    tokens, tensors = truths(name, **arguments)
    daemon = start_daemon(env=s3.env)
    model = models(name) if origin == "folder" else s3.upload(Path(models(name)), f"sglang/{name}")
    # SGLang makes its own load format of an object URI, whatever is asked for.
    asked = SURE | arguments
    with host.engine(model, tmp_path / "home", PROMPTS, asked, served_by(daemon, shim) | env_of(arguments)) as engine:
        assert engine.tokens() == tokens
        stages = {stage["id"] for stage in daemon.client.stages()}
        assert len(stages) == arguments.get("pp_size", 1)  # the processes of a pipeline want nothing that is the same
        assert len(daemon.client.leases()) == processes(arguments)
        for rank in range(processes(arguments)):
            found = engine.found(rank)
            assert found["tensors"] == tensors[rank]
            assert found["weights"]["share"] == 1.0
            assert found["weights"]["stage"] in stages
            assert found["weights"]["preloaded"] == 0  # it came after SGLang had looked how much memory there is
        assert engine.said().count("weightd: the engine loads") == 0
    assert daemon.client.leases() == []


def test_an_object_uri_is_served_to_engines_that_cannot_read_it_and_outlives_the_daemon(
    models: Callable[[str], str],
    truths: Callable[..., Any],
    host: Host,
    s3: SeaweedFS,
    shim: Path,
    start_daemon: Callable[..., Daemon],
    tmp_path: Path,
) -> None:
    """A bare ``s3://`` model: recipes made ahead, configuration and weights from the daemon, two engines on them."""
    tokens, (tensors,) = truths("llama")
    uri = s3.upload(Path(models("llama")), "sglang")
    daemon = start_daemon(env=s3.env)
    environ = served_by(daemon, shim)
    (told,) = host.ahead(tmp_path / "ahead", environ, "--model", uri, "--dtype", "bfloat16")
    assert told["opaque"] == []
    assert daemon.client.stages() == []
    with contextlib.ExitStack() as stack:
        engines = []
        for home in ("first", "second"):
            engine = stack.enter_context(host.engine(uri, tmp_path / home, PROMPTS, {"log_level": "info"}, environ))
            engines.append(engine)
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
        until(lambda: daemon.ready() and len(daemon.client.leases()) == 2, "both leases are known again")

        # Another model's weights are written to memory that is lent: it becomes this process's own.
        other = make("llama", tmp_path / "other", seed=61)
        assert engines[1].ask(str(other)) != tokens
        assert engines[0].ask(PROMPTS) == tokens
        assert engines[1].ask(models("llama")) == tokens

        engines[1].kill()
        until(lambda: len(daemon.client.leases()) == 1, "its lease has ended")
        assert engines[0].ask(PROMPTS) == tokens
    assert daemon.client.leases() == []
    assert [one["state"] for one in daemon.client.stages()] == ["ready"]
    assert daemon.client.stages()[0]["id"] == stage["id"]


@pytest.mark.parametrize(
    ("why", "kind"),
    [("absent", "DaemonUnavailable"), ("refused", "RequestRefused"), ("late", "AttachTimeout")],
)
def test_sglang_loads_by_itself_where_the_daemon_cannot_serve_it(
    why: str,
    kind: str,
    models: Callable[[str], str],
    truths: Callable[..., Any],
    host: Host,
    shim: Path,
    start_daemon: Callable[..., Daemon],
    tmp_path: Path,
) -> None:
    daemon = start_daemon("--capacity", f"cpu={'1MiB' if why == 'refused' else '1GiB'}")
    environ = served_by(daemon, shim)
    if why == "absent":
        environ["WEIGHTD_RUNTIME_DIR"] = str(tmp_path / "nobody")
    options = {"timeout": 0.001} if why == "late" else {}
    asked = {**PRIVATE, "model_loader_extra_config": json.dumps(options)}
    with host.engine(models("llama"), tmp_path / "home", PROMPTS, asked, environ) as engine:
        assert_its_own(engine, truths("llama"), kind)
        assert daemon.client.leases() == []


def test_a_stage_that_fails_ends_in_the_loader_that_sglang_would_have_used(
    models: Callable[[str], str],
    truths: Callable[..., Any],
    host: Host,
    s3: SeaweedFS,
    shim: Path,
    start_daemon: Callable[..., Daemon],
    tmp_path: Path,
) -> None:
    uri = s3.upload(Path(models("llama")), "sglang/failing")
    with FaultProxy(s3.url) as proxy:
        daemon = start_daemon("--retry-deadline", "1", env={**s3.env, "AWS_ENDPOINT_URL": proxy.url})
        daemon.client.checkpoint(uri)  # headers are read, weights cannot be
        proxy.fault = lambda asked: "503" if asked.method == "GET" and asked.path.endswith(".safetensors") else None
        environ = served_by(daemon, shim) | s3.env
        with host.engine(uri, tmp_path / "home", PROMPTS, {"log_level": "info"}, environ) as engine:
            assert_its_own(engine, truths("llama"), "StageFailed")
            assert [stage["state"] for stage in daemon.client.stages()] == ["failed"]
            assert daemon.client.leases() == []


def assert_its_own(engine: Engine, truth: Any, *why: str) -> None:
    """That it has loaded all of it by itself, in all of its processes, and says why."""
    tokens, tensors = truth
    assert engine.tokens() == tokens
    for rank, own in enumerate(tensors):
        found = engine.found(rank)
        assert found["tensors"] == own
        assert found["weights"] is None
    lines = [line for line in engine.said().splitlines() if "weightd: the engine loads" in line]
    assert len(lines) == len(tensors)
    assert all(reason in line for reason in why for line in lines), lines


def test_no_process_of_an_engine_is_lent_what_another_one_loads_itself(
    models: Callable[[str], str],
    truths: Callable[..., Any],
    host: Host,
    shim: Path,
    start_daemon: Callable[..., Daemon],
    tmp_path: Path,
) -> None:
    model, daemon, plan = models("llama"), start_daemon(), {"tp_size": 2}
    options = ["--model", model, "--dtype", "bfloat16", "--tp-size", "2"]
    _, second = host.ahead(tmp_path / "ahead", served_by(start_daemon(), shim), *options)
    daemon.client.put_layout(second["key"], another(second["about"]))
    environ = served_by(daemon, shim) | env_of(plan)
    with host.engine(model, tmp_path / "home", PROMPTS, plan | PRIVATE, environ) as engine:
        assert_its_own(engine, truths("llama", **plan), "another one is there")
        assert daemon.client.leases() == []


@pytest.mark.parametrize(
    ("options", "said"),
    [({"fallback": False}, "no daemon answers"), ({"mod": "clone"}, "weightd knows no option 'mod'")],
    ids=["alone", "unknown"],
)
def test_an_engine_that_may_not_load_by_itself_ends_with_the_reason(
    options: dict[str, Any], said: str, models: Callable[[str], str], host: Host, shim: Path, tmp_path: Path
) -> None:
    environ = {"PYTHONPATH": str(shim), "WEIGHTD_RUNTIME_DIR": str(tmp_path / "nobody")}
    asked = {**PRIVATE, "model_loader_extra_config": json.dumps(options)}
    with (
        pytest.raises(AssertionError, match="the engine has ended"),
        host.engine(models("llama"), tmp_path / "home", PROMPTS, asked, environ) as engine,
    ):
        engine.tokens()
    assert said in engine.said()


@pytest.mark.parametrize("mode", ["clone", "stream"])
def test_weights_are_the_engines_own_where_that_is_asked_for(
    mode: str,
    models: Callable[[str], str],
    truths: Callable[..., Any],
    host: Host,
    daemon: Daemon,
    shim: Path,
    tmp_path: Path,
) -> None:
    tokens, (tensors,) = truths("llama")
    asked = {**PRIVATE, "model_loader_extra_config": json.dumps({"fallback": False, "mode": mode})}
    with host.engine(models("llama"), tmp_path / "home", PROMPTS, asked, served_by(daemon, shim)) as engine:
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
    models: Callable[[str], str],
    truths: Callable[..., Any],
    shim: Path,
    start_daemon: Callable[..., Daemon],
    tmp_path: Path,
) -> None:
    """As its users start it: nothing here is forked."""
    import httpx

    tokens, _ = truths("llama")
    daemon = start_daemon()
    (port,) = free_ports(1)
    options = [
        "--model-path", models("llama"), "--load-format", "private", "--host", "127.0.0.1", "--port", str(port),
        "--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--grammar-backend",
        "none", "--skip-tokenizer-init", "--disable-cuda-graph", "--disable-radix-cache", "--disable-overlap-schedule",
        "--mem-fraction-static", "0.3", "--max-total-tokens", "2048", "--dtype", "bfloat16", "--skip-server-warmup",
    ]  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [python("sglang"), HERE / "run_sglang.py", "serve", *options],
            env=environment("sglang", tmp_path, []) | served_by(daemon, shim), cwd=tmp_path, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:

            def serves() -> bool:
                assert server.poll() is None, (tmp_path / "log").read_text()[-5000:]
                with contextlib.suppress(httpx.TransportError):
                    return client.get("/health").is_success
                return False

            until(serves, "it is healthy", 600)
            sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
            said = client.post("/generate", json={"input_ids": PROMPTS[0], "sampling_params": sampling}).json()
            assert said["output_ids"] == tokens[0]
        assert len(daemon.client.leases()) == 1
        assert "(100.0%) are the daemon's memory" in (tmp_path / "log").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_an_update_of_weights_that_are_lent_on_a_gpu_is_refused_before_it_writes(shim: Path, tmp_path: Path) -> None:
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
        env=environment("sglang", tmp_path, [shim]),
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("(")]
    assert [line.startswith("(True") for line in lines] == [True, False, True, True]
    assert '"mode": "clone"' in lines[1]
