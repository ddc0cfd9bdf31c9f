"""The Grafana dashboard: ``python charts/dashboard.py`` writes charts/weightd/files/dashboard.json anew."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as parts
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FILE = Path(__file__).parent / "weightd" / "files" / "dashboard.json"

SOURCE = parts.DataSourceRef(type_val="prometheus", uid="${datasource}")
HERE = 'instance=~"$instance"'
MODEL = f'{HERE}, model="$model"'
ON_THE_WAY = "queued|planning|loading|verifying"

Panel = Any
"""A panel of any kind: the SDK's builders have no type in common that has all of what is used here."""


class Board:
    """Panels from left to right, in rows, with ids in the order of their coming."""

    def __init__(self) -> None:
        self.dashboard = (
            dashboard.Dashboard("weightd")
            .uid("weightd")
            .description("Model weights staged into memory that engines map: what is resident, why starts are slow.")
            .tags(["weightd"])
            .tooltip(parts.DashboardCursorSync.CROSSHAIR)
            .time("now-1h", "now")
            .refresh("30s")
            .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
            .with_variable(_variable("instance", "Daemon", "label_values(weightd_build_info, instance)", several=True))
            .with_variable(
                _variable("model", "Model", f"label_values(weightd_latest_stage_state{{{HERE}}}, model)", several=False)
            )
        )
        self._ids = itertools.count(1)

    def row(self, title: str) -> None:
        self.dashboard.with_row(dashboard.Row(title).id(next(self._ids)))

    def add(self, panel: Panel) -> None:
        self.dashboard.with_panel(panel.id(next(self._ids)))


def _variable(name: str, label: str, query: str, *, several: bool) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(name).label(label).query(query).datasource(SOURCE)
    variable.refresh(parts.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(parts.VariableSort.ALPHABETICAL_ASC)
    if several:
        everything = parts.VariableOption(text="All", value="$__all", selected=True)
        variable.multi(True).include_all(True).all_value(".*").current(everything)
    return variable


def _filled(kind: Callable[[], Panel], title: str, text: str, queries: Mapping[str, str], unit: str) -> Panel:
    """A panel of queries by their legends."""
    panel = kind().title(title).description(text).datasource(SOURCE).unit(unit)
    for letter, (legend, query) in zip("ABCDEFGH", queries.items(), strict=False):
        panel.with_target(prometheus.Dataquery().ref_id(letter).expr(query).legend_format(legend).range())
    return panel


def lines(
    title: str, text: str, queries: Mapping[str, str], unit: str, *, width: int = 12, stacked: bool = False
) -> Panel:
    """Values over time."""
    panel = _filled(timeseries.Panel, title, text, queries, unit).span(width).height(8).min(0)
    panel.legend(common.VizLegendOptions().display_mode(shapes.LegendDisplayMode.LIST).placement(
        shapes.LegendPlacement.BOTTOM).show_legend(True))  # fmt: skip
    panel.tooltip(common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI).sort(shapes.SortOrder.DESCENDING))
    panel.fill_opacity(60 if stacked else 5).show_points(shapes.VisibilityMode.NEVER)
    if stacked:
        panel.stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL))
    return panel


def figure(
    title: str, text: str, query: str, unit: str, *, legend: str = "", steps: Sequence[tuple[float, str]] = ()
) -> Panel:
    """One value as it is now, coloured from each step on."""
    panel = _filled(stat.Panel, title, text, {legend: query}, unit).span(4).height(4)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    panel.color_mode(shapes.BigValueColorMode.VALUE).graph_mode(shapes.BigValueGraphMode.NONE)
    colours = [parts.Threshold(value=None, color="text"), *(parts.Threshold(value=at, color=to) for at, to in steps)]
    return panel.thresholds(dashboard.ThresholdsConfig().mode(parts.ThresholdsMode.ABSOLUTE).steps(colours))


def bars(title: str, text: str, queries: Mapping[str, str], unit: str, *, width: int = 12) -> Panel:
    """Values as they are now, side by side."""
    panel = _filled(bargauge.Panel, title, text, queries, unit).span(width).height(8).min(0)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    panel.orientation(shapes.VizOrientation.HORIZONTAL).display_mode(shapes.BarGaugeDisplayMode.BASIC)
    return panel.color_scheme(dashboard.FieldColor().mode(parts.FieldColorModeId.PALETTE_CLASSIC))


