"""Whether plain vLLM's graph of a model with a LoRA adapter is one that its own pass can split.

    python .ci/lora_graph.py MODEL [bitsandbytes]      # prints the size() nodes and the outcome

vLLM 0.19 takes size() nodes out of a graph before it cuts it (_decompose_size_nodes), and fails on
one that stands in a slice, as a card's LoRA kernels slice; Unsloth installs a mended pass, plain
vLLM, which is `infer.py --engine vllm`, does not. So the model is traced here as it is on a card,
with the card's LoRA code, but kernels that do nothing, and the graph goes through the stock pass.
"""

import os
import sys

from engine_log import after_import

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
               "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
               "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch  # noqa: E402


def no_kernel(name: str):
    """An operator that Dynamo sees and nothing runs, in place of vLLM's Triton kernel."""
    def nothing(x: torch.Tensor, weights: list[torch.Tensor], y: torch.Tensor,
                mapping: torch.Tensor, indices: torch.Tensor) -> None: ...

    operator = torch.library.custom_op(f"no_kernel::{name}", nothing, mutates_args={"y"})
    operator.register_fake(lambda *_: None)
    return lambda x, weights, y, mapping, indices, *_, **__: operator(
        x, list(weights), y, mapping, indices)


@after_import("vllm.lora.punica_wrapper.punica_gpu")
def use_no_kernels(module) -> None:
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

    module.LoRAKernelMeta = LoRAKernelMeta
    module.lora_shrink, module.lora_expand = no_kernel("shrink"), no_kernel("expand")


@after_import("vllm.platforms.cpu")
def trace_as_on_a_card(module) -> None:
    configure = module.CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, config):
        from vllm.config import CompilationMode

        configure(cls, config)
        config.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE
        config.compilation_config.backend = "lora_graph.split"

    module.CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    module.CpuPlatform.get_punica_wrapper = classmethod(
        lambda cls: "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU")


def split(graph, inputs):
    """The compiler that vLLM is given: the stock pass, and the end."""
    from vllm.compilation.backends import _decompose_size_nodes

    sliced = sum("slice(" in str(node.args) for node in graph.graph.nodes)
    sizes = [node.name for node in graph.graph.find_nodes(op="call_method", target="size")]
    print(f"{sliced} slices, size nodes: {sizes or 'none'}")
    try:
        _decompose_size_nodes(graph)
        print("the pass succeeds")
    except RuntimeError as fault:
        print(f"the pass fails: {fault}")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.modules["lora_graph"] = sys.modules["__main__"]
    from vllm import LLM

    LLM(model=sys.argv[1], dtype="bfloat16", max_model_len=512, enable_lora=True, max_lora_rank=16,
        quantization=sys.argv[2] if len(sys.argv) > 2 else None)
