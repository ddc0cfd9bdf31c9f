"""Before a client says a word it looks at who listens, and whose folder it is."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.servers import free_ports
from weightd.ipc import AttachTimeout, Client, DaemonNotTrusted, DaemonUnavailable, WeightdError, attach, trust
from weightd.ipc.runtime_dir import runtime_dir

NOBODY = 65534
ANOTHER = 1234

LISTENER = """
import os, socket, sys
uid, *paths = sys.argv[1:]
os.setgroups([]); os.setgid(int(uid)); os.setuid(int(uid))
os.umask(0)
listeners = []
for path in paths:
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    listeners.append(socket.socket(socket.AF_UNIX))
    listeners[-1].bind(path)
    listeners[-1].listen()
print("there", flush=True)
for listener in listeners:
    connection, _ = listener.accept()
    print(len(connection.recv(1000)), flush=True)
    connection.close()
"""


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder as /tmp is."""
    if os.getuid():
        pytest.skip("needs root, to become another user")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def listen() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Have a user listen at Unix sockets, and print how many bytes each first client has said."""
    with contextlib.ExitStack() as stack:

        def start(uid: int, *paths: Path) -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", LISTENER, str(uid), *map(str, paths)], stdout=subprocess.PIPE, text=True
                )
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == "there\n"
            return process

        yield start


Listen = Callable[..., "subprocess.Popen[str]"]


def heard(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_nothing_is_said_to_another_users_daemon(base: Path, listen: Listen) -> None:
    folder = base / "weightd-0"
    process = listen(ANOTHER, folder / "lease.sock", folder / "api.sock")
    with pytest.raises(DaemonNotTrusted, match=f"uid {ANOTHER}.*WEIGHTD_DAEMON_UID={ANOTHER}") as error:
        attach("/x", socket=folder)
    assert isinstance(error.value, DaemonUnavailable), "an engine loads by itself then"
    assert error.value.code == "daemon_not_trusted"
    assert heard(process) == 0
    with Client(runtime_directory=folder) as client, pytest.raises(DaemonNotTrusted, match=f"uid {ANOTHER}"):
        client.node()
    assert heard(process) == 0


def asks(folder: Path) -> None:
    with contextlib.suppress(WeightdError), Client(runtime_directory=folder) as client:
        client.node()


def test_a_user_that_the_setting_names_is_believed(base: Path, listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = base / "run"
    process = listen(ANOTHER, folder / "lease.sock", folder / "api.sock")
    folder.chmod(0o777)  # as volumes of Kubernetes are
    monkeypatch.setenv("WEIGHTD_DAEMON_UID", f"4711, {ANOTHER}")
    with pytest.raises(AttachTimeout):  # it hangs up, is asked again, and does not answer
        attach("/x", socket=folder, timeout=2)
    assert heard(process) > 20
    asked = threading.Thread(target=asks, args=(folder,), daemon=True)  # again and again, for half a minute
    asked.start()
    assert heard(process) > 20
    process.kill()
    shutil.rmtree(folder)
    asked.join(60)


def test_a_setting_that_names_nobody_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTD_DAEMON_UID", "weightd")
    with pytest.raises(DaemonNotTrusted, match="is 'weightd': expected"):
        trust.trusted()


def looked_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(path))
        listener.listen()
        client.connect(str(path))
        try:
            trust.check(client, path)
        finally:
            path.unlink()


@pytest.mark.parametrize("mode", [0o770, 0o757, 0o1777])
def test_a_folder_that_others_may_write_to_is_not_believed(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "run"
    folder.mkdir(0o750)
    looked_at(folder / "s")
    folder.chmod(mode)
    with pytest.raises(DaemonNotTrusted, match=f"chmod go-w {folder}"):
        looked_at(folder / "s")


def test_a_folder_of_somebody_elses_is_not_believed_whoever_listens_in_it(base: Path) -> None:
    folder = base / "run"
    folder.mkdir(0o755)
    os.chown(folder, ANOTHER, ANOTHER)
    with pytest.raises(DaemonNotTrusted, match=f"{folder} belongs to uid {ANOTHER}"):
        looked_at(folder / "s")
    link = base / "link"
    link.symlink_to(folder)
    with pytest.raises(DaemonNotTrusted, match=f"belongs to uid {ANOTHER}"):
        looked_at(link / "s")


ATTACHING = """
import os, sys, httpx, httpcore, h11, weightd.ipc.client
from weightd.ipc import DaemonNotTrusted, attach, runtime_dir
os.setgroups([]); os.setgid(65534); os.setuid(65534)
os.environ.pop("WEIGHTD_RUNTIME_DIR", None); os.environ.pop("XDG_RUNTIME_DIR", None)
assert str(runtime_dir()) == "/tmp/weightd-65534"
try:
    attach("/x", socket=sys.argv[1])
