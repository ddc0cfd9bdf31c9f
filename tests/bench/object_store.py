"""A checkpoint in an object store on this machine, which takes its share of the same cores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.checkpoints import language_model, primer
from tests.bench.measure import Section
from tests.bench.session import Session
from tests.servers import Missing, SeaweedFS


@dataclass(frozen=True)
class Stored:
    """Where a checkpoint's files are. ``primer``: a small one beside it, for connecting before anything is timed."""

    server: SeaweedFS
    prefix: str
    uris: list[str]
    sizes: list[int]
    primer: str


@contextmanager
def stored(session: Session, section: Section, folder: Path, size: int) -> Iterator[Stored | None]:
    """A checkpoint of ``size`` bytes, made in ``folder``; None where there is no object store, which is noted."""
    session.progress("making the checkpoint")
    files = language_model(folder, size)
    primer(folder)
    try:
        server = SeaweedFS(session.folder / "s3")
    except Missing as missing:
        section.notes.append(f"not measured: {missing}")
        yield None
        return
    with server:
        session.progress("uploading")
        prefix = server.upload(folder, "bench")
        # What is measured is a checkpoint; the file that primes is beside it, not in it: the index says so.
        sizes = [path.stat().st_size for path in files]
        yield Stored(server, prefix, [f"{prefix}/{path.name}" for path in files], sizes, f"{prefix}/primer.safetensors")
