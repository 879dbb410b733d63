"""Teach a small chat model to reason with GRPO (DeepSeekMath, arXiv:2402.03300): a LoRA adapter.

    python reasoning_model_grpo.py                            # what fits this machine
    python reasoning_model_grpo.py --model Qwen/Qwen2.5-3B-Instruct
    python reasoning_model_grpo.py --recipe cookbook --max-steps 100 --dry-run
    python reasoning_model_grpo.py --evaluate-only --adapter outputs/smollm2-135m/grpo_saved_lora
    accelerate launch --num_processes 2 reasoning_model_grpo.py --recipe qwen-0.5b-fp32

In a notebook cell, with the other files beside it: main(["--max-steps", "20"]).

Questions -> model -> evaluation -> warm start -> GRPO -> evaluation -> adapter, table, pictures.
TRL's GRPOTrainer does the training; what it can do beyond these options goes through --set.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import cpu
import models
from export import ask_fast, check_adapter, export
from machine import (
    check_env, estimate_memory, estimate_minutes, installed, out_of_memory, rehearse,
    start_backend,
)
from models import (
    choose_dtype, complete, count_parameters, find_model, find_trained, has_gpu,
    is_main_process, load_model, load_tokenizer, load_trained, peak_memory_gb, quiet_libraries,
    render_prompts, stop,
)
from options import (
    FREE_ON_RESUME, completions_a_step, find_reward, grpo_config, parse_options, processes, record,
    sharded,
)
from questions import add_prompts, load_questions, rendered

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "unsloth", "vllm")
STAGES = {"before": "before", "warm_start": "after warm start", "after": "after GRPO"}
CHECKPOINTS = "checkpoint-*/trainer_state.json"  # written last, so what has it is whole
WARM_START_BATCH = 8  # worked solutions a supervised step


# ---- The plan ------------------------------------------------------------------------------------
def prepare(args) -> dict:
    """All that can be wrong, looked at before any weight is loaded; what the run works on."""
    from transformers import AutoConfig

    from report import CheckedReward, call_reward

    journal = {"values": {}}
    funcs = [CheckedReward(find_reward(n), n, args.format, journal) for n in args.reward_funcs]
    run = {"journal": journal, "reward_funcs": funcs, "stages": {}}
    run["load_from"], run["base"] = find_model(args.model, args.model_named)
    try:
        config = run["model_config"] = AutoConfig.from_pretrained(run["load_from"])
        run["parameters"] = count_parameters(config)
        run["tokenizer"] = load_tokenizer(run["load_from"], args.chat_template)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        stop(f"{args.model} is no chat model that can be loaded: {problem}")
    train, test = load_questions(args)
    # 99 % of GSM8K's worked solutions have at most 254 tokens, the generated questions' all at most
    # 40: with room for one calculation too many, or being cut off would teach to stop early.
    measured = 53 if args.dataset == "generated" else 256
    args.max_completion_length = args.max_completion_length or measured
    context = getattr(config, "max_position_embeddings", None)
    if context and args.max_prompt_length + args.max_completion_length > context:
        stop(f"--max-prompt-length {args.max_prompt_length} + --max-completion-length "
             f"{args.max_completion_length} exceed the model's context of {context} tokens")
    run["dtype"] = choose_dtype(args.dtype)
    run["config"] = grpo_config(args, run["dtype"], "unused")
    shots = [question for question in train if question["solution"]][: args.few_shot]
    if len(shots) < args.few_shot:
        stop(f"--few-shot {args.few_shot}, but {len(shots)} questions have a worked solution")
    train = [question for question in train if question not in shots]
    test = test if args.eval_questions == "all" else test[: args.eval_questions]
    run["shots"] = [(shot["question"], rendered(shot, args.format)) for shot in shots]
    run["train"] = add_prompts(train, run["shots"], args, run["tokenizer"], "training")
    run["test"] = add_prompts(test, run["shots"], args, run["tokenizer"], "held-out")
    run["validation"] = []
    if args.eval_steps:  # the best adapter is not chosen on the questions whose figures we report
        cut = max(1, min(64, len(run["train"]) // 10))
        run["train"], run["validation"] = run["train"][:-cut], run["train"][-cut:]
    needed = completions_a_step(args) // args.num_generations
    if len(run["train"]) < needed:
        stop(f"a step takes {needed} questions, there are {len(run['train'])}: lower --batch-size, "
             "--gradient-accumulation-steps or give more questions")
    for func in funcs:  # so that a faulty one is named before an hour is spent
        rows = run["train"][:2]
        call_reward(func, rows, [row["solution"] or "1" for row in rows])
    if args.warm_start and not any(row["solution"] for row in run["train"]):
        print("no warm start: these questions come without worked solutions")
        args.warm_start = 0
    return run


def versions() -> dict:
    return {package: version for package in PACKAGES if (version := installed(package))}


def show_plan(args, run: dict, run_dir: Path) -> None:
    import torch

    cpu = f"CPU, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if has_gpu() else cpu
    a_step, train = completions_a_step(args), run["train"]
    prompt = sum(row["tokens"] for row in train) / len(train)
    trained = "all weights" if args.full_finetune else f"LoRA rank {args.lora_rank}"
    warm = f", after {args.warm_start} supervised ones" if args.warm_start else ""
    memory = estimate_memory(run["model_config"], run["parameters"], args, run["dtype"],
                             max(row["tokens"] for row in train))
    minutes = 0 if has_gpu() else estimate_minutes(
        args, run["parameters"], prompt, len(run["test"]), run["dtype"],
        args.warm_start * WARM_START_BATCH)
    lines = {
        "recipe": args.recipe,
        "model": f"{run['base']}, {run['parameters'] / 1e6:.0f} M parameters, {run['dtype']}"
                 f"{', 4-bit' if args.load_in_4bit else ''}, {trained}",
        "device": f"{device}; backend {args.backend}, since {args.why}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "questions": f"{args.dataset}: {len(train)} to train on, {len(run['test'])} held out",
        "steps": f"{args.max_steps} x {a_step // args.num_generations} questions x "
                 f"{args.num_generations} completions{warm}",
        "tokens": f"about {prompt:.0f} a prompt, at most {args.max_completion_length} a completion "
                  f"and {args.max_steps * a_step * args.max_completion_length:,} in all",
        "rewards": " + ".join(f"{w:g} {n}" for n, w in zip(args.reward_funcs, args.reward_weights)),
        "output": str(run_dir),
        "memory": f"about {sum(memory.values()):.1f} GB: " + ", ".join(
            f"{name} {size:.1f}" for name, size in memory.items()),
        "time": "the progress line says after the first step" if has_gpu() else
                f"about {minutes:.0f} minutes on this machine",
    }
    print("\n".join(f"{name + ':':<11}{text}" for name, text in lines.items()), flush=True)


# ---- The run's directory -------------------------------------------------------------------------
def choose_run_dir(args) -> Path:
    """A fresh directory; with --resume the newest of that name that holds a checkpoint."""
    wanted = Path(args.output_dir or f"outputs/{args.recipe}")
    if args.resume:
        runs = [wanted] if args.output_dir else list(wanted.parent.glob(f"{wanted.name}*"))
        runs = [run for run in runs if any(run.glob(CHECKPOINTS))]
        return max(runs, key=lambda run: run.stat().st_mtime) if runs else stop(
            f"no checkpoint in {wanted}; start without --resume")
    number, path = 1, wanted
    while path.is_dir() and any(path.iterdir()):
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    return path


def make_run_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / ".writable").touch()
        (run_dir / ".writable").unlink(missing_ok=True)
    except OSError as problem:
        stop(f"--output-dir {run_dir} can't be written ({problem.strerror}); name another")


def newest_checkpoint(args, run_dir: Path) -> Path:
    """Where --resume goes on; stops if an option that matters differs from then."""
    before, now = json.loads((run_dir / "args.json").read_text())["options"], record(args)
    differ = [name for name in now if name not in FREE_ON_RESUME and now[name] != before.get(name)]
    if differ:
        changes = ", ".join(f"{name} was {before.get(name)}, now {now[name]}" for name in differ)
        stop(f"--resume of {run_dir} with other options: {changes}")
    done, newest = max((int(path.parent.name.partition("-")[2]), path.parent)
                       for path in run_dir.glob(CHECKPOINTS))
    if done >= args.max_steps:
        stop(f"{run_dir} has done its {done} steps; give a higher --max-steps")
    return newest


def write_record(args, run: dict, directory: Path) -> None:
    """args.json: what reproduces the run, and what infer.py needs to prompt alike."""
    git = ["git", "-C", str(Path(models.__file__).parent), "rev-parse", "HEAD"]
    with suppress(OSError):
        run["git"] = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    content = {
        "recipe": args.recipe, "seed": args.seed, "base_model": run["base"], "dtype": run["dtype"],
        "format": args.format, "shots": run["shots"], "chat_template": args.chat_template,
        "max_completion_length": args.max_completion_length, "options": record(args),
        "versions": {"python": sys.version.split()[0]} | versions(), "git": run.get("git"),
    }
    (directory / "args.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


# ---- Training ------------------------------------------------------------------------------------
def load_policy(args, run: dict):
    """The model to train: the base with a fresh LoRA adapter, or all of its weights."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import set_seed

    set_seed(args.seed)  # before the adapter is made: its A matrices are random
    if args.backend == "unsloth":
        return load_unsloth(args, run)
    model = load_model(run["load_from"], run["dtype"], args.load_in_4bit, args.attn_implementation)
    if args.full_finetune:
        return model
    if args.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
                      target_modules=args.lora_targets, task_type="CAUSAL_LM")
    try:
        return cpu.autocast_adapter(get_peft_model(model, lora))
    except ValueError as problem:
        stop(f"--lora-targets {' '.join(args.lora_targets)}: {problem}")


