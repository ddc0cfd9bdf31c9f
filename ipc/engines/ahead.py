"""Recipes ahead of time: an engine's own layouts, made without GPU and without weights, in the engine's own image.

``python -m weightd.ipc.engines.ahead --engine sglang --model s3://models/llama-3-8b --tp-size 8`` gives
the daemon the recipes of all of the engine's processes, and prints a line of JSON for each. The engine's first start
then finds its weights in its own layout. Options that are not listed here are the engine's own. Needs nothing of the
daemon's packages.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from weightd.ipc.errors import WeightdError

ENGINES = {"sglang": "weightd.ipc.engines.sglang_ahead", "vllm": "weightd.ipc.engines.vllm_ahead"}
"""Engine → the module with its ``Processes``, named ``processes``."""


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


def run(engine: str, asked: Asked) -> Iterator[dict[str, Any]]:
    """Trace, and tell of each process's layout. Raises WeightdError where one of them fails."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that was asked anything could not be used after a fork
    processes: Processes = importlib.import_module(ENGINES[engine]).processes
    for process in processes(asked):
        yield _forked(process)


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
    found.add_argument("--model", required=True, help="URI or path, as the engine will be given it")
    found.add_argument("--tp-size", type=int, default=1, help="tensor parallel size")
    found.add_argument("--pp-size", type=int, default=1, help="pipeline parallel size")
    found.add_argument("--socket", help="the daemon's lease socket or runtime directory [env: WEIGHTD_RUNTIME_DIR]")
    found.add_argument(
        "--processor",
        default="cpu",
        help="what the engine will run on: cpu, or cuda and its compute capability, as in 'cuda 9.0'",
    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, and print each layout as a line of JSON; the exit status."""
    given, options = parser().parse_known_args(arguments)
    asked = Asked(given.model, given.tp_size, given.pp_size, given.socket, given.processor, options)
    try:
        for told in run(given.engine, asked):
            print(json.dumps(told), flush=True)
    except ImportError as error:
        print(f"weightd: this has to run in {given.engine}'s own image: {error}", file=sys.stderr)
        return 1
    except WeightdError as error:
        print(f"weightd: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
