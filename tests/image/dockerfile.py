"""A Dockerfile, read: its stages and their instructions. What the Dockerfiles here do not use is an error."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from dockerfile_parse import DockerfileParser

_KNOWN = frozenset({"ARG", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "HEALTHCHECK", "LABEL", "RUN", "USER", "WORKDIR"})


class Instruction(NamedTuple):
    """One instruction. ``value`` is all that follows its name, on one line, variables as they stand."""

    name: str
    value: str
    line: int

    @property
    def words(self) -> list[str]:
        """The value as a shell takes it apart."""
        return shlex.split(self.value)

    @property
    def flags(self) -> dict[str, str]:
        """What begins with ``--``, up to the first word that does not."""
        found: dict[str, str] = {}
        for word in self.words:
            if not word.startswith("--"):
                break
            name, _, value = word.removeprefix("--").partition("=")
            found[name] = value
        return found

    @property
    def arguments(self) -> list[str]:
        """The words after the flags; of the exec form, what is in its list."""
        rest = self.command
        if rest.startswith("["):
            parsed: list[str] = json.loads(rest)
            return parsed
        return shlex.split(rest)

    @property
    def command(self) -> str:
        """What follows the flags, as it stands."""
        return re.sub(r"^(--\S+\s+)+", "", self.value)

    @property
    def pairs(self) -> dict[str, str]:
        """Of ENV, LABEL and ARG: names and values."""
        return {name: value for name, _, value in (word.partition("=") for word in self.words)}


@dataclass
class Stage:
    """What stands between one FROM and the next. ``base`` is an image or another stage, variables filled in."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        return [instruction for instruction in self.instructions if instruction.name == name]

    def last(self, name: str) -> Instruction:
        return self.all(name)[-1]


class Dockerfile:
    """The stages of a Dockerfile, by name and in their order."""

    def __init__(self, text: str) -> None:
        self.arguments: dict[str, str] = {}
        """Defaults of what is declared before the first stage."""
        self.stages: dict[str, Stage] = {}
        stage: Stage | None = None
        parser = DockerfileParser(fileobj=io.BytesIO(text.encode()), env_replace=False)
        for item in parser.structure:
            instruction = Instruction(item["instruction"], item["value"], item["startline"] + 1)
            if instruction.name == "COMMENT":
                continue
            if instruction.name == "FROM":
                base, _, name = instruction.value.partition(" AS ")
                stage = Stage(name or str(len(self.stages)), expand(base, self.arguments))
                assert stage.name not in self.stages, f"two stages are named {stage.name}"
                self.stages[stage.name] = stage
            elif stage is None:
                assert instruction.name == "ARG", instruction
                self.arguments |= instruction.pairs
            else:
                assert instruction.name in _KNOWN, f"line {instruction.line}: {instruction.name} is not known here"
                stage.instructions.append(instruction)


def expand(text: str, variables: Mapping[str, str]) -> str:
    """``$NAME`` and ``${NAME}`` filled in; what has no value is empty, as Docker has it."""
    return re.sub(r"\$(\w+)|\$\{(\w+)\}", lambda match: variables.get(match[1] or match[2], ""), text)
