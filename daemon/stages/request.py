"""A request to stage a checkpoint, as it comes in over HTTP or the lease socket."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from weightd.daemon.errors import InvalidRequest
from weightd.daemon.layouts.checkpoint import Split

_HEX64 = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})")
_XXH3 = re.compile(r"xxh3:[0-9a-f]{32}")

Pattern = Annotated[str, Field(min_length=1, max_length=512)]
Rank = Annotated[int, Field(ge=0, lt=1024)]
File = Annotated[str, Field(min_length=1, max_length=1024)]
Device = Annotated[str, Field(min_length=1, max_length=64)]
LayoutKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Parallel(BaseModel):
    """Which ranks of a tensor-parallel plan to stage, and how tensors are cut for them."""

    model_config = ConfigDict(extra="forbid")

    tp_size: int = Field(1, ge=1, le=1024, description="Ranks that the model is spread over.")
    tp_rank: Rank | list[Rank] | Literal["all"] = Field(
        0, description='Which of them to stage: one, a list, or "all". Each gets a segment of its own.'
    )
    map: dict[Pattern, int | Literal["replicate"]] = Field(
        default_factory=dict,
        max_length=100_000,
        description=(
            "Glob pattern over tensor names → dimension to cut into tp_size equal parts (negative counts from the "
            'last), or "replicate". The first pattern that matches a tensor decides; every tensor needs one.'
        ),
    )

    @model_validator(mode="after")
    def _consistent(self) -> Parallel:
        ranks = self.ranks
        if not ranks:
            raise ValueError("tp_rank is an empty list")
        if max(ranks) >= self.tp_size:
            raise ValueError(f"tp_rank {max(ranks)} is not below tp_size {self.tp_size}")
        if self.tp_size > 1 and not self.map:
            raise ValueError('tp_size needs a map from tensor name patterns to a dimension or "replicate"')
        return self

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks asked for, sorted, each once."""
        if self.tp_rank == "all":
            return tuple(range(self.tp_size))
        return tuple(sorted({self.tp_rank} if isinstance(self.tp_rank, int) else set(self.tp_rank)))


class TensorFilter(BaseModel):
    """Which tensors to stage, by glob patterns over their names."""

    model_config = ConfigDict(extra="forbid")

    include: list[Pattern] = Field(default_factory=list, max_length=10_000, description="Only these; empty: all.")
    exclude: list[Pattern] = Field(default_factory=list, max_length=10_000, description="Not these, even if included.")


class UploadedLayout(BaseModel):
    """Layouts that an engine has uploaded, each for a segment of its own."""

    model_config = ConfigDict(extra="forbid")

    key: LayoutKey | list[LayoutKey] = Field(
        description="What PUT /v1/layouts has it by; a list has one for each of the engine's processes, which are "
        "told apart as tp_rank 0, 1, ..."
    )

    @field_validator("key")
    @classmethod
    def _some_keys(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list) and not 0 < len(value) <= 1024:
            raise ValueError(f"lists {len(value)} layouts, allowed are 1 to 1024")
        return value


