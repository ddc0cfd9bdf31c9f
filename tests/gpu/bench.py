"""The benchmark behind ``make gpu-bench``; docs/gpu.md says what it measures, and against what.

As ``make bench``: fresh processes, everybody's first repetition before anybody's second, medians. Each section's table
is printed, and everything is written to the JSON, as soon as it is there: a time limit takes only what is left.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ByteSize, TypeAdapter

from tests.bench.checkpoints import GIB, language_model, many_tensors, primer
from tests.bench.contender import ContenderFailed, contend
from tests.bench.machine import describe, require
from tests.bench.measure import (
    Row,
    Sample,
    Section,
    Target,
    cores,
    gigabytes_per_second,
    interleave,
    milliseconds,
    warm_memory,
)
from tests.bench.table import as_json
from tests.gpu.contenders import CUDA, fresh, later, rivals
from tests.gpu.machine import no_gpu
from tests.servers import Daemon, Missing, SeaweedFS, until

LIMIT_SHARE = 0.9
"""Of the pinned copy's rate: what filling from the page cache, and promoting from host memory, is to reach."""
DIGESTS = 500.0
"""GB/s that the digests' kernels are to reach."""
ATTACH = 60.0
"""Milliseconds for 10,000 tensors, as in host memory."""
LIMIT_BYTES = 4 * GIB
DIGEST_BYTES = 32 * GIB
S3_BYTES = 2 * GIB
LEAF = 1 << 20


