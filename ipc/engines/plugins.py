"""What engines call when they start: the entry points of pyproject.toml. Nothing of an engine is imported before.

An engine that starts must start, whatever is wrong here: nothing is raised, and each may be called several times in a
process.
"""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


def vllm() -> None:
    """Group ``vllm.general_plugins``."""
    try:
        from weightd.ipc.engines.vllm import register

        register()
    except Exception:
        log.exception("weightd: vLLM starts without it")


def sglang() -> None:
    """Group ``sglang.srt.plugins``."""
    try:
        from weightd.ipc.engines.sglang import register

        register()
    except Exception:
        log.exception("weightd: SGLang starts without it")
