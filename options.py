"""Every option of the training script, its one default, and the five recipes that change defaults.

Defaults < recipe < --config FILE.yaml < command line. What can't work ends here in one line.
"""

import argparse
import difflib
import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path

from models import has_gpu, stop
from rewards import FORMATS, REWARD_FUNCS

GSM8K = "openai/gsm8k"
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# ---- Recipes: what each of the five systems sets; every flag overrides it ------------------------
RECIPES = {
    "qwen-3b": {  # the default on a GPU
        "model": "Qwen/Qwen2.5-3B-Instruct", "load_in_4bit": True, "lora_rank": 16,
        "learning_rate": 5e-6, "batch_size": 1, "num_generations": 3, "max_prompt_length": 500,
        "max_completion_length": 1500, "max_steps": 150,
        "reward_funcs": ["correctness_reward_func", "strict_format_reward_func"],
        "reward_weights": [1.0, 1.0],
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
        "model": "Qwen/Qwen2.5-1.5B-Instruct", "lora_rank": 16,
        "learning_rate": 1e-5,  # LoRA wants a higher rate than full fine-tuning
        "batch_size": 8, "num_generations": 8, "max_prompt_length": 512,
        "max_completion_length": 512, "max_steps": 200,
        "reward_funcs": ["correctness_reward_func", "int_reward_func", "strict_format_reward_func",
                         "soft_format_reward_func", "xmlcount_reward_func"],
        "reward_weights": [2.0, 1.0, 1.0, 1.0, 1.0], "report_to": "wandb",
    },
    "smollm2-135m": {  # the default without a GPU, so without an account; else --report-to wandb
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct", "lora_rank": 16, "lora_alpha": 32,
        # Untrained it writes no tag, every reward is 0, and nothing is learnt: supervised steps
        # show it the format. After fewer of them long answers are so seldom right that it pays to
        # stop after one calculation, after more GRPO has little to add. Groups that differ in
        # format only would, scaled to their spread, count as much as those that differ in the
        # answer. At a rate of 5e-4 it learnt to answer without reasoning.
        "warm_start": 14, "learning_rate": 2e-4, "scale_rewards": "none", "batch_size": 16,
        "gradient_accumulation_steps": 2, "num_generations": 8, "max_steps": 28,
        "max_prompt_length": 300, "max_completion_length": None, "eval_questions": 384,
        "reward_funcs": ["correctness_reward_func", "strict_format_reward_func",
                         "int_reward_func", "xmlcount_reward_func"],
        "reward_weights": [2.0, 1.0, 1.0, 1.0],
    },
    "cookbook": {
        "model": "Qwen/Qwen2.5-3B-Instruct", "load_in_4bit": True, "lora_rank": 16,
        "lora_alpha": 32, "lora_dropout": 0.1, "lora_targets": ["q_proj", "v_proj"],
        "learning_rate": 5e-6, "batch_size": 2, "gradient_accumulation_steps": 8,
        "num_generations": 4, "max_prompt_length": 1024, "max_completion_length": 1024,
        "max_steps": 50, "max_examples": 1000, "format": "cookbook",
        "reward_funcs": ["match_format_exactly", "match_format_approximately",
                         "check_answer_correctness", "check_numbers_extraction"],
        "reward_weights": [1.0, 1.0, 1.0, 1.0], "report_to": "trackio",
        "output_dir": "trl_grpo_outputs",
    },
}
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
FREE_ON_RESUME = {"resume", "max_steps", "save_steps", "report_to", "project_name", "config",
                  "output_dir", "dry_run", "typed", "argv", "why", "check_env",
                  "export", "hub_id"}


