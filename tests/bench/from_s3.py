"""S3 → segment, from a server on this machine, which takes its share of the same cores."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

from tests.bench.contender import ContenderFailed, contend
from tests.bench.from_file import where_the_time_went
from tests.bench.machine import require, version
from tests.bench.measure import (
    Row,
    Sample,
    Section,
    address,
    faulted_memfd,
    fresh_memfd,
    gigabytes_per_second,
    interleave,
    timed,
    warm_memory,
)
from tests.bench.object_store import stored
from tests.bench.session import Session

MAX_SIZE = 1 << 30
_PARTS = (8 << 20, 64 << 20)
_IN_FLIGHT = (32 << 20, 256 << 20, 1 << 40)
_THREADS = (1, 2, 4, 8, 16)
_OUT_OF_THE_BOX = "as it comes"


def library(primer: str, uris: list[str], sizes: list[int], part: int, in_flight: int, fresh: bool = False) -> Sample:
    """The streamer's own library, into memory that is there already, ``part`` bytes a request; no digests, no plan.

    ``fresh``: into memory that has to be faulted in meanwhile, as a segment has to.
    """
    from weightd.daemon.devices.libstreamer import SUCCESS, Streamer, describe

    def load(ranges: list[tuple[str, int, int]], base: int) -> None:
        streamer = Streamer()
        try:
            waiting = iter(ranges)
            pending: dict[int, int] = {}
            position = flying = 0
            left = len(ranges)
            upcoming = next(waiting, None)
            while left:
                while upcoming is not None and (not pending or flying + upcoming[2] <= in_flight):
                    uri, offset, length = upcoming
                    pending[streamer.submit(uri, [offset], [length], [base + position])] = length
                    position += length
                    flying += length
                    upcoming = next(waiting, None)
                response = streamer.response(60)
                if response is None or response.code != SUCCESS:
                    raise RuntimeError(f"libstreamer: {describe(response.code) if response else 'no response'}")
                flying -= pending.pop(response.submission)
                left -= 1
        finally:
            streamer.close()

    ranges = [
        (uri, offset, min(part, size - offset))
        for uri, size in zip(uris, sizes, strict=True)
        for offset in range(0, size, part)
    ]
    if fresh:
        warm_memory(sum(sizes))
        block = fresh_memfd(sum(sizes))
    else:
        _, block = faulted_memfd(sum(sizes))
    load([(primer, 0, 1024)], address(block))
    with timed() as sample:
        load(ranges, address(block))
    return {**sample, "nbytes": sum(sizes)}


def run(session: Session) -> Section:
    """Measure; server, objects and checkpoint are made here and removed by the session."""
    size = min(session.size, MAX_SIZE)
    section = Section("s3", f"S3 → segment, {size / 2**30:.2f} GiB in 8 objects, SeaweedFS on the same cores")
    require(session.folder, disk=3 * size + (2 << 30), memory=4 * size + (1 << 30))
    with stored(session, section, session.folder / "model", size) as there:
        if there is None:
            return section
        server, prefix, uris, sizes, small = there.server, there.prefix, there.uris, there.sizes, there.primer
        best_library, library_runs = session.calibrate(
            "the streamer library alone", _library_choices(server.env, small, uris, sizes)
        )
        section.samples["calibration of the library"] = library_runs
        rivals = _rivals(session, section, server.env, small, uris, sum(sizes))
        with session.daemon("s3", int(1.2 * size) + (64 << 20), server.env) as daemon:
            staging = partial(
                contend, "staging:stage", runtime_dir=str(daemon.runtime_dir), model=prefix, nbytes=size, files=[]
            )
            session.progress("weightd: warming up")
            section.samples["warm-up"] = [staging()]
            contenders: dict[str, Callable[[], Sample]] = {
                "library": _library_choices(server.env, small, uris, sizes)[best_library],
                "library, fresh": _library_choices(server.env, small, uris, sizes, fresh=True)[best_library],
                "weightd": staging,
                **rivals,
            }
            samples = interleave(contenders, session.repetitions, session.progress)
    section.samples["repetitions"] = samples
    limit = Row("the streamer library alone, digests off", "GB/s", gigabytes_per_second(samples["library"]))
    limit.note = f"into faulted memory; {best_library}"
    fresh = Row("the same into fresh memory", "GB/s", gigabytes_per_second(samples["library, fresh"]))
    fresh.note = "which has to be faulted in meanwhile, as a segment has to"
    ours = Row("weightd: POST /v1/stage until ready", "GB/s", gigabytes_per_second(samples["weightd"]))
    ours.at_least(0.95, limit)
    others = [Row(name, "GB/s", gigabytes_per_second(samples[name])) for name in rivals]
    for row in others:
        ours.at_least(1.0, row)
    section.rows += [limit, fresh, ours, *others]
    section.notes.append("weightd, median of all: " + where_the_time_went(samples["weightd"]))
    return section


def _library_choices(
    environment: dict[str, str], primer: str, uris: list[str], sizes: list[int], fresh: bool = False
) -> dict[str, Callable[[], Sample]]:
    choices: dict[str, Callable[[], Sample]] = {}
    for part, in_flight, threads in itertools.product(_PARTS, _IN_FLIGHT, _THREADS):
        if part > in_flight:
            continue
        bound = f"{in_flight >> 20} MiB in flight" if in_flight < 1 << 40 else "all in flight"
        choices[f"{part >> 20} MiB a request, {bound}, {threads} threads"] = partial(
            contend,
            "from_s3:library",
            primer=primer,
            uris=uris,
            sizes=sizes,
            part=part,
            in_flight=in_flight,
            fresh=fresh,
            environment={**environment, "RUNAI_STREAMER_OBJ_CONCURRENCY": str(threads)},
        )
    return choices


def _rivals(
    session: Session, section: Section, environment: dict[str, str], primer: str, uris: list[str], nbytes: int
) -> dict[str, Callable[[], Sample]]:
    name = "runai SafetensorsStreamer"
    if version("runai-model-streamer") is None:
        section.notes.append(f"{name} is not installed: pip install runai-model-streamer runai-model-streamer-s3")
        return {}
    measure = partial(contend, "rivals:runai", primer=primer, files=uris, nbytes=nbytes)
    choices: dict[str, Callable[[], Sample]] = {_OUT_OF_THE_BOX: partial(measure, environment=environment)}
    for threads in _THREADS:
        choices[f"{threads} threads"] = partial(
            measure, environment={**environment, "RUNAI_STREAMER_OBJ_CONCURRENCY": str(threads)}
        )
    try:
        best, section.samples[f"calibration of {name}"] = session.calibrate(name, choices)
    except ContenderFailed as error:
        section.notes.append(f"{name} cannot be measured here: {error}")
        return {}
    return {f"{name} ({choice})": choices[choice] for choice in dict.fromkeys((best, _OUT_OF_THE_BOX))}
