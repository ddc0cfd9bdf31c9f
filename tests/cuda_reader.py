"""An engine on a GPU, as a process of its own: attaches, reads what it maps back by the driver, and says what it saw.

``python -m tests.cuda_reader RUNTIME_DIR ATTACH_OPTIONS_AS_JSON`` prints one JSON object: device, lease, SHA-256 of
each tensor; or error, code and message. It then does what lines on its stdin say (``read``, ``write``, ``end``).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from typing import Any

from weightd.ipc import WeightdError, Weights, attach
from weightd.ipc.cuda import call, gpu_by_name
from weightd.ipc.mapping import DeviceBytes


def read_back(weights: Weights, name: str) -> bytes:
    """A tensor's bytes, wherever they are."""
    found = weights.raw(name)
    if not isinstance(found, DeviceBytes):
        return bytes(found)
    host = ctypes.create_string_buffer(max(found.nbytes, 1))
    if found.nbytes:
        with gpu_by_name(weights.device).context():
            call("cuMemcpyDtoH", ctypes.addressof(host), found.address, found.nbytes)
    return host.raw[: found.nbytes]


def digests(weights: Weights) -> dict[str, str]:
    return {name: hashlib.sha256(read_back(weights, name)).hexdigest() for name in weights}


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def main() -> None:
    runtime_dir, options = sys.argv[1], json.loads(sys.argv[2])
    streamed = options.pop("streamed", False)
    try:
        weights = attach(**options, socket=runtime_dir, wait=not streamed, timeout=120)
        if streamed:
            weights.wait(120)
    except WeightdError as error:
        say({"error": type(error).__name__, "code": error.code, "message": str(error)})
        return
    first = next(iter(weights), None)
    say({"device": weights.device, "lease": weights.lease, "digests": digests(weights)})
    for line in sys.stdin:
        if line.strip() == "read":
            say({"digests": digests(weights)})
        elif line.strip() == "write" and first is not None:
            raw = weights.raw(first)
            assert isinstance(raw, DeviceBytes)
            ctypes.memset(raw.address, 7, 1)  # the fake's memory is the host's, with the rights that the mapping has
            say({"digests": digests(weights)})
        elif line.strip() == "end":
            break
    weights.close()


if __name__ == "__main__":
    main()