def builds() -> Panel:
    """What runs where."""
    panel = table.Panel().title("Builds").datasource(SOURCE).span(12).height(8)
    panel.description("Versions of weightd and of what moves its bytes, on each daemon.")
    query = prometheus.Dataquery().ref_id("A").expr(f"weightd_build_info{{{HERE}}}")
    panel.with_target(query.instant().format(PromQueryFormat.TABLE))
    hidden = dict.fromkeys(("Time", "Value", "__name__", "job", "namespace", "pod", "container", "endpoint"), True)
    return panel.with_transformation(parts.DataTransformerConfig(id_val="organize", options={"excludeByName": hidden}))


def build() -> dashboard.Dashboard:
    """All of it."""
    board = Board()
    _overview(board)
    _stage(board)
    _residency(board)
    _peers(board)
    _api(board)
    return board.dashboard


def _overview(board: Board) -> None:
    board.row("Overview")
    board.add(figure("Daemons", "Daemons that answer the scrape.", f"count(weightd_build_info{{{HERE}}})", "short"))
    board.add(figure(
        "Ready", "Stages that engines can map at once.", f'sum(weightd_stages{{{HERE}, state="ready"}})', "short",
    ))  # fmt: skip
    board.add(figure(
        "On their way", "Stages that are queued, planned, loaded or verified.",
        f'sum(weightd_stages{{{HERE}, state=~"{ON_THE_WAY}"}})', "short",
    ))  # fmt: skip
    board.add(figure(
        "Failed", "Stages that failed within the dashboard's time range. See the errors below for why.",
        f'sum(increase(weightd_stages_finished_total{{{HERE}, state="failed"}}[$__range]))', "short",
        steps=[(0.5, "red")],
    ))  # fmt: skip
    board.add(figure("Leases", "Engine processes' uses of segments.", f"sum(weightd_leases{{{HERE}}})", "short"))
    board.add(figure(
        "Capacity in use",
        "Bytes that segments take, of those that they may take, evictable ones included: full is how it should be.",
        f"sum(weightd_used_bytes{{{HERE}}}) / sum(weightd_capacity_bytes{{{HERE}}})", "percentunit",
    ))  # fmt: skip
    board.add(lines(
        "Stages by what they wait for",
        "How many stages were in which phase, on average: every second of a stage is some phase's. "
        "Mostly source: the storage is what limits. Mostly queued: too few loads at a time, or too little room.",
        {"{{phase}}": f"sum by (phase) (rate(weightd_stage_wall_seconds_total{{{HERE}}}[$__rate_interval]))"},
        "short", stacked=True,
    ))  # fmt: skip
    board.add(lines(
        "Bytes read by where they came from",
        "Weights read from origins, and from peers, which is what origins were spared.",
        {
            "{{source}}": f"sum by (source) (rate(weightd_source_read_bytes_total{{{HERE}}}[$__rate_interval]))",
            "peer": f"sum(rate(weightd_peer_read_bytes_total{{{HERE}}}[$__rate_interval]))",
        },
        "binBps", stacked=True,
    ))  # fmt: skip
    board.add(lines(
        "Seconds from request to ready",
        "Of the latest stage of each model that became ready, the slowest daemon's.",
        {"{{model}}": f"max by (model) (weightd_latest_ready_seconds{{{HERE}}})"},
        "s",
    ))  # fmt: skip
    board.add(lines(
        "Seconds from request to ready, by share of stages",
        "Of all stages that became ready within the time range: half of them were faster than p50, and so on.",
        {
            f"p{percent}": f"histogram_quantile({percent / 100}, sum by (le) "
            f"(increase(weightd_stage_duration_seconds_bucket{{{HERE}}}[$__range])))"
            for percent in (50, 90, 99)
        },
        "s",
    ))  # fmt: skip
    board.add(lines(
        "Reads tried again", "Reads per second that failed and were tried again: the storage throttles, or is unwell.",
        {"{{source}}": f"sum by (source) (rate(weightd_source_retries_total{{{HERE}}}[$__rate_interval]))"},
        "ops",
    ))  # fmt: skip
    board.add(lines(
        "Errors",
        "Failed stages and refused requests, by the error's code (docs/metrics.md lists them).",
        {"{{code}}": f"sum by (code) (increase(weightd_errors_total{{{HERE}}}[$__rate_interval])) > 0"},
        "short",
    ))  # fmt: skip
    board.add(lines(
        "Ends of daemons",
        "Daemons that have ended: by themselves (crashed), by SIGKILL (killed, as where memory is short), or for a new "
        "version (replaced). What they held is adopted by the next.",
        {"{{how}}": f"sum by (how) (increase(weightd_keeper_daemon_ends_total{{{HERE}}}[$__rate_interval]))"},
        "short",
    ))  # fmt: skip
    board.add(builds())


