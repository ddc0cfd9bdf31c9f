"""vLLM's models as weightd loads them, against what vLLM's own loader makes of them: two releases, and no engine."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.environment import Driven, environment, python
from tests.engines.models import make
from tests.engines.starting import another
from tests.fault_proxy import FaultProxy, Kind, Request
from tests.servers import Daemon, SeaweedFS

pytestmark = pytest.mark.timeout(1200)
Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def daemon(s3: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("weightd"), "--capacity", "cpu=4GiB", env=s3.env) as server:
        yield server


def loading(daemon: Daemon, s3: SeaweedFS, home: Path, *paths: Path, **more: str) -> Iterator[Ask]:
    """A process of vLLM that loads what it is asked to, as ``compare_vllm.py`` says."""
    variables = environment("vllm", home, paths) | s3.env | {"WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir)} | more
    with Driven("vllm", "compare_vllm.py", {}, variables, home) as process:
        yield process.ask


@pytest.fixture(scope="module")
def vllm(daemon: Daemon, s3: SeaweedFS, shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """The release that is built for CPUs."""
    yield from loading(daemon, s3, tmp_path_factory.mktemp("vllm") / "home", shim)


@pytest.fixture(scope="module")
def newest(daemon: Daemon, s3: SeaweedFS, shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """The newest one, for GPUs: all but what computes. It is of SGLang's environment, which needs its code."""
    (packages,) = (python("sglang").parents[1] / "lib").glob("python3.*/site-packages")
    release = tmp_path_factory.mktemp("release")
    for path in packages.glob("vllm*"):
        (release / path.name).symlink_to(path)
    cache = str(python("sglang").parents[1] / "cache")
    yield from loading(daemon, s3, tmp_path_factory.mktemp("newest") / "home", release, shim, VLLM_CACHE_ROOT=cache)


def extra(**options: Any) -> dict[str, Any]:
    return {"model_loader_extra_config": options}


@pytest.mark.parametrize("release", ["vllm", "newest"])
@pytest.mark.parametrize(
    ("implementation", "names"),
    [("vllm", ["llama", "tied", "qwen2", "moe", "vision", "mamba"]), ("transformers", ["llama", "tied", "moe"])],
)
def test_every_parameter_and_buffer_is_what_vllms_own_loader_makes_it(
    implementation: str, names: list[str], release: str, models: Callable[[str], str], request: pytest.FixtureRequest
) -> None:
    ask: Ask = request.getfixturevalue(release)
    for name in names:
        if (name, release) == ("mamba", "newest"):
            continue  # it is packed by a kernel that this build is without
        answer = ask("compare", own={"model": models(name), "model_impl": implementation}, ours=extra(fallback=False))
        assert answer.get("differ") == [], (name, answer)
        report = answer["report"]
        assert report["modes"]["clone"] == 0, name
        assert bool(report["modes"]["opaque"]) == (name == "mamba"), name  # it keeps a function of a weight
        assert report["share"] > (0.9 if name == "mamba" else 0.9999), name
        assert report["lent_nbytes"] > 0.98 * report["segment_nbytes"], name


def test_what_goes_wrong_ends_in_vllms_own_loader_or_is_raised_as_was_asked(
    models: Callable[[str], str], vllm: Ask, tmp_path: Path
) -> None:
    llama, mamba = {"model": models("llama")}, {"model": models("mamba")}
    absent, late = {"socket": str(tmp_path / "nowhere")}, {"timeout": 1e-6}
    itself = {"differ": [], "report": None}
    assert vllm("compare", own=llama, ours=extra(**absent)) == itself
    assert vllm("compare", own=llama, ours=extra(**late)) == itself
    assert vllm("compare", own=llama, ours=extra(mode="stream", fallback=False)) == itself
    assert vllm("compare", own=mamba, ours=extra(mode="zero-copy")) == itself
    for own, options, why in (
        (llama, {**absent, "fallback": False}, "DaemonUnavailable: no daemon answers at"),
        (llama, {**late, "fallback": False}, "AttachTimeout: "),
        (llama, {"sockets": "?"}, "ValueError: weightd knows no option 'sockets', but "),
        (llama, {"mode": "quick"}, "ValueError: mode is 'quick', and can be "),
        (mamba, {"mode": "zero-copy", "fallback": False}, "ModelMismatch: "),
    ):
        assert vllm("compare", own=own, ours=extra(**options))["raised"].startswith(why), options
    own_copy = vllm("compare", own=llama, ours=extra(mode="clone", fallback=False))
    assert own_copy["differ"] == []
    assert (own_copy["report"]["lent_nbytes"], own_copy["report"]["share"]) == (0, 0.0)
    lent = vllm("compare", own=llama, ours=extra(mode="zero-copy", fallback=False))
    assert (lent["differ"], lent["report"]["share"]) == ([], 1.0)


def test_a_layout_that_is_not_the_one_just_traced_is_refused_by_its_digest(
    models: Callable[[str], str], vllm: Ask, start_daemon: Callable[..., Daemon]
) -> None:
    llama = {"model": models("llama")}
    right, wrong = start_daemon(), start_daemon()
    assert vllm("compare", own=llama, ours=extra(socket=str(right.runtime_dir), fallback=False))["differ"] == []
    (layout,) = right.client.layouts()
    wrong.client.put_layout(layout["key"], another(layout["about"]))
    # Resident in it already: it is leased before the trace tells what it should have been.
    assert wrong.stage(llama["model"], layout={"key": [layout["key"]]})["state"] == "ready"
    socket = {"socket": str(wrong.runtime_dir)}
    assert vllm("compare", own=llama, ours=extra(**socket)) == {"differ": [], "report": None}
    raised = vllm("compare", own=llama, ours=extra(**socket, fallback=False))["raised"]
    assert raised.startswith("RequestRefused: ")
    assert "another one is there" in raised
    assert wrong.client.leases() == []