class StageRequest(BaseModel):
    """What to stage, where and how."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(
        min_length=1,
        max_length=4096,
        description="A folder or .safetensors file (absolute path or file:), s3://, gs://, az:// or "
        "hf://org/name[/folder][@revision].",
        examples=["s3://models/llama-3-8b"],
    )
    weights: File | list[File] | None = Field(
        None,
        description="Which files are the checkpoint, where the rule would take others or none: names below the URI, "
        "glob patterns (* ends at a slash), or an index. Null: by the rule.",
        examples=["consolidated.safetensors", "model-rank-0-part-*.safetensors"],
    )
    device: Device | list[Device] | None = Field(
        None,
        description="Device of the segments: cpu, cuda:N as the daemon counts, or a GPU's UUID; a list has one for "
        "each rank. Null: the node's default.",
    )
    handle: Literal["fd", "cuda_ipc"] = Field(
        "fd",
        description="fd: a descriptor, lent over lease.sock, read-only to engines, adopted after a restart. cuda_ipc: "
        "the legacy handle of 64 bytes, lent by POST /v1/leases, writable by who opens it, gone with the daemon.",
    )
    layout: Literal["checkpoint"] | UploadedLayout = Field(
        "checkpoint",
        description="checkpoint: the tensors as stored, whole or cut. An object: an engine's own, by its key.",
    )
    parallel: Parallel | None = Field(None, description="Null: whole tensors in one segment.")
    tensors: TensorFilter = Field(default_factory=TensorFilter, description="Which tensors to stage.")
    expect_digest: str | dict[Annotated[str, Field(max_length=1024)], str] | None = Field(
        None,
        description=(
            "What the bytes must be, or the stage fails: the checkpoint digest (xxh3:...), the SHA-256 of its only "
            "file, or a map from file name to SHA-256. The whole checkpoint (or file) is read to know."
        ),
    )
    sources: list[Literal["peer", "origin"]] = Field(
        ["peer", "origin"],
        min_length=1,
        max_length=2,
        description="Where bytes may come from: daemons that have them, and what the URI names.",
    )
    priority: int = Field(0, ge=-1000, le=1000, description="Higher loads first where stages wait for their turn.")
    pin: bool = Field(False, description="Never evict it, whatever else wants its memory.")
    ttl_seconds: float | None = Field(
        None, gt=0, le=10 * 365 * 86400,
        description="Seconds without a lease after which it is evicted; null: only where room is needed.",
    )  # fmt: skip

    @field_validator("layout", mode="before")
    @classmethod
    def _known_layout(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "checkpoint":
            raise ValueError(f'{value[:80]!r} is no layout: say "checkpoint", or name an uploaded one by its key')
        return value

    @field_validator("expect_digest")
    @classmethod
    def _known_digest(cls, value: str | dict[str, str] | None) -> str | dict[str, str] | None:
        if isinstance(value, dict):
            if not value:
                raise ValueError("an empty map expects nothing: leave it out")
            return {name: _sha256(digest) for name, digest in value.items()}
        if value is None or _XXH3.fullmatch(value):
            return value
        return _sha256(value)

    @field_validator("weights")
    @classmethod
    def _some_files(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and not 0 < len(value) <= 10_000:
            raise ValueError(f"lists {len(value)} files, allowed are 1 to 10000: leave it out for the rule")
        return value

    @model_validator(mode="after")
    def _one_device_a_rank(self) -> StageRequest:
        if isinstance(self.device, list) and len(self.device) != len(self.ranks):
            raise ValueError(f"device lists {len(self.device)} devices for {len(self.ranks)} ranks: one for each")
        return self

    @model_validator(mode="after")
    def _uploaded_as_it_is(self) -> StageRequest:
        if self.layouts and (self.parallel is not None or self.tensors != TensorFilter()):
            raise ValueError("an engine's own layout says what is in it: leave parallel and tensors out")
        return self

    @property
    def layouts(self) -> tuple[str, ...]:
        """Keys of the uploaded layouts, one for each segment; none where it is the checkpoint's own."""
        if self.layout == "checkpoint":
            return ()
        return (self.layout.key,) if isinstance(self.layout.key, str) else tuple(self.layout.key)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks asked for, each of which gets a segment."""
        if self.layouts:
            return tuple(range(len(self.layouts)))
        return self.parallel.ranks if self.parallel else (0,)

    @property
    def files(self) -> tuple[str, ...]:
        """The weights asked for, each once; none: by the rule."""
        named = [self.weights] if isinstance(self.weights, str) else self.weights or ()
        return tuple(sorted(set(named)))

    def layout_key(self) -> str:
        """Equal for requests that want the same bytes in the same places of the same segments."""
        plan = self.parallel or Parallel()
        splits: dict[str, Split] = dict(plan.map) if plan.tp_size > 1 else {}
        return repr(
            (
                self.layouts,
                self.handle,
                plan.tp_size,
                plan.ranks,
                list(splits.items()),
                self.tensors.include,
                self.tensors.exclude,
                self.files,
            )
        )


def _sha256(value: str) -> str:
    found = _HEX64.fullmatch(value)
    if not found:
        raise ValueError(f"{value[:80]!r} is neither xxh3: with 32 hexadecimal digits nor a SHA-256 (64 digits)")
    return "sha256:" + found[1].lower()


def parse_request(value: Any) -> StageRequest:
    """A request from a decoded JSON value. Raises InvalidRequest naming the field."""
    try:
        return StageRequest.model_validate(value)
    except ValidationError as error:
        raise InvalidRequest("; ".join(describe_errors(error.errors()))) from None


def describe_errors(errors: list[Any]) -> list[str]:
    """pydantic's errors as one line each: where, and what is wrong there."""
    return [
        f"{'.'.join(str(part) for part in error['loc']) or 'body'}: {error['msg'].removeprefix('Value error, ')}"
        for error in errors[:20]
    ]