def load_unsloth(args, run: dict):
    """The same through Unsloth; with vLLM in the same memory, its engine writes the rollouts."""
    import torch
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=run["load_from"], dtype=getattr(torch, run["dtype"]), random_state=args.seed,
        max_seq_length=args.max_prompt_length + args.max_completion_length,
        load_in_4bit=args.load_in_4bit, load_in_16bit=not args.load_in_4bit,
        fast_inference=args.vllm == "colocate", max_lora_rank=args.lora_rank,
        gpu_memory_utilization=args.gpu_memory_utilization)
    if tokenizer.pad_token in run["tokenizer"].get_vocab():
        # Unsloth finds padding by its id: where that also ends a turn, the ends would be dropped.
        run["tokenizer"].pad_token = tokenizer.pad_token
    model = FastLanguageModel.get_peft_model(
        model, r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
        target_modules=args.lora_targets, random_state=args.seed,
        use_gradient_checkpointing="unsloth" if args.gradient_checkpointing else False)
    if args.vllm == "colocate":  # the first rollout wakes it; until then its memory is needed
        model.vllm_engine.sleep(1)
    return model


def measure(stage: str, args, run: dict, model, run_dir: Path) -> None:
    """Evaluate on the held-out questions into evaluation_STAGE.jsonl, or read what is there."""
    from evaluate import evaluate
    from report import read_jsonl

    path = run_dir / f"evaluation_{stage}.jsonl"
    if not run["test"] or not is_main_process():
        return
    if stage == "after" or not path.is_file():
        evaluate(model, run["tokenizer"], run["test"], args.format, path=path,
                 max_tokens=args.max_completion_length, label=f"evaluating {STAGES[stage]}")
    run["stages"][STAGES[stage]] = read_jsonl(path)


