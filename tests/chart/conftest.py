from __future__ import annotations

import pytest

from tests.chart.helm import program
from tests.conftest import lacking
from tests.servers import Missing


@pytest.fixture(scope="session", autouse=True)
def _helm() -> None:
    try:
        program()
    except Missing as error:
        lacking(str(error))
