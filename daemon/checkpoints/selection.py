"""Which of the files at a URI are the checkpoint: one rule for folders, object stores and hubs (docs/checkpoints.md).

Pure: it knows names, what config.json says, and what an index says. Where Transformers' ``from_pretrained`` has a
reading, it is the same; where that has none and more than one would do, it is refused.
"""

from __future__ import annotations

import fnmatch
import json
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from weightd.daemon.checkpoints.header import check_genuine, is_path_trick, parse_object
from weightd.daemon.errors import AmbiguousCheckpoint, CheckpointNotFound, InvalidCheckpoint, InvalidRequest
from weightd.daemon.sources.base import is_index

WHOLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
CONFIG_FIELD = "transformers_weights"

_OTHER_FORMATS = (
    "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.ot", "*.ckpt", "*.tflite",
    "*.npz", "*.bin.index.json",
)  # fmt: skip
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<part>\d{1,9})-of-(?P<parts>\d{1,9})\.safetensors")
_ONE_RANK = re.compile(r"(?:^|[-_./])(?:rank|mp_rank|tp|pp|ep)[-_]?\d+|\d+-mp\d+")
"""What names have that hold one rank's part: vLLM's sharded states, Megatron's, DeepSeek's."""
_GLOB = re.compile(r"[*?\[]")


