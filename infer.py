"""Ask a trained model: its reasoning, then its answer.

    python infer.py "Anna has 3 boxes with 4 pens each. How many pens does she have?"
    python infer.py --adapter outputs/smollm2-135m/grpo_saved_lora "..."
    python infer.py --file questions.txt --json > answers.jsonl
    cat questions.txt | python infer.py

Takes the newest adapter under outputs/ unless told otherwise, and prompts it as it was trained.
Greedy by default. It answers through transformers + PEFT; it does not serve, and does not stream.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

from models import (
    build_prompt, choose_dtype, complete, find_trained, load_tokenizer, load_trained,
    quiet_libraries, stop,
)
from options import OneLineParser, number
from rewards import FORMATS, answer_block


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("question", nargs="?", help="left out: questions from --file or standard input")
    add("--file", type=Path, help=".txt (one a line), .jsonl or .csv (column question)")
    add("--adapter", type=Path, metavar="DIR", help="default: the newest under outputs/")
    add("--model", help="without --adapter: a base or fully trained model; with it: its base")
    add("--max-tokens", type=number(int, 1), help="default: as in training")
    add("--temperature", type=number(float, 0), default=0.0, help="0 = greedy")
    add("--top-p", type=number(float, 0, inclusive=False), default=1.0)
    add("--seed", type=number(int, 0), default=0)
    add("--batch-size", type=number(int, 1), default=32)
    add("--json", action="store_true", help="one JSON object a question")
    return parser


def newest_adapter() -> Path:
    found = list(Path("outputs").glob("**/adapter_config.json"))
    found = [path for path in found if not path.parent.name.startswith("checkpoint-")]
    if not found:
        stop("no adapter under outputs/ yet: train one with `python reasoning_model_grpo.py`, or "
             "name one with --adapter DIR or --model NAME")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def read_questions(args) -> list[str]:
    if args.question is not None:
        lines = [args.question]
    elif args.file is None:
        if sys.stdin.isatty():
            stop('no question: python infer.py "How many ...?", or --file, or standard input')
        lines = sys.stdin.read().splitlines()
    elif not args.file.is_file():
        stop(f"no file {args.file}")
    elif args.file.suffix == ".jsonl":
        with args.file.open(encoding="utf-8") as file:
            lines = [question_of(text, i, args.file) for i, text in enumerate(file, 1)
                     if text.strip()]
    elif args.file.suffix == ".csv":
        with args.file.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if "question" not in (reader.fieldnames or []):
                stop(f"{args.file} has no column question; it has {reader.fieldnames}")
            lines = [row["question"] for row in reader]
    else:
        lines = args.file.read_text(encoding="utf-8").splitlines()
    questions = [line.strip() for line in lines if line and line.strip()]
    return questions or stop("the question is empty")


def question_of(line: str, number: int, path: Path) -> str:
    try:
        return str(json.loads(line)["question"])
    except (ValueError, KeyError, TypeError):
        stop(f"{path}, line {number}: no JSON object with a question")


def show(question: str, completion, fmt: str, as_json: bool, many: bool) -> None:
    answer = answer_block(completion.text, fmt)
    reasoning_open, reasoning_close = FORMATS[fmt].tags[:2]
    reasoning = completion.text.partition(reasoning_open)[2].partition(reasoning_close)[0].strip()
    if as_json:
        row = {"question": question, "reasoning": reasoning or completion.text, "answer": answer,
               "completion": completion.text, "truncated": completion.truncated}
        return print(json.dumps(row, ensure_ascii=False), flush=True)
    if many:
        print(f"\n> {question}")
    print(reasoning or completion.text.strip())
    cut = " (cut off: raise --max-tokens)" if completion.truncated else ""
    print(f"answer: {answer if answer is not None else 'none in the format'}{cut}", flush=True)


def check_lengths(questions, prompts, tokenizer, load_from: str, room: int) -> None:
    from transformers import AutoConfig

    limit = getattr(AutoConfig.from_pretrained(load_from), "max_position_embeddings", None)
    for question, prompt in zip(questions, prompts):
        tokens = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
        if limit and tokens + room > limit:
            stop(f"too long: {tokens} tokens and --max-tokens {room} exceed the model's {limit}: "
                 f"{question[:60]}...")


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    questions = read_questions(args)
    quiet_libraries()
    alone = args.model and not args.adapter
    trained = find_trained(args.model, None if alone else args.adapter or newest_adapter())
    run = trained.run
    tokenizer = load_tokenizer(trained.load_from, run.get("chat_template", "own"))
    fmt, room = run.get("format", "xml"), args.max_tokens or run.get("max_completion_length", 512)
    prompts = [build_prompt(question, fmt, run.get("shots", [])) for question in questions]
    check_lengths(questions, prompts, tokenizer, trained.load_from, room)
    model = load_trained(trained, choose_dtype(run.get("dtype", "auto")),
                         run.get("options", {}).get("load_in_4bit", False))
    name = f"adapter {trained.adapter} on {trained.name}" if trained.adapter else trained.name
    asked = "" if run else "; no args.json beside it, so asked in the xml format"
    print(f"{name}, transformers on {model.device.type}{asked}", file=sys.stderr, flush=True)
    from transformers import set_seed

    set_seed(args.seed)
    for start in range(0, len(prompts), args.batch_size):  # shown as they come
        part = slice(start, start + args.batch_size)
        done = complete(model, tokenizer, prompts[part], max_tokens=room, top_p=args.top_p,
                        temperature=args.temperature, batch_size=args.batch_size)
        for question, completion in zip(questions[part], done):
            show(question, completion, fmt, args.json, len(questions) > 1)


if __name__ == "__main__":
    main()
