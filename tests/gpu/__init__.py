"""The proof on a real GPU, ``make gpu-test`` and ``make gpu-bench``; see docs/gpu.md.

What needs neither torch on the GPU nor kernels runs over the fake driver as well, in ``make test``: so that what is run
once on a machine with a GPU has run many times before, but for the driver.
"""
