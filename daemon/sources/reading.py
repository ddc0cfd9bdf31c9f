"""Reading in threads: how sources that block are read from several places at once."""

from __future__ import annotations

import threading
from collections.abc import Callable

from weightd.daemon.filling.sink import Sink
from weightd.daemon.layouts.extents import Extent


def read_in_threads(sink: Sink, name: str, bring: Callable[[Extent], None]) -> None:
    """Call ``bring`` with every extent of the sink, in as many threads as it says; ``name`` is what they are called.

    Blocks until all have ended. The first that raises stops the sink, and what it raised is raised here.
    """
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while (extent := sink.next()) is not None:
                bring(extent)
        except BaseException as error:
            errors.append(error)
            sink.stop()

    threads = [threading.Thread(target=work, name=f"{name}-{i}") for i in range(sink.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
