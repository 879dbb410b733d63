"""Ask a trained model: its reasoning, then its answer.

    python infer.py "Anna has 3 boxes with 4 pens each. How many pens does she have?"
    python infer.py --samples 8 "..."                       # majority vote of 8 samples
    python infer.py --file questions.txt --jsonl answers.jsonl [--resume]
    cat questions.txt | python infer.py --json
    python infer.py --chat

Takes the newest adapter under outputs/ unless told otherwise, and prompts it as it was trained.
Greedy by default. --serve PORT prints the command of vLLM's own OpenAI-compatible server.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from engines import Sampling, load_engine, lora_rank
from evaluate import vote
from models import (
    build_prompt, choose_dtype, find_trained, load_tokenizer, quiet_libraries, stop,
)
from options import OneLineParser, number
from questions import read_lines
from rewards import FORMATS, answer_block

CHUNK = 64  # questions answered before they are shown and written


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("question", nargs="?", help="left out: questions from --file or standard input")
    add("--file", type=Path, help=".txt (one a line), .jsonl or .csv (column question)")
    add("--skip-bad", action="store_true", help="pass over the bad lines of --file, aloud")
    add("--adapter", type=Path, metavar="DIR", help="default: the newest under outputs/")
    add("--model", help="without --adapter: a base or fully trained model; with it: its base")
    add("--engine", choices=("auto", "unsloth", "vllm", "transformers"), default="auto")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="default: as trained")
    add("--max-tokens", type=number(int, 1), help="default: as in training")
    add("--temperature", type=number(float, 0), help="default: 0 = greedy; 0.8 with --samples")
    add("--top-p", type=number(float, 0, inclusive=False), default=1.0)
    add("--seed", type=number(int, 0), default=0)
    add("--samples", type=number(int, 1), default=1, metavar="K", help="K draws, majority vote")
    add("--compare", action="store_true", help="also without the adapter")
    add("--chat", action="store_true", help="ask one after the other: /samples N /reset /quit")
    add("--serve", type=number(int, 1), metavar="PORT", help="print the server's command")
    add("--json", action="store_true", help="one JSON object a question")
    add("--jsonl", type=Path, metavar="FILE", help="the same into a file, as they come")
    add("--resume", action="store_true", help="go on with what --jsonl FILE already holds")
    return parser


def check(args) -> None:
    """Stop at what can't work, before anything heavy is imported."""
    if args.resume and not args.jsonl:
        stop("--resume goes with --jsonl FILE, whose answers it goes on with")
    if args.jsonl and args.jsonl.exists() and not args.resume:
        stop(f"{args.jsonl} exists: --resume goes on with it, or name another file")
    if args.samples > 1 and args.temperature == 0:
        stop("--samples of --temperature 0 would all be the same; leave out --temperature")
    if args.chat and args.engine in ("vllm", "unsloth"):
        stop("--chat streams through transformers; leave out --engine")
    if args.compare and args.model and not args.adapter:
        stop("--compare needs an adapter; --model alone has none")
    if args.temperature is None:
        args.temperature = 0.8 if args.samples > 1 else 0.0


