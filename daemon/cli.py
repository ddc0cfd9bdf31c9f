"""The ``weightd`` command."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

if os.getpid() == 1:
    # The kernel drops a signal that PID 1 has no handler for: an order to stop waits until the keeper has one.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))

try:
    import typer
    from pydantic import ValidationError
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.table import Table
except ImportError as missing:
    sys.exit(f"weightd: {missing}: the command needs the daemon's packages: pip install 'weightd[daemon]'")

from weightd.daemon.errors import InvalidRequest
from weightd.daemon.node.preload import read as read_preload
from weightd.daemon.settings import Settings
from weightd.daemon.stages.request import describe_errors
from weightd.ipc import Client, WeightdError
from weightd.ipc import runtime_dir as default_runtime_dir

app = typer.Typer(
    name="weightd",
    help="Stages model weights into memory that inference engines map.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Entry point: errors that a user can do something about are one line, not a traceback."""
    try:
        app()
    except WeightdError as error:
        err.print(f"weightd: {error}" + (f" [{error.code}]" if error.code else ""), style="red", markup=False)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


# ---------------------------------------------------------------------- serve


def _settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option per setting, so that Settings is the only list of them."""
    parameters = []
    for name, field in Settings.model_fields.items():
        several = name in ("allow", "capacity")
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = ""
        if default is not None and default != "" and not several:
            text = ",".join(map(str, default)) if isinstance(default, list) else str(default)
            shown = f" [default: {text}]"
        option = typer.Option(
            f"--{name.replace('_', '-')}",
            help=f"{field.description} [env: WEIGHTD_{name.upper()}]{shown}".replace("[", "\\["),
            show_default=False,
            metavar="DEVICE=SIZE" if name == "capacity" else "URI_PREFIX" if several else "VALUE",
        )
        kind: Any = list[str] | None if several else str | None
        annotation = Annotated[kind, option]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    no_listen = Annotated[bool, typer.Option("--no-listen", help="No TCP port: the Unix sockets only.")]
    parameters.append(
        inspect.Parameter("no_listen", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=no_listen)
    )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@app.command(rich_help_panel="Daemon")
@_settings_options
def serve(**options: Any) -> None:
    """Run the daemon in the foreground until SIGTERM or Ctrl-C.

    Every setting is a flag here, else a WEIGHTD_* variable, else its default.
    """
    given = {name: value for name, value in options.items() if value not in (None, []) and name != "no_listen"}
    if options["no_listen"]:
        if "listen" in given:
            raise typer.BadParameter("--no-listen and --listen contradict each other")
        given["listen"] = ""
    try:
        settings = Settings(**given)
        read_preload(settings.preload)
    except ValidationError as error:
        for line in describe_errors(list(error.errors())):
            err.print(f"weightd: setting {line}", style="red", markup=False)
        sys.exit(2)
    except InvalidRequest as error:
        err.print(f"weightd: setting {error}", style="red", markup=False)
        sys.exit(2)
    for name, value in given.items():
        os.environ[f"WEIGHTD_{name.upper()}"] = ",".join(value) if isinstance(value, list) else value
    os.environ["WEIGHTD_RUNTIME_DIR"] = str(settings.runtime_dir)
    os.environ["WEIGHTD_ON_STOP"] = settings.on_stop  # however it was spelled: the keeper goes by it as well
    # The process becomes the keeper: the command's own packages are not for it to carry.
    daemon = [sys.executable, "-m", "weightd.api"]
    os.execv(sys.executable, [sys.executable, "-m", "weightd.daemon.keeper", *daemon])


# ---------------------------------------------------------------------- stages


@app.command()
def stage(
    model: Annotated[str, typer.Argument(help="Folder, .safetensors file, s3://, gs://, az:// or hf:// URI.")],
    weights: Annotated[
        list[str] | None,
        typer.Option(help="File, glob pattern of files, or index that is the checkpoint, where the rule would not do."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is ready, showing progress on stderr.")] = False,
    device: Annotated[
        list[str] | None,
        typer.Option(help="Device of the segments, once for all or once for each rank; default: the node's."),
    ] = None,
    handle: Annotated[str, typer.Option(help="Kind of handle that they are lent by: fd, or cuda_ipc.")] = "fd",
    tp_size: Annotated[int, typer.Option(help="Tensor-parallel ranks of the plan.")] = 1,
    tp_rank: Annotated[str, typer.Option(help="Ranks to stage: one, several with commas, or all.")] = "0",
    tp_map: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN=DIM", help="How to cut tensors: a dimension, or replicate.")
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="Glob pattern of tensors to stage.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Glob pattern of tensors not to stage.")] = None,
    expect_digest: Annotated[str | None, typer.Option(help="What the bytes must be: xxh3:... or a SHA-256.")] = None,
    priority: Annotated[int, typer.Option(help="Higher loads first.")] = 0,
    as_json: Json = False,
) -> None:
    """Stage a checkpoint. Exit code 1 where it fails."""
    placed = device[0] if device and len(device) == 1 else device or None
    request: dict[str, Any] = {"device": placed, "handle": handle, "expect_digest": expect_digest, "priority": priority}
    if weights:
        request["weights"] = weights
    if include or exclude:
        request["tensors"] = {"include": include or [], "exclude": exclude or []}
    if tp_size > 1:
        request["parallel"] = {"tp_size": tp_size, "tp_rank": _ranks(tp_rank), "map": dict(map(_split, tp_map or []))}
    with Client() as client:
        record = client.stage(model if ":" in model.partition("/")[0] else os.path.abspath(model), **request)
        if wait:
            record = _follow(client, record)
    _print(record, as_json, _show)
    if record["state"] in ("failed", "cancelled"):
        sys.exit(1)


def _ranks(text: str) -> int | list[int] | str:
    try:
        return text if text == "all" else int(text) if "," not in text else [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--tp-rank: expected a number, numbers with commas, or all, found {text!r}") from None


def _split(text: str) -> tuple[str, int | str]:
    pattern, _, dim = text.rpartition("=")
    try:
        return pattern, dim if dim == "replicate" else int(dim)
    except ValueError:
        raise typer.BadParameter(f"--tp-map: expected PATTERN=DIM or PATTERN=replicate, found {text!r}") from None


def _follow(client: Client, record: dict[str, Any]) -> dict[str, Any]:
    """Show a stage's progress on stderr until it ends: a bar on a terminal, else a line for each state."""
    stage_id = record["id"]
    if not err.is_terminal:
        last = ""
        for record in client.events(stage_id):
            if record["state"] != last:
                last = record["state"]
                err.print(f"{record['id']} {last} {record['bytes_done']}/{record['bytes_total']} bytes", markup=False)
        return record
    columns = (TextColumn("{task.description:>9}"), BarColumn(), DownloadColumn(binary_units=True),
               TransferSpeedColumn(), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=err) as progress:
        bar = progress.add_task("queued", total=None)
        for record in client.events(stage_id):
            total = record["bytes_total"] or None
            progress.update(bar, description=record["state"], completed=record["bytes_done"], total=total)
    return record


