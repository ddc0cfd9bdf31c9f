"""vLLM's engines on the daemon's memory: what they generate, against the same engines by themselves."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engines.environment import HERE, Driven, environment, python
from tests.engines.models import SIZES
from tests.servers import Daemon, SeaweedFS, free_ports, until

pytestmark = pytest.mark.timeout(1800)
PROMPTS = [[1, 5, 9, 100 + number] for number in range(3)]
PROBED = {"worker_extension_cls": "probe_vllm.Probe"}
WEIGHTD = {"load_format": "weightd", "model_loader_extra_config": {"fallback": False}}
SEVERAL = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
"""An engine is in the process that starts it, its ranks are not."""


Tokens = list[list[int]]


class Engines:
    """Engines, one after the other; those without processes of their own are in one process, that imports once."""

    def __init__(self, home: Path, models: Callable[[str], str], variables: Mapping[str, str]) -> None:
        self._home, self._models, self._variables = home, models, variables
        self._process: Driven | None = None
        self._ranks = 1

    def start(self, name: str, arguments: Mapping[str, Any]) -> Tokens:
        """What it generates. Raises AssertionError where it does not start."""
        settings = {"model": self._models(name), "prompts": PROMPTS, "arguments": {**PROBED, **arguments}}
        ranks = ranks_of(arguments)
        if max(ranks, self._ranks) > 1:  # vLLM does not survive what it ends processes with
            self.close()
        self._ranks = ranks
        if self._process is None:
            self._process = Driven("vllm", "drive_vllm.py", settings, self._variables, self._home)
            tokens = self._process.answer()
        else:
            tokens = self._process.ask("start", **settings)
        assert isinstance(tokens, list), tokens
        return tokens

    def ask(self, what: str, **arguments: Any) -> Any:
        """As ``drive_vllm.py`` has it."""
        assert self._process is not None
        return self._process.ask(what, **arguments)

    def close(self) -> None:
        if self._process is not None:
            self._process.__exit__()
            self._process = None


def ranks_of(arguments: Mapping[str, Any]) -> int:
    return int(arguments.get("tensor_parallel_size", 1))


@pytest.fixture(scope="module")
def truth(models: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Tokens]]:
    """The tokens that vLLM generates by itself, with nothing of weightd beside it."""
    home = tmp_path_factory.mktemp("truth")
    engines = Engines(home, models, environment("vllm", home, []) | SEVERAL)
    known: dict[str, Tokens] = {}

    def tokens(name: str, adapter: str | None = None, **arguments: Any) -> Tokens:
        at = json.dumps([name, adapter, arguments])
        if at not in known:
            known[at] = engines.start(name, arguments)
            if adapter is not None:
                known[at] = engines.ask("generate", prompts=PROMPTS, adapter=adapter)
            engines.ask("end")
        return known[at]

    yield tokens
    engines.close()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("weightd"), "--capacity", "cpu=4GiB") as server:
        yield server


@pytest.fixture(scope="module")
def lent(
    models: Callable[[str], str], daemon: Daemon, shim: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engines]:
    """Engines on the daemon's memory."""
    home = tmp_path_factory.mktemp("lent")
    variables = environment("vllm", home, [shim]) | SEVERAL | {"WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)}
    engines = Engines(home, models, variables)
    yield engines
    engines.close()


PLANS: list[tuple[str, dict[str, Any]]] = [
    ("tied", {}),
    ("moe", {}),
    ("even", {"model_impl": "transformers"}),
    ("vision", {"limit_mm_per_prompt": {"image": 0}}),  # its processor of images wants torchvision
    ("llama", {"tensor_parallel_size": 2}),
    ("moe", {"tensor_parallel_size": 2}),
]


@pytest.mark.parametrize(
    ("name", "plan"), PLANS, ids=lambda value: value if isinstance(value, str) else "-".join(value) or "alone"
)
def test_an_engine_generates_what_it_generates_by_itself(
    name: str,
    plan: dict[str, Any],
    models: Callable[[str], str],
    truth: Callable[..., Tokens],
    lent: Engines,
    daemon: Daemon,
) -> None:
    before = {stage["id"] for stage in daemon.client.stages()}
    tokens = lent.start(name, WEIGHTD | plan)
    assert tokens == truth(name, **plan)
    reports = lent.ask("report")
    assert len(reports) == ranks_of(plan)
    # What vLLM packs for a CPU is its own afterwards: experts, here.
    assert all(report["share"] > (0.4 if name == "moe" else 0.9999) for report in reports)
    # Each process has a segment and a lease of its own, all of one stage, which has read nothing twice.
    (stage,) = (stage for stage in daemon.client.stages() if stage["id"] not in before)
    assert {report["stage"] for report in reports} == {stage["id"]}
    assert {report["lease"] for report in reports} == {lease["id"] for lease in daemon.client.leases()}
    stored = sum(path.stat().st_size for path in Path(models(name)).glob("*.safetensors"))
    assert stage["bytes_done"] <= stored
    lent.close() if ranks_of(plan) > 1 else lent.ask("end")
    until(lambda: not daemon.client.leases(), "the engine's leases end with it")


def test_a_draft_model_is_lent_as_well(
    models: Callable[[str], str], truth: Callable[..., Tokens], lent: Engines, daemon: Daemon
) -> None:
    speculative = {"method": "draft_model", "model": models("draft"), "num_speculative_tokens": 2}
    tokens = lent.start("llama", WEIGHTD | {"speculative_config": speculative})
    assert tokens == truth("llama", speculative_config=speculative)
    found = lent.ask("report") + lent.ask("drafted")
    assert [report["share"] for report in found] == [1.0, 1.0]
    assert {report["lease"] for report in found} == {lease["id"] for lease in daemon.client.leases()}
    models_of = {stage["id"]: stage["model"] for stage in daemon.client.stages()}
    assert [Path(models_of[report["stage"]]).name for report in found] == ["llama", "draft"]


def adapter(folder: Path) -> Path:
    """One of rank 8, that changes what queries and outputs are projected to."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(61)
    wide, tensors = SIZES["hidden_size"], {}
    for layer in range(SIZES["num_hidden_layers"]):
        for name in ("q_proj", "o_proj"):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors |= {f"{at}.lora_A.weight": torch.randn(8, wide), f"{at}.lora_B.weight": torch.randn(wide, 8)}
    folder.mkdir()
    save_file(
        {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "o_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_adapter_leaves_lent_memory_as_it_is(
    models: Callable[[str], str], truth: Callable[..., Tokens], lent: Engines, daemon: Daemon, tmp_path: Path
) -> None:
    adapting, folder = {"enable_lora": True, "max_lora_rank": 8}, str(adapter(tmp_path / "adapter"))
    tokens = lent.start("llama", WEIGHTD | adapting)
    assert tokens == truth("llama", **adapting)
    (report,) = lent.ask("report")
    held = bytes_of(daemon, report["stage"])
    adapted = lent.ask("generate", prompts=PROMPTS, adapter=folder)
    assert adapted != tokens
    assert lent.ask("generate", prompts=PROMPTS) == tokens
    assert lent.ask("report") == [report]
    assert report["share"] == 1.0
    assert bytes_of(daemon, report["stage"]) == held
    assert adapted == truth("llama", **adapting, adapter=folder)


def bytes_of(daemon: Daemon, stage: str) -> str:
    """A digest of what another process maps of a stage."""
    with daemon.attach(stage=stage) as weights:
        found = hashlib.sha256()
        for name in sorted(weights):
            found.update(weights.raw(name))
        return found.hexdigest()


def test_an_engine_outlives_the_daemon_and_loads_again_from_the_next(
    models: Callable[[str], str],
    truth: Callable[..., Tokens],
    start_daemon: Callable[..., Daemon],
    shim: Path,
    tmp_path: Path,
) -> None:
    daemon, tokens = start_daemon(), truth("llama")
    settings = {"model": models("llama"), "prompts": PROMPTS, "arguments": PROBED | WEIGHTD}
    with contextlib.ExitStack() as stack:
        engines = []
        for home in (tmp_path / "first", tmp_path / "second"):
            variables = environment("vllm", home, [shim]) | {"WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)}
            engines.append(stack.enter_context(Driven("vllm", "drive_vllm.py", settings, variables, home)))
        first, second = engines
        # Both at once: they ask for, trace and wait for the same.
        assert first.answer() == second.answer() == tokens
        digests = first.ask("digests")
        leases = {lease["id"] for lease in daemon.client.leases()}
        assert len(leases) == 2
        assert len(daemon.client.stages()) == 1
        os.kill(daemon.pid, signal.SIGKILL)
        assert first.ask("generate", prompts=PROMPTS) == tokens
        until(lambda: {lease["id"] for lease in daemon.client.leases()} == leases, "both leases are taken up again")
        # What one engine does to its weights is its own: the memory is copied as it is written to.
        first.ask("scribble")
        assert first.ask("generate", prompts=PROMPTS) != tokens
        assert second.ask("generate", prompts=PROMPTS) == tokens
        assert second.ask("digests") == digests
        first.ask("reload")
        assert first.ask("generate", prompts=PROMPTS) == tokens
        assert first.ask("digests") == digests
        second.kill()
        until(lambda: len(daemon.client.leases()) == 1, "the lease of an engine that was killed ends")
        assert first.ask("generate", prompts=PROMPTS) == tokens


def test_its_openai_server_serves_from_the_daemons_memory(
    models: Callable[[str], str], truth: Callable[..., Tokens], daemon: Daemon, shim: Path, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    variables = environment("vllm", tmp_path / "server", [shim, HERE])
    options = [
        "--model", models("llama"), "--load-format", "weightd", "--model-loader-extra-config", '{"fallback": false}',
        "--worker-extension-cls", "probe_vllm.Probe", "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16",
        "--max-model-len", "128", "--skip-tokenizer-init", "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20),
    ]  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [python("vllm"), "-m", "vllm.entrypoints.openai.api_server", *options],
            env=variables | {"WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)}, cwd=tmp_path, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    said = (tmp_path / "log").read_text
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:

            def healthy() -> bool:
                assert server.poll() is None, said()[-5000:]
                with contextlib.suppress(httpx.TransportError):
                    return client.get("/health").is_success
                return False

            until(healthy, "the server answers", deadline=600)
            asked = {"model": models("llama"), "prompt": PROMPTS[0], "temperature": 0, "max_tokens": 12,
                     "ignore_eos": True, "return_token_ids": True}  # fmt: skip
            answer = client.post("/v1/completions", json=asked)
            assert answer.is_success, answer.text + said()[-5000:]
            assert answer.json()["choices"][0]["token_ids"] == truth("llama")[0]
        assert len(daemon.client.leases()) == 1
        assert "(100.0%) are the daemon's memory" in said()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    until(lambda: not daemon.client.leases(), "the server's lease ends with it")


def test_an_object_uri_needs_nothing_but_a_daemon(
    models: Callable[[str], str],
    s3: SeaweedFS,
    truth: Callable[..., Tokens],
    start_daemon: Callable[..., Daemon],
    shim: Path,
    tmp_path: Path,
) -> None:
    uri, daemon = s3.upload(Path(models("llama")), "vllm/llama"), start_daemon(env=s3.env)
    settings = {"model": uri, "prompts": PROMPTS, "arguments": PROBED}
    home = tmp_path / "engine"
    variables = environment("vllm", home, [shim]) | SEVERAL | {"WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)}
    # Without a way to the bucket: its configuration is the daemon's as well.
    with Driven("vllm", "drive_vllm.py", settings, variables, home) as engine:
        assert engine.answer() == truth("llama")
        (report,) = engine.ask("report")
        assert report["share"] == 1.0
        (stage,) = daemon.client.stages()
        assert (stage["id"], stage["model"], stage["state"]) == (report["stage"], uri, "ready")
    # The daemon has gone before the engine looks: vLLM does what it would have done.
    daemon.stop()
    with Driven("vllm", "drive_vllm.py", settings, variables | s3.env, home) as alone:
        assert alone.answer() == truth("llama")
        assert alone.ask("report") == [None]
        assert "vLLM loads by itself" in alone.said
