"""What runs left behind, as tables, pictures and a page: one run, or several side by side.

    python report.py outputs/smollm2-135m                        # as at the end of its training
    python report.py outputs/smollm2-135m outputs/smollm2-135m-2 # one table, one picture of both
    python report.py outputs/smollm2-135m --json                 # the figures, for a program

RUN is a directory of reasoning_model_grpo.py or of `infer.py --evaluate`, shown as far as it came;
no model is loaded. Of one run it writes progress.png, completions.html and evaluation.json into the
directory, of several comparison.png beside the first; there a taken name gets a number.
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

STAGES = {"_before": "before", "_adapter": "with the adapter given",  # evaluation_before.jsonl, ...
          "_warm_start": "after warm start", "_after": "after GRPO", "": "measured alone"}
METRICS = {"strict": "strict accuracy", "flexible": "flexible accuracy", "format": "strict format",
           "truncated": "truncated", "majority": "majority vote"}  # columns of 0 and 1


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
            chances = [pass_at_k(samples, row["right"], k) for row in rows]
            summary["pass_at_k"][k] = sum(chances) / n
    return summary


def shared(first: list[dict], second: list[dict]) -> list[tuple[dict, dict]]:
    """Two rows for each question that both evaluations asked, by its text and gold."""
    waiting = {}  # lists, as a question may be there twice
    for row in second:
        waiting.setdefault((row["question"], str(row["gold"])), []).append(row)
    pairs = []
    for row in first:
        partners = waiting.get((row["question"], str(row["gold"])))
        if partners:
            pairs.append((row, partners.pop(0)))
    return pairs


def verdict(before: list[dict], after: list[dict]) -> dict:
    """The change of strict accuracy on the questions that both evaluations asked, in words too."""
    pairs = shared(before, after)
    n = len(pairs)
    if n == 0:
        return {"n": 0, "words": "nothing to compare, n = 0"}
    p = mcnemar([old["strict"] for old, _ in pairs], [new["strict"] for _, new in pairs])
    change = sum(new["strict"] - old["strict"] for old, new in pairs) / n
    words = f"strict accuracy {'rose' if change > 0 else 'fell'} by {abs(100 * change):.1f} points"
    if p >= 0.05:
        words = f"no significant change of strict accuracy ({100 * change:+.1f} points)"
    words += f", McNemar p = {p:.2g}, n = {n}"
    return {"n": n, "change": change, "p": p, "words": words}


# ---- Reading a run's directory -------------------------------------------------------------------
class Run(NamedTuple):
    directory: Path
    name: str  # as it was typed
    steps: list[dict]  # TRL's metrics of each GRPO step
    stages: dict[str, list[dict]]  # graded answers, in the order in which they were given
    summaries: dict[str, dict]  # of each stage


def printable(text) -> str:
    """Without control characters: a model's or a file's text must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else " " for c in str(text))


