"""What reads s3://, unmodified, at the S3 endpoint: the command line, libraries, and the streamer that engines use."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store
from safetensors.numpy import load_file

from tests.conftest import lacking
from tests.fault_proxy import FaultProxy
from tests.s3.conftest import SHARDS, Endpoint, Start, weight_bytes
from tests.servers import SeaweedFS

CLIENTS = Path(sys.executable).parents[1] / "clients" / "bin"
"""An environment of their own: ``make .venv/clients.stamp``."""


@pytest.fixture
def here(start_daemon: Start, s3: SeaweedFS, origin: FaultProxy, model: Path) -> Endpoint:
    """An endpoint in front of a checkpoint that nobody has staged."""
    s3.upload(model, "s3-clients")
    return Endpoint(start_daemon, origin.url, s3.env)


def run(here: Endpoint, program: str, *arguments: str) -> str:
    """Run a program of the clients' environment at the endpoint; returns what it printed."""
    path = CLIENTS / program
    if not path.exists():
        lacking(f"{program}: make .venv/clients.stamp")
    own = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **here.env, "S3_ENDPOINT_URL": here.url}
    done = subprocess.run([path, *arguments], env=own, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def same(folder: Path, model: Path) -> bool:
    return {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in model.iterdir()
    }


def test_the_aws_command_lists_and_copies(here: Endpoint, model: Path, tmp_path: Path) -> None:
    listed = run(here, "aws", "s3", "ls", "s3://models/s3-clients/")
    assert [line.split()[-1] for line in listed.splitlines()] == sorted(path.name for path in model.iterdir())
    run(here, "aws", "s3", "cp", "--recursive", "--only-show-errors", "s3://models/s3-clients/", str(tmp_path / "a"))
    assert same(tmp_path / "a", model)
    run(here, "aws", "s3", "sync", "--only-show-errors", "s3://models/s3-clients", str(tmp_path / "b"))
    assert same(tmp_path / "b", model)


def test_s5cmd_lists_and_copies(here: Endpoint, model: Path, tmp_path: Path) -> None:
    listed = run(here, "s5cmd", "ls", "s3://models/s3-clients/")
    assert [line.split()[-1] for line in listed.splitlines()] == sorted(path.name for path in model.iterdir())
    run(here, "s5cmd", "cp", "s3://models/s3-clients/*", f"{tmp_path}/")
    assert same(tmp_path, model)


def test_s3fs_reads_ranges_as_a_file(here: Endpoint, model: Path) -> None:
    script = f"""
import hashlib, json, s3fs
files = s3fs.S3FileSystem(endpoint_url={here.url!r}, use_listings_cache=False)
found = {{}}
for path in files.ls("models/s3-clients"):
    with files.open(path, block_size=1 << 20) as file:
        file.seek(-7, 2)
        end = file.read()
        file.seek(0)
        found[path.rpartition("/")[2]] = [hashlib.sha256(file.read()).hexdigest(), end.hex()]
print(json.dumps(found))
"""
    found = json.loads(run(here, "python", "-c", script))
    for path in model.iterdir():
        truth = path.read_bytes()
        assert found[path.name] == [hashlib.sha256(truth).hexdigest(), truth[-7:].hex()]


def test_obstore_reads_lists_and_heads(here: Endpoint, model: Path) -> None:
    store = S3Store(
        "models", endpoint=here.url, access_key_id="any", secret_access_key="any", region="us-east-1",
        client_options={"allow_http": True},
    )  # fmt: skip
    listed = {meta["path"]: meta["size"] for batch in obstore.list(store, "s3-clients") for meta in batch}
    assert listed == {f"s3-clients/{path.name}": path.stat().st_size for path in model.iterdir()}
    truth = (model / SHARDS[0]).read_bytes()
    key = f"s3-clients/{SHARDS[0]}"
    assert bytes(obstore.get(store, key).bytes()) == truth
    starts, ends = [0, 100_000, 5_000_000], [10, 3_000_000, len(truth)]
    parts = obstore.get_ranges(store, key, starts=starts, ends=ends)
    assert [bytes(part) for part in parts] == [truth[a:b] for a, b in zip(starts, ends, strict=True)]
    assert obstore.head(store, key)["size"] == len(truth)


DOWNLOAD = {
    "s3fs": """
import s3fs, sys
url, folder = sys.argv[1:]
s3fs.S3FileSystem(endpoint_url=url).get("models/s3-causal/", folder, recursive=True)
""",
    "obstore": """
import obstore, pathlib, sys
from obstore.store import S3Store
url, folder = sys.argv[1:]
store = S3Store("models", prefix="s3-causal", endpoint=url, client_options={"allow_http": True})
for batch in obstore.list(store):
    for found in batch:
        path = pathlib.Path(folder, found["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for part in obstore.get(store, found["path"]):
                file.write(part)
""",
}


@pytest.mark.parametrize("by", DOWNLOAD)
def test_transformers_loads_what_was_downloaded_and_its_logits_are_those_of_the_original(
    by: str, start_daemon: Start, s3: SeaweedFS, origin: FaultProxy, causal: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    uri = s3.upload(causal, "s3-causal")
    here = Endpoint(start_daemon, origin.url, s3.env)
    assert here.daemon.stage(uri)["state"] == "ready"
    before = weight_bytes(origin)
    if by == "s3fs":
        run(here, "python", "-c", DOWNLOAD[by], here.url, str(tmp_path / "here"))
    else:
        subprocess.run(
            [sys.executable, "-c", DOWNLOAD[by], here.url, str(tmp_path / "here")],
            env={**os.environ, **here.env}, check=True, timeout=300,
        )  # fmt: skip
    assert weight_bytes(origin) == before
    assert same(tmp_path / "here", causal)
    tokens = torch.tensor([[1, 5, 9, 100]])
    mine, other = (
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)(tokens).logits
        for folder in (tmp_path / "here", causal)
    )
    assert torch.equal(mine, other)


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a head, in several shards."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(15)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("causal")
    LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes)).save_pretrained(folder, max_shard_size="1MB")
    return folder


