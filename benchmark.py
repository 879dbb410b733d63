"""How fast infer.py answers, beside plain transformers: one table, measured in one run.

    python benchmark.py                # the newest adapter under outputs/, 64 questions
    python benchmark.py --model DIR --questions 16

First answer: seconds from the command to its end for one question, the median of three after one
that is not counted (it merges the adapter, once); the bare minimum imports torch and transformers
and loads the weights. The pipeline is transformers' own, as one would first try.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
from pathlib import Path

import infer
from engines import Sampling, load_engine
from models import build_prompt, choose_dtype, find_trained, load_tokenizer, quiet_libraries
from options import OneLineParser, number
from questions import generate_questions

BARE = "import torch, transformers as t; t.AutoModelForCausalLM.from_pretrained({!r}, dtype={!r})"


def seconds(command: list[str]) -> float:
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="default: the newest")
    parser.add_argument("--model", help="instead: a model without an adapter")
    parser.add_argument("--questions", type=number(int, 2), default=64)
    parser.add_argument("--max-tokens", type=number(int, 1), default=64)
    args = parser.parse_args(argv)
    quiet_libraries()
    from rich.console import Console
    from rich.table import Table
    from transformers import pipeline

    adapter = None if args.model else args.adapter or infer.newest_adapter()
    trained = find_trained(args.model, adapter)
    tokenizer, dtype = load_tokenizer(trained.load_from), choose_dtype("auto")
    asked = [q["question"] for q in generate_questions(args.questions, split="test")]
    prompts = [build_prompt(question, "xml") for question in asked]
    which = ["--model", args.model] if args.model else ["--adapter", str(adapter)]
    table = Table(title=f"{trained.name}, {dtype}, at most {args.max_tokens} tokens an answer")
    for column in ("", "first answer, s", "1 question, tokens/s", f"{args.questions}, tokens/s"):
        table.add_column(column, justify="right")

    def say(what: str) -> None:
        print(f"measuring {what}", file=sys.stderr, flush=True)

    def row(name: str, first: float, generate) -> None:
        cells = [f"{first:.1f}" if first else ""]
        for some in (prompts[:1], prompts):
            begun, tokens = time.perf_counter(), generate(some)
            cells.append(f"{tokens / (time.perf_counter() - begun):.0f}")
        table.add_row(name, *cells)

    say("the bare minimum")
    bare = seconds([sys.executable, "-c", BARE.format(trained.load_from, dtype)])
    table.add_row("bare minimum", f"{bare:.1f}")
    say("transformers.pipeline")
    pipe = pipeline("text-generation", model=trained.load_from, tokenizer=tokenizer, dtype=dtype)
    settings = {"max_new_tokens": args.max_tokens, "do_sample": False, "return_full_text": False}
    row("transformers.pipeline", 0, lambda some: sum(
        len(tokenizer(reply[0]["generated_text"]).input_ids) for reply in pipe(some, **settings)))
    sampling = Sampling(args.max_tokens)
    for name in ("transformers", "vllm", "unsloth"):
        if name != "transformers" and not importlib.util.find_spec(name):
            print(f"{name} is not installed here, so it has no row", file=sys.stderr)
            continue
        say(f"--engine {name}")
        first = seconds([sys.executable, infer.__file__, asked[0], *which, "--engine", name,
                         "--max-tokens", str(args.max_tokens)])
        engine = load_engine(name, trained, tokenizer, dtype=dtype, load_in_4bit=False, many=True,
                             room=1024, compare=False)
        row(name, first, lambda some, engine=engine: sum(
            one.tokens for one in engine.generate(some, sampling)))
    Console().print(table)


if __name__ == "__main__":
    main()
