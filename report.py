"""What runs left behind, as tables, pictures and a page: one run, or several side by side.

    python report.py outputs/smollm2-135m                        # as at the end of its training
    python report.py outputs/smollm2-135m outputs/smollm2-135m-2 # one table, one picture of both
    python report.py outputs/smollm2-135m --json                 # the figures, for a program

RUN is a directory of reasoning_model_grpo.py or of `infer.py --evaluate`. A run that broke off is
shown as far as it came. It reads files only: no model, no torch. Of one run it writes progress.png,
completions.html and evaluation.json into the directory, of several one picture beside the first.
"""

import argparse
import itertools
import json
import math
import os
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple, NoReturn

STAGES = {"before": "before", "adapter": "with the adapter given", "warm_start": "after warm start",
          "after": "after GRPO"}  # evaluation_STAGE.jsonl: its name on the screen
METRICS = {"strict": "strict accuracy", "flexible": "flexible accuracy", "format": "strict format",
           "truncated": "truncated", "majority": "majority vote"}  # columns of 0 and 1
COLUMNS = {"question": str, "gold": (str, int, float), "completion": str, "tokens": int,
           "strict": int, "flexible": int, "format": int, "truncated": int}  # of every row
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999"]
LENGTH, CLIPPED = "completions/mean_length", "completions/clipped_ratio"  # TRL's names


# ---- Statistics ----------------------------------------------------------------------------------
def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927): 30 of 100 is 0.219 to 0.396."""
    z, p = 1.959964, successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # The bounds of none and all are 0 and 1 exactly, which rounding would miss by 1e-16.
    low = middle - half if successes else 0.0
    high = middle + half if successes < n else 1.0
    return low, high


def mcnemar(before: list, after: list) -> float:
    """Two-sided exact p of McNemar's test (1947): the same questions, right or wrong twice."""
    gained = sum(not b and bool(a) for b, a in zip(before, after, strict=True))
    lost = sum(bool(b) and not a for b, a in zip(before, after, strict=True))
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate that one of k samples is right, from n (Chen et al., arXiv:2107.03374)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def summarise(rows: list[dict]) -> dict:
    """Per metric {"rate", "low", "high", "count"}; beside them "n", "mean_tokens", "pass_at_k"."""
    n = len(rows)
    summary = {"n": n, "mean_tokens": round(sum(row["tokens"] for row in rows) / n, 1)}
    for metric in METRICS:
        if metric in rows[0]:
            count = sum(row[metric] for row in rows)
            low, high = wilson(count, n)
            summary[metric] = {"rate": count / n, "low": low, "high": high, "count": count}
    if "samples" in rows[0]:
        samples = len(rows[0]["samples"])
        summary["pass_at_k"] = {}
        for k in sorted({2**i for i in range(samples.bit_length())} | {samples}):
            chances = [pass_at_k(len(row["samples"]), row["right"], k) for row in rows]
            summary["pass_at_k"][k] = sum(chances) / n
    return summary


def verdict(before: list[dict], after: list[dict]) -> dict:
    """The change of strict accuracy between two evaluations of the same questions, in words too."""
    old = [row["strict"] for row in before]
    new = [row["strict"] for row in after]
    p, change = mcnemar(old, new), (sum(new) - sum(old)) / len(old)
    words = f"strict accuracy {'rose' if change > 0 else 'fell'} by {abs(100 * change):.1f} points"
    if p >= 0.05:
        words = f"no significant change of strict accuracy ({100 * change:+.1f} points)"
    return {"change": change, "p": p, "words": f"{words}, McNemar p = {p:.2g}, n = {len(old)}"}


def shared(first: list[dict], second: list[dict]) -> tuple[list[dict], list[dict]]:
    """The rows of the questions that both answered, by text and gold, in the same order."""
    waiting = defaultdict(list)  # a question may be there twice
    for row in second:
        waiting[row["question"], str(row["gold"])].append(row)
    ours, theirs = [], []
    for row in first:
        partners = waiting[row["question"], str(row["gold"])]
        if partners:
            ours.append(row)
            theirs.append(partners.pop(0))
    return ours, theirs


