"""An engine that does what it is told: ``python -m tests.gpu.engine`` takes a JSON object a line, and answers each.

A process of its own, because a process has one driver and one set of visible GPUs, and because one that writes to
what it was lent is to die of it. ``{"do": method, ...}`` is answered by ``{"ok": ...}`` or ``{"error": code, ...}``.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightd.ipc import CudaError, WeightdError, Weights, attach
from weightd.ipc.cuda import Gpu, call, driver, gpu_by_name, gpu_by_uuid, gpus


class Engine:
    """Every public method can be told. Addresses of tensors are the driver's: no library but it is needed."""

    def __init__(self) -> None:
        self.gpu: Gpu | None = None
        self.weights: Weights | None = None
        self.places: dict[str, tuple[int, int]] = {}
        """Address and bytes of each tensor."""

    # ------------------------------------------------------------------ getting at memory

    def gpus(self) -> list[dict[str, Any]]:
        """The GPUs that this process sees, in its own order."""
        return [{"uuid": gpu.uuid, "name": gpu.name, "bytes": gpu.total_bytes} for gpu in gpus()]

    def free_bytes(self, uuid: str) -> int:
        """Bytes of a GPU that nobody uses, this process's own context already taken off."""
        return gpu_by_uuid(uuid).memory()[0]

    def attach(self, runtime_dir: str, **options: Any) -> dict[str, Any]:
        """``weightd.ipc.attach``; the lease lasts until ``close``."""
        weights = self.weights = attach(socket=runtime_dir, timeout=300, **options)
        weights.wait(300)
        self.gpu = None if weights.device == "cpu" else gpu_by_name(weights.device)
        self.places = {}
        for name in weights:
            raw: Any = weights.raw(name)
            self.places[name] = (raw.address if self.gpu else 0, raw.nbytes)
        return {
            "lease": weights.lease,
            "digest": weights.digest,
            "device": weights.device,
            "gpu": self.gpu.uuid if self.gpu else None,
        }

    def open_handle(
        self, gpu: str, handle: str, offset: int, tensors: Sequence[Mapping[str, Any]], **_: Any
    ) -> dict[str, Any]:
        """Open a legacy handle as an engine without weightd does: by what ``POST /v1/leases`` and the manifest say."""
        self.gpu = gpu_by_uuid(gpu)
        opened = driver().CUipcMemHandle()
        raw = base64.b64decode(handle)
        ctypes.memmove(opened.getPtr(), raw, len(raw))
        with self.gpu.context():
            lazily = driver().CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
            base = int(call("cuIpcOpenMemHandle", opened, lazily.value)) + offset
        self.places = {entry["name"]: (base + entry["offset"], entry["nbytes"]) for entry in tensors}
        return {"gpu": self.gpu.uuid}

    def close(self) -> None:
        """End the lease; what is mapped stays."""
        assert self.weights is not None
        self.weights.close()

    def let_go(self) -> None:
        """End the lease, and unmap what was mapped."""
        self.close()
        self.weights, self.places = None, {}

    # ------------------------------------------------------------------ using it

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each tensor, read back from the GPU."""
        return {name: hashlib.sha256(self._bytes(name)).hexdigest() for name in self.places}

    def _bytes(self, name: str) -> Any:
        if self.gpu is None:
            assert self.weights is not None
            return self.weights.raw(name)
        address, nbytes = self.places[name]
        found = ctypes.create_string_buffer(nbytes)
        if nbytes:
            with self.gpu.context():
                call("cuMemcpyDtoH", ctypes.addressof(found), address, nbytes)
        return found

    def write(self, how: str, name: str) -> None:
        """Write a byte's value over all of a tensor, and wait for it."""
        assert self.gpu is not None
        address, nbytes = self.places[name]
        if how == "host pointer":
            ctypes.memset(address, 0xEE, nbytes)
            return
        with self.gpu.context():
            if how == "memset":
                call("cuMemsetD8", address, 0xEE, nbytes)
            elif how == "copy":
                source = ctypes.create_string_buffer(b"\xee" * nbytes, nbytes)
                call("cuMemcpyHtoD", address, ctypes.addressof(source), nbytes)
            elif how == "kernel":
                self._kernel(name)
            else:
                raise ValueError(how)
            call("cuCtxSynchronize")

    def _kernel(self, name: str) -> None:
        import torch

        assert self.weights is not None
        try:
            self.weights[name].fill_(1)
            torch.cuda.synchronize()
        except RuntimeError as error:  # torch's own words; the driver's number comes with the next call
            print(f"torch: {error}", file=sys.stderr)

    # ------------------------------------------------------------------ torch, CuPy, Transformers

    def torch_equal(self, files: Sequence[str]) -> int:
        """Compare each tensor of the files with what ``safetensors.torch.load_file`` makes of it, bit for bit."""
        import torch
        from safetensors.torch import load_file

        assert self.weights is not None
        count = 0
        for file in files:
            for name, expected in load_file(file).items():
                found = self.weights[name]
                assert found.dtype == expected.dtype, (name, found.dtype, expected.dtype)
                assert found.shape == expected.shape, (name, found.shape, expected.shape)
                assert found.is_cuda, name
                assert torch.equal(_bits(found).cpu(), _bits(expected)), name
                if expected.numel():
                    address, _ = self.places[name]
                    assert found.data_ptr() == address, (name, "is a copy")
                    assert torch.as_tensor(self.weights.raw(name)).data_ptr() == address, (name, "raw is a copy")
                    assert torch.equal(torch.as_tensor(self.weights.raw(name)).cpu(), _bits(expected)), name
                count += 1
        return count

    def torch_streams(self, runtime_dir: str, files: Sequence[str], **options: Any) -> int:
        """Attach to what still loads, and compare each tensor as it comes."""
        import torch
        from safetensors.torch import load_file

        truth = {name: tensor for file in files for name, tensor in load_file(file).items()}
        weights = attach(socket=runtime_dir, wait=False, **options)
        count = 0
        for name, found in weights.stream(timeout=300):
            assert torch.equal(_bits(found).cpu(), _bits(truth[name])), name
            count += 1
        assert count == len(truth), (count, len(truth))
        return count

    def cupy_equal(self, files: Sequence[str]) -> dict[str, list[str]]:
        """Compare each tensor's CuPy array with ``load_file``'s bits; says which dtypes it has, and lacks."""
        import torch
        from safetensors.torch import load_file

        from weightd.ipc import UnsupportedDtype

        assert self.weights is not None
        found: dict[str, set[str]] = {"compared": set(), "refused": set()}
        for file in files:
            for name, expected in load_file(file).items():
                dtype = self.weights.entry(name).dtype
                try:
                    array = self.weights.cupy()[name]
                except UnsupportedDtype:
                    found["refused"].add(dtype)
                    continue
                assert tuple(array.shape) == tuple(expected.shape), name
                assert array.dtype.itemsize == expected.element_size(), name
                assert array.get().tobytes() == _bits(expected).numpy().tobytes(), name
                if expected.numel():
                    assert array.data.ptr == self.places[name][0], (name, "is a copy")
                    # A kernel of CuPy's own reads it, too.
                    flat = array.reshape(-1).view("uint8")
                    total = int(torch.sum(_bits(expected), dtype=torch.int64))
                    assert int(flat.sum(dtype="uint64")) == total, name
                found["compared"].add(dtype)
        return {kind: sorted(dtypes) for kind, dtypes in found.items()}

    def logits(self, runtime_dir: str, folder: str) -> dict[str, Any]:
        """The shim's model on the GPU beside from_pretrained's, by each way that one gets there: how far they differ.

        Two ways, because what a model computes for itself, its rotary frequencies, comes out another in the last bit
        where another device computed it.
        """
        import torch
        import transformers

        from weightd.ipc.engines.transformers import load

        before = torch.cuda.memory_allocated()
        model: Any = load(folder, device="cuda:0", socket=runtime_dir, timeout=300)
        taken = torch.cuda.memory_allocated() - before
        assert all(parameter.is_cuda for parameter in model.parameters())
        nbytes = sum(parameter.nbytes for parameter in model.parameters())
        auto = transformers.AutoModelForCausalLM
        ways = {"loaded on the host, then moved": lambda: auto.from_pretrained(folder, dtype="auto").to("cuda:0")}
        if importlib.util.find_spec("accelerate"):
            ways["device_map"] = lambda: auto.from_pretrained(folder, dtype="auto", device_map="cuda:0")
        tokens = torch.arange(24, device="cuda:0").reshape(2, 12)
        options = {"max_new_tokens": 16, "do_sample": False}
        differences: dict[str, float] = {}
        for way, make in ways.items():
            reference = make().eval()
            assert model.dtype == reference.dtype
            theirs = dict(reference.named_parameters())
            for name, parameter in model.named_parameters():
                assert torch.equal(_bits(parameter), _bits(theirs[name])), name
            with torch.no_grad():
                ours, expected = model(tokens).logits, reference(tokens).logits
                assert ours.is_cuda
                differences[way] = (ours.double() - expected.double()).abs().max().item()
                if not differences[way]:
                    assert torch.equal(model.generate(tokens, **options), reference.generate(tokens, **options))
        return {"dtype": str(model.dtype), "parameters": nbytes, "allocated": taken, "differences": differences}

    def digests(self, count: int) -> int:
        """Leaf digests by the GPU's kernels of lengths and addresses of all kinds, each against the host's."""
        import random

        import cupy
        import numpy

        from weightd.daemon.devices.gpu_digests import GpuDigests
        from weightd.daemon.layouts.digests import LEAF, leaf_digest

        gpu = gpus()[0]
        digests = GpuDigests(gpu)
        digests.check()
        data = numpy.random.default_rng(1).integers(0, 256, 8 * LEAF, numpy.uint8)
        with cupy.cuda.Device(0):
            there = cupy.asarray(data)
            cupy.cuda.get_current_stream().synchronize()
            rng = random.Random(1)
            sizes = [*range(1, 2050), *(rng.randrange(1, LEAF + 1) for _ in range(count)), LEAF]
            starts = [16 * rng.randrange((len(data) - size) // 16 + 1) for size in sizes]
            found = digests.leaves([(int(there.data.ptr) + at, size) for at, size in zip(starts, sizes, strict=True)])
        for at, size, digest in zip(starts, sizes, found, strict=True):
            assert digest == leaf_digest(data[at : at + size].tobytes()), (at, size)
        return len(sizes)


def _bits(tensor: Any) -> Any:
    """A tensor's bytes, flat; comparing floats would take all NaNs for different."""
    import torch

    return tensor.reshape(-1).view(torch.uint8)


def main() -> None:
    # What libraries print is for the log: stdout is for answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = Engine()
    for line in sys.stdin:
        message = json.loads(line)
        try:
            answer: dict[str, Any] = {"ok": getattr(engine, message.pop("do"))(**message)}
        except CudaError as error:
            answer = {"error": "cuda_error", "message": str(error), "result": error.result, "sticky": error.sticky}
        except WeightdError as error:
            answer = {"error": error.code or type(error).__name__, "message": str(error)}
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), file=answers, flush=True)
    # As engines end when they are killed: nothing tidies up.
    os._exit(0)


if __name__ == "__main__":
    assert Path.cwd().joinpath("tests").is_dir(), "run from the repository's root"
    main()
