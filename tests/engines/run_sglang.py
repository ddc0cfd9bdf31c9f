"""In SGLang's environment: start an engine, unmodified, and print the tokens that it generates.

``run_sglang.py MODEL PROMPTS [ARGUMENTS]``: PROMPTS are lists of tokens, ARGUMENTS are the engine's, both as JSON. Each
line of standard input is PROMPTS again, or a folder in quotes, whose weights it generates with from then on; the engine
ends with it. Besides:

- ``run_sglang.py serve OPTION...`` is ``python -m sglang.launch_server`` with these options;
- ``run_sglang.py trace OPTION...`` is ``weightd trace``;
- ``run_sglang.py listen SOCKET`` is any of that in forks, as ``forks`` has it.

With FOUND in the environment each of the engine's processes writes there what has become of its model.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

# torchvision's wheel is compiled for CUDA, and asks for operators of its own that no language model runs.
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import sglang  # noqa: E402
from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: E402


def found(loaded, **_):
    """What each parameter and buffer holds, and whose memory it is."""
    from sglang.srt.runtime_context import get_parallel

    tensors = {
        name: hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in (*loaded.model.named_parameters(), *loaded.model.named_buffers())
        if tensor.numel()
    }
    told = {"tensors": tensors, "loader": type(loaded.loader).__name__, "weights": None}
    if "weightd.ipc.engines.binding" in sys.modules:
        from weightd.ipc.engines.binding import weights_of

        if weights := weights_of(loaded.model):
            report = weights.report
            told["weights"] = {
                "share": report.share, "modes": dict(report.modes), "stage": weights.manifest.stage,
                "footprint": weights.footprint, "preloaded": loaded.loader.preloaded_weights_bytes,
            }  # fmt: skip
    rank = get_parallel().pp_rank * get_parallel().tp_size + get_parallel().tp_rank
    Path(os.environ["FOUND"], f"{rank}.json").write_text(json.dumps(told))


def watch():
    """See what is loaded, where that is asked for."""
    if os.environ.get("FOUND"):
        where = "sglang.srt.model_executor.model_runner_components.load_model_utils.load_model_with_memory_saver"
        HookRegistry.register(where, found, HookType.AFTER)


watch()  # in each of the engine's processes, which run this module and apply its hooks with those of plugins
# SGLang's layers of Transformers models ask for an accelerator, whatever the engine runs on.
HookRegistry.register("sglang.srt.utils.common.get_device", lambda *_: "cpu", HookType.REPLACE)

ON_CPU = {
    "device": "cpu", "attention_backend": "torch_native", "sampling_backend": "pytorch", "grammar_backend": "none",
    "skip_tokenizer_init": True, "disable_cuda_graph": True, "disable_radix_cache": True,
    "disable_overlap_schedule": True, "mem_fraction_static": 0.3, "max_total_tokens": 2048, "dtype": "bfloat16",
    "log_level": "warning",
}  # fmt: skip


def generate(engine, prompts):
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    answers = [engine.generate(input_ids=tokens, sampling_params=sampling) for tokens in prompts]
    print("TOKENS", json.dumps([answer["output_ids"] for answer in answers]), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "listen":
        import sglang.srt.entrypoints.engine
        import sglang.srt.managers.detokenizer_manager
        import sglang.srt.managers.scheduler
        from forks import listen

        listen(sys.argv[2])
        watch()
    if sys.argv[1] == "trace":
        from weightd.ipc.engines.ahead import main

        sys.exit(main(sys.argv[2:]))
    if sys.argv[1] == "serve":
        from sglang.launch_server import run_server
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import prepare_server_args

        load_plugins()
        run_server(prepare_server_args(sys.argv[2:]))
        sys.exit()
    engine = sglang.Engine(model_path=sys.argv[1], **ON_CPU | json.loads(sys.argv[3] if len(sys.argv) > 3 else "{}"))
    prompts = json.loads(sys.argv[2])
    generate(engine, prompts)
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, str):
            done, why, *_ = engine.update_weights_from_disk(asked, load_format="auto")
            assert done, why
            generate(engine, prompts)
        else:
            generate(engine, asked)
    engine.shutdown()
    os._exit(0)  # to take down all that was imported takes seconds
