"""Leaf digests as a GPU computes them: its kernels, run thread by thread on the host, and compiled for every GPU."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import random
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import command, lacking
from tests.filling.fills import MiB, noise
from weightd.daemon.layouts.digests import LEAF, leaf_digest

TESTS = Path(__file__).parent
SOURCE = TESTS.parents[1] / "daemon" / "devices" / "xxh3.cu"
SHORT = 240
ALIGNMENT = 16
UNTOUCHED = 0xDEAD_BEEF_DEAD_BEEF


class Kernels:
    """The two kernels as host functions: every thread of a grid is a call, in an order that no test may depend on."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._indices = [ctypes.c_uint.in_dll(library, name) for name in ("blockIdx", "threadIdx", "blockDim")]

    def launch(self, name: str, threads: int, block: int, *arguments: Any) -> None:
        kernel = getattr(self._library, name)
        kernel.restype = None
        block_index, thread_index, block_size = self._indices
        block_size.value = block
        grid = list(range(-(-threads // block) * block))
        random.Random(threads).shuffle(grid)
        for thread in grid:
            block_index.value, thread_index.value = divmod(thread, block)
            kernel(*arguments)

    def digests_at(self, addresses: Sequence[int], sizes: Sequence[int], *, block: int = 32) -> list[int]:
        count = len(sizes)
        where, how_long = (ctypes.c_uint64 * count)(*addresses), (ctypes.c_uint32 * count)(*sizes)
        lanes = (ctypes.c_uint64 * (8 * count + 8))(*[UNTOUCHED] * (8 * count + 8))
        digests = (ctypes.c_uint64 * (count + 8))(*[UNTOUCHED] * (count + 8))
        self.launch("xxh3_lanes", 4 * count, block, where, how_long, count, lanes)
        self.launch("xxh3_finish", count, block, where, how_long, count, lanes, digests)
        assert set(digests[count:]) | set(lanes[8 * count :]) == {UNTOUCHED}
        for leaf, size in enumerate(sizes):
            assert (size <= SHORT) == (set(lanes[8 * leaf : 8 * leaf + 8]) == {UNTOUCHED})
        return list(digests[:count])

    def digests(self, leaves: Sequence[bytes], *, block: int = 32) -> list[int]:
        starts, end = [], 0
        for leaf in leaves:
            starts.append(end)
            end += -(-len(leaf) // ALIGNMENT) * ALIGNMENT
        with mmap.mmap(-1, end + 1) as memory:
            for start, leaf in zip(starts, leaves, strict=True):
                memory[start : start + len(leaf)] = leaf
            first = address_of(memory)
            return self.digests_at([first + start for start in starts], [len(leaf) for leaf in leaves], block=block)


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    compiler = command("g++", "apt-get install g++")
    library = tmp_path_factory.mktemp("kernels") / "xxh3.so"
    # A trap on what C++ leaves undefined: a load that is not aligned, a shift by 64, an index beyond a table.
    traps = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    header = ["-include", str(TESTS / "cuda_on_cpu.h")]
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", *traps, *header]
    subprocess.run([compiler, *options, "-x", "c++", str(SOURCE), "-o", str(library)], check=True)
    return Kernels(ctypes.CDLL(str(library)))


def right(leaves: Sequence[bytes]) -> list[int]:
    return [leaf_digest(leaf) for leaf in leaves]


CONTENTS: dict[str, Callable[[int], bytes]] = {
    "random": lambda size: noise(size, size),
    "zero": bytes,
    "ones": lambda size: b"\xff" * size,
}


@pytest.mark.parametrize("content", CONTENTS)
def test_leaves_of_every_size_up_to_two_blocks_have_the_digests_of_xxhash(content: str, kernels: Kernels) -> None:
    leaves = [CONTENTS[content](size) for size in range(2101)]
    assert kernels.digests(leaves) == right(leaves)


@pytest.mark.parametrize("content", CONTENTS)
def test_leaves_that_end_around_a_block_or_a_stripe_have_the_digests_of_xxhash(content: str, kernels: Kernels) -> None:
    around = [3 << 10, 4 << 10, 7 << 10, 8 << 10, 65536, 65536 + 960, MiB // 2, MiB - 1024, MiB - 64, MiB]
    nearby = (-65, -64, -63, -17, -16, -15, -1, 0, 1, 15, 16, 17, 63, 64, 65)
    sizes = sorted({base + offset for base in around for offset in nearby if base + offset <= LEAF})
    leaves = [CONTENTS[content](size) for size in sizes]
    assert kernels.digests(leaves) == right(leaves)


@pytest.mark.parametrize("block", [1, 2, 32, 52, 128, 1024])
def test_leaves_of_random_sizes_share_a_launch_whatever_its_blocks(block: int, kernels: Kernels) -> None:
    chance = random.Random(block)
    leaves = [chance.randbytes(chance.randrange(1, 1 << chance.randrange(1, 20))) for _ in range(101)]
    assert kernels.digests(leaves, block=block) == right(leaves)


def test_a_launch_of_one_leaf_or_of_none_is_a_launch(kernels: Kernels) -> None:
    assert kernels.digests([b"weights"], block=128) == [leaf_digest(b"weights")]
    assert kernels.digests([]) == []


@pytest.mark.parametrize("size", [1, 3, 8, 16, 100, 200, 241, 1024, 1025, 3 * 1024 + 5 * 64 + 37])
def test_a_flipped_bit_anywhere_changes_the_digest(size: int, kernels: Kernels) -> None:
    whole = noise(size, 1)
    # A bit of every fourth byte: in each half of each word of each stripe of each block, and up to the very last byte.
    flipped = [bytearray(whole) for _ in range(0, size + 3, 4)]
    for number, leaf in enumerate(flipped):
        leaf[min(4 * number, size - 1)] ^= 1 << number % 8
    leaves = [whole, *map(bytes, flipped)]
    found = kernels.digests(leaves)
    assert found == right(leaves)
    assert found[0] not in found[1:]


def test_nothing_outside_a_leaf_is_read(kernels: Kernels) -> None:
    """Each leaf lies against memory that nobody may touch: a read there ends the process that makes it."""
    page, room, nobody = mmap.PAGESIZE, 2 * mmap.PAGESIZE, 0
    libc = ctypes.CDLL(None)
    sizes = [*range(1, 300), *range(1000, 1100), *range(2030, 2070), *range(room - 70, room + 1)]

    def read() -> None:
        with mmap.mmap(-1, room + 2 * page) as memory:
            first = address_of(memory)
            for guard in (first, first + page + room):
                assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), nobody) == 0
            for size in sizes:
                at_the_end = first + page + (room - size) // ALIGNMENT * ALIGNMENT
                kernels.digests_at([first + page, at_the_end], [size, size])

    process = multiprocessing.get_context("fork").Process(target=read)
    process.start()
    process.join()
    assert process.exitcode == 0


class Compiler:
    """CUDA's compiler as a library, which needs no GPU."""

    def __init__(self) -> None:
        how = "pip install --no-deps cuda-bindings cuda-pathfinder nvidia-cuda-nvrtc"
        try:
            from cuda.bindings import nvrtc

            self._nvrtc: Any = nvrtc
            self._done(nvrtc.nvrtcVersion())  # loads the library
        except (ImportError, RuntimeError) as error:
            lacking(f"NVRTC is not installed: {how} ({error})")

    def _done(self, answer: tuple[Any, ...]) -> Any:
        error, *values = answer
        assert int(error) == 0, self._nvrtc.nvrtcGetErrorString(error)[1]
        return values[0] if values else None

    def compile(self, *options: str) -> tuple[str, str]:
        """PTX, and what the compiler said."""
        nvrtc = self._nvrtc
        program = self._done(nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), b"xxh3.cu", 0, [], []))
        compiled, *_ = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        # NVRTC writes into the bytes that it is given: never into those of one byte, which the interpreter shares.
        said = bytes(self._done(nvrtc.nvrtcGetProgramLogSize(program)) + 1)
        self._done(nvrtc.nvrtcGetProgramLog(program, said))
        assert int(compiled) == 0, said.rstrip(b"\0").decode()
        ptx = bytes(self._done(nvrtc.nvrtcGetPTXSize(program)) + 1)
        self._done(nvrtc.nvrtcGetPTX(program, ptx))
        self._done(nvrtc.nvrtcDestroyProgram(program))
        return ptx.rstrip(b"\0").decode(), said.rstrip(b"\0").decode()


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return Compiler()


@pytest.mark.parametrize("capability", [75, 80, 90, 100])
def test_the_kernels_compile_for_a_gpu_and_load_sixteen_bytes_at_once(capability: int, compiler: Compiler) -> None:
    ptx, said = compiler.compile(f"--gpu-architecture=compute_{capability}")
    assert said.strip("\0 \n") == ""
    assert set(re.findall(r"\.entry (\w+)", ptx)) == {"xxh3_lanes", "xxh3_finish"}
    assert ".local" not in ptx
    # 16 before the loop over blocks and 16 in it, at least.
    assert len(re.findall(r"ld\.global\.cs\.v2\.[ub]64", ptx)) >= 32


def test_the_threads_of_a_kernel_do_not_communicate(compiler: Compiler) -> None:
    """Else running them one after another, as these tests do, would prove nothing."""
    ptx, _ = compiler.compile("--gpu-architecture=compute_90")
    assert not re.search(r"\.shared|\bbar\b|\bbarrier\b|\bshfl\b|\bvote\b|\bmatch\b|\bredux\b|\batom\b|\bred\b", ptx)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_a_block_stays_in_registers(capability: int, compiler: Compiler) -> None:
    _, said = compiler.compile(f"--gpu-architecture=sm_{capability}", "--ptxas-options=-v")
    assert re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", said) == ["0"] * 6
    # Of 65536: 512 threads, which is 128 KiB on the way to each multiprocessor.
    assert max(map(int, re.findall(r"Used (\d+) registers", said))) <= 128