def _stage(board: Board) -> None:
    board.row("One stage in depth: the latest of $model")
    board.add(figure(
        "State", "The state that it is in, on each daemon and device.",
        f"weightd_latest_stage_state{{{MODEL}}}", "short", legend="{{state}}",
    ).text_mode(shapes.BigValueTextMode.NAME))  # fmt: skip
    board.add(figure(
        "Seconds", "From the request until it was ready, or so far.",
        f"max(sum without (phase, source) (weightd_latest_stage_seconds{{{MODEL}}}))", "s",
    ))  # fmt: skip
    board.add(figure(
        "Bytes there", "Share of its bytes that are there and hashed.",
        f"sum(weightd_latest_stage_bytes{{{MODEL}}}) / sum(weightd_latest_stage_size_bytes{{{MODEL}}})", "percentunit",
    ))  # fmt: skip
    board.add(figure(
        "Size", "Bytes to read.", f"max(weightd_latest_stage_size_bytes{{{MODEL}}})", "bytes",
    ))  # fmt: skip
    board.add(figure(
        "Mean rate", "Bytes per second over all of its time, waiting for its turn included.",
        f"sum(weightd_latest_stage_bytes{{{MODEL}}}) / sum(weightd_latest_stage_seconds{{{MODEL}}})", "binBps",
    ))  # fmt: skip
    board.add(figure(
        "Asked for", "When the latest stage was asked for.",
        f"max(weightd_latest_stage_created_timestamp_seconds{{{MODEL}}}) * 1000", "dateTimeFromNow",
    ))  # fmt: skip
    board.add(bars(
        "Where its time went",
        "Seconds of each phase, and of which source: they add up to its duration. Where source is most, the storage or "
        "the network limits; copying and verifying: the processor; buffers: WEIGHTD_BOUNCE_BUFFERS; queued: other "
        "stages before it; other: allocating memory, most of all.",
        {"{{phase}} ({{source}})": f"sum by (phase, source) (weightd_latest_stage_seconds{{{MODEL}}})"},
        "s",
    ))  # fmt: skip
    board.add(lines(
        "Where its time went, as it went",
        "The same over time: the steeper one is what it was at.",
        {"{{phase}} ({{source}})": f"sum by (phase, source) (weightd_latest_stage_seconds{{{MODEL}}})"},
        "s", stacked=True,
    ))  # fmt: skip
    board.add(lines(
        "Bytes by where they came from", "Bytes that are there and hashed.",
        {"{{source}}": f"sum by (source) (weightd_latest_stage_bytes{{{MODEL}}})"},
        "bytes", stacked=True,
    ))  # fmt: skip
    board.add(lines(
        "Against its own history",
        "Seconds from request to ready of the latest stage that became so, and the median of the last week.",
        {
            "{{instance}} {{device}}": f"weightd_latest_ready_seconds{{{MODEL}}}",
            "median of 7 days": f"quantile(0.5, quantile_over_time(0.5, weightd_latest_ready_seconds{{{MODEL}}}[7d]))",
        },
        "s",
    ))  # fmt: skip