# ---- Reading a run's directory -------------------------------------------------------------------
class Run(NamedTuple):
    directory: Path
    name: str  # short, and no other run's
    record: dict  # args.json
    steps: list[dict]  # TRL's metrics of each GRPO step
    stages: dict[str, list[dict]]  # graded answers, in the order in which they were given


def printable(text) -> str:
    """Without control characters: a model's or a file's text must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else " " for c in str(text))


def stop(message: str) -> NoReturn:
    """End in one line that says what is wrong and what to type instead; exit code 2."""
    print(f"error: {' '.join(printable(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def warn(message: str) -> None:
    print(f"watch: {' '.join(printable(message).split())}", file=sys.stderr, flush=True)


def parse(text: bytes) -> dict | None:
    """The JSON object that a text holds, if it holds one."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file, none where it is missing; a last line that was cut off is left out."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        row = parse(line)
        if row is not None:
            rows.append(row)
        elif line and number == len(lines):
            warn(f"{path} ends in the middle of line {number}, which is left out")
        elif line:
            stop(f"{path} is damaged: line {number} is no JSON object; remove that line")
    return rows


def read_answers(path: Path) -> list[dict]:
    """Rows of graded answers, each with what the tables need."""
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        for column, kind in COLUMNS.items():
            if not isinstance(row.get(column), kind):
                stop(f"{path} is damaged: line {number} has no {column}; remove it")
    try:
        summarise(rows or [dict.fromkeys(COLUMNS, 0)])
    except (ArithmeticError, LookupError, TypeError, ValueError):
        stop(f"{path} is damaged: its rows don't have the same columns; remove those that differ")
    return rows


def has_rows(directory: Path) -> bool:
    return any(directory.glob("metrics.jsonl")) or any(directory.glob("evaluation*.jsonl"))


def load(directory: Path, name: str) -> Run:
    """All that the tables and pictures need of a run, however far it came."""
    path, parent = directory / "args.json", directory.parent
    if not has_rows(directory) and (has_rows(parent) or not path.is_file()):
        near = [str(place) for place in (parent, *directory.glob("*/"), *parent.glob("*/"))
                if has_rows(place)]
        hint = " or ".join(near[:3]) or "the directory that a training named as its output"
        stop(f"{directory} is no run: it has no args.json, metrics.jsonl or evaluation rows of its "
             f"own; type {hint}")
    record = parse(path.read_bytes()) if path.is_file() else {}
    if record is None:
        stop(f"{path} is damaged: it is no JSON object; move it away")
    stages = {label: read_answers(directory / f"evaluation_{stage}.jsonl")
              for stage, label in STAGES.items()}
    measured = printable(record.get("adapter") or record.get("base_model") or name)
    stages[measured] = read_answers(directory / "evaluation.jsonl")
    steps = [row for row in read_jsonl(directory / "metrics.jsonl")
             if "reward" in row and isinstance(row.get("step"), int)]
    return Run(directory, name, record, steps,
               {label: rows for label, rows in stages.items() if rows})


def short_names(paths: list[Path]) -> list[str]:
    """The last part of each path, and as many before it as tell it from the others."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    names = []
    for mine in parts:
        depth = 1
        while sum(other[-depth:] == mine[-depth:] for other in parts) > 1:
            depth += 1
        names.append(printable("/".join(mine[-depth:])))
    return names


# ---- Words and tables ----------------------------------------------------------------------------
def percent(rate: dict | None, between: str = " ") -> str:
    if rate is None:
        return "–"
    low, high = 100 * rate["low"], 100 * rate["high"]
    return f"{100 * rate['rate']:.1f} %{between}({low:.1f}–{high:.1f})"


def print_table(title: str, columns: list, rows: list[list[str]], **how) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, **how)
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, emoji=False, highlight=False)  # a name is no markup
    endless = console.options.update_width(10_000)
    needed = console.measure(table, options=endless).minimum
    console.width = max(console.width, needed)  # rather a long line than digits lost
    console.print(table)


def figures(run: Run) -> dict:
    """evaluation.json: each stage's summary, and the verdicts from one to the next and over all."""
    names, changes = list(run.stages), {}
    over_all = [(names[0], names[-1])] if len(names) > 2 else []
    for old, new in [*itertools.pairwise(names), *over_all]:
        before, after = shared(run.stages[old], run.stages[new])
        if before:
            changes[f"{old} → {new}"] = verdict(before, after)
    return {"stages": {name: summarise(rows) for name, rows in run.stages.items()},
            "changes": changes}


