"""Hugging Face repositories, ``hf://org/name[@revision]``: the hub's own local cache, filled where it lacks files."""

from __future__ import annotations

from pathlib import Path

from weightd.daemon.errors import CheckpointNotFound, InvalidRequest, SourceFailed
from weightd.daemon.sources import Allow
from weightd.daemon.sources.file import FileSource

_OTHER_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot", "*.ckpt", "*.tflite"]


def open_source(uri: str, allow: Allow) -> FileSource:
    """The snapshot's folder. Raises InvalidRequest, CheckpointNotFound, SourceFailed (hub unreachable)."""
    allow.check(uri)
    repository, _, revision = uri.removeprefix("hf://").partition("@")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def snapshot(local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                ignore_patterns=_OTHER_WEIGHTS,
                local_files_only=local_files_only,
            )
        )

    try:
        folder = snapshot(local_files_only=True)
        if _complete(folder):
            return FileSource(folder, allow, trusted_root=True)
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise InvalidRequest(f"model: {uri}: {error}") from None
    try:
        return FileSource(snapshot(local_files_only=False), allow, trusted_root=True)
    except LocalEntryNotFoundError as error:
        raise SourceFailed(f"{uri}: not in the local cache, and the hub cannot be reached: {error}") from None
    except HfHubHTTPError as error:
        raise CheckpointNotFound(f"{uri}: {error}") from None


def _complete(folder: Path) -> bool:
    """Whether a cached snapshot has its weights: a download that was interrupted leaves a folder behind too."""
    from weightd.daemon.checkpoint import INDEX_NAME, read_index

    index = folder / INDEX_NAME
    if index.is_file():
        return all((folder / name).is_file() for name in set(read_index(INDEX_NAME, index.read_bytes()).values()))
    return any(folder.glob("*.safetensors"))