class LeftOut(NamedTuple):
    """A file that is at the URI and was not taken, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """The files whose tensors are the checkpoint."""

    rule: str
    """Why these."""
    weights: tuple[str, ...]
    """Sorted."""
    index: str | None = None
    weight_map: Mapping[str, str] | None = None
    """Tensor name → file, where there is an index: what it leaves out is not of the checkpoint."""
    certain: bool = True
    """Whether files that are not in the list could not change it, where the list may be less than all."""


class _NumberedSet(NamedTuple):
    """Files ``STEM-i-of-n.safetensors`` of one folder, stem and n."""

    stem: str
    parts: str
    files: dict[int, list[str]]
    """Number → names: several only where some were written with other widths."""

    @property
    def pattern(self) -> str:
        return f"{self.stem}-*-of-{self.parts}.safetensors"

    @property
    def names(self) -> list[str]:
        return sorted(name for names in self.files.values() for name in names)

    @property
    def complete(self) -> bool:
        """Whether all are there, counted from 1, or from 0 as some do."""
        count, first = int(self.parts), min(self.files)
        return len(self.names) == len(self.files) == count and first in (0, 1) and max(self.files) - first == count - 1

    def missing(self) -> CheckpointNotFound:
        count = int(self.parts)
        first = next((i for i in range(1, count + 1) if i not in self.files), 0)
        name = f"{self.stem}-{first:0{len(self.parts)}}-of-{self.parts}.safetensors"
        return CheckpointNotFound(
            f"{self.pattern}: {len(self.files)} of {count} files are there, {name!r} is not: upload what is missing, "
            'or list the files in the request\'s "weights" where fewer are wanted',
            missing=[name],
        )


def select(
    uri: str,
    names: Sequence[str],
    config: bytes | None,
    read: Callable[[str], bytes],
    wanted: Sequence[str] = (),
    *,
    by: str = 'the request\'s "weights"',
) -> Selection:
    """The checkpoint among ``names``, which are relative to ``uri``.

    ``config`` is what config.json holds, where it is there and can be read; ``read`` gives an index. ``wanted`` names
    files instead of the rule: names, glob patterns (``*`` ends at a slash), or one index; ``by`` says who named them.

    Raises CheckpointNotFound, AmbiguousCheckpoint, InvalidCheckpoint, InvalidRequest.
    """
    for name in names:
        if is_path_trick(name):
            raise InvalidCheckpoint(f"{uri}: a file is called {name!r}, a path that leaves its folder")
    here = frozenset(names)
    found = _named(here, read, wanted, by) if wanted else _ruled(here, config, read)
    if found is None:
        raise _nothing(uri, here)
    return found


def left_out(selection: Selection, names: Iterable[str]) -> list[LeftOut]:
    """Of files that hold weights, or say where they are, those that were not taken."""
    taken = {*selection.weights, selection.index}
    return [LeftOut(name, _reason(selection, name)) for name in names if is_weights(name) and name not in taken]


def is_weights(name: str) -> bool:
    """Whether a file holds weights, or is an index of such, by its name."""
    safetensors = name.endswith(".safetensors") or is_index(name)
    return safetensors or any(fnmatch.fnmatchcase(name, pattern) for pattern in _OTHER_FORMATS)


def _reason(selection: Selection, name: str) -> str:
    if not (name.endswith(".safetensors") or is_index(name)):
        return "not safetensors"
    if "/" in name:
        return "in a folder below"
    if is_index(name):
        return f"an index that does not decide: {selection.rule}"
    if selection.index is not None:
        return f"{selection.index} does not name it"
    return f"{_kind(name)}, not named: {selection.rule}"


def _kind(name: str) -> str:
    if _ONE_RANK.search(name):
        return "one rank's part"
    if name.startswith("consolidated"):
        return "a second copy"
    if _is_adapter(name):
        return "an adapter"
    return "another file"


def _is_adapter(name: str) -> bool:
    return name.startswith(("adapter_", "adapter."))


# ---------------------------------------------------------------------------- by the rule


def _ruled(here: frozenset[str], config: bytes | None, read: Callable[[str], bytes]) -> Selection | None:
    if (name := _configured(config)) is not None:
        rule = f"{CONFIG_NAME} names {name} as its {CONFIG_FIELD}"
        if name not in here:
            raise CheckpointNotFound(
                f"{rule}, which is not there: upload it, or remove the field", missing=[name[:200]]
            )
        # As from_pretrained: an index in a folder below still names files from here.
        return _indexed(rule, here, name, read, folder="") if is_index(name) else Selection(rule, (name,))
    if WHOLE_NAME in here:
        return Selection(f"{WHOLE_NAME} is there", (WHOLE_NAME,))
    if INDEX_NAME in here:
        return _indexed(f"{INDEX_NAME} is there", here, INDEX_NAME, read)
    top = sorted(name for name in here if "/" not in name)
    indexes = [name for name in top if name.endswith(".safetensors.index.json")]
    files = [name for name in top if name.endswith(".safetensors")]
    sets = _numbered_sets(files)
    canonical = [each for each in sets if each.stem == "model"]
    if len(indexes) == 1:
        found = _indexed(f"{indexes[0]} is the only index", here, indexes[0], read)
        if not any(set(each.names) - set(found.weights) for each in canonical):
            return replace(found, certain=False)
    if indexes:
        raise _ambiguous([*indexes, *_candidates(files, sets)])
    if sets:
        return _numbered(files, sets, canonical)
    return _sole(files)


def _configured(config: bytes | None) -> str | None:
    """The file that config.json names, if it does. Raises InvalidCheckpoint where that cannot be one."""
    try:
        table = json.loads(config) if config is not None else None  # as lenient as Transformers reads it
    except (ValueError, RecursionError):
        return None
    name: Any = table.get(CONFIG_FIELD) if isinstance(table, dict) else None
    if name is None:
        return None
    usable = isinstance(name, str) and name.endswith((".safetensors", ".safetensors.index.json"))
    if not usable or is_path_trick(name):
        raise InvalidCheckpoint(
            f"{CONFIG_NAME}: {CONFIG_FIELD} is {str(name)[:200]!r}: must be a .safetensors file, or a "
            ".safetensors.index.json, below its own folder"
        )
    return posixpath.normpath(str(name))


def _numbered(files: Sequence[str], sets: Sequence[_NumberedSet], canonical: Sequence[_NumberedSet]) -> Selection:
    candidates = canonical or sets
    if len(candidates) > 1:
        raise _ambiguous(_candidates(files, sets))
    chosen = candidates[0]
    alone = len(chosen.names) == len(files)
    # What is only ever meant by name is not meant where something else could be.
    if _ONE_RANK.search(chosen.stem) or (not alone and _kind(chosen.stem) != "another file"):
        raise _ambiguous(_candidates(files, sets))
    if not chosen.complete:
        raise chosen.missing()
    return Selection(
        f"{chosen.pattern} is the only complete set of shards", tuple(chosen.names), certain=bool(canonical)
    )


def _sole(files: Sequence[str]) -> Selection | None:
    stems = {name.removesuffix(".safetensors") for name in files}
    # stem.variant.safetensors beside stem.safetensors, and adapters beside anything, are only ever meant by name.
    plain = [
        name
        for name in files
        if not (_is_adapter(name) and len(files) > 1)
        and name.removesuffix(".safetensors").rpartition(".")[0] not in stems
    ]
    if not files:
        return None
    if len(plain) != 1 or _ONE_RANK.search(plain[0]):
        raise _ambiguous(_candidates(files, ()))
    return Selection(f"{plain[0]} is the only one", (plain[0],), certain=False)


def _numbered_sets(files: Iterable[str]) -> list[_NumberedSet]:
    sets: dict[tuple[str, str], _NumberedSet] = {}
    for name in files:
        if found := _NUMBERED.fullmatch(name):
            key = found["stem"], found["parts"]
            sets.setdefault(key, _NumberedSet(*key, {})).files.setdefault(int(found["part"]), []).append(name)
    return list(sets.values())


def _candidates(files: Iterable[str], sets: Iterable[_NumberedSet]) -> list[str]:
    """Files, with sets as the pattern that names them."""
    found = [each.pattern for each in sets]
    return found + [name for name in files if not (found and _NUMBERED.fullmatch(name))]


def _ambiguous(candidates: Sequence[str]) -> AmbiguousCheckpoint:
    ranks = [name for name in candidates if _ONE_RANK.search(name)]
    example = re.sub(r"part[-_]?\d+", "part-*", ranks[0]) if ranks else candidates[0]
    each = "; each rank's is a checkpoint of its own" if ranks else ""
    return AmbiguousCheckpoint(
        f"which of these is the checkpoint cannot be told: {', '.join(candidates[:20])}"
        f"{f' and {len(candidates) - 20} more' if len(candidates) > 20 else ''}: name it, by its own URI or in the "
        f'request\'s "weights" (weightd stage --weights), as in "weights": {json.dumps(example)}{each}',
        candidates=[_printable(name) for name in candidates[:100]],
    )


def _nothing(uri: str, here: frozenset[str]) -> CheckpointNotFound:
    nested = sorted({posixpath.dirname(name) for name in here if name.endswith(".safetensors")})
    if nested:
        places = ", ".join(below(uri, folder) for folder in nested[:5])
        hint = f"; there are some in {places}: stage one of these"
    elif others := sorted(name for name in here if is_weights(name)):
        hint = f"; there is {others[0]}, of a format that is not staged: save it as safetensors"
    else:
        hint = ""
    return CheckpointNotFound(f"{uri}: no .safetensors file at its top level{hint}")


def below(uri: str, folder: str) -> str:
    """The URI of a folder below another."""
    if uri.startswith("file:"):
        folder = folder.replace("%", "%25")
    if uri.startswith("hf:"):
        place, at, revision = uri.partition("@")
        return f"{place}/{folder}{at}{revision}"
    return f"{uri}/{folder}"


# ---------------------------------------------------------------------------- by name


def _named(here: frozenset[str], read: Callable[[str], bytes], wanted: Sequence[str], by: str) -> Selection:
    rule = f"{by} names {'it' if len(wanted) == 1 else 'them'}"
    chosen: set[str] = set()
    for text in wanted:
        name = posixpath.normpath(text)
        if is_path_trick(name):
            raise InvalidRequest(f"{by} names {text[:200]!r}, a path that leaves the checkpoint's folder")
        if is_index(name):
            if len(wanted) > 1:
                raise InvalidRequest(f"{by} names {text[:200]!r}, an index, which names files itself: give it alone")
            if name not in here:
                raise _not_there(by, text, here)
            return _indexed(rule, here, name, read)
        if name in here and name.endswith(".safetensors"):
            chosen.add(name)
            continue
        if not _GLOB.search(name):
            if not name.endswith(".safetensors"):
                raise InvalidRequest(
                    f"{by} names {text[:200]!r}: must be a .safetensors file, a pattern of such, or an index "
                    "(.safetensors.index.json)"
                )
            raise _not_there(by, text, here)
        matches = [
            other
            for other in here
            if other.endswith(".safetensors")
            and other.count("/") == name.count("/")
            and all(map(fnmatch.fnmatchcase, other.split("/"), name.split("/")))
        ]
        if not matches:
            raise _not_there(by, text, here)
        for each in _numbered_sets(matches):
            if not each.complete:
                raise each.missing()
        chosen.update(matches)
    return Selection(rule, tuple(sorted(chosen)), certain=here.issuperset(map(posixpath.normpath, wanted)))


def _not_there(by: str, text: str, here: frozenset[str]) -> CheckpointNotFound:
    there = sorted(name for name in here if name.endswith(".safetensors") or is_index(name))
    names = _candidates(there, _numbered_sets(there))
    shown = ", ".join(names[:20]) if names else "no .safetensors file"
    return CheckpointNotFound(f"{by} names {text[:200]!r}, which is not there; there is {shown}")


# ---------------------------------------------------------------------------- by an index


def _indexed(
    rule: str, here: frozenset[str], index: str, read: Callable[[str], bytes], folder: str | None = None
) -> Selection:
    """What an index names, in its own folder unless another is given."""
    folder = posixpath.dirname(index) if folder is None else folder
    weight_map = index_map(index, read(index), folder)
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if name not in here]:
        raise CheckpointNotFound(
            f"{index} names {missing[0]!r}, which is not there ({len(missing)} of {len(names)} shards are missing)",
            missing=[_printable(name) for name in missing[:100]],
        )
    return Selection(rule, tuple(names), index, weight_map)


def index_map(index: str, text: bytes, folder: str) -> dict[str, str]:
    """Tensor name → file of an index whose shards are in a folder. Raises InvalidCheckpoint."""
    return {
        tensor: posixpath.normpath(posixpath.join(folder, shard)) for tensor, shard in read_index(index, text).items()
    }


def read_index(name: str, text: bytes) -> dict[str, str]:
    """The weight map of an index file: tensor name → shard. Raises InvalidCheckpoint."""
    check_genuine(name, text)
    weight_map = parse_object(name, text).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidCheckpoint(f"{name}: weight_map must be an object from tensor name to file, and not empty")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or is_path_trick(shard) or not shard.endswith(".safetensors"):
            raise InvalidCheckpoint(
                f"{name}: weight_map: tensor {tensor[:200]!r} is said to be in {str(shard)[:200]!r}: "
                "must be a .safetensors file below the index's own folder"
            )
    return weight_map


def _printable(name: str) -> str:
    return name.encode(errors="replace").decode()