class OneLineParser(argparse.ArgumentParser):
    """argparse, but an error is one line and names the nearest flag."""

    def error(self, message):
        if message.startswith("unrecognized arguments:"):
            wrong = message.split()[2].split("=")[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            message = f"unknown option {wrong}{did_you_mean(wrong, flags)}; --help lists all"
        stop(message)


def did_you_mean(word: str, known) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


def number(kind, low, inclusive=True, below=float("inf")):
    """An argparse type: a number from `low` (or above it) to `below`, exclusive."""

    def read(text: str):
        value = kind(text)
        if not (low < value < below or inclusive and value == low):
            bound = f"at least {low}" if inclusive else f"above {low}"
            bound += f" and below {below}" * (below < float("inf"))
            raise argparse.ArgumentTypeError(f"{text} is not {bound}")
        return value

    read.__name__ = kind.__name__
    return read


def how_many(text: str):
    return text if text == "all" else number(int, 0)(text)


def build_parser(description: str) -> argparse.ArgumentParser:
    count, many = number(int, 1), number(int, 0)
    share, positive = number(float, 0), number(float, 0, inclusive=False)
    flag = argparse.BooleanOptionalAction
    parser = OneLineParser(description=description, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to train").add_argument
    add("--recipe", choices=RECIPES, help="default: qwen-3b on a GPU, else smollm2-135m")
    add("--config", metavar="FILE.yaml", help="options from a file; the command line wins")
    add("--model", "--model-name", help="Hub id, local directory or .gguf file")
    add("--chat-template", choices=("own", "plain"), default="own", help="plain: has none itself")
    add("--backend", choices=("auto", "transformers", "unsloth"), default="auto",
        help="auto: unsloth on a GPU that has it")
    add("--vllm", choices=("auto", "off", "colocate", "server"), default="auto",
        help="who writes the rollouts; server: `trl vllm-serve` elsewhere")
    add("--gpu-memory-utilization", type=number(float, 0, inclusive=False, below=1), default=0.5,
        help="vLLM's share of the memory")
    add("--gradient-checkpointing", action=flag, help="default: on a GPU")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    add("--load-in-4bit", action=flag, default=False, help="QLoRA through bitsandbytes")
    add("--attn-implementation", default="auto", help="auto: FlashAttention 2 where installed")
    add("--lora-rank", type=count, default=16)
    add("--lora-alpha", type=positive, default=16)
    add("--lora-dropout", type=number(float, 0, below=1), default=0.0)
    add("--lora-targets", nargs="+", default=ALL_LINEAR, metavar="MODULE")
    add("--full-finetune", action=flag, default=False, help="train all weights, no adapter")
    add = parser.add_argument_group("on which questions").add_argument
    add("--dataset", help=f"{GSM8K} (the default) or another Hub id; a .jsonl .json .csv .parquet "
                          "file; generated; reasoning-gym:TASK")
    add("--dataset-config", help="of the Hub data set (GSM8K: main)")
    add("--eval-dataset", metavar="FILE", help="held out; default: the test split, else a tenth")
    add("--question-column", default="question")
    add("--answer-column", default="answer", help="the gold number, alone or after ####")
    add("--max-examples", type=count, help="train on the first N questions")
    add("--max-prompt-length", type=count, default=512, help="tokens; longer ones are dropped")
    add("--format", choices=FORMATS, default="xml")
    add("--few-shot", type=many, default=0, metavar="N", help="worked examples in every prompt")
    add = parser.add_argument_group("how to train").add_argument
    add("--max-steps", type=count, default=100)
    add("--learning-rate", type=positive, default=5e-6)
    add("--batch-size", type=count, default=8, help="completions a device and forward pass")
    add("--gradient-accumulation-steps", type=count, help="default: the fewest that hold a group")
    add("--num-generations", type=number(int, 2), default=8, help="group: completions a question")
    add("--max-completion-length", type=count, default=512, help="tokens; smollm2-135m: "
        "as long as the questions need")
    add("--temperature", type=positive, default=1.0, help="of the rollouts; best left at 1")
    add("--beta", type=share, default=0.0, help="KL weight, 0 = no reference model")
    add("--loss-type", choices=LOSS_TYPES, default="dapo")
    add("--scale-rewards", choices=("group", "batch", "none"), default="group",
        help="advantages in units of the spread in a group or batch, or as they are")
    add("--reward-funcs", nargs="+", metavar="NAME", help="of rewards.py, or FILE.py:function")
    add("--reward-weights", nargs="+", type=float, metavar="W", help="default: 1 each")
    add("--warm-start", type=many, default=0, metavar="N",
        help="supervised steps on worked solutions first, 0 = off")
    add("--warm-start-learning-rate", type=positive, default=5e-4,
        help="falls linearly to zero (default: %(default)s)")
    add("--strict-start", action=flag, default=False, help="stop if no reward differs at the start")
    add("--seed", type=many, default=0)
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="any GRPOConfig field")
    add = parser.add_argument_group("what to measure").add_argument
    add("--eval-questions", type=how_many, default=200, metavar="N|all", help="0 = none")
    add("--skip-evaluation", dest="eval_questions", action="store_const", const=0,
        help="the same as --eval-questions 0")
    add("--eval-steps", type=many, default=0, metavar="N",
        help="validate every N steps and keep the best adapter, 0 = keep the last")
    add("--evaluate-only", action=flag, default=False, help="measure --model or --adapter only")
    add("--adapter", type=Path, metavar="DIR", help="with --evaluate-only: a saved adapter")
    add("--samples", type=count, default=1, metavar="K", help="with --evaluate-only: maj@K, pass@K")
    add = parser.add_argument_group("where it goes").add_argument
    add("--output-dir", metavar="DIR", help="default: outputs/RECIPE; a taken one gets a number")
    add("--save-steps", type=count, default=50, help="a checkpoint every N steps")
    add("--resume", action=flag, default=False, help="go on from the newest checkpoint")
    add("--report-to", choices=("none", "trackio", "wandb", "tensorboard"), default="none")
    add("--no-trackio", dest="report_to", action="store_const", const="none",
        help="the same as --report-to none")
    add("--project-name", default="reasoning-grpo", help="the tracker's project")
    add("--dry-run", action=flag, default=False, help="print the plan, stop before loading weights")
    add("--check-env", action=flag, default=False, help="what is installed, what a run would take")
    add("--export", nargs="+", choices=("merged", "gguf", "hub"), default=[],
        help="after training, or of --adapter: 16-bit weights, a GGUF file, the Hub")
    add("--hub-id", metavar="OWNER/NAME", help="where --export hub puts the adapter")
    return parser


def parse_options(argv: list[str] | None, description: str) -> argparse.Namespace:
    if argv is None:  # in a notebook, sys.argv is the kernel's
        argv = [] if "ipykernel" in sys.modules else sys.argv[1:]
    parser = build_parser(description)
    given = parser.parse_args(argv)
    if given.config:
        argv = read_config(given.config) + argv
        given = parser.parse_args(argv)
    recipe = given.recipe or ("qwen-3b" if has_gpu() else "smollm2-135m")
    parser.set_defaults(**RECIPES[recipe])
    args = parser.parse_args(argv)
    args.argv = [word for word in argv if word != "--resume"]
    args.typed = sorted({w[2:].partition("=")[0].replace("-", "_") for w in argv if w[:2] == "--"})
    args.recipe, args.model_named = recipe, given.model is not None
    args.dataset_named, args.dataset = args.dataset is not None, args.dataset or GSM8K
    if given.reward_funcs and not given.reward_weights:
        args.reward_weights = [1.0] * len(args.reward_funcs)
    if args.gradient_accumulation_steps is None:
        args.gradient_accumulation_steps = next(
            n for n in range(1, args.num_generations + 1)
            if n * args.batch_size * processes() % args.num_generations == 0)
    check(args)
    return args


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def sharded() -> bool:
    """Launched with FSDP: while it trains, each process holds a part of every weight."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true" and processes() > 1


def completions_a_step(args) -> int:
    return args.batch_size * args.gradient_accumulation_steps * processes()


def check(args) -> None:
    """Stop at the first option that can't work with the others."""
    if completions_a_step(args) % args.num_generations:
        stop(f"--num-generations {args.num_generations} does not divide the "
             f"{completions_a_step(args)} completions of a step (--batch-size {args.batch_size} x "
             f"--gradient-accumulation-steps {args.gradient_accumulation_steps} x {processes()} "
             "processes); leave --gradient-accumulation-steps out to have it fit")
    if len(args.reward_weights) != len(args.reward_funcs):
        stop(f"{len(args.reward_weights)} --reward-weights for {len(args.reward_funcs)} rewards")
    if args.adapter and not (args.evaluate_only or args.export):
        stop("--adapter goes with --evaluate-only or --export; to go on with a run, --resume")
    if "hub" in args.export and not args.hub_id:
        stop("--export hub needs --hub-id OWNER/NAME")
    if args.export and args.full_finetune:
        stop("--export is for adapters; --full-finetune leaves whole weights in final_model/")
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        stop("ZeRO-3 shards the weights, which evaluating and saving here don't gather: take "
             "zero2.yaml, fsdp2.yaml or --multi_gpu")
    if sharded() and os.environ.get("FSDP_VERSION") != "2":
        stop("FSDP works here in its second version: take fsdp2.yaml")
    if sharded() and args.load_in_4bit:
        stop("FSDP shards no 4-bit weights: take --no-load-in-4bit, or launch with --multi_gpu")
    if args.dtype == "float16" and not args.evaluate_only and (args.full_finetune or not has_gpu()):
        stop("training in float16 needs a GPU and LoRA: take --dtype float32 or bfloat16")
    if args.load_in_4bit and args.full_finetune:
        stop("4-bit weights can't be trained in full: --no-load-in-4bit or --no-full-finetune")
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        stop(f"{args.report_to} is missing: pip install {args.report_to}, or --report-to none")
    if args.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        stop("bitsandbytes is missing: pip install bitsandbytes, or --no-load-in-4bit")


def find_reward(name: str):
    if name in REWARD_FUNCS:
        return REWARD_FUNCS[name]
    file, colon, function = name.rpartition(":")
    if not colon:
        stop(f"no reward {name}{did_you_mean(name, REWARD_FUNCS)}; there are "
             f"{', '.join(REWARD_FUNCS)}, or write FILE.py:function")
    if not Path(file).is_file():
        stop(f"reward {name}: no file {file}; write FILE.py:function")
    try:
        found = runpy.run_path(file).get(function)
    except Exception as problem:  # the user's file may fail in any way
        stop(f"reward {name}: {file} fails with {type(problem).__name__}: {problem}")
    if not callable(found):
        stop(f"reward {name}: {file} has no function {function}")
    return found


def grpo_config(args, dtype: str, output_dir: str):
    """TRL's GRPOConfig: the options, then our own defaults, which --set may change."""
    import dataclasses

    from trl import GRPOConfig

    same = ("max_steps", "learning_rate", "loss_type", "beta", "temperature", "scale_rewards",
            "num_generations", "gradient_accumulation_steps", "max_completion_length", "report_to",
            "reward_weights", "save_steps", "seed", "gradient_checkpointing")
    ours = {name: getattr(args, name) for name in same} | {
        "output_dir": output_dir, "run_name": Path(output_dir).name, "project": args.project_name,
        "per_device_train_batch_size": args.batch_size, "use_cpu": not has_gpu(),
        "bf16": dtype == "bfloat16", "fp16": dtype == "float16", "use_vllm": args.vllm != "off",
        "vllm_mode": args.vllm if args.vllm != "off" else "colocate",
        "vllm_gpu_memory_utilization": args.gpu_memory_utilization,
    }
    fields = {
        "logging_steps": 1, "disable_tqdm": True, "save_total_limit": 2, "max_grad_norm": 1.0,
        "lr_scheduler_type": "linear",  # falls to 0, so the last few questions don't decide
        "warmup_steps": 0,  # runs are short, and a warm-up's first step trains nothing
        "optim": "adamw_torch_fused", "weight_decay": 0.0,  # Unsloth's differ
        "mask_truncated_completions": False, "epsilon_high": None,
        "vllm_importance_sampling_correction": True,
    } | ours
    known = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    for pair in args.set:
        name, equals, value = pair.partition("=")
        if name not in known:
            stop(f"--set {name}: GRPOConfig has no such field{did_you_mean(name, known)}")
        if not equals or name in ours:
            stop(f"--set {pair}: {'it has an option of its own' if equals else 'write NAME=VALUE'}")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
        if isinstance(known[name], (int, float)) and not isinstance(fields[name], (int, float)):
            stop(f"--set {pair}: {name} is a number or true/false, by default {known[name]}")
    try:
        config = GRPOConfig(**fields)
    except (ValueError, TypeError) as problem:
        stop(f"GRPOConfig refuses these options: {problem}")
    # Unsloth replaces GRPOConfig by its own, which sets some fields by the loss that is named, and
    # drops what it does not know with a warning.
    for name in ("mask_truncated_completions", "epsilon_high", "scale_rewards"):
        setattr(config, name, fields[name])
    for name in sorted(set(fields) - {"report_to", "use_vllm", "vllm_mode"}):
        if getattr(config, name, None) != fields[name]:
            stop(f"GRPOConfig took {getattr(config, name, None)} for {name}, not {fields[name]}: "
                 "the installed trl and unsloth are not the pinned ones, see --check-env")
    return config


def read_config(path: str) -> list[str]:
    """A YAML file of options as a command line, so that both are checked alike."""
    import yaml

    try:
        options = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError) as problem:
        stop(f"--config {path}: {problem}")
    if not isinstance(options, dict):
        stop(f"--config {path} is no table of `option: value` lines")
    argv = []
    for name, value in options.items():
        flag = "--" + str(name).replace("_", "-")
        if isinstance(value, bool):
            argv.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            argv += [flag, *map(str, value if isinstance(value, list) else [value])]
    return argv


def record(args) -> dict:
    """The options as JSON keeps them."""
    return json.loads(json.dumps(vars(args), default=str))