@app.command("ls")
def list_stages(as_json: Json = False) -> None:
    """List all stages, and what the keeper holds of stages that could not be adopted (not in the JSON)."""
    with Client() as client:
        stages = client.stages()
        unadopted = [] if as_json else client.node()["unadopted"]

    def table(stages: list[dict[str, Any]]) -> None:
        view = Table(box=None, header_style="bold")
        for column in ("ID", "STATE", "BYTES", "DEVICE", "LEASES", "MODEL"):
            view.add_column(column, overflow="fold", justify="right" if column in ("BYTES", "LEASES") else "left")
        for record in stages:
            size = record["footprint_bytes"] or record["bytes_total"]
            view.add_row(
                record["id"], record["state"], _size(size), record["device"], str(record["leases"]), record["model"]
            )
        for left in unadopted:
            view.add_row(left["name"], "unadopted", _size(left["nbytes"]), "", "", left["reason"].replace("[", "\\["))
        out.print(view)
        if unadopted:
            out.print("weightd rm --unadopted frees what was not adopted", markup=False)

    _print(stages, as_json, table)


@app.command()
def show(stage_id: Annotated[str, typer.Argument(metavar="ID")], as_json: Json = False) -> None:
    """Show one stage."""
    with Client() as client:
        _print(client.show(stage_id), as_json, _show)


