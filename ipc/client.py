"""A thin client of the daemon's HTTP API, over its Unix socket or TCP."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightd.ipc import trust
from weightd.ipc.absence import Absence
from weightd.ipc.errors import DaemonUnavailable, RequestRefused
from weightd.ipc.runtime_dir import API_SOCKET, runtime_dir

if TYPE_CHECKING:
    import httpx


class Client:
    """The daemon's API: each method is one route and returns its JSON. Close it, or use it in a ``with`` block.

    ``url`` (``http://127.0.0.1:7400``) and ``token`` are for TCP; without a url it is the ``api.sock`` of
    ``runtime_directory`` (default: ``WEIGHTD_RUNTIME_DIR``). Without a token, the one that lies there is shown to this
    machine's daemon, where this process may read it. All methods raise DaemonUnavailable, of which DaemonNotTrusted is
    one kind, and RequestRefused.
    """

    def __init__(
        self,
        *,
        url: str | None = None,
        token: str | None = None,
        runtime_directory: str | os.PathLike[str] | None = None,
    ) -> None:
        import httpx

        self._folder = Path(runtime_directory or runtime_dir())
        socket = None if url else str(self._folder / API_SOCKET)
        self.address = url or socket
        self._url = url
        self._token = token
        self._http = httpx.Client(
            base_url=url or "http://weightd",
            transport=httpx.HTTPTransport(uds=socket),
            timeout=httpx.Timeout(30.0, read=None),
        )

    def stage(self, model: str, *, wait: float = 0, dry_run: bool = False, **request: Any) -> dict[str, Any]:
        """``POST /v1/stage``: stage a model, waiting at most ``wait`` seconds for it; further fields as in the API.

        ``dry_run`` only says whether it would fit, and what would go for it.
        """
        params = {"wait": wait, "dry_run": dry_run}
        return self._call("POST", "/v1/stage", json={"model": model, **request}, params=params)

    def stages(self) -> list[dict[str, Any]]:
        """``GET /v1/stage``: all stages."""
        found: list[dict[str, Any]] = self._call("GET", "/v1/stage")["stages"]
        return found

    def show(self, stage: str) -> dict[str, Any]:
        """``GET /v1/stage/{id}``."""
        return self._call("GET", f"/v1/stage/{stage}")

    def manifest(self, stage: str, *, tp_rank: int | None = None, leaves: bool = False) -> dict[str, Any]:
        """``GET /v1/stage/{id}/manifest``."""
        rank = {} if tp_rank is None else {"tp_rank": tp_rank}
        return self._call("GET", f"/v1/stage/{stage}/manifest", params={"leaves": leaves, **rank})

    def remove(self, stage: str, *, force: bool = False, grace: float | None = None) -> dict[str, Any]:
        """``DELETE /v1/stage/{id}``: cancel it, or drop it when nobody leases it.

        ``force`` takes it away from those who do: they have ``grace`` seconds to let go (default: the daemon's).
        """
        params = {"force": force} if grace is None else {"force": force, "grace": grace}
        return self._call("DELETE", f"/v1/stage/{stage}", params=params)

    def remove_unadopted(self) -> list[dict[str, Any]]:
        """``DELETE /v1/unadopted``: drop what the keeper holds and the daemon could not adopt; returns that."""
        dropped: list[dict[str, Any]] = self._call("DELETE", "/v1/unadopted")["unadopted"]
        return dropped

    def change(self, stage: str, *, pin: bool | None = None, priority: int | None = None) -> dict[str, Any]:
        """``PATCH /v1/stage/{id}``: change its pin or its priority."""
        return self._call("PATCH", f"/v1/stage/{stage}", json={"pin": pin, "priority": priority})

    def move(self, stage: str, device: str) -> dict[str, Any]:
        """``POST /v1/stage/{id}/move``: move it to another device, without its source."""
        return self._call("POST", f"/v1/stage/{stage}/move", json={"device": device})

    def leases(self) -> list[dict[str, Any]]:
        """``GET /v1/leases``."""
        found: list[dict[str, Any]] = self._call("GET", "/v1/leases")["leases"]
        return found

    def checkpoint(self, model: str, *, weights: str | Sequence[str] | None = None) -> dict[str, Any]:
        """``GET /v1/checkpoint``: what the headers of a checkpoint say; nothing is staged, no weights are read."""
        named = [] if weights is None else [weights] if isinstance(weights, str) else list(weights)
        return self._call("GET", "/v1/checkpoint", params={"model": model, "weights": named})

    def put_layout(self, key: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """``PUT /v1/layouts/{key}``: give the daemon an engine's layout, as ``weightd.ipc.recipe.encode`` writes it."""
        return self._call("PUT", f"/v1/layouts/{key}", json=recipe)

    def layout(self, key: str, *, wait: float = 0) -> dict[str, Any]:
        """``GET /v1/layouts/{key}``: a layout that the daemon has; one that is on its way is waited for, in seconds."""
        return self._call("GET", f"/v1/layouts/{key}", params={"wait": wait})

    def remove_layout(self, key: str) -> None:
        """``DELETE /v1/layouts/{key}``: forget a layout that no stage is in."""
        self._call("DELETE", f"/v1/layouts/{key}")

    def layouts(self) -> list[dict[str, Any]]:
        """``GET /v1/layouts``: all layouts that the daemon keeps."""
        found: list[dict[str, Any]] = self._call("GET", "/v1/layouts")["layouts"]
        return found

    def peers(self) -> dict[str, Any]:
        """``GET /v1/peers``: the other daemons of the fleet."""
        return self._call("GET", "/v1/peers")

    def node(self) -> dict[str, Any]:
        """``GET /v1/node``."""
        return self._call("GET", "/v1/node")

    def events(self, stage: str) -> Iterator[dict[str, Any]]:
        """``GET /v1/stage/{id}/events``: the stage's record at every change, until it has ended.

        Goes on with the next daemon where this one is restarted.
        """
        import httpx

        absence = Absence(met=True)
        while True:
            try:
                with self._http.stream("GET", f"/v1/stage/{stage}/events", **self._asking()) as response:
                    if response.is_error:
                        response.read()
                        self._refuse(response)
                    for line in response.iter_lines():
                        if line.startswith("data:"):
                            absence.answered()
                            yield json.loads(line.removeprefix("data:"))
                    return
            except httpx.TransportError as error:
                if not _broke(error) or not absence.may_end(error):
                    raise self._unavailable(error) from None

    def _call(
        self, method: str, path: str, *, json: Any = None, params: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        import httpx

        absence = Absence(met=True)
        while True:
            try:
                response = self._http.request(method, path, json=json, params=dict(params or {}), **self._asking())
                break
            except httpx.TransportError as error:
                # Asking for a stage twice is asking once; dropping one twice is an error.
                if method == "DELETE" or not _broke(error) or not absence.may_end(error):
                    raise self._unavailable(error) from None
        if response.is_error:
            self._refuse(response)
        answer: dict[str, Any] = response.json() if response.content else {}
        return answer

    def _asking(self) -> dict[str, Any]:
        """What goes with every request: the token where there is one, and a look at who listens, before a word."""
        token = self._token or (trust.own_token(self._url, self._folder) if self._url else None)
        return {
            "headers": {"Authorization": f"Bearer {token}"} if token else {},
            "extensions": {} if self._url else {"trace": self._look},
        }

    def _look(self, event: str, told: dict[str, Any]) -> None:
        """httpx tells of all that it does for a request; a connection that it has made is looked at."""
        if event == "connection.connect_unix_socket.complete":
            stream = told["return_value"]
            try:
                trust.check(stream.get_extra_info("socket"), self._folder / API_SOCKET)
            except BaseException:
                stream.close()
                raise

    def _refuse(self, response: httpx.Response) -> None:
        try:
            problem = response.json()
            details = {key: value for key, value in problem.items() if key not in ("type", "title", "detail", "code")}
            raise RequestRefused(problem["detail"], code=problem["code"], details=details)
        except (ValueError, KeyError, TypeError):
            raise RequestRefused(f"HTTP {response.status_code} from {self.address}: {response.text[:200]}") from None

    def _unavailable(self, error: Exception) -> DaemonUnavailable:
        return DaemonUnavailable(
            f"no daemon answers at {self.address}: {error}: start one with 'weightd serve', or set "
            "WEIGHTD_RUNTIME_DIR to its runtime directory"
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _broke(error: httpx.TransportError) -> bool:
    """Whether there was a connection, and it broke."""
    import httpx

    return isinstance(error, httpx.ReadError | httpx.WriteError | httpx.RemoteProtocolError)
