"""What is decided for the card here, as one JSON object: the plan that is printed, and, where
Unsloth's engine writes the rollouts, what it is asked for with the weights of Qwen2.5-3B.

    PRETEND_GPU=t4 python .ci/pretend_gpu.py .ci/decisions.py OPTIONS OF reasoning_model_grpo.py
"""

import io
import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reasoning_model_grpo as script


def printed_plan(argv: list[str]) -> tuple[dict, list[str]]:
    """The lines of the plan by their names, and what was said before it."""
    with redirect_stdout(io.StringIO()) as said:
        script.main([*argv, "--dry-run"])
    before, _, plan = said.getvalue().partition("recipe:")
    lines = f"recipe:{plan}".partition("\n\n")[0].splitlines()
    return {name: text.strip() for name, text in (line.split(":", 1) for line in lines)}, [
        line for line in before.splitlines() if line]


def engine_arguments(four_bit: bool) -> dict:
    """What Unsloth would give vLLM for the default recipe's model, without loading it."""
    import torch
    from transformers import Qwen2Config
    from unsloth_zoo.vllm_utils import load_vllm

    config = Qwen2Config(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                         num_attention_heads=16, num_key_value_heads=2, vocab_size=151936,
                         tie_word_embeddings=True, max_position_embeddings=32768,
                         dtype=torch.bfloat16)
    with redirect_stdout(sys.stderr):
        return load_vllm("Qwen/Qwen2.5-3B-Instruct", config, gpu_memory_utilization=0.5,
                         max_seq_length=2000, use_bitsandbytes=four_bit, return_args=True)


def attention_of_vllm() -> str:
    """The first in vLLM's order for this card that can be used, FlashInfer being switched off."""
    import torch

    # What vLLM's module about cards imports of its CUDA build: nothing of it is called here.
    sys.modules.setdefault("vllm._C_stable_libtorch", ModuleType("vllm._C_stable_libtorch"))
    from vllm.platforms.cuda import _get_backend_priorities
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backend

    capability = DeviceCapability(*torch.cuda.get_device_capability())
    for backend in _get_backend_priorities(False, capability):
        if backend is Backend.FLASHINFER:
            continue
        if backend.get_class().supports_compute_capability(capability):
            return backend.name
    raise LookupError("vLLM has no attention for this card")


def main(argv: list[str]) -> dict:
    plan, before = printed_plan(argv)
    model, steps = plan["model"], re.findall(r"\d+", plan["steps"])
    backend = re.search("backend (unsloth|transformers)", plan["device"]).group(1)
    dtype = re.search("bfloat16|float16|float32", model).group()
    engine = "colocate" if "vLLM's share" in plan["device"] else "none"
    cells = {"device": plan["device"], "said": before, "backend": backend, "dtype": dtype,
             "weights": "4 bits" if ", 4-bit" in model else dtype, "engine": engine,
             "questions": int(steps[1]), "completions": int(steps[2])}
    if backend == "unsloth" and engine == "colocate":
        asked = engine_arguments("4-bit" in model)
        cells["share"] = round(asked["gpu_memory_utilization"], 2)
        pinned = asked.get("attention_backend")
        cells["attention"] = getattr(pinned, "name", pinned) or attention_of_vllm()
    return cells


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