def print_run(run: Run, found: dict) -> None:
    """One run: a column a stage; then what changed, and the question that gained most."""
    columns = list(found["stages"].values())
    rows = [[label, *(percent(stage.get(metric)) for stage in columns)]
            for metric, label in METRICS.items() if metric in columns[0]]
    for k, rate in columns[0].get("pass_at_k", {}).items():
        rows.append([f"pass@{k}", f"{100 * rate:.1f} %"])  # of what was measured alone
    rows.append(["mean tokens", *(f"{stage['mean_tokens']:.0f}" for stage in columns)])
    n = " / ".join(dict.fromkeys(str(stage["n"]) for stage in columns))
    print_table(f"{n} held-out questions, 95 % intervals", ["", *found["stages"]], rows)
    for stages, change in found["changes"].items():
        print(f"{stages}: {change['words']}")
    answers = list(run.stages.values())
    pairs = list(zip(*shared(answers[0], answers[-1])))
    if len(answers) > 1 and pairs:
        old, new = max(pairs, key=lambda both: both[1]["strict"] - both[0]["strict"])
        print(f"\nquestion: {printable(old['question'])} (gold: {printable(old['gold'])})")
        for name, row in (("before", old), ("after", new)):
            mark = "right" if row["strict"] else "wrong"
            print(f"--- {name} ({mark})\n{printable(row['completion'].strip())}")


def columns_of(runs: list[Run]) -> list[str]:
    """All stages of several runs, in the order in which a training has them."""
    there = {stage for run in runs for stage in run.stages}
    return [stage for stage in (*STAGES.values(), "measured") if stage in there]


def print_runs(runs: list[Run]) -> None:
    """Several runs: a row a run, a column a stage."""
    from rich.table import Column

    stages, rows = columns_of(runs), []
    voted = any("majority" in list(run.stages.values())[-1][0] for run in runs if run.stages)
    for run in runs:
        summaries = {stage: summarise(answers) for stage, answers in run.stages.items()}
        row = [f"{run.name}\n{len(run.steps)} steps\n" if run.steps else f"{run.name}\n"]
        for stage in stages:
            row.append(percent(summaries[stage]["strict"], "\n") if stage in summaries else "–")
        if summaries:
            last = list(summaries.values())[-1]
            if voted:
                row.append(percent(last.get("majority"), "\n"))
            rate = f"{100 * last['format']['rate']:.1f} %"
            row += [rate, f"{last['mean_tokens']:.0f}", str(last["n"])]
        rows.append(row)
    heads = [*stages, *["majority vote"] * voted, "format", "tokens", "n"]
    columns = [Column(head.replace(" ", "\n", 1), no_wrap=True) for head in heads]
    print_table("strict accuracy, 95 % intervals; format, tokens, n of the last evaluation",
                [Column("run", overflow="fold", min_width=12), *columns], rows, box=None,
                pad_edge=False)


def print_differences(runs: list[Run]) -> None:
    """The options that all runs have recorded and that are not the same in all."""
    known = [(run.record.get("options") or {}) | run.record for run in runs]
    for name in known[0]:
        if name in ("options", "typed", "versions") or not all(name in one for one in known):
            continue
        values = [str(one[name]) for one in known]
        if len(set(values)) > 1:
            print(printable(f"{name}: {' | '.join(value[:40] for value in values)}"))


def compare(runs: list[Run]) -> list[dict]:
    """For each two runs McNemar between their last stages, on the questions that both answered."""
    found = []
    for one, other in itertools.combinations([run for run in runs if run.stages], 2):
        old, new = list(one.stages)[-1], list(other.stages)[-1]
        before, after = shared(one.stages[old], other.stages[new])
        result = {"runs": [one.name, other.name], "stages": [old, new], "shared": len(before),
                  "words": "they share no question, so nothing tells which is better"}
        if before:
            result |= verdict(before, after)
        found.append(result)
    return found


