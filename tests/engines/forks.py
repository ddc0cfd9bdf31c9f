"""In an engine's environment: what takes long to import is imported once, and each run is a fork of that."""

import gc
import json
import multiprocessing
import os
import signal
import socket
import sys


def listen(where: str) -> None:
    """Return in a process of its own for each connection, as if it had been started for it.

    A connection's first line is arguments, variables and folder, as JSON; from then on it is standard input and output.
    """
    gc.freeze()  # else each fork copies what it collects
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(where)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("LISTENING", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        listener.close()
        os.setsid()
        for descriptor in (0, 1):
            os.dup2(connection.fileno(), descriptor)
        connection.close()
        arguments, variables, home = json.loads(sys.stdin.readline())
        os.dup2(os.open(f"{home}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.chdir(home)
        os.environ.clear()
        os.environ.update(variables)
        sys.argv[1:] = arguments
        sys.path[:0] = [path for path in variables.get("PYTHONPATH", "").split(":") if path not in ("", *sys.path)]
        # Its own processes are forks as well: engines ask for fresh ones, which is for CUDA's sake.
        multiprocessing.set_start_method = lambda *_, **__: None
        print(os.getpid(), flush=True)
        return
