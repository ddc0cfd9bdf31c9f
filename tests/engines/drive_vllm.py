"""In vLLM's environment: start an engine, and print the tokens that it generates.

Its argument is a JSON object: ``model``, ``prompts`` (lists of tokens) and ``arguments`` of the engine. Each line of
standard input is an object with what to ``do`` then:

- ``start``: once this one has ended, another engine in this process, of ``model``, ``prompts`` and ``arguments``
- ``generate``: from ``prompts``; with the ``adapter`` in a folder, where one is named
- ``end``: end the engine, and nothing else
- what all of the engine's processes answer to a method of that name

What an engine raises as it starts is answered as ``{"raised": ...}``.
"""

import gc
import json
import sys
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest

ON_CPU = {
    "dtype": "bfloat16", "max_model_len": 128, "skip_tokenizer_init": True, "enforce_eager": True,
    "disable_log_stats": True, "kv_cache_memory_bytes": 64 << 20,
}  # fmt: skip


def say(answer: Any) -> None:
    print("ANSWER", json.dumps(answer), flush=True)


class Driven:
    """The engine of this process, one at a time."""

    def __init__(self) -> None:
        self.llm: Any = None

    def start(self, model: str, prompts: list[list[int]], arguments: dict[str, Any]) -> Any:
        self.end()
        try:
            self.llm = LLM(model=model, **{**ON_CPU, **arguments})
        except Exception as error:
            return {"raised": f"{type(error).__name__}: {error}"}
        return self.generate(prompts)

    def generate(self, prompts: list[list[int]], adapter: str | None = None) -> list[list[int]]:
        sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
        lora = LoRARequest("adapter", 1, adapter) if adapter else None
        given = [TokensPrompt(prompt_token_ids=tokens) for tokens in prompts]
        answers = self.llm.generate(given, sampling, use_tqdm=False, lora_request=lora)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def end(self) -> None:
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            cleanup_dist_env_and_memory()
        gc.collect()

    def do(self, what: str, **arguments: Any) -> Any:
        if what in ("start", "generate", "end"):
            return getattr(self, what)(**arguments)
        return self.llm.collective_rpc(what, **arguments)


def main() -> None:
    driven = Driven()
    say(driven.start(**json.loads(sys.argv[1])))
    for line in sys.stdin:
        command = json.loads(line)
        say(driven.do(command.pop("do"), **command))
    driven.end()


if __name__ == "__main__":
    main()
