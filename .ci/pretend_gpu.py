"""Run a script as if NVIDIA cards were there, on a CPU: python .ci/pretend_gpu.py SCRIPT ARGS...

All code is the users' but that of the card: Unsloth's GPU path with vLLM's engine inside, its
patched trainers, TRL, PEFT, bitsandbytes. Pretended is what is asked of the driver; "cuda" as a
place of tensors means the CPU; three of Unsloth's Triton kernels are formulas, for Triton's
interpreter takes minutes a step. Not shown by this: CUDA's kernels and memory, compiled graphs.
`.ci/make_engine.py` makes the environment.

PRETEND_GPU=t4|two-t4|a10g|l4|a100 (default a10g) is the card, PRETEND_WITHOUT=vllm,unsloth hides
packages, ENGINE_LOG=FILE writes down what was asked of the engine (engine_log.py).
"""

import functools
import importlib.metadata
import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

from engine_log import after_import, log, run_script

# As nvidia-smi shows them: name, compute capability, bytes, multiprocessors, how many.
CARDS = {
    "t4": ("Tesla T4", (7, 5), 15_637_086_208, 40, 1),
    "two-t4": ("Tesla T4", (7, 5), 15_637_086_208, 40, 2),
    "a10g": ("NVIDIA A10G", (8, 6), 23_609_475_072, 80, 1),
    "l4": ("NVIDIA L4", (8, 9), 23_661_117_440, 58, 1),
    "a100": ("NVIDIA A100-SXM4-40GB", (8, 0), 42_297_786_368, 108, 1),
}
NAME, CAPABILITY, MEMORY, PROCESSORS, COUNT = CARDS[os.environ.get("PRETEND_GPU", "a10g")]

for name, value in {
    "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(COUNT))),
    "TRITON_INTERPRET": "1",  # the kernels that have no formula below
    "TORCHDYNAMO_DISABLE": "1",  # what would be compiled runs as it is written
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a process of its own would see no card
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)

# ---- Packages that are not there -----------------------------------------------------------------
HIDDEN = set(filter(None, os.environ.get("PRETEND_WITHOUT", "").split(",")))
find_record = importlib.metadata.Distribution.from_name


def record_of(name: str):
    if name.replace("-", "_") in HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return find_record(name)


importlib.metadata.Distribution.from_name = record_of
for name in HIDDEN:
    sys.modules[name] = None  # neither found nor imported

import torch  # noqa: E402
import torch._inductor.config  # noqa: E402  (Unsloth takes it for imported)
import triton.backends.nvidia.driver as nvidia  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402


# ---- What is asked of the driver -----------------------------------------------------------------
class AtOnce:
    """A stream, an event or a device as a context: all that is queued is done already."""

    cuda_stream, device_index, device, idx = 0, 0, torch.device("cuda", 0), 0

    def __init__(self, *_, **__): ...
    def __enter__(self): return self
    def __exit__(self, *_): return None
    def __eq__(self, other): return isinstance(other, AtOnce)
    def __hash__(self): return 0
    def query(self): return True
    def elapsed_time(self, other): return 0.0
    def synchronize(self): ...
    def record(self, *_): ...
    def wait(self, *_): ...
    def wait_stream(self, *_): ...
    def wait_event(self, *_): ...
    def record_event(self, *_): return self


def says(value):
    """A new function each time: torch.compile knows these functions by identity."""
    return lambda *_, **__: value


def is_bf16_supported(including_emulation: bool = True) -> bool:
    return including_emulation or CAPABILITY >= (8, 0)


PROPERTIES = SimpleNamespace(
    name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=MEMORY, uuid="GPU-0",
    multi_processor_count=PROCESSORS, warp_size=32, max_threads_per_multi_processor=1024,
    regs_per_multiprocessor=65536, shared_memory_per_multiprocessor=65536, L2_cache_size=4 << 20,
    shared_memory_per_block=49152, gcnArchName="", is_integrated=0, is_multi_gpu_board=0,
    shared_memory_per_block_optin=101376 if CAPABILITY >= (8, 0) else 65536)
