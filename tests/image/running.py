"""An image that runs as Kubernetes runs it: PID 1 of its own, its user, a read-only root, two folders to write to."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.image.container import Container
from tests.image.dockerfile import Stage
from tests.servers import Daemon


class Running(Daemon):
    """``docker run --read-only`` of the daemon's image, beside a client on this machine."""

    def __init__(
        self, image: Container, stage: Stage, folder: Path, *arguments: str,
        env: Mapping[str, str], mounts: Mapping[str, Path],
    ) -> None:  # fmt: skip
        super().__init__(folder)
        self.image = image
        # As volumes are that a cluster mounts: owned by whom it is told to, and empty.
        for path in (self.runtime_dir, self.cache_dir):
            path.mkdir()
            os.chown(path, *map(int, image.user.split(":")))
        entrypoint = json.loads(stage.last("ENTRYPOINT").value)
        volumes = {"/run/weightd": self.runtime_dir, "/var/cache/weightd": self.cache_dir, **mounts}
        self._command = image.command(*entrypoint, *arguments, writable=("/tmp",), mounts=volumes)
        # Whoever tests is root here; the image's user is let in by default, others by this.
        self.env = self._env = {**image.env, "HOME": "/home/weightd", "WEIGHTD_PEER_UIDS": "0,65532", **env}

    @property
    def keeper_pid(self) -> int:
        """The keeper's, as this machine counts: it is the first that ``unshare`` starts."""
        assert self.process is not None
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())

    def execute(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``docker exec``: in its namespaces, as its user, in its environment."""
        inside = ["nsenter", f"--target={self.keeper_pid}", "--mount", "--pid", "--", "chroot", str(self.image.root)]
        inside += self.image.as_user()
        return subprocess.run(
            [*inside, *arguments], env=self._env, capture_output=True, text=True, check=False, timeout=60
        )

    def stop(self) -> None:
        """As a container runtime does: SIGTERM to PID 1."""
        if self.process is not None and self.process.poll() is None:
            os.kill(self.keeper_pid, self.stop_signal)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        super().stop()
