"""``python -m tests.bench``: run the benchmark; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from pydantic import ByteSize, TypeAdapter
from rich.console import Console

from tests.bench.machine import describe
from tests.bench.measure import Section
from tests.bench.session import Session
from tests.bench.table import as_json, show_header, show_section, show_verdict

SECTIONS = {
    "file": "from_file",
    "s3": "from_s3",
    "s3face": "s3_endpoint",
    "attach": "attaching",
    "layouts": "layouts",
    "engines": "engine_starts",
    "planning": "planning",
    "restart": "restarting",
    "peer": "peer",
    "fleet": "fleet",
}
"""Section → its module, with ``run(session) -> Section``."""


def main() -> int:
    """Run the sections asked for. Exit code 0 whatever the figures: this is a measurement, not a test."""
    arguments = _arguments()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    progress = _progress(Console(stderr=True, highlight=False))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    sections: list[Section] = []
    with tempfile.TemporaryDirectory(prefix="weightd-bench-", dir=arguments.folder, ignore_cleanup_errors=True) as name:
        # Settings of the user's own daemon are not what is measured.
        for variable in [key for key in os.environ if key.startswith(("WEIGHTD_", "RUNAI_STREAMER_"))]:
            del os.environ[variable]
        facts = describe(Path(name))
        show_header(console, facts)
        try:
            for section in arguments.sections:
                folder = Path(name) / section
                folder.mkdir()
                module = import_module(f"tests.bench.{SECTIONS[section]}")
                found = module.run(Session(arguments.size, arguments.repetitions, folder, progress, arguments.json))
                sections.append(found)
                progress("")
                show_section(console, found)
                shutil.rmtree(folder, ignore_errors=True)
        except KeyboardInterrupt:
            progress("")
            console.print("interrupted: what was started is stopped, what was made is removed")
            return 130
    show_verdict(console, sections)
    given = {"size": arguments.size, "repetitions": arguments.repetitions, "sections": arguments.sections}
    arguments.json.write_text(json.dumps(as_json(facts, given, sections), indent=1) + "\n")
    console.print(f"every sample is in {arguments.json}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure weightd beside other loaders.")
    parser.add_argument("--size", type=_size, default=_size("4GiB"), help="bytes of the checkpoint (default: 4GiB)")
    parser.add_argument("--repetitions", type=_positive, default=5, help="repetitions of everything (default: 5)")
    parser.add_argument(
        "--sections", type=_sections, default=list(SECTIONS), help=f"which tables (default: {','.join(SECTIONS)})"
    )
    parser.add_argument(
        "--json", type=Path, default=Path("bench.json"), help="file for every sample (default: bench.json)"
    )
    parser.add_argument("--folder", type=Path, help="where checkpoints are made (default: the temporary folder)")
    return parser.parse_args()


def _size(text: str) -> int:
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a size, as in 4GiB, found {text!r}") from None
    if size < 64 << 20:
        raise argparse.ArgumentTypeError(f"{text} is too small to measure anything by: 64MiB at least")
    return size


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)


def _sections(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"no section is called {unknown[0]!r}: {', '.join(SECTIONS)}")
    return names


def _progress(console: Console) -> Callable[[str], None]:
    """What is going on, in one line that is replaced on a terminal; else a line each."""
    if not console.is_terminal:
        return lambda text: console.print(text, markup=False) if text else None
    status = console.status("")

    def show(text: str) -> None:
        status.update(text.replace("[", "\\["))
        (status.start if text else status.stop)()

    return show


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