STREAM = """
import json, sys, torch, hashlib
from runai_model_streamer import SafetensorsStreamer, list_safetensors, pull_files
uri, folder = sys.argv[1:]
pull_files(uri, folder, ignore_pattern=["*.safetensors"])
paths = sorted(list_safetensors(uri))
found = {}
with SafetensorsStreamer() as streamer:
    streamer.stream_files(paths)
    for name, tensor in streamer.get_tensors():
        found[name] = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
print(json.dumps([paths, found]))
"""


def test_the_streamer_streams_and_the_second_time_nothing_is_read_at_the_origin(
    here: Endpoint, origin: FaultProxy, model: Path, tmp_path: Path
) -> None:
    truth = {
        name: hashlib.sha256(tensor.tobytes()).hexdigest()
        for shard in SHARDS
        for name, tensor in load_file(model / shard).items()
    }
    read: list[int] = []
    for folder in ("first", "second"):
        environment = {**os.environ, **here.env}
        done = subprocess.run(
            [sys.executable, "-c", STREAM, "s3://models/s3-clients", str(tmp_path / folder)],
            env=environment, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        paths, found = json.loads(done.stdout.splitlines()[-1])
        assert [path.rpartition("/")[2] for path in paths] == list(SHARDS)
        assert found == truth
        kept = {path.name for path in (tmp_path / folder).rglob("*") if path.is_file()}
        assert kept == {path.name for path in model.iterdir()} - set(SHARDS)
        read.append(weight_bytes(origin))
    assert read[1] == read[0] > 0
    small = [path.stat().st_size for path in model.iterdir() if path.name not in SHARDS]
    assert here.sent("passed") == sum(small), "what was asked for before anything was resident"
