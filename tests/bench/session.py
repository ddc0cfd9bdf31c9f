"""One run of the benchmark: what the sections share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.bench.contender import ContenderFailed
from tests.bench.measure import Sample
from tests.servers import Daemon

K = TypeVar("K")


@dataclass(frozen=True)
class Session:
    """``size`` in bytes of the checkpoint; ``folder`` for everything that is made, removed at the end."""

    size: int
    repetitions: int
    folder: Path
    progress: Callable[[str], None]
    beside: Path = Path("bench.json")
    """The file with every sample: plots are written beside it."""

    def daemon(
        self, name: str, capacity: int, environment: Mapping[str, str] | None = None
    ) -> AbstractContextManager[Daemon]:
        """``weightd serve`` as installed, room for ``capacity`` bytes, in a folder of its own."""
        server: Daemon = Daemon(self.folder / f"weightd-{name}", "--capacity", f"cpu={capacity}", env=environment)
        return server

    def calibrate(self, what: str, choices: Mapping[K, Callable[[], Sample]], again: int = 3) -> tuple[K, list[Sample]]:
        """The choice that was fastest, and all samples: every choice is run once, the ``again`` fastest once more.

        A choice that fails here is out; ContenderFailed is raised where all do.
        """
        samples: list[Sample] = []
        best: dict[K, float] = {}
        failure: ContenderFailed | None = None

        def attempt(choice: K) -> None:
            nonlocal failure
            self.progress(f"{what}: calibrating, {choice}")
            try:
                sample = choices[choice]()
            except ContenderFailed as error:
                failure = error
                samples.append({"configuration": str(choice), "failed": str(error)})
                return
            samples.append({**sample, "configuration": str(choice)})
            best[choice] = min(best.get(choice, float("inf")), sample["seconds"])

        for choice in choices:
            attempt(choice)
        for choice in sorted(best, key=lambda choice: best[choice])[:again] if len(choices) > 1 else ():
            attempt(choice)
        if not best:
            assert failure is not None
            raise failure
        return min(best, key=lambda choice: best[choice]), samples
