"""In vLLM's environment: start an engine, unmodified, and print the tokens that it generates."""

import json
import sys

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

if __name__ == "__main__":
    prompts = [TokensPrompt(prompt_token_ids=tokens) for tokens in json.loads(sys.argv[2])]
    llm = LLM(
        model=sys.argv[1],
        load_format="runai_streamer",
        dtype="bfloat16",
        max_model_len=128,
        skip_tokenizer_init=True,
        enforce_eager=True,
    )
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    answers = llm.generate(prompts, sampling)
    print("TOKENS", json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
