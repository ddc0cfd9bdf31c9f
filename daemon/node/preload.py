"""What the daemon is to stage by itself as it starts, and how far that is: until then it is not ready."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from weightd.daemon.errors import InvalidRequest
from weightd.daemon.stages.request import StageRequest, describe_errors

_MAX_BYTES = 16 << 20
_REQUESTS: TypeAdapter[list[StageRequest]] = TypeAdapter(list[StageRequest])


def read(text: str) -> list[StageRequest]:
    """The stage requests that the setting ``preload`` means: a JSON array, or the path of a file with one.

    Raises InvalidRequest, which says what is wrong with which of them.
    """
    if not text.strip():
        return []
    where = "preload"
    if not text.lstrip().startswith("["):
        where = f"preload: {text}"
        try:
            with Path(text).open("rb") as file:
                content = file.read(_MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InvalidRequest(
                f"{where}: neither a JSON array of stage requests nor a file with one: {reason}"
            ) from None
        if len(content) > _MAX_BYTES:
            raise InvalidRequest(f"{where}: more than {_MAX_BYTES} bytes")
        text = content.decode(errors="replace")
    try:
        requests = _REQUESTS.validate_python(json.loads(text))
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"{where}: not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest(f"{where}: nested too deeply") from None
    except ValidationError as error:
        raise InvalidRequest(f"{where}: {'; '.join(describe_errors(list(error.errors())))}") from None
    return requests


@dataclass
class Wanted:
    """One entry of the list, and how far it is."""

    request: StageRequest
    state: str = "waiting"
    """Of its stage; ``waiting`` before there is one, and before the next try."""
    stage: str | None = None
    """Id of its stage, once there is one."""
    attempts: int = 0
    error: str = ""
    """Why it is not ready, where it has failed."""
    was_ready: bool = field(default=False, repr=False)
    """Once is enough: what becomes of the stage later is a matter of policy, and no reason to take engines down."""

    @property
    def why_not(self) -> str:
        return f"{self.request.model}: {self.state}" + (f", {self.error}" if self.error else "")


class Preload:
    """A list of requests, each to be staged until it was ready once."""

    def __init__(self, requests: Sequence[StageRequest] = (), problem: str = "") -> None:
        """``problem`` is why there is no list, where there should be one."""
        self.wanted = [Wanted(request) for request in requests]
        self._problem = problem

    @property
    def missing(self) -> list[str]:
        """What is not ready and was not since the daemon started, each with the reason; empty where the node is."""
        missing = [wanted.why_not for wanted in self.wanted if not wanted.was_ready]
        return [self._problem, *missing] if self._problem else missing
