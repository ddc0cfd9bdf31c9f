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
from string import Template
from typing import Any

from weightd.api import overview
from weightd.api.models import device_record
from weightd.daemon.node import Node

_SCRIPTS = ("elements.js", "stream.js", "devices.js", "stages.js", "tables.js", "page.js")
_MAX_TEXT = 160
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
    """The page, below 60 KB whatever there is; None: with nothing of the node, but how to ask for it."""
    page, style, script = _parts()
    body = _NO_TOKEN if node is None else f"<noscript>{_tables(node)}</noscript>"
    return page.substitute(style=style, script=script, body=body)


def _tables(node: Node) -> str:
    about = overview.bounded(overview.node_summary(node))
    daemon = about["node"]
    stages = sorted(node.stages(), key=lambda stage: stage.created_at, reverse=True)
    failed = [overview.bounded(overview.stage_summary(stage)) for stage in stages if stage.error][:20]
    errors = [{**stage["error"], "at": stage["state_since"], "of": stage["model"]} for stage in failed]
    errors += [{**overview.bounded(overview.refusal_summary(found)), "of": "refused"} for found in node.refusals]
    leases = list(itertools.islice(node.residency.leases(), overview.MAX_LEASES))
    peers = list(overview.peers(node))
    devices = list(node.devices.values())
    text = (
        f"<p>weightd {escape(about['version'])}, pid {daemon['pid']}, default device "
        f"{escape(daemon['default_device'])}, up for {_seconds(time.time() - node.started_at)}; as of "
        f'{_when(time.time())}. Without JavaScript this page stands still: <a href="">load it again</a>.</p>'
    )
    if daemon.get("preload"):
        text += _table("Preload", daemon["preload"], _PRELOAD, len(daemon["preload"]))
    text += _table("Devices", (_record(device_record, device, node.residency) for device in devices), _DEVICE,
                   len(devices))  # fmt: skip
    text += _table("Stages, the latest first", (_record(overview.stage_summary, stage) for stage in stages), _STAGE,
                   len(stages), 6000)  # fmt: skip
    text += _table("Leases", (_record(overview.lease_summary, lease) for lease in leases), _LEASE, len(leases))
    text += _table("Peers", (_record(overview.peer_summary, *peer) for peer in peers), _PEER, len(peers))
    return text + _table("Last errors", sorted(errors, key=lambda error: -error["at"]), _ERROR, len(errors), 3500)


def _record(summary: Callable[..., Any], *of: Any) -> Record:
    return overview.bounded(summary(*of))


def _table(
    caption: str,
    records: Iterable[Record],
    columns: Mapping[str, Callable[[Record], object]],
    total: int,
    most: int = 1800,
) -> str:
    """As many rows as fit into ``most`` bytes; the rest is counted."""
    if not total:
        return f"<section><h2>{caption}</h2><p>None.</p></section>\n"
    rows: list[str] = []
    nbytes = 0
    for record in records:
        cells = [_cell(value(record)) for value in columns.values()]
        row = f'<tr><th scope="row">{cells[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in cells[1:]) + "</tr>\n"
        nbytes += len(row.encode())
        if nbytes > most:
            break
        rows.append(row)
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    left = f"<p>And {total - len(rows)} more.</p>" if len(rows) < total else ""
    return (
        f'<section class="scroll"><table><caption>{caption} ({total})</caption><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{''.join(rows)}</tbody></table>{left}</section>\n"
    )


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
    spans = stage["seconds"] or stage["state_seconds"]
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in spans.items() if seconds >= 0.05)


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
    name.capitalize(): lambda entry, name=name: entry.get(name)  # type: ignore[misc]
    for name in ("model", "state", "stage", "attempts", "error")
}
