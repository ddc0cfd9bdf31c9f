"""What ``weightd.ipc`` exports: all that is public in it, from one place."""

from __future__ import annotations

import inspect

import weightd.ipc
from weightd.ipc import client, errors, manifest, runtime_dir, weights


def test_every_public_name_is_exported_from_one_place() -> None:
    for module in (client, errors, manifest, runtime_dir, weights):
        for name, value in vars(module).items():
            own = getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
            if own and (inspect.isclass(value) or inspect.isfunction(value)):
                assert getattr(weightd.ipc, name) is value
                assert name in weightd.ipc.__all__
                assert value.__doc__