def gather(args, run: dict, model):
    """The model in one piece: where FSDP trained it, each process holds a part of every weight."""
    if not sharded():
        return model
    from report import put_back, trainable_weights

    weights, model = trainable_weights(model), load_policy(args, run)
    put_back(model, weights)
    return model


def warm_start(args, run: dict, model, run_dir: Path):
    """Supervised steps on worked solutions in the recipe's format, on the adapter that returns."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    rows = [row for row in run["train"] if row["solution"]][: args.warm_start * WARM_START_BATCH]
    examples = [{"prompt": row["prompt"], "completion": [
        {"role": "assistant", "content": rendered(row, args.format)}]} for row in rows]
    same = ("use_cpu", "bf16", "fp16", "gradient_checkpointing", "seed",
            "optim", "weight_decay", "max_grad_norm")  # Unsloth's defaults differ
    config = SFTConfig(
        output_dir=str(run_dir), max_steps=args.warm_start, max_length=None, save_strategy="no",
        per_device_train_batch_size=WARM_START_BATCH, gradient_accumulation_steps=1,
        learning_rate=args.warm_start_learning_rate, lr_scheduler_type="linear", warmup_steps=0,
        report_to="none", logging_strategy="no",
        disable_tqdm=False, **{name: getattr(run["config"], name) for name in same})
    print(f"warm start: {args.warm_start} supervised steps", flush=True)
    trainer = SFTTrainer(model=model, args=config, processing_class=run["tokenizer"],
                         train_dataset=Dataset.from_list(examples))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return gather(args, run, model)


def sample_before_training(args, run: dict, model) -> None:
    """Look at a few rollouts first: where no reward differs, GRPO has nothing to learn from."""
    from report import call_reward, show_samples

    rows = [row for row in run["train"][:2] for _ in range(8)]
    prompts = [row["prompt"] for row in rows]
    completions = complete(model, run["tokenizer"], prompts, temperature=args.temperature,
                           max_tokens=args.max_completion_length)
    texts = [completion.text for completion in completions]
    values = {func.__name__: call_reward(func, rows, texts) for func in run["reward_funcs"]}
    if is_main_process():
        show_samples(rows, completions, values, args.reward_weights, args.format)
    if all(len(set(column)) == 1 for column in values.values()):
        advice = (f"no reward differs among {len(rows)} rollouts, so there is nothing to learn: "
                  "try --warm-start 12, --few-shot 2, another --format or easier questions")
        stop(advice) if args.strict_start else print(f"watch: {advice}", flush=True)


def train(args, run: dict, model, run_dir: Path, checkpoint: Path | None):
    """GRPO. Returns the trained model, and the RunWatch that saw it."""
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOTrainer

    from evaluate import validate
    from report import RunWatch

    score = lambda: validate(model, run["tokenizer"], run["validation"], args)  # noqa: E731
    watch = RunWatch(run_dir, run["journal"], score, args.eval_steps)
    rows = [{c: row[c] for c in ("prompt", "question", "answer")} for row in run["train"]]
    trainer = GRPOTrainer(
        model=model, args=grpo_config(args, run["dtype"], str(run_dir)), callbacks=[watch],
        reward_funcs=run["reward_funcs"], processing_class=run["tokenizer"],
        train_dataset=Dataset.from_list(rows))
    trainer.remove_callback(PrinterCallback)
    trainer.create_model_card = lambda *_, **__: None  # its text knows nothing of this run
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError:
        out_of_memory("training step", args)
    return gather(args, run, model), watch


def save(args, run: dict, model, run_dir: Path) -> Path:
    """The adapter (or the whole model), its tokenizer and args.json, ready for infer.py."""
    from report import write_html

    write_html(run_dir, args.format)
    directory = run_dir / ("final_model" if args.full_finetune else "grpo_saved_lora")
    if args.full_finetune:
        model.save_pretrained(str(directory))
    else:
        if not any(p.any() for name, p in model.named_parameters() if "lora_B" in name):
            stop("the adapter changes nothing: no reward ever differed, so nothing was learnt; "
                 "see completions.html, and try --warm-start 12 or easier questions")
        model.peft_config["default"].base_model_name_or_path = run["base"]
        if args.backend == "unsloth":
            model.save_lora(str(directory))
        else:
            model.save_pretrained(str(directory), save_embedding_layers=False)
    run["tokenizer"].save_pretrained(str(directory))
    write_record(args, run, directory)
    if not args.full_finetune:
        prompt = run["train"][0]["prompt"]
        check_adapter(model, run["tokenizer"], prompt, directory)
        if args.backend == "unsloth" and args.vllm == "colocate":
            reply = ask_fast(model, run["tokenizer"], prompt, directory, args.max_completion_length)
            print(f"through vLLM, with the saved adapter: {prompt[-1]['content']}\n{reply}")
    return directory


# ---- The end -------------------------------------------------------------------------------------
def finish(args, run: dict, directory: Path, run_dir: Path, watch) -> None:
    """Draw, and say what came of it and what to type next."""
    from evaluate import report
    from report import draw, show_one_question

    draw(run_dir, run["stages"])
    if len(run["stages"]) > 1:
        report(run["stages"], run_dir / "evaluation.json")
        show_one_question(*list(run["stages"].values())[:: len(run["stages"]) - 1])
    print("\n".join(watch.summary()))
    minutes = (time.time() - run["begun"]) / 60
    print(f"{minutes:.1f} minutes, peak memory {peak_memory_gb():.1f} GB. In {run_dir}: "
          f"{directory.name}/, progress.png, completions.html, metrics.jsonl, evaluation files")
    if watch.interrupted:
        start = f"accelerate launch --num_processes {processes()}" if processes() > 1 else "python"
        again = shlex.join([*args.argv, "--resume", "--output-dir", str(run_dir)])
        print(f"go on with: {start} reasoning_model_grpo.py {again}")
    question = (run["test"] or run["train"])[0]["question"].replace('"', "'")
    flag = "--model" if args.full_finetune else "--adapter"
    print(f'ask it:     python infer.py {flag} {directory} "{question}"')


def evaluate_only(args) -> None:
    """Measure a base model, an adapter or a merged model, with the prompt it was trained with."""
    from evaluate import evaluate, report

    model = args.model if args.model_named or not args.adapter else None
    trained = find_trained(model, args.adapter, args.model_named)
    for option in ("format", "chat_template", "max_completion_length", "dtype", "load_in_4bit"):
        if not {option, f"no_{option}"} & set(args.typed):  # as trained, unless told otherwise
            value = trained.run.get("options", {}).get(option, getattr(args, option))
            setattr(args, option, value)
    tokenizer = load_tokenizer(trained.load_from, args.chat_template)
    _, test = load_questions(args)
    test = test if args.eval_questions == "all" else test[: args.eval_questions]
    rows = add_prompts(test, trained.run.get("shots", []), args, tokenizer, "held-out")
    run_dir = choose_run_dir(args)
    make_run_dir(run_dir)
    model = load_trained(trained, choose_dtype(args.dtype), args.load_in_4bit,
                         args.attn_implementation)
    results = evaluate(model, tokenizer, rows, args.format, samples=args.samples,
                       label=trained.name, max_tokens=args.max_completion_length or 256,
                       path=run_dir / "evaluation.jsonl",
                       temperature=args.temperature if args.samples > 1 else 0.0)
    report({str(args.adapter or trained.name): results}, run_dir / "evaluation.json")
    print(f"in {run_dir}: evaluation.json and evaluation.jsonl")


def main(argv: list[str] | None = None) -> None:
    args = parse_options(argv, __doc__)
    if args.check_env:
        raise SystemExit(check_env(args))
    if not (args.evaluate_only or args.adapter):
        start_backend(args)
    quiet_libraries()
    if args.evaluate_only:
        return evaluate_only(args)
    if args.adapter:
        return export(args, args.adapter) if is_main_process() else None
    begun, run_dir = time.time(), choose_run_dir(args)
    from accelerate import PartialState

    # One process downloads, the others find it; later they wait while it evaluates, maybe hours.
    with PartialState(cpu=not has_gpu(), timeout=timedelta(hours=12)).main_process_first():
        run = prepare(args) | {"begun": begun}
    checkpoint = newest_checkpoint(args, run_dir) if args.resume else None
    show_plan(args, run, run_dir)
    if args.dry_run:
        return show_prompt(run)
    make_run_dir(run_dir)
    write_record(args, run, run_dir)
    model = load_policy(args, run)
    measure("before", args, run, model, run_dir)
    if args.warm_start:
        if not checkpoint:
            model = warm_start(args, run, model, run_dir)
        measure("warm_start", args, run, model, run_dir)  # a resumed run reads what is there
    if has_gpu() and not sharded():  # this model is whole, and would need more than training does
        rehearse(args, run, model)
    if not checkpoint:
        sample_before_training(args, run, model)
    model, watch = train(args, run, model, run_dir, checkpoint)
    if is_main_process():
        directory = save(args, run, model, run_dir)  # first: nothing after it can cost the adapter
        if not watch.interrupted:
            measure("after", args, run, model, run_dir)
        finish(args, run, directory, run_dir, watch)
        if args.export:
            export(args, directory)


def show_prompt(run: dict) -> None:
    row = run["train"][0]
    (text,) = render_prompts(run["tokenizer"], [row["prompt"]])
    print(f"\nthe first prompt, {row['tokens']} tokens:\n{text}\n[gold: {row['answer']}]")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        os.write(2, b"\nstopped; nothing was saved since the last line above\n")
        raise SystemExit(130) from None
