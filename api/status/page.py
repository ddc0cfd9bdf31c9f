"""The page as it is served: its parts put together, and the tables that stand in where JavaScript does not run."""

from __future__ import annotations

import base64
import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from html import escape
from importlib import resources
from operator import itemgetter
from string import Template
from typing import Any

from weightd.api import overview
from weightd.api.node_models import device_record
from weightd.daemon.node.service import Node
from weightd.daemon.stages.stage import Stage

_SCRIPTS = ("elements.js", "stream.js", "devices.js", "stages.js", "tables.js", "page.js")
MAX_BYTES = 59_900
"""Of the whole page."""
_MAX_ERRORS = 20
_MAX_TEXT = 120
"""Characters of one cell; a longer text is cut."""
_NO_TOKEN = """<noscript><section><h2>401: a token is needed here</h2>
<p>The setting <code>WEIGHTD_TOKEN</code> has it. Without JavaScript it has to come with the request:</p>
<pre>curl -H "Authorization: Bearer $$WEIGHTD_TOKEN" http://127.0.0.1:7400/v1/stage</pre></section></noscript>""".replace(
    "$$", "$"
)

Record = Mapping[str, Any]


@cache
def _parts() -> tuple[Template, str, str]:
    """What is the same in every answer: the page, its style and its script, none of whose names is global."""
    here = resources.files("weightd.api.status")
    page, style = ((here / name).read_text("utf-8") for name in ("page.html", "style.css"))
    scripts = "".join((here / name).read_text("utf-8") for name in _SCRIPTS)
    return Template(page), f"\n{style}", f'\n"use strict";\n(() => {{\n{scripts}}})();\n'


@cache
def headers() -> Mapping[str, str]:
    """The answer's headers: nothing runs or is fetched but what is in the page, and nobody frames it."""
    _, style, script = _parts()
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-store",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def render(node: Node | None) -> str:
    """The page, of ``MAX_BYTES`` at most whatever there is; None: with nothing of the node, but how to ask for it."""
    page, style, script = _parts()

    def filled(body: str) -> str:
        return page.substitute(style=style, script=script, body=body)

    if node is None:
        return filled(_NO_TOKEN)
    return filled(f"<noscript>{_tables(node, MAX_BYTES - len(filled('<noscript></noscript>').encode()))}</noscript>")


def _tables(node: Node, most: int) -> str:
    """All tables, in ``most`` bytes together: stages, of which there are the most, get what the others leave."""
    about = _record(overview.node_summary, node)
    stages = sorted(node.stages(), key=lambda stage: stage.created_at, reverse=True)
    leases = list(itertools.islice(node.residency.leases, overview.MAX_LEASES))
    peers, devices = list(overview.peers(node)), list(node.devices.values())
    preload = about["node"]["preload"]
    errors = _errors(node, stages)
    found = {
        "about": _about(about, node),
        "preload": _table("Preload", preload, _PRELOAD, len(preload), 1300) if preload else "",
        "devices": _table("Devices", (_record(device_record, device, node.residency) for device in devices), _DEVICE,
                          len(devices), 1300),
        "stages": "",
        "leases": _table("Leases", (_record(overview.lease_summary, one) for one in leases), _LEASE, len(leases), 1300),
        "peers": _table("Peers", (_record(overview.peer_summary, *one) for one in peers), _PEER, len(peers), 1300),
        "errors": _table("Last errors", errors, _ERROR, len(errors), 2500),
    }  # fmt: skip
    left = most - len("".join(found.values()).encode())
    records = (_record(overview.stage_summary, stage) for stage in stages)
    found["stages"] = _table("Stages, the latest first", records, _STAGE, len(stages), left)
    return "".join(found.values())


def _about(about: Record, node: Node) -> str:
    return (
        f"<p>weightd {_cell(about['version'])}, pid {about['node']['pid']}, default device "
        f"{_cell(about['node']['default_device'])}, up for {_seconds(time.time() - node.started_at)}; as of "
        f'{_when(time.time())}. Without JavaScript this page stands still: <a href="">load it again</a>.</p>\n'
    )


