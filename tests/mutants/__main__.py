"""Tries small changes of the code, each with the tests that run through the changed line.

``python -m tests.mutants [--tests FOLDER,...] [--sample N] [MODULE...]``: modules as paths, by default those of
``MODULES``. All is done in ``.mutants``, on a clone of the commit that is checked out; where it is interrupted, the
same command goes on. It ends with how many changes of each module some test noticed, and which none did.

Each file of tests that has changed since is run once first, alone, and ``coverage`` notes which lines each test
reaches: by itself where it runs them in its own process, with all tests of its file where daemons run them that these
share.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.mutants.changes import Change, Unmade, changes, sample
from tests.mutants.reached import Reached, file_of_data
from tests.mutants.results import Result, Results, table
from tests.mutants.trial import Trials

ROOT = Path(__file__).parents[2]
MODULES = (
    "daemon/layouts", "daemon/filling", "daemon/stages", "daemon/keeper", "daemon/lending", "daemon/peers/serving",
    "daemon/peers/pulling", "ipc",
)  # fmt: skip
LEFT_OUT = {"bench", "chart", "gpu", "image", "mutants"}
"""Folders of tests that run nothing of these, or not here."""
FOLDERS = ("api", "daemon", "ipc")
RULES = """[run]
parallel = true
patch = subprocess
sigterm = true
source = {tree}/daemon, {tree}/ipc, {tree}/api
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--tests", default="tests", help="folders or files of tests, with commas between")
    parser.add_argument("--sample", type=int, metavar="N", help="N changes of each module, the same ones each time")
    parser.add_argument("--seed", type=int, default=0, help="for other ones")
    parser.add_argument(
        "--within", type=float, default=float("inf"), metavar="SECONDS",
        help="of the tests that reach a line, the fastest, as many as take so long together",
    )  # fmt: skip
    parser.add_argument("--again", metavar="COMMIT", help="only what no test noticed at that commit")
    parser.add_argument("modules", nargs="*", default=MODULES)
    wanted = parser.parse_args()
    commit = output("rev-parse", "HEAD")[:12]
    folder = ROOT / ".mutants"
    tree = cloned(folder, commit)
    env = {**os.environ, "PYTHONPATH": f"{folder / 'path'}{os.pathsep}{tree}", "PYTHONDONTWRITEBYTECODE": "1"}
    tests = sorted({file for name in wanted.tests.split(",") for file in found(tree, name, "test_*.py")})
    data = cover(tree, folder, [file for file in tests if not LEFT_OUT.intersection(Path(file).parts)], env)
    modules = [file for name in wanted.modules for file in found(tree, name, "*.py")]
    known = [changes(tree, module) for module in modules]
    if wanted.again:
        earlier = Results(folder / f"{output('rev-parse', wanted.again)[:12]}.jsonl")
        to_try = [change for of_module in known for change in of_module if earlier.survived(change)]
    else:
        to_try = [change for of_module in known for change in sample(of_module, wanted.sample, wanted.seed)]
    results = Results(folder / f"{commit}.jsonl")
    mutate(tree, to_try, Reached(data, tree), wanted.within, results, env)
    report = table(results, to_try)
    (folder / f"{commit}.report").write_text(report)
    print(report)


def cloned(folder: Path, commit: str) -> Path:
    """A clone of the commit, held by this process alone, and beside it a folder with the package."""
    tree, package = folder / "tree", folder / "path" / "weightd"
    folder.mkdir(exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)  # until the end of the process
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if not tree.exists():
        subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(tree)], check=True)
        package.mkdir(parents=True)
        for name in FOLDERS:
            (package / name).symlink_to(tree / name)
    subprocess.run(["git", "fetch", "--quiet", str(ROOT), "HEAD"], cwd=tree, check=True)
    subprocess.run(["git", "checkout", "--quiet", "--force", commit], cwd=tree, check=True)  # a change may be left over
    compiled = [sys.executable, "-m", "compileall", "-q", *FOLDERS]  # trials write no bytecode
    subprocess.run(compiled, cwd=tree, check=True)
    return tree


def found(tree: Path, name: str, pattern: str) -> list[str]:
    """Files of a folder, or a file."""
    path = tree / name
    if not path.exists():
        raise SystemExit(f"{name}: there is no such file or folder")
    files = [path] if path.is_file() else path.rglob(pattern)
    return sorted(str(file.relative_to(tree)) for file in files)


def cover(tree: Path, folder: Path, files: Sequence[str], env: dict[str, str]) -> list[Path]:
    """Run each test file that has not been run with this code yet; what each reaches and how long its tests take."""
    code = hashlib.sha256("".join(output("rev-parse", f"HEAD:{name}") for name in FOLDERS).encode())
    data = folder / f"reached-{code.hexdigest()[:12]}"
    data.mkdir(exist_ok=True)
    rules = folder / "coveragerc"
    rules.write_text(RULES.format(tree=tree))
    at = [file_of_data(data, file, (tree / file).read_bytes()) for file in files]
    for file, path in zip(files, at, strict=True):
        if path.exists():
            continue
        print(f"{file} ...", flush=True)
        for part in data.glob("part*"):
            part.unlink()
        command = ["-m", "coverage", "run", f"--rcfile={rules}", f"--data-file={data / 'part'}", f"--context={file}"]
        plugin = ["-p", "tests.mutants.noting", "-p", "no:cacheprovider", f"--reached={path}.json"]
        subprocess.run(
            [sys.executable, *command, "-m", "pytest", "-q", "--no-header", *plugin, file],
            cwd=tree,
            env=env,
            stdout=subprocess.DEVNULL,
            check=False,  # tests that fail by themselves are left out of trials
        )
        combine = ["-m", "coverage", "combine", f"--rcfile={rules}", f"--data-file={data / 'part-all'}", "--quiet"]
        if parts := [str(part) for part in data.glob("part.*")]:
            subprocess.run([sys.executable, *combine, *parts], cwd=tree, env=env, check=True)
            (data / "part-all").rename(path)
    return [path for path in at if path.exists()]


def mutate(
    tree: Path, to_try: Iterable[Change], reached: Reached, within: float, results: Results, env: dict[str, str]
) -> None:
    """Try these changes, but for those that were tried before."""
    waiting = [change for change in to_try if change not in results]
    trials = Trials(tree, env, reached.modules)
    for number, change in enumerate(waiting, 1):
        tests = reached.tests(change.module, change.lines, within)
        began = time.monotonic()
        try:
            with change.made(tree) as diff:
                noticed = trials.noticed(tests.names, tests.seconds)
        except Unmade as error:
            print(f"{number}/{len(waiting)} {change}: {error}")
            continue
        result = Result(change, noticed, len(tests.names), diff)
        results.add(result)
        took = time.monotonic() - began
        print(
            f"{number}/{len(waiting)} {change}: {noticed or 'SURVIVED'} ({len(tests.names)} tests, {took:.1f} s)",
            flush=True,
        )


def output(*command: str) -> str:
    got = subprocess.run(["git", "-C", str(ROOT), *command], check=True, stdout=subprocess.PIPE, text=True)
    return got.stdout.strip()


if __name__ == "__main__":
    main()