def print_comparisons(comparisons: list[dict]) -> None:
    for found in comparisons:
        (one, other), (old, new) = found["runs"], found["stages"]
        who = f"{one} → {other}, {new}" if old == new else f"{one} ({old}) → {other} ({new})"
        print(f"{who}: {found['words']}{' shared questions' if found['shared'] else ''}")
    tests = sum("p" in found for found in comparisons)
    if tests > 1:
        print(f"of {tests} tests some may look significant by chance: ask for p < "
              f"{0.05 / tests:.2g} (Bonferroni)")


# ---- Pictures and the page -----------------------------------------------------------------------
def as_label(text: str) -> str:
    """A name as matplotlib shows it unchanged: $ would begin a formula, a leading _ hide it."""
    text = printable(text).replace("$", r"\$")
    text = text if len(text) <= 48 else f"{text[:20]}…{text[-27:]}"
    return f" {text}" if text.startswith("_") else text


def steps_of(run: Run):
    """Its metrics as a table of numbers, a row a step."""
    import pandas

    log = pandas.DataFrame(run.steps or {"step": []}).set_index("step")
    log = log.apply(pandas.to_numeric, errors="coerce")
    return log[~log.index.duplicated(keep="last")]


def draw_run(run: Run, path: Path) -> None:
    """progress.png: rewards, lengths and evaluations at a glance."""
    panels = []
    if run.steps:
        log = steps_of(run).reindex(columns=dict.fromkeys([*run.steps[0], LENGTH, CLIPPED]))
        first, last = log.head(3).mean(), log.tail(3).mean()
        parts = log.filter(regex="^rewards/.*/mean$").dropna(axis=1, how="all")
        parts = log[["reward"]] if parts.empty else parts
        most = parts.abs().max().replace(0, 1)
        names = [name.removeprefix("rewards/").removesuffix("/mean").removesuffix("_reward_func")
                 for name in parts]
        names = [f"{name} (of {highest:.2g})" for name, highest in zip(names, most)]
        panels = [
            (f"Reward {first['reward']:.2f} → {last['reward']:.2f} (first and last 3 steps)",
             "mean of a step's answers, % of its highest",
             (100 * parts / most).set_axis(names, axis=1)),
            (f"Answers of {first[LENGTH]:.0f} → {last[LENGTH]:.0f} tokens", "mean tokens",
             log[[LENGTH]]),
            ("Answers cut off at the limit", "% of a step's answers", 100 * log[[CLIPPED]]),
        ]
    summaries = [summarise(rows) for rows in run.stages.values()]
    rates = {METRICS[metric]: [summary[metric] for summary in summaries]
             for metric in ("strict", "flexible", "format")}
    right = " → ".join(f"{100 * summary['strict']['rate']:.0f}" for summary in summaries)
    draw(path, panels, f"Strictly right: {right} % of the held-out questions", rates,
         list(run.stages))


def draw_runs(runs: list[Run], path: Path) -> None:
    """The curves and the bars of several runs, a colour each."""
    import pandas

    logs, panels = [steps_of(run) for run in runs], []
    for title, unit, pattern in (
        ("Reward", "mean of a step's answers", "^reward$"),
        ("Reward for right answers", "mean of a step's answers", "^rewards/.*correct.*/mean$"),
        ("Length of an answer", "mean tokens", f"^{LENGTH}$"),
    ):
        curves = pandas.DataFrame({i: log.filter(regex=pattern).sum(axis=1, min_count=1)
                                   for i, log in enumerate(logs)})
        if curves.notna().any(axis=None):
            panels.append((title, unit, curves))
    stages, rates = columns_of(runs), {}
    for run in runs:
        answers = [run.stages.get(stage) for stage in stages]
        rates[run.name] = [summarise(rows)["strict"] if rows else None for rows in answers]
    draw(path, panels, "Strictly right of the held-out questions", rates, stages, list(rates))