def _errors(node: Node, stages: Iterable[Stage]) -> list[Record]:
    """The last errors, the latest first, of stages and of what was refused."""
    found: list[Record] = []
    for stage in itertools.islice((stage for stage in stages if stage.state == "failed"), _MAX_ERRORS):
        record = _record(overview.stage_summary, stage)
        found.append({**record["error"], "at": record["state_since"], "of": record["model"]})
    found += [{**_record(overview.refusal_summary, refusal), "of": "refused"} for refusal in node.refusals]
    return sorted(found, key=lambda error: -error["at"])[:_MAX_ERRORS]


def _record(summary: Callable[..., Any], *of: Any) -> Record:
    return overview.bounded(summary(*of))


def _table(
    caption: str,
    records: Iterable[Record],
    columns: Mapping[str, Callable[[Record], object]],
    total: int,
    most: int,
) -> str:
    """As many rows as there is room for in ``most`` bytes; the rest is counted."""
    names = "".join(f'<th scope="col">{name}</th>' for name in columns)
    head = (
        f'<section class="scroll"><table><caption>{caption} ({total})</caption><thead><tr>{names}</tr></thead>\n<tbody>'
    )
    rows: list[str] = []
    room = most - len(head) - 80
    for record in records:
        first, *others = (_cell(value(record)) for value in columns.values())
        row = f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>\n'
        room -= len(row.encode())
        if room < 0:
            break
        rows.append(row)
    left = f"<p>And {total - len(rows)} more.</p>" if len(rows) < total else ""
    return f"{head}{''.join(rows)}</tbody></table>{left}</section>\n"


def _cell(value: object) -> str:
    text = "" if value is None else str(value)
    text = text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"
    return escape(text.encode(errors="replace").decode())


def _size(nbytes: float | None) -> str:
    if nbytes is None:
        return ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def _rate(rate: float | None) -> str:
    return f"{_size(rate)}/s" if rate else ""


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{max(0.0, seconds):.1f} s"
    minutes = int(seconds) // 60
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h" if minutes < 2880 else f"{minutes // 1440} d"


def _when(at: float | None) -> str:
    return "" if not at else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _spans(stage: Record) -> str:
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in stage["seconds"].items() if seconds >= 0.05)


_DEVICE: dict[str, Callable[[Record], object]] = {
    "Device": lambda device: device["name"],
    "Used": lambda device: _size(device["used_bytes"]),
    "Free": lambda device: _size(device["free_bytes"]),
    "Capacity": lambda device: _size(device["capacity_bytes"]),
    "Reserve": lambda device: _size(device["reserve_bytes"]),
}
_STAGE: dict[str, Callable[[Record], object]] = {
    "Model": lambda stage: stage["model"],
    "Id": lambda stage: stage["id"],
    "State": lambda stage: stage["state"],
    "Device": lambda stage: stage["device"],
    "Read": lambda stage: f"{_size(stage['bytes_done'])} of {_size(stage['bytes_total'])}",
    "Mean rate": lambda stage: _rate(stage["bytes_per_second"]),
    "Seconds": _spans,
    "Leases": lambda stage: stage["leases"],
}
_LEASE: dict[str, Callable[[Record], object]] = {
    "Lease": lambda lease: lease["id"],
    "Stage": lambda lease: lease["stage"],
    "Rank": lambda lease: lease["tp_rank"],
    "Process": lambda lease: lease["pid"],
    "User": lambda lease: lease["uid"],
    "Since": lambda lease: _when(lease["since"]),
}
_PEER: dict[str, Callable[[Record], object]] = {
    "Address": lambda peer: peer["address"],
    "Node": lambda peer: peer["node"],
    "Transport": lambda peer: peer["transport"],
    "Read from it": lambda peer: _size(peer["bytes_from"]),
    "Read by it": lambda peer: _size(peer["bytes_to"]),
    "Rate": lambda peer: _rate(peer["bytes_per_second"]),
    "Given up": lambda peer: peer["given_up"],
}
_ERROR: dict[str, Callable[[Record], object]] = {
    "When": lambda error: _when(error["at"]),
    "Of": lambda error: error["of"],
    "Code": lambda error: error["code"],
    "What": lambda error: error["message"],
    "Remedy": lambda error: error["remedy"],
}
_PRELOAD: dict[str, Callable[[Record], object]] = {
    name.capitalize(): itemgetter(name) for name in ("model", "state", "stage", "attempts", "error")
}
