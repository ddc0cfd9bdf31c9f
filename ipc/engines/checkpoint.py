"""A checkpoint as an engine is told of it, and as the daemon has it: its URI, its configuration, the files of that."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from weightd.ipc.client import Client
from weightd.ipc.errors import ModelMismatch
from weightd.ipc.recipe import digest_of


def uri(name: str, revision: str | None = None) -> str:
    """As the daemon names it: a URI as it is, a folder by its absolute path, and what is neither is a hub's."""
    if "://" in name:
        return name
    if os.path.exists(name):
        return os.path.abspath(name)
    return f"hf://{name}" + (f"@{revision}" if revision else "")


def configuration_digest(config: Mapping[str, Any]) -> str:
    """Identity of what a layout hangs on beside the checkpoint. What is not JSON's counts by its name."""
    return digest_of(_plain(config))


def _plain(value: Any) -> Any:
    """As JSON has it. Names of files tell nothing of a layout."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items() if key not in ("_name_or_path", "name_or_path")}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def configure(model: str, folder: str | os.PathLike[str]) -> None:
    """Make a folder hold what a checkpoint has beside its weights, configuration and tokenizer: no more, no less.

    They are the daemon's, which looks whether they are still what is at the origin; engines keep by URL what they have
    once downloaded, for good. Other engines may be reading the folder: a file that is there is whole. Raises
    DaemonUnavailable, RequestRefused, ModelMismatch, OSError; the folder may be of no use then.
    """
    with Client() as client:
        found = client.checkpoint(model)["metadata"]
    names = _files(Path(found)) if found is not None and os.path.isdir(found) else []
    if not names:
        raise ModelMismatch(f"the daemon's copies of the files of {model}, in {found}, cannot be read from here")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        source, file = Path(found, name), target / name
        if not (file.is_file() and file.read_bytes() == source.read_bytes()):
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, beside := file.with_name(f".{file.name}.{os.getpid()}"))
            beside.replace(file)
    for name in set(_files(target)) - set(names):
        if not name.name.startswith("."):  # another engine's, on its way
            (target / name).unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    """All of a folder's, by their path in it. Raises OSError for what cannot be listed."""
    return [Path(at, name).relative_to(folder) for at, _, names in os.walk(folder, onerror=_raise) for name in names]


def _raise(error: OSError) -> NoReturn:
    raise error
