"""What the image weighs, by package and choice of CUDA, and what was cut: the tables of docs/image.md.

``make image-sizes``, or ``python -m tests.image.sizes [none 12 13]``. It carries the Dockerfile out (see ``container``)
and adds up files; a registry's compressed layers are a third to a half of it.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.image import ROOT
from tests.image.container import Build, Container, python_for
from tests.image.dockerfile import Dockerfile

_SHOWN = 2_000_000
"""Bytes from which on a package has a line of its own."""


def weights(packages: Path) -> Counter[str]:
    """Bytes of each package of a folder, with what was compiled of it."""
    owner: dict[str, str] = {}
    for found in metadata.distributions(path=[str(packages)]):
        name = canonicalize_name(found.metadata["Name"])
        for file in found.files or ():
            owner[str(file)] = name
    total: Counter[str] = Counter()
    for path in packages.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        relative = path.relative_to(packages)
        if relative.parent.name == "__pycache__":
            relative = relative.parent.parent / f"{relative.name.partition('.')[0]}.py"
        total[owner.get(str(relative), "(nobody's)")] += path.stat().st_size
    return total


def asked_for(roots: Iterable[str]) -> set[str]:
    """All that packages of this environment ask for, and what that asks for, and so on."""
    found: set[str] = set()
    waiting = [Requirement(root) for root in roots]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if f"{name}[{extra}]" in found:
                continue
            found.add(f"{name}[{extra}]")
            try:
                below = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            parsed = [Requirement(text) for text in below]
            waiting += [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": extra})]
    return {entry.partition("[")[0] for entry in found}


def own_weight(name: str) -> int:
    """Bytes of a package of this environment; 0 where it is not there."""
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError:
        return 0
    return sum(path.stat().st_size for path in (Path(str(file.locate())) for file in files) if path.is_file())


def main() -> None:
    choices = sys.argv[1:] or ["none", "12", "13"]
    dockerfile = Dockerfile((ROOT / "Dockerfile").read_text())
    folder = Path(tempfile.mkdtemp(prefix="weightd-sizes-"))
    try:
        base = Container.base(folder / "base", python_for(dockerfile.arguments["BASE"]))
        by_choice: dict[str, Counter[str]] = {}
        trimmed: dict[str, dict[str, float]] = {}
        for cuda in choices:
            (folder / cuda).mkdir()
            build = Build(
                dockerfile, ROOT, folder / cuda, images={dockerfile.arguments["BASE"]: base}, arguments={"CUDA": cuda}
            )
            (packages,) = (build.stage("weightd").root / "opt" / "weightd").glob("lib/python*/site-packages")
            by_choice[cuda] = weights(packages)
            printed = re.findall(r"^ *([\d.]+) MB  (.*)$", "\n".join(build.output["dependencies"]), re.MULTILINE)
            trimmed[cuda] = {why: float(gone) for gone, why in printed}
    finally:
        shutil.rmtree(folder)

    def row(name: str, numbers: Iterable[float | None]) -> None:
        print(f"| {name} | " + " | ".join("" if number is None else f"{number:.1f}" for number in numbers) + " |")

    print("| MB | " + " | ".join(f"CUDA={cuda}" for cuda in choices) + " |")
    print("| --- |" + " ---: |" * len(choices))
    names = sorted(set().union(*by_choice.values()), key=lambda name: -max(sizes[name] for sizes in by_choice.values()))
    large = [name for name in names if max(sizes[name] for sizes in by_choice.values()) >= _SHOWN]
    for name in large:
        row(name, (by_choice[cuda][name] / 1e6 or None for cuda in choices))
    rest = [sum(size for name, size in by_choice[cuda].items() if name not in large) / 1e6 for cuda in choices]
    row(f"{len(names) - len(large)} others", rest)
    row("**all**", (by_choice[cuda].total() / 1e6 for cuda in choices))
    print("\n| cut out of packages, MB | " + " | ".join(f"CUDA={cuda}" for cuda in choices) + " |")
    print("| --- |" + " ---: |" * len(choices))
    for why in dict.fromkeys(why for found in trimmed.values() for why in found):
        row(why, (trimmed[cuda].get(why) for cuda in choices))
    print("\n| packages cut whole | MB in the environment of the tests |\n| --- | ---: |")
    cut = asked_for(["weightd[daemon]", "nixl-cu12"]) - set(by_choice[choices[0]])
    for name in sorted(cut, key=own_weight, reverse=True):
        if own_weight(name):
            row(name, [own_weight(name) / 1e6])


if __name__ == "__main__":
    main()
