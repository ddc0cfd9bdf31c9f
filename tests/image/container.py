"""A Dockerfile carried out without a container engine, and its image run: folders, chroot and namespaces.

The base image's part is played by this machine: its /usr with a Python's own folder as /usr/local, as python:slim has
it, and a copy of its /etc. Each stage has a root folder of its own. RUN commands run as they stand in the Dockerfile;
what runs from the image does so as its USER, as PID 1, with nothing writable but the folders that are named. For root
on Linux; elsewhere ``Missing`` says what is in the way.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from docker.utils.build import exclude_paths

from tests.image.dockerfile import Dockerfile, Instruction, Stage, expand
from tests.servers import Missing

_SHARED = ("dev", "sys", "usr")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NETWORK = ("SSL_CERT_FILE", "PIP_CERT", "PIP_INDEX_URL", "UV_DEFAULT_INDEX", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
"""How this machine reaches a package registry: a build is told, as an engine's client tells it about proxies."""
_NAMESPACES = ("--mount", "--pid", "--fork", "--kill-child")


def python_for(base: str) -> Path:
    """The folder of a Python of the version that a base image's tag names; where there is none, of this one."""
    version = base.rpartition(":")[2].partition("-")[0]
    found = [path for path in Path.home().glob(f".pyenv/versions/{version}.*") if (path / "bin" / "python").exists()]
    prefix = found[0] if found else Path(sys.base_prefix)
    if prefix == Path("/usr"):
        raise Missing(f"a Python {version} in a folder of its own, as pyenv and python:slim have it")
    return prefix


