"""What this machine has, and what a run therefore does: backend, memory, time.

    python reasoning_model_grpo.py --check-env

The decisions are functions of plain values, so they are tested where there is no GPU.
"""

import importlib.metadata
import os
import re
import shutil
import sys
import time
from pathlib import Path
from statistics import median

from models import choose_dtype, has_gpu, hub_reachable, stop
from options import processes

# GB of GPU memory: bounds that fit Qwen2.5-3B beside its rollouts. A recipe's own value is kept
# where it is lower, and what the user typed is kept always.
PRESETS = {
    6: {"load_in_4bit": True, "num_generations": 4, "max_prompt_length": 256,
        "max_completion_length": 256, "gpu_memory_utilization": 0.5},
    8: {"load_in_4bit": True, "num_generations": 4, "max_prompt_length": 384,
        "max_completion_length": 512, "gpu_memory_utilization": 0.5},
    12: {"load_in_4bit": True, "num_generations": 6, "max_prompt_length": 512,
         "max_completion_length": 768, "gpu_memory_utilization": 0.5},
    16: {"load_in_4bit": True, "num_generations": 8, "max_prompt_length": 512,
         "max_completion_length": 1024, "gpu_memory_utilization": 0.55},
    24: {"load_in_4bit": True, "num_generations": 8, "max_prompt_length": 1024,
         "max_completion_length": 1536, "gpu_memory_utilization": 0.6},
    40: {"load_in_4bit": False, "gpu_memory_utilization": 0.6},
    80: {"load_in_4bit": False, "gradient_checkpointing": False, "gpu_memory_utilization": 0.6},
}  # fmt: skip


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pinned(path: Path) -> dict[str, str]:
    """The package: version table of a requirements file; {} where it is absent."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return dict(found.groups() for line in lines if (found := re.match(r"([\w-]+)==(\S+)", line)))


# ---- The backend ---------------------------------------------------------------------------------
def choose_backend(wanted: str, vllm: str, gpu: bool, packages: set[str], *, alone: bool = True,
                   lora: bool = True) -> tuple[str, str, str]:  # fmt: skip
    """(backend, vllm mode, why) from what is asked for and what is there; stops where it can't be.

    `alone`: one process; `lora`: an adapter is trained. vLLM's mode is off, colocate or server.
    """
    if wanted == "unsloth" or vllm in ("colocate", "server"):
        asked = "--backend unsloth" if wanted == "unsloth" else f"--vllm {vllm}"
        if not gpu:
            stop(f"{asked} needs an NVIDIA GPU, and there is none; leave it out")
        for package in ("unsloth",) * (wanted == "unsloth") + ("vllm",) * (vllm != "off"):
            if package not in packages and not (package == "vllm" and vllm == "auto"):
                stop(f"{asked} needs {package}: pip install -r requirements.txt")
    if wanted == "unsloth" and not (alone and lora):
        stop("--backend unsloth trains a LoRA adapter on one GPU; take --backend transformers")
    if wanted == "unsloth" and vllm == "server":
        stop("--vllm server goes with --backend transformers")
    if not gpu:
        return "transformers", "off", "no GPU"
    mode = ("colocate" if "vllm" in packages else "off") if vllm == "auto" else vllm
    rollouts = {"off": "rollouts without vLLM", "server": "rollouts from a vLLM server",
                "colocate": "rollouts through vLLM"}[mode]
    if vllm == "auto" and mode == "off":
        rollouts += ", which is not installed"
    if wanted == "transformers":
        return "transformers", mode, f"as asked; {rollouts}"
    if "unsloth" not in packages:
        return "transformers", mode, f"unsloth is not installed; {rollouts}"
    if not alone or not lora or mode == "server":
        reason = "several processes" if not alone else "a server" if lora else "all weights"
        return "transformers", mode, f"unsloth is not for {reason}; {rollouts}"
    return "unsloth", mode, f"a GPU and unsloth; {rollouts}"


def start_backend(args) -> None:
    """Settle backend, vLLM and dtype in `args`. Unsloth must come before trl, peft, transformers:
    it patches them as they are imported."""
    gpu = has_gpu()
    # Under FSDP it would leave every process but one without weights, and all look at rollouts.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    packages = {name for name in ("unsloth", "vllm") if installed(name)}
    args.backend, args.vllm, args.why = choose_backend(
        args.backend, args.vllm, gpu, packages, lora=not args.full_finetune,
        alone=processes() == 1)
    if gpu:
        import torch

        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        if changed := fit_to_memory(args, memory):
            print(f"for a GPU of {memory:.0f} GB: {', '.join(changed)}; what you type is kept")
    if args.backend == "transformers" and args.load_in_4bit and args.vllm != "off":
        if "vllm" in args.typed:
            stop(f"--vllm {args.vllm} would get packed 4-bit weights from TRL, which it can't "
                 "follow: --no-load-in-4bit, --vllm off, or one process with --backend unsloth")
        args.vllm = "off"
        args.why += ", but off for 4-bit weights, which TRL can't send it"
    if args.vllm == "colocate" and args.load_in_4bit and not installed("vllm-bnb-plugin"):
        stop("4-bit weights in vLLM need vllm-bnb-plugin: pip install -r requirements.txt")
    if args.gradient_checkpointing is None:  # a CPU has the memory and lacks the time
        args.gradient_checkpointing = gpu
    if args.backend == "unsloth":
        os.environ.setdefault("UNSLOTH_VLLM_STANDBY", "1")  # engine and training share the memory
        import unsloth  # noqa: F401

        if args.dtype == "auto" and choose_dtype("auto") == "float32":
            args.dtype = "float16"  # T4, V100: twice as fast, and Unsloth keeps it stable


# ---- Memory --------------------------------------------------------------------------------------
def choose_preset(gigabytes: float) -> dict:
    """The largest preset that a GPU of so much memory (it reports some less) can hold."""
    return PRESETS[max((size for size in PRESETS if size <= gigabytes * 1.1), default=min(PRESETS))]


def fit_to_memory(args, gigabytes: float) -> list[str]:
    """Bound what the user did not type by the GPU's preset. Returns what changed, for the screen.

    The batch is never touched: group and batch must divide, and its size is part of the recipe.
    """
    changed = []
    for name, bound in choose_preset(gigabytes).items():
        old = getattr(args, name)
        typed = {name, f"no_{name}"} & set(args.typed)
        if name == "num_generations" and args.batch_size % min(bound, old or bound):
            continue
        new = bound if old is None or isinstance(bound, bool) else min(old, bound)
        if not typed and new != old and not (args.full_finetune and name == "load_in_4bit"):
            setattr(args, name, new)
            changed.append(f"--{name.replace('_', '-')} {old} -> {new}")
    return changed


def estimate_memory(config, parameters: int, args, dtype: str, prompt: int) -> dict[str, float]:
    """GB that training needs at its peak, by part, from the model's config. Rough by design.

    `prompt`: tokens of the longest one.
    """
    micro_batch, size = args.batch_size, 4 if dtype == "float32" else 2
    hidden, layers, inner = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", heads) * (hidden // heads)
    embedding = config.vocab_size * hidden
    length = prompt + args.max_completion_length
    # NF4 with double quantisation takes 4.127 bits a weight (QLoRA, arXiv:2305.14314).
    weight = 4.127 / 8 if args.load_in_4bit else size
    ends = {"k_proj": kv, "v_proj": kv, "gate_proj": inner, "up_proj": inner, "down_proj": inner}
    widths = sum(hidden + ends.get(name, hidden) for name in args.lora_targets)  # in and out
    trained = parameters if args.full_finetune else layers * args.lora_rank * widths
    # What autograd keeps of a layer and token: its inputs, norms, q, k, v, gate, up and products,
    # the adapter's copies of its inputs in float32, and the attention scores of a whole row.
    a_token = size * (10 * hidden + 2 * kv + 4 * inner) + 4 * (5 * hidden + inner)
    a_token += 0 if has_gpu() else size * 3 * heads * length  # fused attention keeps no scores
    kept = size * hidden * layers + a_token if args.gradient_checkpointing else a_token * layers
    rollouts = 2 * layers * kv * size * length * micro_batch * args.gradient_accumulation_steps
    parts = {
        "weights": (parameters - embedding) * weight + embedding * size,
        "adapter and optimiser" if not args.full_finetune else "gradients and optimiser":
            trained * (12 if args.full_finetune else 16),  # float32: weight, gradient, two moments
        "activations": kept * micro_batch * length,
        # logits in their dtype, in float32, their softmax and its gradient
        "logits": micro_batch * args.max_completion_length * config.vocab_size * (size + 3 * 4),
    }
    if args.vllm != "colocate":  # vLLM takes its own share, set by --gpu-memory-utilization
        parts["KV cache"] = rollouts
    return {name: value / 1e9 for name, value in parts.items()}


def rehearse(args, run: dict, model) -> None:
    """The longest rollout and update once, thrown away, so that out of memory shows at once."""
    import torch

    pad, part = run["tokenizer"].pad_token_id, "rollouts"
    room, device = args.max_completion_length, model.device
    prompt = max(row["tokens"] for row in run["train"])
    try:
        if args.vllm == "off":
            a_step = args.batch_size * args.gradient_accumulation_steps
            ids = torch.full((a_step, prompt), pad, device=device)
            with torch.no_grad():
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                               max_new_tokens=room, min_new_tokens=room)
        part = "update"
        if hasattr(model, "for_training"):  # Unsloth's generate left it without checkpointing
            model.for_training()
        elif args.gradient_checkpointing:  # transformers' Trainer has not switched it on yet
            model.train()
            model.gradient_checkpointing_enable()
            if not args.full_finetune:
                model.enable_input_require_grads()
        ids = torch.full((args.batch_size, prompt + room), pad, device=device)
        with torch.autocast(device.type, getattr(torch, run["dtype"])):
            logits = model(ids, logits_to_keep=room + 1).logits
        torch.log_softmax(logits.float(), -1)[..., 0].mean().backward()
        model.zero_grad(set_to_none=True)
    except torch.OutOfMemoryError:
        out_of_memory(part, args)


def out_of_memory(part: str, args) -> None:
    """End with which part needed too much and what to type next."""
    half, twice = args.batch_size // 2, args.gradient_accumulation_steps * 2
    if part == "rollouts" and args.vllm == "colocate":
        remedy = f"--gpu-memory-utilization {max(0.1, args.gpu_memory_utilization - 0.1):.2g}"
    elif half:
        remedy = f"--batch-size {half} --gradient-accumulation-steps {twice}"
    else:
        remedy = f"--max-completion-length {args.max_completion_length // 2}"
    stop(f"out of GPU memory in the {part}; type the same with {remedy}")


# ---- Time ----------------------------------------------------------------------------------------
def estimate_minutes(args, parameters: int, prompt: float, questions: int, dtype: str, warm: int):
    """Rough minutes of a run on a CPU, from a short measurement of its matrix products.

    `prompt`: tokens a prompt; `questions`: held out; `warm`: worked solutions of the warm start.
    """
    import torch

    a = torch.randn(512, 2048, dtype=getattr(torch, dtype))
    b = torch.randn(2048, 2048, dtype=a.dtype)
    product, seconds = a @ b, []
    for _ in range(30):  # into the same memory, and the median: new pages, waking threads cost time
        begun = time.perf_counter()
        torch.mm(a, b, out=product)
        seconds.append(time.perf_counter() - begun)
    speed = 2 * 512 * 2048 * 2048 / median(seconds)
    # 2 operations a weight and token forward; decoding token by token, and training with its
    # element-wise parts, reach about a tenth and a half of the speed of large products.
    length = min(args.max_completion_length, 100) * 0.6
    decoded, trained = 2 * prompt + 12 * length, 10 * (prompt + length)
    completions = args.max_steps * args.batch_size * args.gradient_accumulation_steps
    work = completions * (decoded + trained) + warm * trained
    work += (3 if args.warm_start else 2) * questions * decoded
    return work * parameters / speed / 60


# ---- --check-env ---------------------------------------------------------------------------------
def check_env(args) -> int:
    """Print what is installed against what is pinned, and what a run would choose; 1 = mend it."""
    import torch
    from rich.console import Console
    from rich.table import Table

    gpu = has_gpu()
    file = "requirements.txt" if gpu else "requirements-cpu.txt"
    table = Table(title=f"installed, against {file}")
    for column in ("package", "installed", "pinned", ""):
        table.add_column(column)
    wrong = []
    for name, version in pinned(Path(__file__).with_name(file)).items():
        have = installed(name)
        same = have is not None and have.partition("+")[0] == version
        needed = name not in ("pytest", "hypothesis", "ruff", "ipykernel", "nbclient")
        wrong += [f"{name}=={version}"] * (needed and not same)
        table.add_row(name, have or "-", version, "" if same else "differs" if have else "missing")
    Console().print(table)
    facts = {"python": sys.version.split()[0]}
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        wrong.append("python 3.11 to 3.13")
    if gpu:
        about = torch.cuda.get_device_properties(0)
        facts["GPU"] = f"{about.name}, {about.total_memory / 1e9:.0f} GB, compute capability " \
                       f"{about.major}.{about.minor}, {torch.cuda.device_count()} in all"
        facts["memory preset"] = str(choose_preset(about.total_memory / 1e9))
    else:
        facts["GPU"] = "none that torch can use"
        if shutil.which("nvidia-smi"):
            facts["GPU"] += ", though nvidia-smi is there: this torch was built without CUDA"
            wrong.append("torch")
    facts["bfloat16"] = "native" if choose_dtype("auto") == "bfloat16" else "not native: float32"
    facts["vLLM"] = installed("vllm") or "not installed"
    facts["the Hub"] = "reachable" if hub_reachable() else "not reachable"
    packages = {name for name in ("unsloth", "vllm") if installed(name)}
    backend, mode, why = choose_backend("auto", "auto", gpu, packages)
    facts["a run takes"] = f"recipe {args.recipe}, backend {backend}, vLLM {mode}: {why}"
    print("\n".join(f"{name + ':':<15}{fact}" for name, fact in facts.items()))
    if wrong:
        print(f"would break: {', '.join(wrong)}; mend it with: pip install -r {file}")
    return int(bool(wrong))