ANSWERS = {
    "is_available": True, "is_initialized": True, "device_count": COUNT, "current_device": 0,
    "get_device_name": NAME, "get_device_capability": CAPABILITY,
    "get_device_properties": PROPERTIES, "get_arch_list": ["sm_75", "sm_80", "sm_86"],
    "mem_get_info": (MEMORY - (300 << 20), MEMORY), "memory_stats": {}, "host_memory_stats": {},
    "can_device_access_peer": False, "is_current_stream_capturing": False,
    "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    "get_rng_state_all": [torch.zeros(16, dtype=torch.uint8)] * COUNT,
} | dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved",
                   "max_memory_reserved"), 1 << 30) | dict.fromkeys(
    ("init", "_lazy_init", "set_device", "synchronize", "empty_cache", "ipc_collect", "_sleep",
     "manual_seed", "manual_seed_all", "seed", "seed_all", "reset_peak_memory_stats",
     "reset_max_memory_allocated", "set_stream", "set_rng_state", "set_rng_state_all"))
FUNCTIONS = {name: says(answer) for name, answer in ANSWERS.items()} | {
    name: type(name, (AtOnce,), {}) for name in (
        "Stream", "Event", "StreamContext", "stream", "device", "_DeviceGuard", "current_stream",
        "default_stream")} | {"is_bf16_supported": is_bf16_supported}
for module in (torch.cuda, torch.cuda.random, torch.cuda.memory):
    for name, function in FUNCTIONS.items():
        if module is torch.cuda or hasattr(module, name):
            setattr(module, name, function)
torch._C._cuda_getCurrentRawStream = says(0)
torch._C._cuda_getDevice = says(0)
# No driver for Triton: vLLM takes its CPU kernels, and nothing looks for libcuda to link.
nvidia.CudaDriver.is_active = staticmethod(says(False))
nvidia.libcuda_dirs = says([])
run_command = os.system
os.system = lambda command: 0 if "ldconfig" in command else run_command(command)


# ---- "cuda" as a place is the CPU ----------------------------------------------------------------
def on_cpu(place):
    """"cpu" for a card, by name, device or number; anything else as it is."""
    if isinstance(place, int) and not isinstance(place, bool):
        return "cpu"
    if isinstance(place, (str, torch.device)) and str(place).partition(":")[0] == "cuda":
        return "cpu"
    return place


class OnCpu(TorchFunctionMode):
    """Whatever is made on or sent to a card is made on or stays on the CPU."""

    def __torch_function__(self, function, types, args=(), how=None):
        how = dict(how or {})
        if how.get("device") is not None:
            how["device"] = on_cpu(how["device"])
        if how.get("pin_memory"):
            how["pin_memory"] = False
        name = getattr(function, "__name__", "")
        if name == "to" and len(args) > 1:
            args = (args[0], on_cpu(args[1]), *args[2:])
        elif name == "type" and len(args) > 1 and "cuda" in str(args[1]):
            args = (args[0], str(args[1]).replace("torch.cuda.", "torch."), *args[2:])
        return function(*args, **how)


def stay(self, *_, **__):
    return self


torch.Tensor.cuda = torch.nn.Module.cuda = torch.Tensor.pin_memory = stay
torch.Tensor.record_stream = says(None)
Generator, load_file, begin_autocast = torch.Generator, torch.load, torch.autocast.__init__


class GeneratorOnCpu(Generator):
    def __new__(cls, device="cpu"):
        return Generator(on_cpu(device))


@functools.wraps(load_file)
def load(file, map_location=None, *given, **how):
    return load_file(file, on_cpu(map_location), *given, **how)


@functools.wraps(begin_autocast)
def autocast(self, device_type, dtype=None, *given, **how):
    if device_type == "cuda":
        dtype = dtype or torch.float16  # a card's default
    begin_autocast(self, on_cpu(device_type), dtype, *given, **how)


def about_cpu(ask):
    return lambda device_type="cuda": ask(on_cpu(device_type))


torch.Generator, torch.load, torch.autocast.__init__ = GeneratorOnCpu, load, autocast
torch.is_autocast_enabled = about_cpu(torch.is_autocast_enabled)
torch.get_autocast_dtype = about_cpu(torch.get_autocast_dtype)


@after_import("transformers.modeling_utils")
def load_models_on_cpu(module) -> None:
    """Its device_map would have the file reader put weights on a card."""
    read = module.PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, *given, **how):
        if how.get("device_map") is not None:
            how["device_map"] = {"": "cpu"}
        return read(cls, *given, **how)

    module.PreTrainedModel.from_pretrained = classmethod(from_pretrained)