@dataclass
class Session:
    """What the sections share; ``limits`` are GB/s of pinned copies by direction, once measured."""

    size: int
    repetitions: int
    folder: Path
    limits: dict[str, list[Sample]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def daemon(self, name: str, env: Mapping[str, str] | None = None) -> Daemon:
        """``weightd serve`` with room for what is moved and staged on the host."""
        capacity = f"cpu={2 * self.size + GIB}"
        own = {"WEIGHTD_RESTART_LIMIT": "0", "WEIGHTD_RESTART_WINDOW": "1", **(env or {})}
        return Daemon(self.folder / f"weightd-{name}", "--capacity", capacity, env=own)

    def checkpoint(self) -> list[str]:
        """The checkpoint's files, made when first asked for."""
        if not self.files:
            progress("making the checkpoint")
            self.files = [str(path) for path in language_model(self.model, self.size)]
        return self.files

    def limit(self, direction: str) -> Row:
        """The best pinned copy, of as many repetitions as everything has."""
        if direction not in self.limits:
            nbytes = min(self.size, LIMIT_BYTES)
            run = later("pinned_copies", nbytes=nbytes, direction=direction)
            name = f"pinned copy {direction}"
            self.limits[direction] = interleave({name: run}, self.repetitions, progress)[name]
        samples = self.limits[direction]
        row = Row(f"pinned copy {direction}: the limit", "GB/s", gigabytes_per_second(samples))
        row.note = f"best of five ways, here {samples[0]['named']}"
        return row


def progress(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------- sections


def from_file(session: Session) -> Section:
    """Page cache → GPU, both ways of filling, beside the limit and everybody else."""
    section = Section("file", "file (page cache) → GPU")
    files = session.checkpoint()
    small = primer(session.folder)
    with session.daemon("ring", {"WEIGHTD_CUDA_FILL": "ring"}) as ring, session.daemon("auto") as auto:
        contenders: dict[str, Callable[[], Sample]] = {
            "limit": later("pinned_copies", nbytes=min(session.size, LIMIT_BYTES), direction="to the GPU"),
            "read": lambda: contend("raw:into_faulted_memory", files=files, tries=[[cores(), 8 << 20, "by the read"]]),
        }
        given = {"model": str(session.model), "files": files, "device": CUDA}
        daemons = {"ring": ring, "auto": auto}
        for name, daemon in daemons.items():
            contenders[name] = later("stage", runtime_dir=str(daemon.runtime_dir), **given)
        others = rivals(small, files)
        for name, run in [*contenders.items(), *others.items()]:
            progress(f"{name}: warming up")
            try:
                section.samples[f"warm-up: {name}"] = [run()]
            except ContenderFailed as error:
                if name not in others:
                    raise
                section.notes.append(f"{name} cannot be measured here: {error}")
                del others[name]
        samples = interleave({**contenders, **others}, session.repetitions, progress)
        for name, daemon in daemons.items():
            device = next(one for one in daemon.client.node()["devices"] if one["name"] == CUDA)
            section.notes.append(
                f"WEIGHTD_CUDA_FILL={name}: filled by {device['fill_path']}, digests on the {device['digest_path']}"
            )
            section.notes.append(f"{name}: {_where_the_time_went(samples[name])}")
    section.samples["repetitions"] = samples
    session.limits.setdefault("to the GPU", samples["limit"])
    limit = session.limit("to the GPU")
    reads = [sample["runs"][0] for sample in samples["read"]]
    read = Row("raw preadv into faulted host memory", "GB/s", gigabytes_per_second(reads))
    read.note = f"{cores()} threads: what a path through bounce buffers cannot outrun"
    rows = {name: Row(f"weightd, {name}", "GB/s", gigabytes_per_second(samples[name])) for name in daemons}
    theirs = [Row(name, "GB/s", gigabytes_per_second(samples[name])) for name in others]
    for row in rows.values():
        row.at_least(LIMIT_SHARE, limit)
    for row in theirs:
        rows["auto"].at_least(1.0, row)
    section.rows += [limit, read, *rows.values(), *theirs]
    digests = {sample["checkpoint_digest"] for name in daemons for sample in samples[name]}
    section.notes.append(f"digest, the same in all repetitions: {len(digests) == 1}")
    return section


def from_s3(session: Session) -> Section:
    """S3 on loopback → GPU, beside the same into host memory."""
    size = min(session.size, S3_BYTES)
    section = Section("s3", f"S3 on loopback → GPU, {size / GIB:g} GiB, the server on the same cores")
    try:
        server = SeaweedFS(session.folder / "s3")
    except Missing as missing:
        section.notes.append(f"not measured: {missing}")
        return section
    folder = session.folder / "for-s3"
    language_model(folder, size)
    with server:
        progress("uploading")
        uri = server.upload(folder, "bench")
        with session.daemon("s3", server.env) as daemon:
            given = {"runtime_dir": str(daemon.runtime_dir), "model": uri, "files": []}
            contenders = {
                "to the GPU": later("stage", device=CUDA, **given),
                "to host memory": later("stage", device="cpu", nbytes=size, **given),
            }
            section.samples["warm-up"] = [run() for run in contenders.values()]
            samples = interleave(contenders, session.repetitions, progress)
    section.samples["repetitions"] = samples
    host, gpu = (Row(f"S3 {name}", "GB/s", gigabytes_per_second(samples[name])) for name in reversed(list(samples)))
    gpu.at_least(0.0, host)
    section.rows += [host, gpu]
    return section


def attaching(session: Session) -> Section:
    """``attach()`` to 10,000 tensors on the GPU, without and with all of them made."""
    section = Section("attach", "attach() to 10,000 tensors on the GPU, fresh processes that have a context")
    folder = session.folder / "many"
    many_tensors(folder, 10_000, GIB, 8)
    with session.daemon("attach") as daemon:
        stage = daemon.stage(folder, wait=3600, device=CUDA)
        if stage["state"] != "ready":
            raise RuntimeError(f"the stage is {stage['state']}: {stage['error']}")
        given = {"runtime_dir": str(daemon.runtime_dir), "stage": stage["id"]}
        repetitions = max(5, session.repetitions)
        samples = interleave({"attach": later("attach", make=False, **given)}, repetitions, progress)
        try:
            samples |= interleave({"made": later("attach", make=True, **given)}, repetitions, progress)
        except ContenderFailed as error:
            section.notes.append(f"tensors cannot be made here: {error}")
    section.samples["repetitions"] = samples
    row = Row("attach()", "ms", milliseconds(samples["attach"]))
    row.under(ATTACH)
    section.rows.append(row)
    if "made" in samples:
        section.rows.append(Row("attach(), torch in the process", "ms", milliseconds(samples["made"])))
        row = Row("  and every tensor made", "ms", milliseconds(samples["made"], "together_seconds"))
        section.rows.append(row)
    return section


def digesting(session: Session) -> Section:
    """What the digests' kernels do of memory on the GPU."""
    section = Section("digest", "digests on the GPU, results on the host, by the wall clock")
    lots = {"in one call": 1 << 30, "1 GiB a call": GIB // LEAF, "64 MiB a call": 64}
    contenders = {name: later("digests", nbytes=DIGEST_BYTES, lot=lot) for name, lot in lots.items()}
    try:
        samples = interleave(contenders, session.repetitions, progress)
    except ContenderFailed as error:
        section.notes.append(f"not measured: {error}")
        return section
    section.samples["repetitions"] = samples
    for name, found in samples.items():
        row = Row(f"leaf digests of {found[0]['nbytes'] / GIB:.0f} GiB, {name}", "GB/s", gigabytes_per_second(found))
        if name == "in one call":
            row.targets.append(Target("", DIGESTS, row.median, "at least", row.unit))
        section.rows.append(row)
    return section


def moving(session: Session) -> Section:
    """Host segment → GPU and back, without the source, verified where it arrives."""
    section = Section("move", "POST /v1/stage/{id}/move between host memory and GPU")
    session.checkpoint()
    found: dict[str, list[Sample]] = {"cuda": [], "cpu": []}
    with session.daemon("move") as daemon:
        stage = daemon.stage(session.model, wait=3600, device="cpu")
        if stage["state"] != "ready":
            raise RuntimeError(f"the stage is {stage['state']}: {stage['error']}")
        for repetition in range(session.repetitions + 1):
            for device in (CUDA, "cpu"):
                progress(f"moving to {device}: {f'repetition {repetition}' if repetition else 'warming up'}")
                if device == "cpu":
                    warm_memory(session.size)
                start = time.perf_counter()
                record = daemon.client.move(stage["id"], device)
                seconds = time.perf_counter() - start
                if (record["state"], record["device"]) != ("ready", device):
                    raise RuntimeError(f"the stage is {record['state']} on {record['device']}")
                if repetition:
                    sample = {"seconds": seconds, "nbytes": record["bytes_total"]}
                    found[device.partition(":")[0]].append(sample)
    section.samples["repetitions"] = found
    up, down = session.limit("to the GPU"), session.limit("to the host")
    promote = Row("promote: host segment → GPU, verified", "GB/s", gigabytes_per_second(found["cuda"]))
    promote.at_least(LIMIT_SHARE, up)
    demote = Row("demote: GPU → new host segment, verified", "GB/s", gigabytes_per_second(found["cpu"]))
    demote.at_least(0.0, down)
    section.rows += [up, promote, down, demote]
    return section


def restarting(session: Session) -> Section:
    """kill -9 of the daemon until its stage on the GPU is ready again."""
    section = Section("restart", "kill -9 of the daemon until the stage on the GPU is ready again")
    session.checkpoint()
    seconds, attached = [], []
    with session.daemon("restart") as daemon:
        stage = daemon.stage(session.model, wait=3600, device=CUDA)
        if stage["state"] != "ready":
            raise RuntimeError(f"the stage is {stage['state']}: {stage['error']}")
        for repetition in range(session.repetitions):
            progress(f"kill -9: repetition {repetition + 1}")
            pid = daemon.status["daemon_pid"]
            start = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            # The socket is the keeper's: the request waits in it for the next daemon.
            states = [one["state"] for one in daemon.client.stages()]
            seconds.append(time.perf_counter() - start)
            if states != ["ready"]:
                raise RuntimeError(f"after the restart: {states}")
            given = {"runtime_dir": str(daemon.runtime_dir), "stage": stage["id"]}
            attached.append(fresh("attach", make=False, **given))
            until(lambda: daemon.status["state"] == "running", "the keeper says so as well")
    section.rows.append(Row(f"{session.size / GIB:g} GiB on the GPU, ready again", "s", seconds))
    section.rows.append(Row("the first attach() after it", "ms", milliseconds(attached)))
    return section


SECTIONS = {
    "file": from_file,
    "s3": from_s3,
    "attach": attaching,
    "digest": digesting,
    "move": moving,
    "restart": restarting,
}


def _where_the_time_went(samples: list[Sample]) -> str:
    last = samples[-1]
    states = ", ".join(f"{name} {seconds:.3f}" for name, seconds in last["state_seconds"].items())
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in last["phase_seconds"].items())
    return f"seconds by state: {states}; thread-seconds by phase: {phases}"


# ---------------------------------------------------------------------- the report


def as_markdown(section: Section) -> str:
    """One section as a table, a line for each target."""
    lines = [
        f"### {section.title}",
        "",
        "| | median | min - max | against | is | target | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in section.rows:
        name = row.contender + (f" ({row.note})" if row.note else "")
        figures = f"{_number(row.median)} {row.unit} | {_number(min(row.values))} - {_number(max(row.values))}"
        for number, target in enumerate(row.targets or [None]):
            head = f"| {name} | {figures} |" if not number else "| | | |"
            if target is None:
                lines.append(f"{head} | | | |")
                continue
            unit = "×" if target.against else f" {target.unit}"
            sign = "≥" if target.sense == "at least" else "<"
            wanted = f"{sign} {_number(target.wanted)}{unit}" if target.wanted else ""
            verdict = "" if not target.wanted else "met" if target.met else f"short by {target.short_by:.0%}"
            lines.append(f"{head} {target.against} | {_number(target.found)}{unit} | {wanted} | {verdict} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in section.notes), ""])


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def main() -> int:
    """Run the sections asked for. Exit code 0 whatever the figures, and where there is no GPU."""
    arguments = _arguments()
    if reason := no_gpu():
        print(f"gpu-bench measures nothing: {reason}")
        return 0
    # Settings of the user's own daemon are not what is measured.
    for variable in [key for key in os.environ if key.startswith(("WEIGHTD_", "RUNAI_STREAMER_"))]:
        del os.environ[variable]
    sections: list[Section] = []
    failed = False
    with tempfile.TemporaryDirectory(prefix="weightd-gpu-", dir=arguments.folder, ignore_cleanup_errors=True) as name:
        session = Session(arguments.size, arguments.repetitions, Path(name))
        require(session.folder, disk=arguments.size * 2 + 4 * GIB, memory=4 * arguments.size + 4 * GIB)
        found = fresh("facts") | describe(session.folder)
        print("\n".join(f"- {key}: {value}" for key, value in found.items()) + "\n", flush=True)
        for section in arguments.sections:
            try:
                sections.append(SECTIONS[section](session))
            except (RuntimeError, AssertionError) as error:
                failed = True
                sections.append(Section(section, section, notes=[f"FAILED: {error}"]))
            print(as_markdown(sections[-1]), flush=True)
            given = {"size": arguments.size, "repetitions": arguments.repetitions, "sections": arguments.sections}
            arguments.json.write_text(json.dumps(as_json(found, given, sections), indent=1) + "\n")
            for left in session.folder.glob("weightd-*"):
                shutil.rmtree(left, ignore_errors=True)
    print(f"every sample is in {arguments.json}")
    return int(failed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make gpu-bench", description="Measure weightd on a GPU beside its limits.")
    parser.add_argument("--size", type=_size, default=8 * GIB, help="bytes of the checkpoint (default: 8GiB)")
    parser.add_argument("--repetitions", type=int, default=3, help="repetitions of everything (default: 3)")
    parser.add_argument(
        "--sections", type=_sections, default=list(SECTIONS), help=f"which tables (default: {','.join(SECTIONS)})"
    )
    parser.add_argument("--json", type=Path, default=Path("gpu-bench.json"), help="file for every sample")
    parser.add_argument("--folder", type=Path, help="where checkpoints are made (default: the temporary folder)")
    return parser.parse_args()


def _size(text: str) -> int:
    return int(TypeAdapter(ByteSize).validate_python(text))


def _sections(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"no section is called {unknown[0]!r}: {', '.join(SECTIONS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
