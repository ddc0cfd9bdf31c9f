"""Takes files out of an environment that weightd never opens, and says what each kind of them weighed.

Run by the Dockerfile: ``python trim.py /opt/weightd``. Packages are cut whole in cut.txt; here it is parts of those
that are needed. Exits where a package is there and has no such part: then it is to be looked at anew. Then every shared
library that is left is asked whether it finds those it is linked to.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Cut(NamedTuple):
    """Files of one package. Patterns are globs below site-packages; what matches one of ``but`` stays."""

    package: str
    files: tuple[str, ...]
    why: str
    but: tuple[str, ...] = ()


_NIXL_LIBRARIES = (
    "aio", "aws-*", "azure-*", "core", "curl", "gusli_*", "numa", "pull", "s2n", "uring", "xml2", "zstd",
)  # fmt: skip

CUTS = (
    Cut(
        "nixl",
        ("nixl_ep_cu1?",),
        "NIXL's kernels for expert parallelism, once for each of three versions of torch",
    ),
    Cut(
        "nixl",
        (
            "nixl_cu1?.libs/nixl",
            ".nixl_cu1?.mesonpy.libs/plugins/*",
            ".nixl_cu1?.mesonpy.libs/libobj_utils.so",
            ".nixl_cu1?.mesonpy.libs/libpull.so*",
            ".nixl_cu1?.mesonpy.libs/libcore.so*",
            *(f"nixl_cu1?.libs/lib{name}-*" for name in _NIXL_LIBRARIES),
        ),
        "NIXL's other backends (object stores, files, GPUNetIO, libfabric), and the libraries that only they use",
        but=("libplugin_UCX.so",),
    ),
    Cut(
        "nixl",
        (
            "nixl_cu1?.libs/ucx/libucx_perftest*",
            "nixl_cu1?.libs/ucx/*.la",
            "nixl_cu1?.scripts",
            # Linked to what is not there: the CUDA runtime, libefa, libflexio.
            "nixl_cu1?.libs/ucx/libucm_cuda*",
            "nixl_cu1?.libs/ucx/libuct_ib_efa*",
            "nixl_cu1?.libs/ucx/libuct_ib_mlx5_gdp*",
        ),
        "UCX's benchmarks and what of it cannot be loaded, NIXL's examples",
    ),
    Cut(
        "botocore",
        ("botocore/data/*",),
        "descriptions of AWS services; credentials need those that stay",
        but=("*.json", "sts", "sso", "sso-oidc", "signin"),
    ),
    Cut("numpy", ("numpy/**/tests", "numpy/f2py"), "its test suites, its Fortran compiler front end"),
    Cut(
        "nvidia_cuda_nvrtc_cu12",
        ("nvidia/cuda_nvrtc/lib/libnvrtc*.alt.so*",),
        "a second build of the CUDA compiler, that is loaded where it is asked for",
    ),
    Cut("cupy", ("cupy/cuda/thrust.*.so",), "sorting, without which CuPy does where it is not there"),
    Cut("runai", ("runai_model_streamer*/**/tests",), "its test suites"),
)  # fmt: skip

_OF_THE_DRIVER = frozenset({"libcuda.so.1", "libnvidia-ml.so.1"})
"""Come from the node's driver."""
_ON_DEMAND = ("cupy/", "cupy_backends/", "cupyx/")
"""CuPy's modules over CUDA's libraries for mathematics: imported when used, and weightd uses its compiler alone."""


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder; links count nothing."""
    if path.is_symlink():
        return 0
    return path.stat().st_size if path.is_file() else sum(size(below) for below in path.iterdir())


def trim(packages: Path) -> None:
    """Carry out ``CUTS``, printing a line for each. Exits where a package does not look as it did."""
    for cut in CUTS:
        if not list(packages.glob(f"{cut.package}*")):
            continue
        gone = 0
        for pattern in cut.files:
            found = [path for path in packages.glob(pattern) if not any(path.match(but) for but in cut.but)]
            if not found:
                sys.exit(f"trim: {cut.package} is there, and has no {pattern}: look at what it holds now")
            for path in found:
                gone += size(path)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(f"{gone / 1e6:7.1f} MB  {cut.package}: {cut.why}")


def unresolved(packages: Path) -> dict[str, set[str]]:
    """Libraries that are linked to and not there, by the file that needs them."""
    missing: dict[str, set[str]] = {}
    for path in sorted(packages.rglob("*.so*")):
        command = ["/usr/bin/ldd", str(path)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - files just installed
        absent = set(re.findall(r"(\S+) => not found", answer.stdout)) - _OF_THE_DRIVER
        name = str(path.relative_to(packages))
        if absent and not name.startswith(_ON_DEMAND):
            missing[name] = absent
    return missing


def main() -> None:
    (packages,) = Path(sys.argv[1]).glob("lib/python*/site-packages")
    trim(packages)
    Path(sys.argv[1], ".lock").unlink(missing_ok=True)  # uv's, which everybody could write to
    for launcher in Path(sys.argv[1], "bin").iterdir():
        if not launcher.name.startswith("python"):
            launcher.unlink()  # other packages' commands
    if missing := unresolved(packages):
        sys.exit("\n".join(f"trim: {path} lacks {', '.join(sorted(absent))}" for path, absent in missing.items()))


if __name__ == "__main__":
    main()
