"""What else loads safetensors files on a host. Contenders; run in processes of their own.

Each loads ``primer``, a small file, before it is timed: libraries look for GPUs and start threads when first used,
which is no more the loading of weights than their imports are.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.bench.measure import Sample, cores, in_threads, timed, warm_cache, warm_memory


def _prepare(files: list[str]) -> int:
    """Warm page cache and memory; returns the files' bytes."""
    nbytes = sum(os.path.getsize(name) for name in files)
    warm_cache(files)
    warm_memory(nbytes)
    return nbytes


def _checked(tensors: dict[str, Any], nbytes: int) -> int:
    found = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if not 0.99 * nbytes <= found <= nbytes:
        raise RuntimeError(f"{found} bytes of tensors were loaded from files of {nbytes} bytes")
    return int(found)


def runai(primer: str, files: list[str], nbytes: int | None = None) -> Sample:
    """``SafetensorsStreamer``: until every tensor has been yielded, all of them kept. Configured by environment.

    ``files`` may be URIs of objects, ``nbytes`` large together.
    """
    from runai_model_streamer import SafetensorsStreamer

    def load(names: list[str]) -> dict[str, Any]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(names)
            return dict(streamer.get_tensors())

    load([primer])
    if nbytes is None:
        nbytes = _prepare(files)
    else:
        warm_memory(nbytes)
    with timed() as sample:
        tensors = load(files)
    return {**sample, "nbytes": _checked(tensors, nbytes), "tensors": len(tensors)}


def fastsafetensors(primer: str, files: list[str], threads: int | None) -> Sample:
    """``SafeTensorsFileLoader`` for the CPU: until its buffers are full and every tensor was taken from them."""
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    options = {} if threads is None else {"max_threads": threads}

    def load(names: list[str]) -> dict[str, Any]:
        loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True, **options)
        loader.add_filenames({0: names})
        buffers = loader.copy_files_to_device()
        return {name: buffers.get_tensor(name) for name in loader.get_keys()}

    load([primer])
    nbytes = _prepare(files)
    with timed() as sample:
        tensors = load(files)
    return {**sample, "nbytes": _checked(tensors, nbytes), "tensors": len(tensors)}


def load_file_read(primer: str, files: list[str]) -> Sample:
    """``safetensors.torch.load_file``, then every byte read where it is, by as many threads as there are cores.

    load_file maps the files and copies nothing: without the reading it would not have loaded a byte. What reads is
    XXH3, which is several times as fast as memory; ``touch_again`` is the same reading once more, everything mapped.
    """
    import torch
    import xxhash
    from safetensors.torch import load_file

    load_file(primer)
    nbytes = _prepare(files)

    def read(tensor: Any) -> None:
        xxhash.xxh3_64_intdigest(memoryview(tensor.view(torch.uint8).flatten().numpy()))

    tensors: dict[str, Any] = {}
    with timed() as sample:
        for name in files:
            tensors |= load_file(name)
        in_threads(cores(), list(tensors.values()), read)
    with timed() as again:
        in_threads(cores(), list(tensors.values()), read)
    return {**sample, "nbytes": _checked(tensors, nbytes), "tensors": len(tensors), "touch_again": again["seconds"]}


def load_file_copy(primer: str, files: list[str]) -> Sample:
    """``load_file``, then every tensor cloned: bytes in memory of the process's own, as other loaders leave them."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(1)  # the pool's threads are the parallelism
    load_file(primer)
    nbytes = _prepare(files)
    with timed() as sample, ThreadPoolExecutor(cores()) as pool:
        mapped = [item for file in files for item in load_file(file).items()]
        tensors = dict(pool.map(lambda item: (item[0], item[1].clone()), mapped))
    return {**sample, "nbytes": _checked(tensors, nbytes), "tensors": len(tensors)}
