"""File → segment, page cache warm; and the pipeline alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from tests.bench import raw
from tests.bench.checkpoints import language_model, primer
from tests.bench.contender import ContenderFailed, contend
from tests.bench.machine import require, version
from tests.bench.measure import Row, Sample, Section, cores, gigabytes_per_second, interleave, milliseconds
from tests.bench.session import Session

_NATIVE = ("sync_buffered", "io_uring_buffered", "io_uring_direct")
"""The streamer's ways to read files (RUNAI_STREAMER_FS_STRATEGY)."""
_RUNAI = "runai SafetensorsStreamer"
_FAST = "fastsafetensors"
_OUT_OF_THE_BOX = "as it comes"


def run(session: Session) -> Section:
    """Measure; the checkpoint is made here and removed by the session."""
    # Page cache, a segment or a rival's copy, and as much again while one is freed and the next is filled.
    require(session.folder, disk=session.size + (1 << 30), memory=int(2.3 * session.size) + (1 << 30))
    session.progress("making the checkpoint")
    folder = session.folder / "model"
    files = [str(path) for path in language_model(folder, session.size)]
    small = str(primer(session.folder))
    section = Section("file", "file → segment, page cache warm")

    fresh = _best_raw(session, section, "into_fresh_memfd", files, raw.FAULTS)
    faulted = _best_raw(session, section, "into_faulted_memory", files, ("by the read",))
    runai = _runai_choices(session, section, small, files)
    fast = _fast_choices(session, section, small, files)

    with session.daemon("file", int(1.2 * session.size) + (64 << 20)) as daemon:
        staging = partial(
            contend,
            "staging:stage",
            runtime_dir=str(daemon.runtime_dir),
            model=str(folder),
            nbytes=session.size,
            files=files,
        )
        alone = partial(contend, "staging:pipeline", model=str(folder), cache_dir=str(daemon.cache_dir), files=files)
        session.progress("weightd: warming up")
        section.samples["warm-up"] = [staging(), alone()]
        contenders: dict[str, Callable[[], Sample]] = {
            "fresh": lambda: contend("raw:into_fresh_memfd", files=files, tries=fresh),
            "weightd": staging,
            **runai,
            **fast,
            "load_file, read": partial(contend, "rivals:load_file_read", primer=small, files=files),
            "load_file, copied": partial(
                contend,
                "rivals:load_file_copy",
                primer=small,
                files=files,
                environment={"THP_MEM_ALLOC_ENABLE": "1"},
            ),
            "faulted": lambda: contend("raw:into_faulted_memory", files=files, tries=faulted),
            "pipeline": alone,
        }
        samples = interleave(contenders, session.repetitions, session.progress)
    section.samples["repetitions"] = samples
    _rows(section, samples, runai, fast)
    return section


def _best_raw(
    session: Session, section: Section, function: str, files: list[str], faults: tuple[str, ...]
) -> list[list[Any]]:
    """The two best ways to read: both are in every repetition, and the better one of the medians is the limit."""
    choices = raw.configurations(faults)
    session.progress(f"raw preadv {function}: {len(choices)} configurations")
    runs = contend(f"raw:{function}", files=files, tries=choices)["runs"]
    runs.sort(key=lambda run: run["seconds"])
    session.progress(f"raw preadv {function}: the best once more")
    runs += contend(f"raw:{function}", files=files, tries=[run["configuration"] for run in runs[:4]])["runs"]
    section.samples[f"calibration of raw {function}"] = runs
    found: list[list[Any]] = []
    for run in sorted(runs, key=lambda run: run["seconds"]):
        if run["configuration"] not in found:
            found.append(run["configuration"])
    return found[:2]


def _runai_choices(
    session: Session, section: Section, primer: str, files: list[str]
) -> dict[str, Callable[[], Sample]]:
    if version("runai-model-streamer") is None:
        section.notes.append(f"{_RUNAI} is not installed: pip install runai-model-streamer")
        return {}
    measure = partial(contend, "rivals:runai", primer=primer, files=files)
    environments: dict[str, dict[str, str]] = {_OUT_OF_THE_BOX: {}}
    for strategy in _NATIVE:
        for threads in sorted({cores(), 2 * cores(), 16}):
            environments[f"{strategy}, concurrency {threads}"] = {
                "RUNAI_STREAMER_FS_STRATEGY": strategy,
                "RUNAI_STREAMER_CONCURRENCY": str(threads),
            }
    choices = {name: partial(measure, environment=values) for name, values in environments.items()}
    return _calibrated(session, section, _RUNAI, choices)


def _fast_choices(session: Session, section: Section, primer: str, files: list[str]) -> dict[str, Callable[[], Sample]]:
    if version("fastsafetensors") is None:
        section.notes.append(f"{_FAST} is not installed: pip install fastsafetensors")
        return {}
    measure = partial(contend, "rivals:fastsafetensors", primer=primer, files=files)
    choices = {_OUT_OF_THE_BOX: partial(measure, threads=None)}
    for threads in sorted({cores(), 2 * cores(), 16}):
        choices[f"buffered, {threads} threads"] = partial(
            measure, threads=threads, environment={"FASTSAFETENSORS_ODIRECT": "0"}
        )
    return _calibrated(session, section, _FAST, choices)


