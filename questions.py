"""The questions: from the Hub, a file, reasoning-gym, or generated here; checked, with prompts.

    >>> generate_questions(1, seed=1)[0]["answer"].splitlines()[-1]
    '#### 12'

A question is {"question", "answer" (the gold number), "solution" (worked, or None)}; with its
conversation it is a row {..., "prompt", "tokens"}.
"""

import csv
import json
import random
import re
import zlib
from pathlib import Path

import rewards
from models import build_prompt, hub_reachable, render_prompts, stop
from options import GSM8K


# ---- Questions -----------------------------------------------------------------------------------
def load_questions(args) -> tuple[list[dict], list[dict]]:
    """The training questions and the held-out ones."""
    if args.dataset == GSM8K and not args.dataset_named and not hub_rows(args, "train", False):
        print(f"questions: generated word problems, since the Hub can't be reached for {GSM8K}")
        args.dataset = "generated"
    name = args.dataset
    if name == "generated":
        train = generate_questions(args.max_examples or 2000, args.seed)
        test = generate_questions(1000, args.seed, "test")
    elif name.startswith("reasoning-gym:"):
        train, test = reasoning_gym_rows(name.partition(":")[2], args)
    elif Path(name).suffix in (".jsonl", ".json", ".csv", ".parquet"):
        train, test = read_rows(Path(name)), []
    else:
        train, test = hub_rows(args, "train", True), hub_rows(args, "test", False)
    test = read_rows(Path(args.eval_dataset)) if args.eval_dataset else test
    train, test = (to_questions(rows, args, name) for rows in (train, test))
    if not test:  # never trained on
        random.Random(args.seed).shuffle(train)
        cut = max(1, len(train) // 10)
        train, test = train[cut:], train[:cut]
    return train[: args.max_examples], test


def hub_rows(args, split: str, needed: bool) -> list[dict]:
    """The rows of a Hub data set's split. Where it can't be had: none, or the end if needed."""
    reachable = hub_reachable()  # decides whether its libraries try the network
    from datasets import load_dataset

    config = args.dataset_config or ("main" if args.dataset == GSM8K else None)
    try:
        return list(load_dataset(args.dataset, config, split=split))
    except Exception as problem:  # datasets raises many kinds for one thing: it can't be had
        if not needed:
            return []
        why = str(problem).splitlines()[0] if reachable else "the Hub can't be reached"
        stop(f"no data set {args.dataset} to be had ({why}): check the spelling, --dataset-config "
             "and `hf auth login`, or give a file, or `generated`")


def read_rows(path: Path) -> list[dict]:
    """The rows of a local file; stops where it is missing, empty or malformed, at which line."""
    if not path.is_file():
        stop(f"no file {path}")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            lines = list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
        elif path.suffix == ".json":
            lines = list(enumerate(json.loads(path.read_text(encoding="utf-8")), 1))
        else:
            lines = list(read_lines(path))
    except (ValueError, TypeError, OSError) as problem:
        stop(f"{path} is malformed: {problem}")
    for number, row in lines:
        if not isinstance(row, dict):
            stop(f"{path}, line {number} is malformed: {row}")
    return [row for _, row in lines] or stop(f"{path} holds no rows: give one object a question")


def read_lines(path: Path):
    """Yield (line number, row, or what is wrong with it) of a .jsonl, .csv or .txt (a question)."""
    with path.open(newline="", encoding="utf-8") as file:  # splitlines() would also split at U+2028
        reader = csv.DictReader(file, strict=True) if path.suffix == ".csv" else ()
        try:
            yield from ((reader.line_num, row) for row in reader)
        except csv.Error as problem:
            yield reader.line_num, problem
            return
        for i, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield i, json.loads(line) if path.suffix == ".jsonl" else {"question": line}
            except ValueError as problem:
                yield i, problem


def reasoning_gym_rows(task: str, args) -> tuple[list[dict], list[dict]]:
    try:
        import reasoning_gym
    except ImportError:
        stop("reasoning-gym is not installed: pip install reasoning-gym (needs a C compiler)")
    try:
        n = args.max_examples or 2000
        items = list(reasoning_gym.create_dataset(task, size=n + n // 10, seed=args.seed))
    except ValueError as problem:
        stop(f"reasoning-gym has no task {task!r}: {problem}")
    rows = [{args.question_column: item["question"],
             args.answer_column: item["metadata"].get("answer_cot") or str(item["answer"])}
            for item in items]
    return rows[:n], rows[n:]


def to_questions(rows: list[dict], args, name: str) -> list[dict]:
    """Rows as questions; stops where a column is missing or a gold is no number."""
    questions, bad = [], []
    for row in rows:
        for column in (args.question_column, args.answer_column):
            if column not in row:
                stop(f"{name} has no column {column!r}; it has {', '.join(map(str, row))}: "
                     "name yours with --question-column and --answer-column")  # fmt: skip
        answer = str(row[args.answer_column])
        gold = rewards.extract_hash_answer(answer)
        solution = answer.rpartition("####")[0].strip() if gold is not None else ""
        gold = answer.strip() if gold is None else gold
        if rewards.parse_number(gold) is None:
            bad.append(gold)
        solution = re.sub(r"<<[^<>]*>>", "", solution)  # GSM8K's calculator marks
        questions.append({"question": str(row[args.question_column]).strip(), "answer": gold,
                          "solution": solution or None})
    if bad:
        stop(f"{len(bad)} of {len(rows)} answers of {name} are no numbers, the first is {bad[0]!r}")
    return questions


def add_prompts(questions, shots, args, tokenizer, label: str) -> list[dict]:
    """Give each question its conversation, and drop those over --max-prompt-length, aloud."""
    if not questions:
        return []
    rows = [q | {"prompt": build_prompt(q["question"], args.format, shots)} for q in questions]
    texts = render_prompts(tokenizer, [row["prompt"] for row in rows])
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    kept = [row | {"tokens": n} for row, n in zip(rows, lengths) if n <= args.max_prompt_length]
    limit = f"longer than --max-prompt-length {args.max_prompt_length}"
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} of {len(rows)} {label} questions dropped: {limit}")
    if not kept:
        stop(f"every {label} prompt is {limit}; the shortest has {min(lengths)} tokens")
    return kept


def rendered(question: dict, fmt: str) -> str:
    return rewards.FORMATS[fmt].render(question["solution"], question["answer"])


# ---- Generated questions -------------------------------------------------------------------------
# (question, its steps from left to right). Letters a-c are numbers drawn at random. No more than
# two steps, and none that subtracts: the 135M model is hardly ever right there (18 - 9 = 17), so it
# pays to stop early, and a question that no completion of a group solves teaches nothing. Words
# like "more" go with both operations: else that word alone comes to decide.
TEMPLATES = [
    ("{name} has {a} {thing}. {name} buys {b} more. How many {thing} does {name} have now?", "a+b"),
    ("{name} has {a} {thing} and {other} has {b} {thing}. How many {thing} do they have together?",
     "a+b"),
    ("{name} made {a} {thing} and {other} made {b}. How many {thing} did they make in all?", "a+b"),
    ("There are {a} boxes with {b} {thing} in each box. How many {thing} are there in all?", "a*b"),
    ("{name} walks {a} miles every day. How many miles does {name} walk in {b} days?", "a*b"),
    ("{name} found {a} {thing}, {other} found {b} {thing}, and then they found {c} more. "
     "How many {thing} do they have?", "a+b+c"),
    ("{name} had {a} {thing}, got {b} more on Monday and {c} more on Tuesday. "
     "How many {thing} does {name} have?", "a+b+c"),
    ("{name} has {a} red, {b} blue and {c} green {thing}. How many {thing} does {name} have?",
     "a+b+c"),
    ("{name} packs {a} bags with {b} {thing} each and has {c} {thing} left over. "
     "How many {thing} did {name} start with?", "a*b+c"),
    ("{name} buys {a} {thing} for {b} dollars each and pays {c} dollars for a bag. "
     "How many dollars does {name} pay?", "a*b+c"),
    ("{name} reads {a} pages a day for {b} days and {c} pages on Sunday. How many pages is that?",
     "a*b+c"),
    ("{name} fills {a} bags with {b} {thing} each. Then {other} brings {c} more. "
     "How many {thing} do they have?", "a*b+c"),
]  # fmt: skip
HELD_OUT_TEMPLATES = [  # never trained on: a gain on these is not memory
    ("{name} catches {a} fish and {other} catches {b} fish. "
     "How many fish do they catch together?", "a+b"),
    ("A room has {a} tables with {b} chairs at each table. "
     "How many chairs are in the room?", "a*b"),
    ("{name} plants {a} rows of {b} trees. Then {c} more trees are planted. "
     "How many trees are there?", "a*b+c"),
]  # fmt: skip
NAMES = {
    "train": ["Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry"],
    "test": ["Olivia", "Peter", "Rosa", "Simon", "Tara", "Victor"],
}
THINGS = {
    "train": ["apples", "marbles", "books", "pencils", "cookies", "stamps", "shells"],
    "test": ["oranges", "coins", "cards", "buttons", "muffins"],
}
_CALCULATE = {"+": int.__add__, "*": int.__mul__}


def generate_questions(n: int, seed: int = 0, split: str = "train") -> list[dict[str, str]]:
    """Draw n different questions, each {"question", "answer"}; the answer ends in "#### gold".

    The splits share no name, no thing and no numbers in the same order, and every third "test"
    question comes from a template that is never trained on.
    """
    rng, questions = random.Random(f"{split}-{seed}"), {}
    for _ in range(100 * n):
        held_out = split == "test" and len(questions) % 3 == 2
        question, steps = rng.choice(HELD_OUT_TEMPLATES if held_out else TEMPLATES)
        # Smaller where one result goes into the next: right often enough for a group to learn from.
        largest = {"a+b": 12, "a*b": 9}.get(steps, 7)
        numbers = {letter: rng.randint(2, largest) for letter in steps[::2]}
        if (zlib.crc32(bytes(numbers.values())) % 4 == 0) != (split == "test"):
            continue  # the numbers decide which split may use them
        name, other = rng.sample(NAMES[split], 2)
        thing = rng.choice(THINGS[split])
        question = question.format(name=name, other=other, thing=thing, **numbers)
        lines, result = [], numbers[steps[0]]
        for operator, letter in zip(steps[1::2], steps[2::2]):
            left, result = result, _CALCULATE[operator](result, numbers[letter])
            lines.append(f"{left} {operator} {numbers[letter]} = {result}")
        answer = "\n".join([*lines, f"#### {result}"])
        questions[question] = {"question": question, "answer": answer}
        if len(questions) == n:
            return list(questions.values())
    raise ValueError(f"the templates do not yield {n} different questions")
