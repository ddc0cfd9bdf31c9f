"""Recipes ahead of time: an engine's own layouts, made without GPU and without weights, in the engine's own image.

``python -m weightd.ipc.engines.ahead --engine sglang --model s3://models/llama-3-8b --tp-size 8`` gives
the daemon the recipes of all of the engine's processes, and prints a line of JSON for each. With ``--stage`` the daemon
loads the model in these layouts as well, and the engine's first start finds its weights there. Options that are not
listed here are the engine's own. Needs nothing of the daemon's packages.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from weightd.ipc.client import Client
from weightd.ipc.errors import AttachTimeout, DaemonUnavailable, StageFailed, WeightdError
from weightd.ipc.lease import socket_path

ENGINES = {"sglang": "weightd.ipc.engines.sglang_ahead", "vllm": "weightd.ipc.engines.vllm_ahead"}
"""Engine → the module with its ``Processes``, named ``processes``."""
_AGAIN_SECONDS = 0.5
"""How often a daemon that is not there yet is looked for."""
_PROGRESS_SECONDS = 10.0
"""How often it is told how far a stage is."""


@dataclass(frozen=True)
class Asked:
    """What is to be traced."""

    model: str
    """URI or path."""
    tp_size: int
    pp_size: int
    socket: str | None
    """The daemon's lease socket, or its runtime directory (default: ``WEIGHTD_RUNTIME_DIR``)."""
    processor: str
    """What the engine will run on: ``cpu``, or ``cuda`` and its compute capability (``cuda 9.0``)."""
    options: Sequence[str]
    """The engine's own, as on its command line."""


class Processes(Protocol):
    """What an engine's module offers: for each process of its plan, what that does to trace its own layout.

    What is common to all is done once, before the first is given; each then runs in a process of its own, forked from
    this one, and returns what the daemon says of the layout.

    >>> def processes(asked):
    ...     arguments = parse(asked.options)
    ...     for rank in range(asked.tp_size):
    ...         yield functools.partial(trace_rank, asked, arguments, rank)
    """

    def __call__(self, asked: Asked) -> Iterator[Callable[[], dict[str, Any]]]: ...


def run(engine: str, asked: Asked, timeout: float = 0) -> Iterator[dict[str, Any]]:
    """Trace, and tell of each process's layout; a daemon that is being started is waited for, ``timeout`` seconds.

    Raises ImportError where the engine is not there, WeightdError where one of its processes fails.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that was asked anything could not be used after a fork
    processes: Processes = importlib.import_module(ENGINES[engine]).processes
    _answers(asked.socket, timeout)
    for process in processes(asked):
        yield _forked(process)


def _answers(socket: str | None, timeout: float) -> None:
    end = time.monotonic() + timeout
    while True:
        try:
            with Client(runtime_directory=socket_path(socket).parent) as client:
                client.node()
            return
        except DaemonUnavailable:
            if time.monotonic() > end:
                raise
            time.sleep(_AGAIN_SECONDS)


def stage(asked: Asked, told: Sequence[Mapping[str, Any]], request: Mapping[str, Any], wait: float) -> dict[str, Any]:
    """Have the daemon stage the model in layouts that ``run`` told of; the stage's record.

    ``request`` has further fields of a stage request. Without a device it is host memory for a CPU, else the daemon's
    first GPUs, one for each process. Waits ``wait`` seconds for it to be ready. Raises RequestRefused, StageFailed,
    AttachTimeout.
    """
    devices = ["cpu"] if asked.processor == "cpu" else [f"cuda:{number}" for number in range(len(told))]
    fields = {"device": devices[0] if len(devices) == 1 else devices, **request}
    model, keys = str(told[0]["model"]), [one["key"] for one in told]
    end = time.monotonic() + wait
    with Client(runtime_directory=socket_path(asked.socket).parent) as client:
        while True:
            left = max(0.0, end - time.monotonic())
            # Who asks for the same again joins it.
            record = client.stage(model, layout={"key": keys}, wait=min(left, _PROGRESS_SECONDS), **fields)
            state = record["state"]
            if state in ("failed", "cancelled", "evicted"):
                why = (record.get("error") or {}).get("message", "nobody says why")
                raise StageFailed(f"{model} is {state}: {why}")
            if state == "ready" or not wait:
                return record
            if not left:
                raise AttachTimeout(f"{model} was not ready within {wait} s; it goes on loading")
            print(
                f"weightd: waiting for {model}: {state}, {record['bytes_done']} of {record['bytes_total']} bytes",
                file=sys.stderr,
            )


def _forked(process: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            told = process()
        except BaseException as error:
            traceback.print_exc()
            told = {"error": f"{type(error).__name__}: {error}"}
        try:
            with os.fdopen(writing, "w") as pipe:
                json.dump(told, pipe)
        finally:
            os._exit(0)  # what the parent has registered to do at its end is not this one's
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    answer: dict[str, Any] = json.loads(text) if text else {"error": f"it died of signal {os.WTERMSIG(status)}"}
    if "error" in answer:
        raise WeightdError(f"the layout could not be traced: {answer['error']}")
    return answer


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="weightd trace",
        allow_abbrev=False,
        description="Make the recipes of an engine's own layouts ahead of its first start, in the engine's own image: "
        "without GPU, without weights.",
        epilog="All other options are the engine's own, as on its command line.",
    )
    found.add_argument("--engine", required=True, choices=sorted(ENGINES))
    # By the engines' names as well: their own command lines may be said as they are.
    found.add_argument("--model", "--model-path", required=True, help="URI or path, as the engine will be given it")
    found.add_argument(
        "--tp-size", "--tensor-parallel-size", "--tp", "-tp", type=int, default=1, help="tensor parallel size"
    )
    found.add_argument(
        "--pp-size", "--pipeline-parallel-size", "--pp", "-pp", type=int, default=1, help="pipeline parallel size"
    )
    found.add_argument("--socket", help="the daemon's lease socket or runtime directory [env: WEIGHTD_RUNTIME_DIR]")
    found.add_argument(
        "--processor",
        default="cpu",
        help="what the engine will run on: cpu, or cuda and its compute capability, as in 'cuda 9.0'",
    )
    found.add_argument(
        "--stage",
        nargs="?",
        const={},
        type=_fields,
        metavar="FIELDS",
        help="have the daemon stage the model in these layouts; further fields of the request as JSON, as in "
        '\'{"device": ["cuda:0", "cuda:1"], "pin": true}\'',
    )
    found.add_argument("--wait", action="store_true", help="with --stage: until it is ready")
    found.add_argument(
        "--timeout", type=float, default=60.0, help="seconds to wait: for the daemon to answer, and with --wait again"
    )
    return found


def _fields(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(text)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, and print each layout, and the stage, as a line of JSON; the exit status."""
    given, options = parser().parse_known_args(arguments)
    asked = Asked(given.model, given.tp_size, given.pp_size, given.socket, given.processor, options)
    told = []
    try:
        for one in run(given.engine, asked, given.timeout):
            print(json.dumps(one), flush=True)
            told.append(one)
        if given.stage is not None:
            print(json.dumps(stage(asked, told, given.stage, given.timeout if given.wait else 0)), flush=True)
    except ImportError as error:
        print(f"weightd: this has to run in {given.engine}'s own image: {error}", file=sys.stderr)
        return 1
    except WeightdError as error:
        print(f"weightd: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