def _calibrated(
    session: Session, section: Section, name: str, choices: dict[str, Callable[[], Sample]]
) -> dict[str, Callable[[], Sample]]:
    """The best configuration and the one out of the box, which may be the same."""
    try:
        best, section.samples[f"calibration of {name}"] = session.calibrate(name, choices)
    except ContenderFailed as error:
        section.notes.append(f"{name} cannot be measured here: {error}")
        return {}
    found = {f"{name} ({best})": choices[best]}
    if best != _OUT_OF_THE_BOX:
        found[f"{name} ({_OUT_OF_THE_BOX})"] = choices[_OUT_OF_THE_BOX]
    return found


def _raw_row(title: str, samples: list[Sample]) -> Row:
    """The better of the configurations that every repetition ran."""
    by_configuration = zip(*(sample["runs"] for sample in samples), strict=True)
    rows = [Row(title, "GB/s", gigabytes_per_second(runs), runs[0]["named"]) for runs in by_configuration]
    return max(rows, key=lambda row: row.median)


def _rows(
    section: Section,
    samples: dict[str, list[Sample]],
    runai: dict[str, Callable[[], Sample]],
    fast: dict[str, Callable[[], Sample]],
) -> None:
    limit = _raw_row("raw preadv into a fresh memfd", samples["fresh"])
    ours = Row("weightd: POST /v1/stage until ready", "GB/s", gigabytes_per_second(samples["weightd"]))
    rivals = {name: Row(name, "GB/s", gigabytes_per_second(samples[name])) for name in (*runai, *fast)}
    read = Row("safetensors load_file, every byte read", "GB/s", gigabytes_per_second(samples["load_file, read"]))
    read.note = "maps the page cache and copies nothing; read by XXH3 in a thread a core"
    copied = Row(
        "safetensors load_file, every tensor copied", "GB/s", gigabytes_per_second(samples["load_file, copied"])
    )
    copied.note = "into memory of its own, as all others deliver them"
    ours.at_least(0.85, limit)
    for names in (runai, fast):
        for name in list(names)[:1]:
            ours.at_least(2.0, rivals[name])
    ours.at_least(1.2, read)
    ours.at_least(1.2, copied)
    by_record = [{**sample, "seconds": sample["record_seconds"]} for sample in samples["weightd"]]
    record = Row("weightd: the same by its own record", "GB/s", gigabytes_per_second(by_record))
    record.note = "ready_at - created_at"
    delete = Row("weightd: DELETE, memory released", "ms", milliseconds(samples["weightd"], "delete_seconds"))
    again = [{**sample, "seconds": sample["touch_again"]} for sample in samples["load_file, read"]]
    touch = Row("the reading alone, of what is mapped already", "GB/s", gigabytes_per_second(again))
    faulted = _raw_row("raw preadv into faulted memory", samples["faulted"])
    alone = Row("weightd's pipeline alone into faulted memory", "GB/s", gigabytes_per_second(samples["pipeline"]))
    alone.note = "listing, planning, reads, digests; no daemon"
    alone.at_least(0.6, faulted)
    section.rows += [limit, ours, record, *rivals.values(), read, touch, copied, faulted, alone, delete]
    _notes(section, samples)


def _notes(section: Section, samples: dict[str, list[Sample]]) -> None:
    first = samples["weightd"][0]
    section.title += f", {first['nbytes'] / 2**30:.2f} GiB in 8 shards"
    digests = {sample["checkpoint_digest"] for sample in (*samples["weightd"], *samples["pipeline"])}
    section.notes.append(f"digest, the same in all repetitions: {digests.pop()}" if len(digests) == 1 else
                         f"DIGESTS DIFFER: {sorted(map(str, digests))}")  # fmt: skip
    section.notes.append("weightd, median of all: " + where_the_time_went(samples["weightd"]))
    section.notes.append("pipeline alone, median of all: " + _phases(samples["pipeline"]))
    huge = median(sample["huge_pages"] / max(1, sample["held"]) for sample in samples["weightd"])
    section.notes.append(f"share of the segment in huge pages: {huge:.0%}")


def where_the_time_went(samples: list[Sample]) -> str:
    """Seconds by state, and thread-seconds by phase of loading, of weightd's records."""
    states = {
        state: median(sample["state_seconds"].get(state, 0.0) for sample in samples)
        for state in samples[0]["state_seconds"]
    }
    http = median(sample["seconds"] - sample["record_seconds"] for sample in samples)
    text = ", ".join(f"{state} {seconds:.3f} s" for state, seconds in states.items())
    return f"{text}, outside the record {http:.3f} s; {_phases(samples)}"


def _phases(samples: list[Sample]) -> str:
    phases = {
        phase: median(sample["phase_seconds"][phase] for sample in samples) for phase in samples[0]["phase_seconds"]
    }
    return "thread-seconds of loading: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in phases.items())