def stop(message: str) -> NoReturn:
    """End in one line that says what is wrong and what to type instead; exit code 2."""
    print(f"error: {' '.join(printable(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


@contextmanager
def reading(path: Path):
    """Whatever is wrong with a file ends in one line that names it."""
    try:
        yield
    except Exception as problem:
        stop(f"{path} is damaged, move it away to see the rest: {problem!r}")


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file, none where it is missing; what splitlines() splits stays a line."""
    if not path.exists():
        return []
    with reading(path):
        return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def load(directory: Path) -> Run:
    """All that is shown of a run, however far it came."""
    steps = [row for row in read_jsonl(directory / "metrics.jsonl") if "reward" in row]
    stages, summaries = {}, {}
    for file, stage in STAGES.items():
        path = directory / f"evaluation{file}.jsonl"
        rows = read_jsonl(path)
        if rows:
            stages[stage] = rows
            with reading(path):
                summaries[stage] = summarise(rows)
    if not steps and not stages:
        stop(f"{directory} holds no metrics.jsonl or evaluation*.jsonl: name a run's directory")
    return Run(directory, printable(directory), steps, stages, summaries)


# ---- Figures and tables --------------------------------------------------------------------------
def figures(run: Run) -> dict:
    """evaluation.json: each stage's summary, and the verdicts between each two."""
    changes = {f"{old} → {new}": verdict(run.stages[old], run.stages[new])
               for old, new in itertools.combinations(run.stages, 2)}
    return {"stages": run.summaries, "changes": changes}


def compare(runs: list[Run]) -> dict[str, dict]:
    """The verdicts between the last stages of each two runs."""
    verdicts = {}
    for one, other in itertools.combinations([run for run in runs if run.stages], 2):
        old, new = list(one.stages)[-1], list(other.stages)[-1]
        name = f"{one.name}, {old} → {other.name}, {new}"
        verdicts[name] = verdict(one.stages[old], other.stages[new])
    return verdicts


def percent(rate: dict) -> str:
    return f"{100 * rate['rate']:.1f} % ({100 * rate['low']:.1f}–{100 * rate['high']:.1f})"


def print_table(title: str, heads: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    table = Table(*[Column(head, overflow="fold") for head in heads], title=title)
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, emoji=False, highlight=False)  # a name is no markup
    console.width = max(console.width, 80)  # below, digits would be broken
    console.print(table)


def print_run(run: Run) -> None:
    """One run: a column a stage; then what changed, and the question that gained most."""
    columns, rows = list(run.summaries.values()), []
    for metric, label in METRICS.items():
        if metric in columns[0]:
            rows.append([label, *[percent(stage[metric]) for stage in columns]])
    for k, rate in columns[0].get("pass_at_k", {}).items():
        rows.append([f"pass@{k}", f"{100 * rate:.1f} %"])  # only what was measured alone has it
    rows.append(["mean tokens", *[f"{stage['mean_tokens']:.0f}" for stage in columns]])
    print_table(f"{columns[0]['n']} held-out questions, 95 % intervals", ["", *run.stages], rows)
    for stages, change in figures(run)["changes"].items():
        print(f"{stages}: {change['words']}")
    answers = list(run.stages.values())
    pairs = shared(answers[0], answers[-1])
    if len(answers) > 1 and pairs:
        old, new = max(pairs, key=lambda pair: pair[1]["strict"] - pair[0]["strict"])
        print(f"\nquestion: {printable(old['question'])} (gold: {printable(old['gold'])})")
        for name, row in (("before", old), ("after", new)):
            mark = "right" if row["strict"] else "wrong"
            print(f"--- {name} ({mark})\n{printable(row['completion'].strip())}")


# ---- Pictures and the page -----------------------------------------------------------------------
LENGTH, CLIPPED = "completions/mean_length", "completions/clipped_ratio"  # TRL's names
TITLES = {"reward": "Reward", LENGTH: "Length of an answer, tokens",
          CLIPPED: "Answers cut off at the limit, of 1"}


def draw_run(run: Run, path: Path) -> None:
    """progress.png: rewards, lengths and evaluations at a glance."""
    panels, bars = {}, {}
    if run.steps:
        rewards = [name for name in run.steps[0] if re.fullmatch("rewards/.*/mean", name)]
        for title, columns in (("Rewards", rewards), (TITLES[LENGTH], [LENGTH]),
                               (TITLES[CLIPPED], [CLIPPED])):
            panels[title] = [(short(column), run.steps, column) for column in columns]
    for metric in ("strict", "flexible", "format"):
        bars[METRICS[metric]] = {name: stage[metric] for name, stage in run.summaries.items()}
    draw(path, panels, bars, "Held-out questions, with 95 % intervals")


def draw_runs(runs: list[Run], path: Path) -> None:
    """The curves and the bars of several runs, a colour each."""
    panels, bars = {}, {}
    if any(run.steps for run in runs):
        for column, title in TITLES.items():
            panels[title] = [(run.name, run.steps, column) for run in runs]
    for run in runs:
        bars[run.name] = {name: stage["strict"] for name, stage in run.summaries.items()}
    draw(path, panels, bars, "Strictly right of the held-out questions, with 95 % intervals")


def short(column: str) -> str:
    """rewards/correctness_reward_func/mean: correctness."""
    return column.removeprefix("rewards/").removesuffix("/mean").removesuffix("_reward_func")


def draw(path: Path, panels: dict, bars: dict[str, dict], title: str) -> None:
    """Three or no {title: [(name, steps, column)]} as curves, and {name: {stage: rate}} as bars."""
    import pandas
    from matplotlib import figure, style
    plain = {"axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3, "text.parse_math": False}
    with style.context(["tableau-colorblind10", plain]):
        size = 2 if panels else 1
        picture = figure.Figure(figsize=(6.5 * size, 4.5 * size), layout="constrained")
        grid = picture.subplots(size, size, squeeze=False).flat
        for axes, (heading, curves) in zip(grid, panels.items()):
            axes.set(title=heading, xlabel="GRPO step (thick: mean of five)")
            for i, (name, steps, column) in enumerate(curves):
                curve = pandas.Series({row["step"]: row.get(column) for row in steps}, dtype=float)
                smooth = curve.rolling(5, center=True, min_periods=1).mean()
                axes.plot(curve.index, curve, color=f"C{i}", alpha=0.3)
                axes.plot(curve.index, smooth, color=f"C{i}", label=f" {name[-40:]}")
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        draw_bars(grid[-1], bars)
        grid[-1].set_title(title)
        for axes in grid:
            if len(axes.get_legend_handles_labels()[1]) < 2:
                continue
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)
        picture.savefig(path, dpi=100)
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display
        display(Image(filename=path))


def draw_bars(axes, bars: dict[str, dict]) -> None:
    """Bars with 95 % intervals, a group a stage."""
    there = {stage for rates in bars.values() for stage in rates}
    stages = [stage for stage in STAGES.values() if stage in there]
    width = 0.8 / len(bars)
    for i, (name, rates) in enumerate(bars.items()):
        axes.bar(0, 0, color=f"C{i}", label=f" {name[-40:]}")  # for the legend
        for stage, rate in rates.items():
            place = stages.index(stage) + (i - (len(bars) - 1) / 2) * width
            low, middle, high = 100 * rate["low"], 100 * rate["rate"], 100 * rate["high"]
            bar = axes.bar(place, middle, width, color=f"C{i}", capsize=3,
                           yerr=[[middle - low], [high - middle]])
            axes.bar_label(bar, fmt="%.0f")
    axes.set_xticks(range(len(stages)), stages)
    axes.set(ylim=(0, 108), ylabel="%")


PAGE = """<!doctype html><meta charset="utf-8"><title>Completions during training</title>
<style>body{font:14px sans-serif} th{font-size:11px} td,th{text-align:left;vertical-align:top;
white-space:pre-wrap;padding:.4em;max-width:30em;border-bottom:1px solid #ccc}</style>
"""


def write_page(directory: Path) -> None:
    """completions.html: what the model wrote at eight steps at most, with its rewards."""
    files = sorted((directory / "completions").glob("*.parquet"))
    if not files:
        return
    import pandas
    samples = []
    for file in files[:: len(files) // 8 + 1]:
        with reading(file):
            samples.append(pandas.read_parquet(file).head(8))
    rows = pandas.concat(samples).drop(columns=["prompt", "advantage"], errors="ignore")
    # With a formatter newlines stay; what is in the cells and heads is escaped all the same.
    texts = {name: str for name in rows.select_dtypes(exclude="number")}
    page = rows.to_html(index=False, border=0, formatters=texts)
    (directory / "completions.html").write_text(PAGE + page, encoding="utf-8")


# ---- One run, several runs -----------------------------------------------------------------------
def show(run_dir: Path) -> None:
    """What a run shows at its end: table, changes, the greatest gain, picture and page."""
    main(["--", str(run_dir)])


def show_run(run: Run) -> None:
    """Print one run and write its files."""
    if run.stages:
        print_run(run)
        text = json.dumps(figures(run), indent=2, ensure_ascii=False)
        (run.directory / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    if run.steps or len(run.stages) > 1:
        draw_run(run, run.directory / "progress.png")
    write_page(run.directory)


def show_runs(runs: list[Run], wanted: Path) -> None:
    """Several runs: a row for each stage of each, which of two is better, and a picture."""
    rows = []
    for run in runs:
        for stage, summary in run.summaries.items():
            rows.append([run.name, stage, percent(summary["strict"]), percent(summary["format"]),
                         f"{summary['mean_tokens']:.0f}", str(summary["n"])])
    heads = ["run", "stage", "strict accuracy", "strict format", "tokens", "n"]
    print_table("held-out questions, 95 % intervals", heads, rows)
    for evaluations, change in compare(runs).items():
        print(f"{evaluations}: {change['words']} shared questions")
    path, number = wanted, 2
    while path.exists():  # nothing saved is overwritten
        path, number = wanted.with_stem(f"{wanted.stem}-{number}"), number + 1
    draw_runs(runs, path)
    print(f"picture: {printable(path)}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop

    def path(text: str) -> Path:
        return Path(text).expanduser()

    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="a run's directory")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, no file")
    parser.add_argument("--output", type=path, metavar="FILE.png", help="picture of several runs")
    args = parser.parse_args(argv)
    if args.output and (args.json or len(args.runs) == 1):
        stop("--output is for the picture of several runs: leave it out")
    with suppress(AttributeError, ValueError):  # a notebook's takes all
        sys.stdout.reconfigure(errors="replace")  # what a terminal can't show
    try:
        runs = [load(place) for place in args.runs]
        if args.json:
            found = [{"name": run.name, "steps": len(run.steps)} | figures(run) for run in runs]
            print(json.dumps({"runs": found, "comparisons": compare(runs)}, indent=2))
        elif len(runs) == 1:
            show_run(runs[0])
        else:
            show_runs(runs, args.output or args.runs[0].resolve().with_name("comparison.png"))
    except BrokenPipeError:  # `| head` has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (OSError, ImportError) as problem:
        stop(f"{problem} (requirements-cpu.txt lists the packages needed)")


if __name__ == "__main__":
    main()
