"""What became of a model's parameters: which are lent, which are this process's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """Of one model, in one engine process, after the engine's own post-processing. Bytes are those of parameters."""

    modes: Mapping[str, int]
    """How many parameters came by ``zero-copy``, ``clone``, ``stream``, or ``opaque`` (the engine's loader, into
    memory of its own)."""
    lent_nbytes: int
    """Bytes that were bound to the segment, before post-processing."""
    aliasing_nbytes: int
    """Bytes that still are in the segment."""
    parameter_nbytes: int
    """Bytes of all parameters, each storage once."""
    segment_nbytes: int
    """Bytes of the whole segment."""

    @property
    def share(self) -> float:
        """Of the parameters' bytes, what is in the segment: 0 to 1."""
        return self.aliasing_nbytes / self.parameter_nbytes if self.parameter_nbytes else 1.0

    def __str__(self) -> str:
        modes = ", ".join(f"{count} {mode}" for mode, count in self.modes.items() if count)
        return (
            f"{self.aliasing_nbytes} of {self.parameter_nbytes} bytes of parameters ({self.share:.1%}) are the daemon's"
            f" memory, {self.lent_nbytes} were before post-processing ({modes})"
        )