# ---- vLLM ----------------------------------------------------------------------------------------
@after_import("vllm.platforms.cpu")
def answer_for_a_card(module) -> None:
    """It can sleep, computes in what a card does, and compiles nothing."""
    configure = module.CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, config):
        from vllm.config import CompilationMode

        configure(cls, config)
        config.compilation_config.mode = CompilationMode.NONE

    computes = [torch.float16, torch.float32]
    if CAPABILITY >= (8, 0):
        computes.insert(0, torch.bfloat16)
    module.CpuPlatform.supported_dtypes = property(says(computes))
    module.CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    module.CpuPlatform.is_sleep_mode_available = says(True)


@after_import("vllm.device_allocator.cumem")
def allocate_nothing(module) -> None:
    pool = SimpleNamespace(get_current_usage=says(0), use_memory_pool=lambda tag: nullcontext())
    module.CuMemAllocator.get_instance = staticmethod(says(pool))


@after_import("vllm.v1.worker.cpu_worker")
def lose_the_cache(module) -> None:
    """Asleep the cache is gone, awake it holds anything: whoever read it would be seen."""
    def fill(value):
        def change(self, *_, **__):
            for cache in self.model_runner.kv_caches:
                cache.fill_(value)
        return change

    module.CPUWorker.sleep, module.CPUWorker.wake_up = fill(float("nan")), fill(100.0)


@after_import("vllm.model_executor.layers.utils")
def share_weights(module) -> None:
    """As on a card, where the model that trains shares them: the CPU build would repack them."""
    def keep(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    module.dispatch_cpu_unquantized_gemm = keep


# ---- Three of Unsloth's kernels ------------------------------------------------------------------
@after_import("unsloth.kernels.rms_layernorm")
def normalise_by_formula(module) -> None:
    def fast_rms_layernorm(layer, X, gemma=False, **_):
        epsilon = getattr(layer, "variance_epsilon", None) or layer.eps
        x = X.float()
        x = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)).to(layer.weight.dtype)
        weight = layer.weight.float() + 1 if gemma else layer.weight
        return (x * weight).to(X.dtype)

    assert module.fast_rms_layernorm
    module.fast_rms_layernorm = fast_rms_layernorm


@after_import("unsloth.kernels.rope_embedding")
def turn_by_formula(module) -> None:
    def fast_rope_embedding(Q, K, cos, sin, indices=None):
        length = Q.shape[2]
        cos, sin = cos.squeeze(), sin.squeeze()
        if indices is None:
            cos, sin = cos[:length], sin[:length]
        else:
            places = indices.reshape(-1, length).long()
            cos, sin = cos[places].unsqueeze(1), sin[places].unsqueeze(1)

        def turn(x):
            first, second = x.chunk(2, dim=-1)
            return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)

        return turn(Q), turn(K)

    assert module.fast_rope_embedding
    module.fast_rope_embedding = fast_rope_embedding


@after_import("unsloth.kernels.swiglu")
def gate_by_formula(module) -> None:
    def swiglu_fg_kernel(gate, up):
        return torch.nn.functional.silu(gate.float()).to(gate.dtype) * up

    def swiglu_DWf_DW_dfg_kernel(DW, gate, up):
        """In place: DW becomes the product, `gate` and `up` the gradients of up and gate."""
        x = gate.float()
        sigmoid = torch.sigmoid(x)
        f = (sigmoid * x).to(DW.dtype)
        product, of_up = f * up, DW * f
        of_gate = ((DW * up).float() * sigmoid * (1 + x * (1 - sigmoid))).to(DW.dtype)
        return DW.copy_(product), gate.copy_(of_up), up.copy_(of_gate)

    assert module.swiglu_fg_kernel and module.swiglu_DWf_DW_dfg_kernel
    module.swiglu_fg_kernel = swiglu_fg_kernel
    module.swiglu_DWf_DW_dfg_kernel = swiglu_DWf_DW_dfg_kernel


if __name__ == "__main__":
    log("card", name=NAME, count=COUNT)
    OnCpu().__enter__()
    run_script(sys.argv[1:])