except DaemonNotTrusted as error:
    print(error)
"""


def test_a_folder_of_tmp_that_somebody_else_made_first_gets_nothing_of_a_plain_user(base: Path, listen: Listen) -> None:
    folder = base / f"weightd-{NOBODY}"
    process = listen(ANOTHER, folder / "lease.sock", folder / "api.sock")
    done = subprocess.run(
        [sys.executable, "-c", ATTACHING, str(folder)], capture_output=True, text=True, check=True, timeout=120
    )
    assert f"uid {ANOTHER}, neither root nor uid {NOBODY}" in done.stdout
    assert heard(process) == 0


def test_the_default_folder_is_what_the_readme_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEIGHTD_RUNTIME_DIR", raising=False)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert f"`{runtime_dir()}` for root" in readme
    monkeypatch.setattr(os, "geteuid", lambda: ANOTHER)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "$XDG_RUNTIME_DIR")
    assert f"`{runtime_dir()}`" in readme
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert f"`{runtime_dir()}`".replace(str(ANOTHER), "UID") in readme


TCP_LISTENER = """
import os, socket, sys
os.setgroups([]); os.setgid(1234); os.setuid(1234)
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as listener:
    print("there", flush=True)
    sys.stdin.read()
"""


def test_the_token_is_shown_on_this_machine_alone_and_to_a_trusted_listener_alone(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("f" * 64 + "\n")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        for host in ("127.0.0.1", "localhost", "[::1]"):
            assert trust.own_token(f"http://{host}:{port}", tmp_path) == "f" * 64
        elsewhere = (f"http://10.0.0.1:{port}", f"http://elsewhere:{port}", f"https://127.0.0.1:{port}")
        for url in (*elsewhere, "http://[", "x"):
            assert trust.own_token(url, tmp_path) is None
        assert trust.own_token(f"http://127.0.0.1:{port}", tmp_path / "nowhere") is None
    assert trust.own_token(f"http://127.0.0.1:{port}", tmp_path) is None, "nobody listens"
    if os.getuid() == 0:
        (port,) = free_ports(1)
        command = [sys.executable, "-c", TCP_LISTENER, str(port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"there\n"
            assert trust.own_token(f"http://127.0.0.1:{port}", tmp_path) is None
            process.communicate(timeout=60)


def test_what_httpx_tells_of_a_connection_is_what_is_looked_at(tmp_path: Path) -> None:
    """The look at who listens hangs on it: a version that says nothing would be one that looks at nothing."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        told = []
        transport = httpx.HTTPTransport(uds=str(tmp_path / "s"))
        with httpx.Client(transport=transport, timeout=0.2) as client, pytest.raises(httpx.ReadTimeout):
            client.get("http://weightd/", extensions={"trace": lambda event, _: told.append(event)})
        assert select.select([listener], [], [], 0)[0]
    assert told.index("connection.connect_unix_socket.complete") < told.index("http11.send_request_headers.started")
