from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.chart.cases import CASES, Case
from tests.chart.helm import HelmFailed, program, template
from tests.conftest import lacking
from tests.servers import Missing


@pytest.fixture(scope="session", autouse=True)
def _helm() -> None:
    """helm is there, and has rendered all cases, on all cores."""
    try:
        program()
    except Missing as error:
        lacking(str(error))
    with ThreadPoolExecutor(4) as pool:
        for case in CASES.values():
            for kubernetes in case.kubernetes:
                pool.submit(_rendered, case, kubernetes)


def _rendered(case: Case, kubernetes: str) -> None:
    with contextlib.suppress(HelmFailed):  # the test that asks for it says so
        template(case.values, release=case.release, kubernetes=kubernetes)
