"""A real Prometheus that scrapes daemons, and what is asked of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import command
from tests.servers import Server, free_ports

HOW = "apt-get install prometheus"
SCRAPE_INTERVAL = "500ms"


class Prometheus(Server):
    """Scrapes ``targets`` (HOST:PORT) as a job named weightd, twice a second, and evaluates ``rules``."""

    def __init__(self, folder: Path, targets: Sequence[str], rules: Path) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        config = {
            "global": {"scrape_interval": SCRAPE_INTERVAL, "evaluation_interval": SCRAPE_INTERVAL},
            "rule_files": [str(rules)],
            "scrape_configs": [{"job_name": "weightd", "static_configs": [{"targets": list(targets)}]}],
        }
        folder.mkdir(parents=True)
        (folder / "prometheus.yml").write_text(json.dumps(config))  # which is YAML
        super().__init__(
            [
                command("prometheus", HOW), f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
            ],
            folder,
        )  # fmt: skip

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=5).is_success
        except httpx.TransportError:
            return False

    def query(self, text: str) -> list[dict[str, Any]]:
        """The series of an instant query; each has ``metric`` and ``value``. Raises AssertionError with its words."""
        return list(self._get("/api/v1/query", query=text)["result"])

    def label_values(self, label: str, series: str) -> list[str]:
        """Values that a label has in some series."""
        return list(self._get(f"/api/v1/label/{label}/values", **{"match[]": series}))

    def rules(self) -> list[dict[str, Any]]:
        """Its rules, with how they fare."""
        return [rule for group in self._get("/api/v1/rules")["groups"] for rule in group["rules"]]

    def targets(self) -> Mapping[str, str]:
        """Health by target."""
        found = self._get("/api/v1/targets", state="active")["activeTargets"]
        return {target["labels"]["instance"]: target["health"] for target in found}

    def _get(self, path: str, **params: str) -> Any:
        answer = httpx.get(self.url + path, params=params, timeout=30).json()
        assert answer["status"] == "success", f"{params}: {answer['error']}"
        return answer["data"]