def of_weights(request: Request) -> bool:
    """Whether it is read from behind a shard's header."""
    return request.method == "GET" and ".safetensors" in request.path and bool(request.first)


def test_a_stage_that_fails_leaves_all_of_it_to_vllms_own_loader(
    models: Callable[[str], str], s3: SeaweedFS, vllm: Ask, start_daemon: Callable[..., Daemon]
) -> None:
    broken = threading.Event()
    uri = s3.upload(Path(models("llama")), "vllm/failing")

    def fault(request: Request) -> Kind | None:
        return "truncate" if broken.is_set() and of_weights(request) else None

    with FaultProxy(s3.url, fault) as origin:
        daemon = start_daemon(env={**s3.env, "AWS_ENDPOINT_URL": origin.url, "WEIGHTD_RETRY_DEADLINE": "0.5"})
        daemon.client.checkpoint(uri)  # its headers are known, and can be traced
        broken.set()
        own, ours, socket = {"model": models("llama")}, {"model": uri, "load_format": "auto"}, str(daemon.runtime_dir)
        sure = ours | extra(socket=socket, fallback=False)
        assert vllm("compare", own=own, ours=ours | extra(socket=socket)) == {"differ": [], "report": None}
        assert {stage["state"] for stage in daemon.client.stages()} == {"failed"}
        raised = vllm("compare", own=own, ours=sure)["raised"]
        assert raised.startswith("StageFailed: "), raised
        assert daemon.client.leases() == []
        broken.clear()
        answer = vllm("compare", own=own, ours=sure)
        assert (answer["differ"], answer["report"]["share"]) == ([], 1.0)


def test_weights_that_change_at_the_origin_as_they_are_staged_are_never_mixed(
    models: Callable[[str], str], s3: SeaweedFS, vllm: Ask, start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    uri = s3.upload(Path(models("llama")), "vllm/changing")
    changed = make("llama", tmp_path / "changed", seed=61)
    lock, staging, done = threading.Lock(), threading.Event(), threading.Event()

    def fault(request: Request) -> Kind | None:
        with lock:
            if staging.is_set() and of_weights(request) and not done.is_set():
                s3.upload(changed, "vllm/changing")
                done.set()
        return None

    with FaultProxy(s3.url, fault) as origin:
        daemon = start_daemon(env={**s3.env, "AWS_ENDPOINT_URL": origin.url})
        daemon.client.checkpoint(uri)
        staging.set()
        ours = {"model": uri, "load_format": "auto", **extra(socket=str(daemon.runtime_dir))}
        assert vllm("compare", own={"model": str(changed)}, ours=ours) == {"differ": [], "report": None}
        assert done.is_set()
        assert {stage["state"] for stage in daemon.client.stages()} == {"failed"}
        assert daemon.client.leases() == []


@pytest.mark.parametrize("release", ["vllm", "newest"])
def test_the_configuration_of_an_object_uri_is_what_is_at_the_origin_now(
    release: str, models: Callable[[str], str], s3: SeaweedFS, request: pytest.FixtureRequest
) -> None:
    import obstore

    ask: Ask = request.getfixturevalue(release)
    uri, folder = f"s3://models/configured/{release}", Path(models("llama"))
    s3.upload(folder, f"configured/{release}")
    before = ask("configure", settings={"model": uri})
    assert before["config"]["rope_parameters"]["rope_theta"] == 10000.0
    assert before["files"] == sorted(path.name for path in folder.iterdir() if path.suffix != ".safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 20000.0, "rope_type": "default"}
    obstore.put(s3.store(), f"configured/{release}/config.json", json.dumps(config).encode())
    obstore.delete(s3.store(), f"configured/{release}/generation_config.json")
    after = ask("configure", settings={"model": uri})
    assert after["config"]["rope_parameters"]["rope_theta"] == 20000.0
    assert after["files"] == [name for name in before["files"] if name != "generation_config.json"]


def test_what_is_written_to_later_is_a_copy_of_the_engines_own_on_a_gpu(
    models: Callable[[str], str], vllm: Ask
) -> None:
    llama, moe, sure = {"model": models("llama")}, {"model": models("moe")}, extra(fallback=False)
    plain = vllm("compare", own=llama, ours=sure, gpu=[])
    assert (plain["differ"], plain["report"]["share"], plain["report"]["modes"]["clone"]) == ([], 1.0, 0)
    assert plain["again"] is not None
    assert "start the engine with mode 'clone'" in plain["again"]
    for switch in ("model_config.enable_sleep_mode", "parallel_config.enable_eplb", "weight_transfer_config"):
        copied = vllm("compare", own=llama, ours=sure, gpu=[switch])
        assert (copied["differ"], copied["report"]["lent_nbytes"]) == ([], 0), switch
        assert copied["report"]["modes"]["zero-copy"] == 0, switch
        assert copied["again"] is None, switch
    # What packs these experts is not known to leave them alone.
    experts = vllm("compare", own=moe, ours=sure, gpu=[])
    assert experts["differ"] == []
    assert experts["report"]["modes"]["clone"] == 4
    assert 0 < experts["report"]["share"] < 1
    raised = vllm("compare", own=moe, ours=extra(mode="zero-copy", fallback=False), gpu=[])["raised"]
    assert "post-processing may write to 'model.layers.0.mlp.experts" in raised