def _residency(board: Board) -> None:
    board.row("Residency and leases")
    board.add(lines(
        "Capacity and use",
        "Bytes that segments may take, those that they take, and of these what may go where room is needed.",
        {
            "{{instance}} {{device}} capacity": f"weightd_capacity_bytes{{{HERE}}}",
            "{{instance}} {{device}} used": f"weightd_used_bytes{{{HERE}}}",
            "{{instance}} {{device}} evictable": f"weightd_evictable_bytes{{{HERE}}}",
            "{{instance}} {{device}} free": f"weightd_free_bytes{{{HERE}}}",
        },
        "bytes",
    ))  # fmt: skip
    board.add(bars(
        "Models", "Bytes that models take, of all daemons and devices together.",
        {"{{model}}": f"sort_desc(sum by (model) (weightd_resident_bytes{{{HERE}}}))"}, "bytes",
    ))  # fmt: skip
    board.add(lines(
        "Evictions",
        "Ready stages that were freed, by reason, and stages of what went to make room within the hour before: "
        "where that happens again and again, the capacity is too small for what is asked for.",
        {
            "{{reason}}": f"sum by (reason) (increase(weightd_evictions_total{{{HERE}}}[$__rate_interval]))",
            "staged again": f"sum(increase(weightd_stages_restaged_total{{{HERE}}}[$__rate_interval]))",
        },
        "short",
    ))  # fmt: skip
    board.add(lines(
        "Queue",
        "Stages that wait for their turn, how long the first of them has, and what daemons are still to preload.",
        {
            "waiting": f'sum(weightd_stages{{{HERE}, state="queued"}})',
            "longest wait (s)": f"max(weightd_queue_oldest_seconds{{{HERE}}})",
            "still to preload": f"sum(weightd_preload_missing{{{HERE}}})",
        },
        "short",
    ))  # fmt: skip
    board.add(lines(
        "Leases by age",
        "Processes that use segments; those that are awaited had a lease before the daemon's restart.",
        {
            "{{age}}": f"sum by (age) (weightd_leases_by_age{{{HERE}}})",
            "awaited": f"sum(weightd_leases_awaited{{{HERE}}})",
        },
        "short", width=8, stacked=True,
    ))  # fmt: skip
    board.add(lines(
        "Oldest lease", "Age of the oldest lease of each daemon.",
        {"{{instance}}": f"weightd_lease_oldest_seconds{{{HERE}}}"}, "s", width=8,
    ))  # fmt: skip
    quantiles = {
        f"p{percent}": f"histogram_quantile({percent / 100}, sum by (le) "
        f"(rate(weightd_attach_duration_seconds_bucket{{{HERE}}}[$__rate_interval])))"
        for percent in (50, 90, 99)
    }
    board.add(lines(
        "Attaching", "Seconds from a lease request for a ready stage to its handle being sent.",
        quantiles, "s", width=8,
    ))  # fmt: skip
    board.add(lines(
        "Adopted after restarts",
        "Stages that daemons took over from the ones before them: ready at once, or interrupted and going on.",
        {"{{state}}": f"sum by (state) (weightd_stages_adopted_total{{{HERE}}})"}, "short", width=8,
    ))  # fmt: skip
    board.add(lines(
        "Start of daemons", "Seconds from the start of the daemon's process until it served, with everything adopted.",
        {"{{instance}}": f"weightd_start_duration_seconds{{{HERE}}}"}, "s", width=8,
    ))  # fmt: skip
    board.add(lines(
        "Orphans",
        "Bytes of host memory that keepers hold and daemons do not understand: nobody can use them.",
        {"{{instance}}": f"weightd_keeper_orphaned_bytes{{{HERE}}}"}, "bytes", width=8,
    ))  # fmt: skip


def _peers(board: Board) -> None:
    board.row("Peers")
    board.add(figure(
        "Peers", "Other daemons that the directory knows, the most that any daemon sees.",
        f"max(weightd_peers{{{HERE}}})", "short",
    ))  # fmt: skip
    board.add(figure(
        "Off", "Daemons whose peers are configured, and that can neither read from them nor serve them.",
        f"sum(weightd_peers_off{{{HERE}}})", "short", steps=[(1, "red")],
    ))  # fmt: skip
    board.add(figure(
        "Reading now", "Stages that peers are reading.", f"sum(weightd_peer_readers{{{HERE}}})", "short",
    ))  # fmt: skip
    board.add(figure(
        "Origins were spared", "Bytes not read from origins because peers had them, within the time range.",
        f"sum(increase(weightd_origin_saved_bytes_total{{{HERE}}}[$__range]))", "bytes",
    ))  # fmt: skip
    board.add(figure(
        "Slow paths",
        "Stages within the time range that read by TCP though the machine has a better path to the peer.",
        f"sum(increase(weightd_peer_slow_path_total{{{HERE}}}[$__range]))", "short", steps=[(0.5, "orange")],
    ))  # fmt: skip
    board.add(figure(
        "Wrong bytes", "Times within the time range that a peer's bytes were not the expected ones; they were dropped.",
        f'sum(increase(weightd_digest_mismatches_total{{{HERE}, source="peer"}}[$__range]))', "short",
        steps=[(0.5, "red")],
    ))  # fmt: skip
    board.add(lines(
        "Read from peers by path", "Bytes per second by what UCX found: RDMA, CUDA IPC, shared memory, TCP.",
        {"{{transport}}": f"sum by (transport) (rate(weightd_peer_read_bytes_total{{{HERE}}}[$__rate_interval]))"},
        "binBps", stacked=True,
    ))  # fmt: skip
    board.add(lines(
        "Read from each peer", "Bytes per second, by the peer that they came from.",
        {"{{peer}}": f"sum by (peer) (rate(weightd_peer_read_bytes_total{{{HERE}}}[$__rate_interval]))"},
        "binBps", stacked=True,
    ))  # fmt: skip
    board.add(lines(
        "Sent to each peer", "Bytes per second that peers say they have read.",
        {"{{peer}}": f"sum by (peer) (rate(weightd_peer_sent_bytes_total{{{HERE}}}[$__rate_interval]))"},
        "binBps", stacked=True,
    ))  # fmt: skip
    board.add(lines(
        "Given up", "Peers given up while a stage was read from them, by reason. What they were to bring comes from "
        "others, or from the origin.",
        {"{{reason}}": f"sum by (reason) (increase(weightd_peers_dropped_total{{{HERE}}}[$__rate_interval]))"},
        "short",
    ))  # fmt: skip