def newest_adapter() -> Path:
    found = list(Path("outputs").glob("**/adapter_config.json"))
    found = [path for path in found if not path.parent.name.startswith("checkpoint-")]
    if not found:
        stop("no adapter under outputs/ yet: train one with `python reasoning_model_grpo.py`, or "
             "name one with --adapter DIR or --model NAME")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def read_questions(args) -> list[str]:
    """The questions, stripped; a bad line ends the run or, with --skip-bad, is passed over."""
    if args.question is not None:
        return [args.question.strip() or stop("the question is empty")]
    if args.file is None and sys.stdin.isatty():
        stop('no question: python infer.py "How many ...?", or --file, or standard input')
    try:
        lines = list(read_lines(args.file)) if args.file else [
            (i, {"question": line}) for i, line in enumerate(sys.stdin, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as problem:
        stop(f"{args.file} can't be read: {problem}")
    questions = []
    for i, row in lines:
        question = str(isinstance(row, dict) and row.get("question") or "").strip()
        problem = f"{args.file}, line {i}: no question in {str(row)[:80]}"
        if question:
            questions.append(question)
        elif args.skip_bad:
            print(f"skipped: {problem}", file=sys.stderr)
        else:
            stop(f"{problem}; --skip-bad passes over such lines")
    return questions or stop("the question is empty")


def answered(args, questions: list[str]) -> int:
    """How many questions FILE of --jsonl answers already; a line cut short by a break is redone."""
    if not args.resume or not args.jsonl.is_file():
        return 0
    *whole, rest = args.jsonl.read_text(encoding="utf-8").split("\n")
    try:
        same = [json.loads(line)["question"] for line in whole] == questions[: len(whole)]
    except (ValueError, KeyError, TypeError):  # no lines of ours
        same = False
    if not same:
        stop(f"{args.jsonl} answers other questions; name another file")
    if rest:
        args.jsonl.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
    print(f"{len(whole)} of {len(questions)} are answered already", file=sys.stderr)
    return len(whole)


def ask(engine, prompts: list, sampling: Sampling, samples: int, fmt: str, **how) -> list[dict]:
    """A row for each prompt: its completion, or the one that the vote of its samples chose."""
    completions = engine.generate([p for p in prompts for _ in range(samples)], sampling, **how)
    rows = []
    for start in range(0, len(completions), samples):
        mine = completions[start : start + samples]
        chosen, count = vote([one.text for one in mine], fmt)
        best = next((one for one in mine if chosen and vote([one.text], fmt)[0] == chosen), mine[0])
        opening, closing = FORMATS[fmt].tags[:2]
        reasoning = best.text.partition(opening)[2].partition(closing)[0].strip()
        row = {"reasoning": reasoning or best.text.strip(), "answer": answer_block(best.text, fmt),
               "completion": best.text, "truncated": best.truncated}
        rows.append(row | ({"votes": count, "samples": samples} if samples > 1 else {}))
    return rows


def show(row: dict, many: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    if many:
        print(f"\n> {row['question']}")
    if "without_adapter" not in row:
        return print(f"{row['reasoning']}\n{answer_line(row)}", flush=True)
    sides, table = (row, row["without_adapter"]), Table("with the adapter", "without it")
    table.add_row(*(side["reasoning"] for side in sides))
    table.add_row(*map(answer_line, sides))
    Console(markup=False).print(table)


def answer_line(row: dict) -> str:
    answer = "none in the format" if row["answer"] is None else row["answer"]
    votes = f" ({row['votes']} of {row['samples']})" if "votes" in row else ""
    return f"answer: {answer}{votes}" + " (cut off: raise --max-tokens)" * row["truncated"]


def check_lengths(questions, prompts, tokenizer, load_from: str, room: int) -> int:
    """Tokens that the longest prompt and its completion take; stops where the model has fewer."""
    from transformers import AutoConfig

    limit, longest = getattr(AutoConfig.from_pretrained(load_from), "max_position_embeddings", 0), 0
    for question, prompt in zip(questions, prompts):
        tokens = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
        if limit and tokens + room > limit:
            stop(f"too long: {tokens} tokens and --max-tokens {room} exceed the model's {limit}: "
                 f"{question[:60]}...")
        longest = max(longest, tokens + room)
    return longest


def answer_all(args, questions, prompts, engine, sampling, fmt: str) -> None:
    """Answer in chunks; shown and written as they come, so that a broken run keeps what it had."""
    from rich.console import Console
    from rich.progress import track

    many, file = len(questions) > 1, None
    if args.jsonl:
        file = args.jsonl.open("a", encoding="utf-8")
    chunks = track(range(0, len(prompts), CHUNK), "answering", console=Console(stderr=True),
                   disable=not (many and (args.jsonl or args.json)), transient=True)  # fmt: skip
    for start in chunks:
        part = slice(start, start + CHUNK)
        rows = ask(engine, prompts[part], sampling, args.samples, fmt)
        if args.compare:
            plain = ask(engine, prompts[part], sampling, args.samples, fmt, adapter=False)
            rows = [row | {"without_adapter": other} for row, other in zip(rows, plain)]
        for question, row in zip(questions[part], rows):
            row = {"question": question} | row
            if file or args.json:
                print(json.dumps(row, ensure_ascii=False), file=file, flush=True)
            else:
                show(row, many)
    if file:
        file.close()
        print(f"in {args.jsonl}", file=sys.stderr)


def chat(engine, tokenizer, trained, sampling: Sampling, samples: int, fmt: str) -> None:
    """Questions one after the other: the reasoning streams, dimmed, then the answer in bold."""
    from rich.console import Console
    from rich.text import Text
    from transformers import TextStreamer

    class Dim(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            console.print(Text(text, style="dim"), end="\n" if stream_end else "")

    console, turns = Console(), []
    console.print("a question, or /samples N, /reset, /quit", style="dim")
    while True:
        try:
            line = console.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            return
        command, _, value = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            turns = []
        elif command == "/samples" and value.isdigit() and int(value):
            samples = int(value)
            sampling = sampling._replace(temperature=0.8 if samples > 1 else 0.0)
        elif line.startswith("/"):
            console.print("/samples N, /reset or /quit", style="dim")
        elif line:
            prompt = build_prompt(line, fmt, trained.run.get("shots", []))
            prompt[-1:-1] = turns  # after the system prompt and the worked examples
            streamer = Dim(tokenizer, skip_prompt=True, skip_special_tokens=True)
            how = {"streamer": streamer} if samples == 1 else {}
            (row,) = ask(engine, [prompt], sampling, samples, fmt, **how)
            turns += [prompt[-1], {"role": "assistant", "content": row["completion"]}]
            console.print(Text(answer_line(row), style="bold"))


def serve_command(port: int, trained) -> str:
    command = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", trained.load_from,
               "--port", str(port)]  # fmt: skip
    if trained.adapter:
        command += ["--enable-lora", "--max-lora-rank", str(lora_rank(trained.adapter)),
                    "--lora-modules", f"reasoning={trained.adapter}"]
    return shlex.join(command)


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check(args)
    questions = [] if args.chat or args.serve else read_questions(args)
    done = answered(args, questions)
    if questions and done == len(questions):
        return
    alone = args.model and not args.adapter
    adapter = None if alone else args.adapter or newest_adapter()
    quiet_libraries()
    trained = find_trained(args.model, adapter)
    if args.serve:
        return print(serve_command(args.serve, trained))
    run, questions = trained.run, questions[done:]
    tokenizer = load_tokenizer(trained.load_from, run.get("chat_template", "own"))
    fmt, room = run.get("format", "xml"), args.max_tokens or run.get("max_completion_length", 512)
    prompts = [build_prompt(question, fmt, run.get("shots", [])) for question in questions]
    longest = check_lengths(questions, prompts, tokenizer, trained.load_from, room)
    import torch  # its own seed: transformers' set_seed imports peft, which takes seconds

    torch.manual_seed(args.seed)
    engine = load_engine(
        "transformers" if args.chat else args.engine, trained, tokenizer,
        dtype=choose_dtype(args.dtype or run.get("dtype", "auto")), room=longest,
        load_in_4bit=run.get("options", {}).get("load_in_4bit", False),
        many=len(questions) * args.samples > 1, compare=args.compare)
    sampling = Sampling(room, args.temperature, args.top_p, args.seed)
    if args.chat:
        return chat(engine, tokenizer, trained, sampling, args.samples, fmt)
    answer_all(args, questions, prompts, engine, sampling, fmt)


if __name__ == "__main__":
    main()
