"""Planning: everything before a byte is allocated, of 100,000 tensors in 1,000 shards on local disk."""

from __future__ import annotations

from functools import partial
from statistics import median

from tests.bench.checkpoints import many_tensors
from tests.bench.contender import contend
from tests.bench.measure import Row, Section, interleave
from tests.bench.session import Session

TENSORS, SHARDS = 100_000, 1_000
BOUND = 2.0
"""Seconds."""


def run(session: Session) -> Section:
    """Measure; the checkpoint is made here and removed by the session."""
    session.progress(f"making {SHARDS} shards")
    folder = session.folder / "model"
    many_tensors(folder, TENSORS, TENSORS << 20, SHARDS)
    plan = partial(contend, "staging:plan", model=str(folder))
    plan()  # the directory and the headers are in the page cache, as all else here
    samples = interleave({"planning": plan}, session.repetitions, session.progress)["planning"]
    first = samples[0]
    section = Section("planning", f"planning {first['tensors']:,} tensors in {first['shards']:,} shards, with an index")
    row = Row("weightd: plan", "s", [sample["seconds"] for sample in samples])
    row.note = "list_checkpoint, open_checkpoint, checkpoint_layout, plan_extents"
    row.under(BOUND)
    section.rows.append(row)
    for step in first["steps"]:
        section.rows.append(Row(f"  {step}", "s", [sample["steps"][step] for sample in samples]))
    section.notes.append(f"{first['extents']:,} extents; CPU seconds, user and system: "
                         f"{median(s['cpu_user'] for s in samples):.2f}, {median(s['cpu_system'] for s in samples):.2f}"
                         )  # fmt: skip
    section.samples["repetitions"] = samples
    return section