def draw(path: Path, panels: list[tuple], title: str, rates: dict[str, list], stages: list[str],
         names: list[str] | None = None) -> None:
    """Panels of curves (title, unit, table with a column a curve) and one of bars.

    `names`: what each colour stands for in all panels; else each panel has a legend of its own.
    """
    import matplotlib.pyplot as plt

    if "ipykernel" not in sys.modules:
        plt.switch_backend("Agg")  # no window
    count = len(panels) + bool(stages)
    columns = 2 if count == 4 else count
    rows = math.ceil(count / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(6.4 * columns, 4.4 * rows), squeeze=False,
                                layout="constrained")
    figure.get_layout_engine().set(h_pad=0.15)
    styles = plt.cycler(linestyle=["-", "--", ":"]) * plt.cycler(color=COLOURS)
    for axes, (heading, unit, curves) in zip(grid.flat, panels):
        draw_curves(axes, curves, styles)
        axes.set(title=heading, ylabel=unit, xlabel="GRPO step (thick: mean of five)")
        if unit.startswith("% of"):
            axes.set_ylim(0, 105)
        elif unit == "mean tokens":
            axes.set_ylim(0, None)
        if not names and len(curves.columns) > 1:
            axes.legend()
    if stages:
        draw_bars(grid.flat[-1], rates, stages)
        grid.flat[-1].set_title(title)
        if not names:
            grid.flat[-1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, axis="y")
        axes.set_axisbelow(True)
    if names:
        lines = [plt.Line2D([], [], linewidth=5, **style) for _, style in zip(names, styles)]
        labels = [as_label(name) for name in names]
        figure.legend(lines, labels, loc="outside upper center", ncols=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font lacks
        figure.savefig(path, dpi=110)
        if "ipykernel" in sys.modules:
            plt.show()
    plt.close(figure)


def draw_curves(axes, curves, styles) -> None:
    """Each curve pale as it is, and thick as the mean of five steps: single steps are noisy."""
    axes.set_prop_cycle(styles)
    axes.plot(curves.index, curves, marker=".", alpha=0.25, linewidth=1)
    axes.set_prop_cycle(styles)
    smooth = curves.rolling(5, center=True, min_periods=1).mean().where(curves.notna())
    axes.plot(curves.index, smooth, linewidth=2, label=[as_label(name) for name in curves])


def draw_bars(axes, rates: dict[str, list[dict | None]], stages: list[str]) -> None:
    """Bars with 95 % intervals: a group a stage, in it one of each series of `rates`."""
    width = 0.8 / len(rates)
    present = [[name for name in rates if rates[name][group]] for group in range(len(stages))]
    for i, (name, column) in enumerate(rates.items()):
        there = {}
        for group, rate in enumerate(column):
            if rate:
                left = present[group].index(name) - (len(present[group]) - 1) / 2
                there[group + left * width] = rate
        heights = [100 * rate["rate"] for rate in there.values()]
        errors = [[100 * (rate["rate"] - rate["low"]) for rate in there.values()],
                  [100 * (rate["high"] - rate["rate"]) for rate in there.values()]]
        bars = axes.bar(list(there), heights, width, yerr=errors, capsize=3, label=as_label(name),
                        color=COLOURS[i % len(COLOURS)])
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    axes.set_xticks(range(len(stages)), [as_label(stage) for stage in stages])
    axes.set(ylim=(0, 108), yticks=range(0, 101, 20), ylabel="%, with 95 % intervals")


PAGE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Completions during training</title>
<style>body{font:14px/1.4 system-ui,sans-serif;margin:1em;overflow-x:auto} th{font-size:11px}
td,th{text-align:left;vertical-align:top;white-space:pre-wrap;padding:.4em;max-width:30em;
border-bottom:1px solid #ccc} td:nth-child(2),td:nth-child(4){min-width:14em}</style>
"""


def write_page(directory: Path) -> bool:
    """completions.html: what the model wrote at several steps, with its rewards."""
    files = sorted((directory / "completions").glob("*.parquet"))
    if not files:
        return False
    import pandas

    if len(files) > 8:
        files = [files[i * (len(files) - 1) // 7] for i in range(8)]
    samples = []
    for file in files:
        try:
            samples.append(pandas.read_parquet(file).head(8))
        except (OSError, ValueError):  # of a step that broke off
            warn(f"{file} is damaged, and left out of completions.html")
    if not samples:
        return False
    rows = pandas.concat(samples).drop(columns=["prompt", "advantage"], errors="ignore")
    rows = rows.rename(columns=lambda name: name.removesuffix("_reward_func"))
    first = [name for name in ("step", "question", "answer", "completion") if name in rows]
    rows = rows[first + [name for name in rows if name not in first]]
    # With a formatter newlines stay; what is in the cells and heads is escaped all the same.
    texts = {name: str for name in rows if rows[name].dtype.kind not in "biuf"}
    with pandas.option_context("display.max_colwidth", None):
        page = rows.to_html(index=False, border=0, float_format="{:g}".format, formatters=texts)
    write_whole(directory / "completions.html", PAGE + page)
    return True


def write_whole(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


# ---- One run, several runs -----------------------------------------------------------------------
def show(run_dir: Path) -> None:
    """What a run shows at its end: table, changes, the greatest gain, picture and page."""
    show_run(load(Path(run_dir), short_names([run_dir])[0]))


def show_run(run: Run) -> list[str]:
    """Print one run and write its files; returns their names."""
    written = []
    if run.steps:
        planned = (run.record.get("options") or {}).get("max_steps", "?")
        print(f"{run.name}: {len(run.steps)} of {planned} GRPO steps")
    if run.stages:
        found = figures(run)
        print_run(run, found)
        text = json.dumps(found, indent=2, ensure_ascii=False)
        write_whole(run.directory / "evaluation.json", text + "\n")
        written.append("evaluation.json")
    if run.steps or len(run.stages) > 1:
        draw_run(run, run.directory / "progress.png")
        written.append("progress.png")
    if write_page(run.directory):
        written.append("completions.html")
    return written


def show_runs(runs: list[Run], path: Path) -> Path:
    """Print several runs side by side and draw them; returns the picture's path."""
    named = []
    for run in runs:  # what was measured alone gets one column, whatever it was
        stages = {stage if stage in STAGES.values() else "measured": rows
                  for stage, rows in run.stages.items()}
        named.append(run._replace(stages=stages))
    print_runs(named)
    print_differences(named)
    print_comparisons(compare(named))
    wanted, number = path.stem, 2
    while path.exists():  # nothing saved is overwritten
        path, number = path.with_stem(f"{wanted}-{number}"), number + 1
    draw_runs(named, path)
    return path


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        stop(f"{message}; python report.py --help shows what to type")


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory")
    add("--json", action="store_true", help="one JSON object on stdout, and no file")
    add("--output", type=Path, metavar="FILE.png", help="picture of several runs; default: "
        "comparison.png beside the first; a taken name gets a number")
    args = parser.parse_args(argv)
    places = [run.resolve() for run in args.runs]
    for i, run in enumerate(args.runs):
        if places[i] in places[:i]:
            stop(f"{run} is given twice; give each run once")
    if args.output and args.json:
        stop("--json draws nothing; leave out --json or --output")
    if args.output and len(args.runs) == 1:
        stop("--output is for the picture of several runs; that of one is its progress.png")
    if args.output and args.output.suffix.lower() != ".png":
        stop(f"--output {args.output} must end in .png")
    if args.output and not args.output.parent.is_dir():
        stop(f"--output {args.output}: there is no directory {args.output.parent}")
    return args


def main(argv: list[str] | None = None) -> None:
    try:
        show_all(parse_options(argv))
    except OSError as problem:
        stop(f"{problem.filename or 'the output'}: {problem.strerror}")
    except ModuleNotFoundError as problem:
        stop(f"{problem.name} is not installed: pip install -r requirements-cpu.txt")


def show_all(args) -> None:
    runs = [load(path, name) for path, name in zip(args.runs, short_names(args.runs))]
    if args.json:
        found = [{"name": run.name, "directory": str(run.directory), "steps": len(run.steps),
                  **figures(run)} for run in runs]
        print(json.dumps({"runs": found, "comparisons": compare(runs)}, indent=2))
    elif not any(run.steps or run.stages for run in runs):
        print("no evaluation and no GRPO step there yet")
    elif len(runs) == 1:
        print(f"\nin {printable(runs[0].directory)}: {', '.join(show_run(runs[0]))}")
    else:
        beside = Path(os.path.abspath(args.runs[0])).parent / "comparison.png"
        print(f"\npicture: {printable(show_runs(runs, args.output or beside))}")


if __name__ == "__main__":
    main()
