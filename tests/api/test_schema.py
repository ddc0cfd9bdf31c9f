"""The OpenAPI document against the running daemon: schemathesis sends what it allows and what it does not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.servers import Daemon, free_ports


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """Where it is served, and the headers by which one may do everything."""
    (port,) = free_ports(1)
    folder = tmp_path_factory.mktemp("schema")
    allowed = folder / "allowed"
    allowed.mkdir()
    # Generated URIs must not make the daemon look for buckets somewhere out there.
    arguments = ("--listen", f"127.0.0.1:{port}", "--allow", str(allowed), "--capacity", "cpu=1MiB")
    with Daemon(folder / "d", *arguments) as daemon:
        token = (daemon.runtime_dir / "token").read_text().strip()
        yield f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def loaded(served: tuple[str, dict[str, str]]) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{served[0]}/openapi.json")


@pytest.mark.parametrize("who", ["a guest", "who has the token"])
def test_every_answer_is_one_that_the_document_promises(
    loaded: schemathesis.BaseSchema, served: tuple[str, dict[str, str]], who: str
) -> None:
    headers = served[1] if who == "who has the token" else {}
    operations = [result.ok() for result in loaded.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/stage", "/v1/leases", "/v1/node", "/livez", "/metrics"}
    for operation in operations:
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
            def check(case: schemathesis.Case) -> None:
                if isinstance(case.query, dict):
                    case.query.pop("wait", None)  # waiting is what it is for; not here
                if case.path == "/v1/events":  # it would go on for ever
                    valid = case.meta is None or case.meta.generation.mode.is_positive
                    case.query = {"follow": "false" if valid else "neither"}
                # A well-formed request can still mean nothing, and is refused with 422 then.
                case.call_and_validate(timeout=60, headers=headers, excluded_checks=[positive_data_acceptance])

            with contextlib.suppress(Unsatisfiable):  # nothing can be wrong in a request that takes nothing
                check()
