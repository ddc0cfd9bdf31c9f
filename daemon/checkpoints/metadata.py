"""A checkpoint's files beside the weights: which of them are worth having, and fetching them."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from weightd.daemon.checkpoints.header import is_pointer
from weightd.daemon.checkpoints.selection import LeftOut
from weightd.daemon.errors import DaemonError, SourceFailed
from weightd.daemon.sources.base import Source, SourceFile

MAX_FILES = 512
"""Configuration files kept of one checkpoint."""
MAX_FILE_BYTES = 64 << 20
MAX_TOTAL_BYTES = 256 << 20

_PARALLEL_READS = 16
_IMPORTANT = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "generation_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "spiece.model", "sentencepiece.bpe.model", "tekken.json", "params.json", "modules.json", "model_index.json",
    "config_sentence_transformers.json", "sentence_bert_config.json", "quantize_config.json", "quant_config.json",
    "hf_quant_config.json",
)  # fmt: skip
"""What engines and tokenizers read, most of all first."""
_RANK = {name: rank for rank, name in enumerate(_IMPORTANT)}
_USEFUL = (".json", ".model", ".txt", ".jinja", ".py", ".tiktoken")


def choose(files: Iterable[SourceFile]) -> tuple[list[SourceFile], list[LeftOut]]:
    """What to have of these, as many as the bounds allow, by what it is worth; and what not."""
    chosen: list[SourceFile] = []
    left_out: list[LeftOut] = []
    total = 0
    for file in sorted(files, key=_worth):
        if file.size > MAX_FILE_BYTES:
            left_out.append(LeftOut(file.name, f"{file.size} bytes, kept are files of at most {MAX_FILE_BYTES}"))
        elif len(chosen) == MAX_FILES:
            left_out.append(LeftOut(file.name, f"more than {MAX_FILES} files beside the weights"))
        elif total + file.size > MAX_TOTAL_BYTES:
            left_out.append(LeftOut(file.name, f"more than {MAX_TOTAL_BYTES} bytes beside the weights"))
        else:
            total += file.size
            chosen.append(file)
    return chosen, left_out


def _worth(file: SourceFile) -> tuple[int, int, int, str]:
    """A key that sorts what is worth most first: known names, then what looks like configuration, top level first."""
    name, depth = posixpath.basename(file.name), file.name.count("/")
    if name in _RANK:
        return (0 if depth == 0 else 2), depth, _RANK[name], file.name
    useful = name.endswith(_USEFUL) and depth == 0
    return (1 if useful else 3), depth, file.size, file.name


def fetch(source: Source, files: Sequence[SourceFile]) -> tuple[list[tuple[SourceFile, bytes]], list[LeftOut]]:
    """Read these; one that cannot be read is left out, with the reason.

    Raises SourceFailed where the source answers for none of several: then it is the source that is away.
    """
    found: list[tuple[SourceFile, bytes]] = []
    left_out: list[LeftOut] = []
    failures: list[SourceFailed] = []

    def read(file: SourceFile) -> bytes | DaemonError:
        try:
            return source.read(file.name, 0, file.size)
        except DaemonError as error:
            return error.with_traceback(None)

    with ThreadPoolExecutor(_PARALLEL_READS, thread_name_prefix="metadata") as pool:
        for file, content in zip(files, pool.map(read, files), strict=True):
            if isinstance(content, DaemonError):
                left_out.append(LeftOut(file.name, f"cannot be read: {content}"))
                if isinstance(content, SourceFailed):
                    failures.append(content)
            elif len(content) < file.size:
                left_out.append(LeftOut(file.name, f"cannot be read: {len(content)} of {file.size} bytes came"))
            elif is_pointer(content):
                left_out.append(LeftOut(file.name, "a Git LFS pointer in the file's place"))
            else:
                found.append((file, content))
    if len(failures) == len(files) > 1:
        raise failures[0]
    return found, left_out