class Container:
    """One stage: a root folder, and the environment, user and folder that its instructions have set."""

    def __init__(self, root: Path, prefix: Path) -> None:
        self.root = root
        self.prefix = prefix
        self.env: dict[str, str] = {"PATH": _PATH, "HOME": "/root"}
        self.directory = "/"
        self.user = "0:0"

    @classmethod
    def base(cls, root: Path, prefix: Path) -> Container:
        """What python:slim is here: ``prefix`` is the Python that it has."""
        if os.geteuid():
            raise Missing("root: images are built in namespaces")
        container = cls(root, prefix)
        for name in (*_SHARED, "proc", "opt", "home", "run", "var", "root"):
            (root / name).mkdir(parents=True)
            (root / name).chmod(0o755)
        root.chmod(0o755)
        (root / "tmp").mkdir()
        (root / "tmp").chmod(0o1777)
        for link in Path("/").iterdir():
            if link.is_symlink() and os.readlink(link).startswith("usr/"):
                (root / link.name).symlink_to(os.readlink(link))
        shutil.copytree("/etc", root / "etc", symlinks=True)
        container.run("ldconfig")  # a Python of a folder of its own may be a shared library there
        return container

    def child(self, root: Path) -> Container:
        """What FROM begins with: all that this one has. Files are shared: nothing here changes one in place."""
        subprocess.run(["cp", "-a", "--link", str(self.root), str(root)], check=True)
        child = Container(root, self.prefix)
        child.env, child.directory, child.user = dict(self.env), self.directory, self.user
        return child

    def command(
        self, *arguments: str, writable: Sequence[str] | None = None, mounts: Mapping[str, Path] | None = None
    ) -> list[str]:
        """What runs ``arguments`` in it, as PID 1 and its user.

        ``writable``: folders, where all else is read-only. ``mounts``: folders of this machine, by where they appear.
        """
        root = shlex.quote(str(self.root))
        lines = [
            "umask 022",
            "mount --make-rprivate /",
            f"mount --bind {root} {root}",
            *(f"mount --rbind /{name} {root}/{name}" for name in _SHARED),
            f"mount --bind {shlex.quote(str(self.prefix))} {root}/usr/local",
            # What is this machine's stays as it is.
            *(f"mount -o remount,bind,ro {root}/{name}" for name in ("usr", "usr/local")),
        ]
        for place, folder in (mounts or {}).items():
            (self.root / place.lstrip("/")).mkdir(parents=True, exist_ok=True)
            lines += [f"mount --bind {shlex.quote(str(folder))} {root}{place}"]
        if writable is not None:
            lines += [f"mount --bind {root}{folder} {root}{folder}" for folder in writable]
            lines += [f"mount -o remount,bind,ro {root}"]
        lines += [f"mount -t proc proc {root}/proc"]
        inside = shlex.join(["cd", self.directory]) + ' && exec "$@"'
        run = shlex.join(["chroot", str(self.root), *self.as_user(), "sh", "-c", inside, "sh", *arguments])
        return ["unshare", *_NAMESPACES, "sh", "-ec", "\n".join([*lines, f"exec {run}"])]

    def as_user(self) -> list[str]:
        """What a command begins with that runs as the image's user: without root's, and without any capability."""
        uid, _, gid = self.user.partition(":")
        drop = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"]
        return drop + (["--bounding-set=-all", "--inh-caps=-all"] if uid != "0" else [])

    def run(
        self, *arguments: str, env: Mapping[str, str] | None = None, mounts: Mapping[str, Path] | None = None
    ) -> str:
        """Run it to its end as it is built; returns its output. Raises RuntimeError with it where it fails."""
        reach = {name: os.environ[name] for name in _NETWORK if name in os.environ}
        done = subprocess.run(
            self.command(*arguments, mounts=mounts), env={**self.env, **reach, **(env or {})}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{shlex.join(arguments)[:500]} ended with {done.returncode}:\n{done.stdout[-4000:]}")
        return done.stdout


class Build:
    """Builds stages of a Dockerfile below ``folder``, each once. ``images`` are those that are not its stages."""

    def __init__(
        self, dockerfile: Dockerfile, context: Path, folder: Path, *,
        images: Mapping[str, Container], arguments: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._dockerfile = dockerfile
        self._context = context
        self._folder = folder
        self._images = dict(images)
        self._given = dict(arguments or {})
        self._done: dict[str, Container] = {}
        self.output: dict[str, list[str]] = {}
        """What the RUN commands of each stage have printed."""

    def stage(self, name: str) -> Container:
        """The stage of this name, or the image."""
        if name in self._images:
            return self._images[name]
        if name not in self._done:
            self._done[name] = self._carry_out(self._dockerfile.stages[name])
        return self._done[name]

    def _carry_out(self, stage: Stage) -> Container:
        root = self._folder / stage.name
        root.parent.mkdir(parents=True, exist_ok=True)
        if stage.base == "scratch":
            root.mkdir()
            container = Container(root, Path(sys.base_prefix))
        else:
            container = self.stage(stage.base).child(root)
        variables: dict[str, str] = {}
        for instruction in stage.instructions:
            if instruction.name == "ARG":
                for name, default in instruction.pairs.items():
                    variables[name] = self._given.get(name, default or self._dockerfile.arguments.get(name, ""))
            elif instruction.name == "ENV":
                known = {**variables, **container.env}
                container.env |= {name: expand(value, known) for name, value in instruction.pairs.items()}
            elif instruction.name == "WORKDIR":
                container.directory = instruction.value
                (root / instruction.value.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif instruction.name == "USER":
                container.user = instruction.value
            elif instruction.name == "COPY":
                self._copy(container, instruction)
            elif instruction.name == "RUN":
                output = container.run("sh", "-c", instruction.command, env=variables, mounts=_caches(instruction))
                self.output.setdefault(stage.name, []).append(output)
        return container

    def _copy(self, container: Container, instruction: Instruction) -> None:
        *sources, target = instruction.arguments
        there = container.root / os.path.join(container.directory, target).lstrip("/")
        if "from" in instruction.flags:
            (source,) = sources
            other = self.stage(instruction.flags["from"]).root / source.lstrip("/")
            there.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-a", "--link", "--force", f"{other}/.", str(there)], check=True)
            return
        sent = context_files(self._context)
        for source in sources:
            files = [name for name in sent if name == source or name.startswith(f"{source}/")]
            if not files:
                raise RuntimeError(f"line {instruction.line}: COPY {source}: .dockerignore lets nothing of it in")
            for name in files:
                rest = name.removeprefix(source).lstrip("/")
                to = there / rest if rest else there / Path(name).name if target.endswith("/") else there
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self._context / name, to)


def _caches(run: Instruction) -> dict[str, Path]:
    """What ``RUN --mount=type=cache`` keeps between builds: this user's own, of the same place below the home."""
    options = dict(option.split("=", 1) for option in run.flags.get("mount", "").split(",") if option)
    if not options:
        return {}
    assert options["type"] == "cache", f"line {run.line}: a mount of type {options['type']} is not known here"
    kept = Path.home() / Path(options["target"]).relative_to("/root")
    kept.mkdir(parents=True, exist_ok=True)
    return {options["target"]: kept}


def context_files(context: Path) -> list[str]:
    """The files that a client sends to the builder, as .dockerignore has it."""
    patterns = [line.strip() for line in (context / ".dockerignore").read_text().splitlines()]
    kept = exclude_paths(str(context), [line for line in patterns if line and not line.startswith("#")])
    return sorted(name for name in kept if (context / name).is_file() and name not in ("Dockerfile", ".dockerignore"))
