"""Attaching: how long it takes for how many tensors, and what each further process costs the machine."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.checkpoints import many_tensors
from tests.bench.contender import ROOT, contend, die_with_parent
from tests.bench.machine import meminfo, require
from tests.bench.measure import Row, Sample, Section, cores, in_threads, interleave, milliseconds
from tests.bench.session import Session
from tests.servers import Daemon

BOUNDS = {10_000: 60.0, 100_000: 600.0}
"""Tensors → milliseconds that attaching may take."""
SAME = 0.1
"""Share by which the large segment's attach may differ from the small one's and still be called the same."""
MEMORY_SHARE = 0.01
LEAST_REPETITIONS = 9


def attach(runtime_dir: str, model: str) -> Sample:
    """``attach()`` in a process that has torch and weightd.ipc imported, as an engine has; then every tensor made."""
    import torch  # noqa: F401

    from tests.bench.measure import timed
    from weightd.ipc import attach as attach_weights

    with timed() as sample:
        weights = attach_weights(model, socket=runtime_dir)
    with timed() as making:
        tensors = [weights[name] for name in weights]
    return {
        **sample,
        "making_seconds": making["seconds"],
        "together_seconds": sample["seconds"] + making["seconds"],
        "tensors": len(tensors),
        "segment": weights.manifest.nbytes,
    }


def run(session: Session) -> Section:
    """Measure; segments of a quarter of the session's size and of twice of it: 1 and 8 GiB by default."""
    small, large = session.size // 4, session.size * 2
    require(session.folder, disk=1 << 30, memory=small + large + large // 8 + (2 << 30))
    repetitions = max(LEAST_REPETITIONS, session.repetitions)
    section = Section("attach", f"attach(), fresh processes with torch imported, {repetitions} of each")
    with session.daemon("attach", small + large + (256 << 20)) as daemon:
        for count, bound in BOUNDS.items():
            measure: dict[str, Any] = {}
            with ExitStack() as stack:
                models = {}
                for nbytes in (small, large):
                    name = f"{count:,} tensors, {nbytes / 2**30:g} GiB"
                    models[name] = stack.enter_context(_staged(session, daemon, name, count, nbytes))
                    measure[name] = partial(
                        contend, "attaching:attach", runtime_dir=str(daemon.runtime_dir), model=str(models[name])
                    )
                samples = interleave(measure, repetitions, session.progress)
                _rows(section, samples, bound)
                if count == min(BOUNDS):
                    for model, name in zip(models.values(), models, strict=True):
                        session.progress(f"{name}: memory of further processes")
                        _memory_rows(section, daemon, model, name)
            section.samples[f"{count} tensors"] = samples
    return section


@contextlib.contextmanager
def _staged(session: Session, daemon: Daemon, name: str, count: int, nbytes: int) -> Iterator[Path]:
    """A checkpoint of so many tensors (all zeros: what counts here is not read), staged for the length of the block."""
    folder = session.folder / name.replace(" ", "-").replace(",", "")
    session.progress(f"{name}: staging")
    many_tensors(folder, count, nbytes, 8)
    record = daemon.stage(folder, wait=3600)
    if record["state"] != "ready":
        raise RuntimeError(f"{name}: the stage is {record['state']}: {record['error']}")
    yield folder
    daemon.client.remove(record["id"])


def _rows(section: Section, samples: dict[str, list[Sample]], bound: float) -> None:
    rows = []
    for name, found in samples.items():
        row = Row(f"attach(): {name}", "ms", milliseconds(found))
        row.under(bound)
        rows.append(row)
        together = Row("  and every tensor made", "ms", milliseconds(found, "together_seconds"))
        together.under(bound)
        section.rows += [row, together]
    first, second = rows
    section.notes.append(
        f"{second.contender} takes {second.median / first.median - 1:+.1%} of what {first.contender} takes: "
        f"{'the same' if abs(second.median / first.median - 1) <= SAME else 'NOT the same'} within {SAME:.0%}"
    )


# ---------------------------------------------------------------------- memory of further processes


def reader() -> None:
    """A process that attaches and reads every byte when told to: ``MODEL RUNTIME_DIR`` are its arguments.

    Says ``imported``, waits for a line, reads, says what it holds in JSON, and waits for the end of its input.
    """
    import torch  # noqa: F401
    import xxhash

    from weightd.ipc import attach as attach_weights

    model, runtime_dir = sys.argv[1:3]
    before = _own_memory()
    print("imported", flush=True)
    sys.stdin.readline()
    weights = attach_weights(model, socket=runtime_dir)
    in_threads(cores(), list(weights), lambda name: xxhash.xxh3_64_intdigest(weights.raw(name)))
    after = _own_memory()
    print(json.dumps({key: after[key] - before[key] for key in after}), flush=True)
    sys.stdin.read()
    os._exit(0)


def _own_memory() -> dict[str, int]:
    """Bytes that are this process's alone (smaps_rollup), and bytes of its page tables."""
    found = {"private": 0, "page_tables": 0}
    with open("/proc/self/smaps_rollup") as file:
        found["private"] = sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Private_"))
    with open("/proc/self/status") as file:
        found["page_tables"] = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmPTE"))
    return found


def _memory_rows(section: Section, daemon: Daemon, model: Path, name: str) -> None:
    """What a first, second and third process add that read every byte through the mapping, one after the other."""
    with ExitStack() as stack:
        readers = [stack.enter_context(_reader(daemon, model)) for _ in range(3)]
        found: list[dict[str, int]] = []
        for process in readers:
            assert process.stdin
            assert process.stdout
            before = _settled_available()
            process.stdin.write("read\n")
            process.stdin.flush()
            own = json.loads(process.stdout.readline())
            found.append({**own, "machine": before - _settled_available()})
        nbytes = next(
            record["footprint_bytes"] for record in daemon.client.stages() if record["model"].endswith(str(model))
        )
    section.samples[f"memory, {name}"] = found
    own = Row(
        f"memory of a further process, of the segment's: {name}",
        "%",
        [100 * (one["private"] + one["page_tables"]) / nbytes for one in found[1:]],
        "second and third, every byte read: private pages and page tables, beyond what it had with torch imported",
    )
    own.under(100 * MEMORY_SHARE)
    machine = Row(
        "  the same by the machine's MemAvailable",
        "%",
        [100 * one["machine"] / nbytes for one in found[1:]],
        "others on the machine move it too",
    )
    machine.under(100 * MEMORY_SHARE)
    section.rows += [own, machine]


@contextlib.contextmanager
def _reader(daemon: Daemon, model: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", "from tests.bench.attaching import reader; reader()", str(model),
         str(daemon.runtime_dir)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent,
    )  # fmt: skip
    try:
        assert process.stdout
        if process.stdout.readline().strip() != "imported":
            raise RuntimeError(f"a reader ended with {process.wait(60)} before it read anything")
        yield process
    finally:
        process.kill()
        process.communicate()


def _settled_available() -> int:
    """``MemAvailable`` once two readings in a row agree to a MiB: the kernel's counters lag a little behind."""
    last = meminfo()["MemAvailable"]
    for _ in range(20):
        time.sleep(0.1)
        now = meminfo()["MemAvailable"]
        if abs(now - last) < 1 << 20:
            return now
        last = now
    return last