def _api(board: Board) -> None:
    requests = "weightd_api_request_duration_seconds"
    board.row("API and process")
    board.add(lines(
        "Requests", "Requests per second, by route.",
        {"{{method}} {{route}}": f"sum by (method, route) (rate({requests}_count{{{HERE}}}[$__rate_interval]))"},
        "reqps",
    ))  # fmt: skip
    board.add(lines(
        "Answers", "Requests per second, by status.",
        {"{{status}}": f"sum by (status) (rate({requests}_count{{{HERE}}}[$__rate_interval]))"},
        "reqps", stacked=True,
    ))  # fmt: skip
    board.add(lines(
        "Seconds to answer, p99",
        "Of each route; staging answers once it is planned, which takes as long as listing and headers.",
        {
            "{{route}}": f"histogram_quantile(0.99, sum by (le, route) "
            f"(rate({requests}_bucket{{{HERE}}}[$__rate_interval])))"
        },
        "s",
    ))  # fmt: skip
    board.add(lines(
        "Seconds to scrape", "How long Prometheus waited for /metrics.",
        {"{{instance}}": f"scrape_duration_seconds{{{HERE}}} and on (job, instance) weightd_build_info"}, "s",
    ))  # fmt: skip
    board.add(lines(
        "Connections", "Connections that are open, by the socket that they came in by.",
        {"{{listener}}": f"sum by (listener) (weightd_connections{{{HERE}}})"}, "short", stacked=True,
    ))  # fmt: skip
    board.add(lines(
        "Connections dropped",
        "Connections that were hung up on or turned away: silent for too long, silent where others needed the place, "
        "too many, or of a user who may not come in.",
        {
            "{{listener}} {{reason}}": f"sum by (listener, reason) "
            f"(increase(weightd_connections_dropped_total{{{HERE}}}[$__rate_interval]))"
        },
        "short",
    ))  # fmt: skip
    board.add(lines(
        "Read over S3", "Bytes of objects that the S3 endpoint has sent, by where they came from: memory, memory once "
        "it was loaded, or the origin.",
        {"{{outcome}}": f"sum by (outcome) (rate(weightd_s3_sent_bytes_total{{{HERE}}}[$__rate_interval]))"},
        "binBps", stacked=True,
    ))  # fmt: skip
    board.add(lines(
        "Requests over S3", "Requests to the S3 endpoint, by what they were and how they were answered.",
        {
            "{{operation}} {{status}}": f"sum by (operation, status) "
            f"(rate(weightd_s3_requests_total{{{HERE}}}[$__rate_interval]))"
        },
        "reqps",
    ))  # fmt: skip
    board.add(lines(
        "Memory", "Resident memory of the daemon's process, segments in host memory included.",
        {"{{instance}}": f"process_resident_memory_bytes{{{HERE}}} and on (job, instance) weightd_build_info"},
        "bytes", width=8,
    ))  # fmt: skip
    board.add(lines(
        "Processor", "Cores that the daemon's process uses.",
        {
            "{{instance}}": f"rate(process_cpu_seconds_total{{{HERE}}}[$__rate_interval]) "
            "and on (job, instance) weightd_build_info"
        },
        "short", width=8,
    ))  # fmt: skip
    board.add(lines(
        "Descriptors", "Share of the descriptors that the process may have open.",
        {
            "{{instance}}": f"process_open_fds{{{HERE}}} / process_max_fds{{{HERE}}} "
            "and on (job, instance) weightd_build_info"
        },
        "percentunit", width=8,
    ))  # fmt: skip


def text() -> str:
    """The file's content."""
    return JSONEncoder(sort_keys=True, indent=2).encode(build().build()) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