@app.command("rm")
def remove(
    stage_id: Annotated[str | None, typer.Argument(metavar="ID")] = None,
    force: Annotated[bool, typer.Option("--force", help="Take it away from those who lease it.")] = False,
    grace: Annotated[
        float | None, typer.Option(help="Seconds that they have to let go; default: the daemon's.")
    ] = None,
    unadopted: Annotated[
        bool, typer.Option("--unadopted", help="Instead of a stage: all that the keeper holds and nobody could adopt.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Cancel a stage that is on its way, or drop one that nobody leases."""
    if (stage_id is None) != unadopted:
        raise typer.BadParameter("name either a stage's ID or --unadopted")
    with Client() as client:
        if stage_id is None:
            _print(client.remove_unadopted(), as_json, _show_dropped)
            return
        _print(client.remove(stage_id, force=force, grace=grace), as_json, _show)


@app.command("set")
def change(
    stage_id: Annotated[str, typer.Argument(metavar="ID")],
    pin: Annotated[bool | None, typer.Option("--pin/--unpin", help="Whether never to evict it.")] = None,
    priority: Annotated[int | None, typer.Option(help="Lower goes first where room is made.")] = None,
    as_json: Json = False,
) -> None:
    """Pin a stage, or unpin it, or change its priority."""
    with Client() as client:
        _print(client.change(stage_id, pin=pin, priority=priority), as_json, _show)


@app.command("mv")
def move(
    stage_id: Annotated[str, typer.Argument(metavar="ID")],
    device: Annotated[str, typer.Argument(help="Device to move it to.")],
    as_json: Json = False,
) -> None:
    """Move a ready stage that nobody leases to another device, without its source."""
    with Client() as client:
        _print(client.move(stage_id, device), as_json, _show)


@app.command(rich_help_panel="Daemon")
def reload(
    runtime_dir: Annotated[Path | None, typer.Option(help="The daemon's runtime directory.")] = None,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the new daemon.")] = 30.0,
) -> None:
    """Replace the daemon by a new one, of the version that is installed now, without moving a byte of weights."""
    from weightd.daemon.keeper.control import NoKeeper, reload_daemon

    try:
        before, after = reload_daemon(runtime_dir or default_runtime_dir(), wait)
    except (NoKeeper, TimeoutError) as error:
        err.print(f"weightd: {error}", style="red", markup=False)
        sys.exit(1)
    out.print(f"daemon {before} was replaced by {after}" if before else f"daemon {after} was started")


@app.command()
def leases(as_json: Json = False) -> None:
    """List all leases."""
    with Client() as client:
        held = client.leases()

    def table(held: list[dict[str, Any]]) -> None:
        view = Table(box=None, header_style="bold")
        for column in ("ID", "STAGE", "RANK", "PID", "UID", "MODEL"):
            view.add_column(column, overflow="fold")
        for lease in held:
            who = [f"S3, {lease['client']}", "-"] if lease.get("client") else [str(lease["pid"]), str(lease["uid"])]
            view.add_row(lease["id"], lease["stage"], str(lease["tp_rank"]), *who, lease["model"])
        out.print(view)

    _print(held, as_json, table)


@app.command()
def peers(as_json: Json = False) -> None:
    """List the other daemons of the fleet."""
    with Client() as client:
        found = client.peers()

    def table(found: dict[str, Any]) -> None:
        out.print("directory:", found["directory"], markup=False)
        if found["off"]:
            out.print("off:", found["off"], markup=False)
        view = Table(box=None, header_style="bold")
        for column in ("NODE", "ADDRESS", "STAGES", "FROM", "TO", "RATE", "BY", "GIVEN UP"):
            view.add_column(column, overflow="fold")
        for peer in found["peers"]:
            held = "to be asked" if peer["stages"] is None else ", ".join(
                f"{key[:12]} {share:.0%}" for key, share in peer["stages"].items()
            )  # fmt: skip
            rate = f"{_size(peer['bytes_per_second'])}/s" if peer["bytes_per_second"] else ""
            view.add_row(
                peer["node"], peer["address"], held, _size(peer["bytes_from"]), _size(peer["bytes_to"]), rate,
                peer["transport"] or "", peer["given_up"] or "",
            )  # fmt: skip
        out.print(view)

    _print(found, as_json, table)


@app.command()
def doctor(
    quick: Annotated[
        bool, typer.Option("--quick", help="Only whether the daemon answers: for container probes.")
    ] = False,
    ready: Annotated[
        bool, typer.Option("--ready", help="Only whether what it is to preload (WEIGHTD_PRELOAD) is ready.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check what staging and attaching need, and say how to mend what is missing. Exit code 1 where something is."""
    from weightd.daemon.doctor.checks import examine, probe

    findings = probe(ready=ready) if quick or ready else examine()

    def table(_: Any) -> None:
        for finding in findings:
            mark = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "error": "[red]✗[/]"}[finding.level]
            out.print(mark, f"{finding.what}:", finding.found, markup=True)
            if finding.remedy:
                out.print("   →", finding.remedy, markup=False)

    _print([finding._asdict() for finding in findings], as_json, table)
    if any(finding.level == "error" for finding in findings):
        sys.exit(1)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def trace(context: typer.Context) -> None:
    """Give the daemon an engine's own layouts ahead of its first start, in the engine's own image (trace --help)."""
    from weightd.ipc.engines.ahead import main as trace_ahead

    sys.exit(trace_ahead(context.args))


# ---------------------------------------------------------------------- printing


def _print(value: Any, as_json: bool, human: Callable[[Any], None]) -> None:
    if as_json:
        print(json.dumps(value, indent=2))
    else:
        human(value)


def _show_dropped(dropped: list[dict[str, Any]]) -> None:
    for left in dropped:
        out.print(f"{left['name']} dropped, {_size(left['nbytes'])} of host memory", markup=False)


def _show(record: dict[str, Any]) -> None:
    view = Table(box=None, show_header=False)
    view.add_column(style="bold")
    view.add_column(overflow="fold")
    rate, selection = record["bytes_per_second"], record["selection"]
    rows = {
        "id": record["id"],
        "model": record["model"],
        "state": record["state"],
        "error": record["error"] and f"{record['error']['message']} [{record['error']['code']}]",
        "device": record["device"],
        "bytes": f"{_size(record['bytes_done'])} of {_size(record['bytes_total'])}"
        + (f", {_size(rate)}/s" if rate else ""),
        "segments": ", ".join(
            f"rank {segment['tp_rank']}: {segment['tensors']} tensors, {_size(segment['nbytes'])}"
            for segment in record["segments"]
        ),
        "digest": record["checkpoint_digest"] or ", ".join(s["digest"] for s in record["segments"] if s["digest"]),
        "states": ", ".join(f"{state} {seconds:.2f} s" for state, seconds in record["state_seconds"].items()),
        "time": _spent(record),
        "files": selection and f"{', '.join(selection['files'])}: {selection['rule']}",
        "left out": selection and ", ".join(f"{file['name']} ({file['reason']})" for file in selection["left_out"]),
        "metadata": record["metadata"],
        "leases": str(record["leases"]),
    }
    for key, value in rows.items():
        if value:
            view.add_row(key, str(value).replace("[", "\\["))
    out.print(view)


def _spent(record: dict[str, Any]) -> str:
    """Where its time went, most first: why its start was slow."""
    seconds, sources = record["seconds"], record["source_seconds"]
    waits = ", ".join(f"{source} {span:.2f}" for source, span in sorted(sources.items(), key=lambda item: -item[1]))
    parts = [
        f"{phase} {span:.2f}" + (f" ({waits})" if phase == "source" else "")
        for phase, span in sorted(seconds.items(), key=lambda item: -item[1])
        if span >= 0.005
    ]
    return f"{sum(seconds.values()):.2f} s" + (f": {', '.join(parts)}" if parts else "")


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


if __name__ == "__main__":
    main()
