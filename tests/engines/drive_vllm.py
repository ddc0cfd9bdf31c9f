"""In vLLM's environment: start an engine with the settings given, and do what standard input says."""

import json
import sys
from typing import Any


def say(answer: Any) -> None:
    print("ANSWER", json.dumps(answer), flush=True)


if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    fixed = {"dtype": "bfloat16", "max_model_len": 128, "skip_tokenizer_init": True, "enforce_eager": True,
             "worker_extension_cls": "probe_vllm.Probe", "disable_log_stats": True}  # fmt: skip
    llm = LLM(**{**fixed, **json.loads(sys.argv[1])})
    say("started")
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "generate":
            sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
            prompts = [TokensPrompt(prompt_token_ids=tokens) for tokens in command["prompts"]]
            say([list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, sampling, use_tqdm=False)])
        else:
            say(llm.collective_rpc(command["do"], args=tuple(command.get("arguments", []))))
