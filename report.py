"""What runs left behind, as tables, pictures and a page: one run, or several side by side.

    python report.py outputs/smollm2-135m                        # as at the end of its training
    python report.py outputs/smollm2-135m outputs/smollm2-135m-2 # one table, one picture of both

RUN is a directory of reasoning_model_grpo.py or of `infer.py --evaluate`. One gets progress.png,
completions.html and evaluation.json in it, several get comparison.png beside the first,
with a number where there is one.
"""

import argparse
import fnmatch
import itertools
import json
import math
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

STAGES = {"_before": "before", "_adapter": "with the adapter given",  # evaluation_before.jsonl, ...
          "_warm_start": "after warm start", "_after": "after GRPO", "": "measured alone"}
METRICS = {"strict": "strict accuracy", "flexible": "flexible accuracy", "format": "strict format",
           "truncated": "truncated", "majority": "majority vote"}  # columns of 0 and 1
CURVES = {"reward": "Reward", "completions/mean_length": "Length of an answer, tokens",
          "completions/clipped_ratio": "Answers cut off at the limit, of 1"}  # TRL's names


# ---- Statistics ----------------------------------------------------------------------------------
def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927): 30 of 100 is 0.219 to 0.396."""
    z, p = 1.959964, successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Rounded, so that the bounds of none and all are 0 and 1: matplotlib takes no bar below 0.
    return max(0.0, round(middle - half, 12)), round(middle + half, 12)


def summarise(rows: list[dict]) -> dict:
    """Per metric {"rate", "low", "high", "count"}; beside them "n", "mean_tokens", "pass_at_k"."""
    n = len(rows)
    summary = {"n": n, "mean_tokens": round(sum(row["tokens"] for row in rows) / n, 1)}
    for metric in METRICS:
        if metric in rows[0]:
            count = sum(row[metric] for row in rows)
            low, high = wilson(count, n)
            summary[metric] = {"rate": count / n, "low": low, "high": high, "count": count}
    if "samples" in rows[0]:  # unbiased, from all samples (Chen et al., arXiv:2107.03374)
        drawn = len(rows[0]["samples"])
        summary["pass_at_k"] = {}
        for k in sorted({2**i for i in range(drawn.bit_length())} | {drawn}):
            misses = sum(math.comb(drawn - row["right"], k) for row in rows)
            summary["pass_at_k"][k] = 1 - misses / math.comb(drawn, k) / n
    return summary


def shared(first: list[dict], second: list[dict]) -> list[tuple[dict, dict]]:
    """Two rows for each question, with its gold, that both evaluations asked."""
    old, new = ({(row["question"], str(row["gold"])): row for row in rows}
                for rows in (first, second))
    return [(old[question], new[question]) for question in old if question in new]


def verdict(before: list[dict], after: list[dict]) -> dict:
    """The change of strict accuracy on what both asked; p is McNemar's, exact and two-sided."""
    changes = [new["strict"] - old["strict"] for old, new in shared(before, after)]
    n, gained, lost = len(changes), changes.count(1), changes.count(-1)
    if n == 0:
        return {"n": 0, "words": "nothing to compare, n = 0"}
    tail = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1))
    p, change = min(1.0, 2 * tail / 2 ** (gained + lost)), (gained - lost) / n
    words = f"strict accuracy {'rose' if change > 0 else 'fell'} by {abs(100 * change):.1f} points"
    if p >= 0.05:
        words = f"no significant change of strict accuracy ({100 * change:+.1f} points)"
    return {"n": n, "change": change, "p": p, "words": f"{words}, McNemar p = {p:.2g}, n = {n}"}


def verdicts(evaluations: dict[str, list[dict]]) -> dict[str, dict]:
    """What changed between each two evaluations of these names."""
    return {f"{old} → {new}": verdict(evaluations[old], evaluations[new])
            for old, new in itertools.combinations(evaluations, 2)}


# ---- A run's directory ---------------------------------------------------------------------------
def printable(text) -> str:
    """Without control characters: a model's or a file's text must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else " " for c in str(text))


def stop(message: str):
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
    text = path.read_text("utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n") if line]  # splitlines(): U+2028 too


class Run:
    """All that is shown of a run, however far it came."""

    def __init__(self, directory: Path):
        self.directory, self.name = directory, printable(directory)
        self.stages, summaries = {}, {}  # graded answers, in the order in which they were given
        with reading(path := directory / "metrics.jsonl"):
            self.steps = [row for row in read_jsonl(path) if "reward" in row]
        for file, stage in STAGES.items():
            with reading(path := directory / f"evaluation{file}.jsonl"):
                if rows := read_jsonl(path):
                    self.stages[stage], summaries[stage] = rows, summarise(rows)
        if not self.steps and not self.stages:
            stop(f"{directory} holds no metrics.jsonl or evaluation*.jsonl: name a run's directory")
        self.figures = {"stages": summaries, "changes": verdicts(self.stages)}


# ---- Tables, pictures and the page ---------------------------------------------------------------
def percent(rate: dict) -> str:
    return f"{100 * rate['rate']:.1f} % ({100 * rate['low']:.1f}–{100 * rate['high']:.1f})"


def print_table(runs: list[Run], changes: dict) -> None:
    """Of one run a column a stage, of several a row with less; then what changed."""
    import pandas
    columns = {}
    for run in runs:
        for stage, summary in run.figures["stages"].items():
            cells = {label: percent(summary[metric]) for metric, label in METRICS.items()
                     if metric in summary}
            for k, rate in summary.get("pass_at_k", {}).items():
                cells[f"pass@{k}"] = f"{100 * rate:.1f} %"
            more = {"mean tokens": f"{summary['mean_tokens']:.0f}", "questions": summary["n"]}
            columns[run.name, stage] = cells | more
    whole = pandas.DataFrame(columns)
    short = whole.filter(regex="strict|tokens|questions", axis=0).T
    table = whole[runs[0].name] if len(runs) == 1 else short
    print(f"held-out questions, 95 % intervals\n{table.to_string()}")
    for stages, change in changes.items():
        print(f"{stages}: {change['words']}")


def draw(runs: list[Run], path: Path) -> None:
    """Curves and bars; of one run a colour for each reward and metric, of several one a run."""
    import pandas
    from matplotlib import figure, style
    panels = {title: [(run.name, run.steps, column) for run in runs]
              for column, title in CURVES.items()}
    steps = [row for run in runs for row in run.steps]
    if len(runs) == 1 and steps:
        panels["Reward"] = [(name[8:-5].removesuffix("_reward_func"), steps, name)
                            for name in fnmatch.filter(steps[0], "rewards/*/mean")]
    size = 2 if steps else 1
    plain = "seaborn-v0_8-whitegrid", "tableau-colorblind10", {"text.parse_math": False}
    with style.context(plain):
        picture = figure.Figure(figsize=(6.5 * size, 4.5 * size), layout="constrained")
        *above, below = picture.subplots(size, size, squeeze=False).flat
        for axes, (title, curves) in zip(above, panels.items()):
            axes.set(title=title, xlabel="GRPO step (thick: mean of five)")
            for i, (name, rows, column) in enumerate(curves):
                curve = pandas.Series({row["step"]: row.get(column) for row in rows}, dtype=float)
                smooth = curve.rolling(5, center=True, min_periods=1).mean()
                axes.plot(curve, color=f"C{i}", alpha=0.3)
                axes.plot(smooth, color=f"C{i}", label=f" {name[-40:]}")
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        draw_bars(below, runs)
        for axes in picture.axes:
            columns = 4 if len(runs) == 1 else 1  # names of runs are long
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=columns)
        picture.savefig(path, dpi=100)
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display
        display(Image(filename=path))


def draw_bars(axes, runs: list[Run]) -> None:
    """Shares of the held-out questions with 95 % intervals, a group a stage."""
    import pandas
    stages = [stage for stage in STAGES.values() if any(stage in run.stages for run in runs)]
    bars, label = [(METRICS[name], runs[0], name) for name in ("strict", "flexible", "format")], "%"
    if len(runs) > 1:
        bars, label = [(run.name, run, "strict") for run in runs], "strictly right, %"
    width = 0.8 / len(bars)
    for i, (name, run, metric) in enumerate(bars):
        rates = {stage: rates[metric] for stage, rates in run.figures["stages"].items()}
        low, rate, high = 100 * pandas.DataFrame(rates, ["low", "rate", "high"], dtype=float).values
        places = [stages.index(stage) + (i - (len(bars) - 1) / 2) * width for stage in rates]
        drawn = axes.bar(places, rate, width, yerr=[rate - low, high - rate], capsize=3,
                         label=f" {name[-40:]}")
        axes.bar_label(drawn, fmt="%.0f")
    axes.set_xticks(range(len(stages)), stages)
    axes.set(ylim=(0, 108), ylabel=label, title="Held-out questions, with 95 % intervals")


PAGE = """<!doctype html><meta charset="utf-8"><title>Completions during training</title>
<style>body{font:14px sans-serif} td,th{text-align:left;vertical-align:top;white-space:pre-wrap;
padding:.4em;max-width:30em;border-bottom:1px solid #ccc}</style>
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
    """Its table, the question that gained most, and its files."""
    answers = list(run.stages.values())
    if answers:
        print_table([run], run.figures["changes"])
        text = json.dumps(run.figures, indent=2, ensure_ascii=False)
        (run.directory / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    pairs = shared(answers[0], answers[-1]) if len(answers) > 1 else []
    if pairs:
        old, new = max(pairs, key=lambda pair: pair[1]["strict"] - pair[0]["strict"])
        print(f"\nquestion: {printable(old['question'])} (gold: {printable(old['gold'])})")
        for name, row in (("before", old), ("after", new)):
            mark = "right" if row["strict"] else "wrong"
            print(f"--- {name} ({mark})\n{printable(row['completion'].strip())}")
    if run.steps or len(answers) > 1:
        draw([run], run.directory / "progress.png")
    write_page(run.directory)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory")
    add("--json", action="store_true", help="one JSON object on stdout, no file")
    add("--output", type=Path, metavar="FILE.png", help="picture of several runs")
    args = parser.parse_args(argv)
    if args.output and (args.json or len(args.runs) == 1):
        stop("--output is for the picture of several runs: leave it out")
    with suppress(AttributeError, ValueError):  # a notebook's takes all
        sys.stdout.reconfigure(errors="replace")  # what a terminal can't show
    try:
        runs = [Run(place.expanduser()) for place in args.runs]
        last = {f"{run.name}, {stage}": run.stages[stage]
                for run in runs for stage in list(run.stages)[-1:]}
        if args.json:
            found = [{"name": run.name, "steps": len(run.steps)} | run.figures for run in runs]
            print(json.dumps({"runs": found, "comparisons": verdicts(last)}, indent=2))
        elif len(runs) == 1:
            show_run(runs[0])
        else:
            print_table(runs, verdicts(last))
            wanted = runs[0].directory.resolve().with_name("comparison.png")
            wanted = args.output.expanduser() if args.output else wanted
            numbered = (wanted.with_stem(f"{wanted.stem}-{n}") for n in itertools.count(2))
            free = (path for path in itertools.chain([wanted], numbered) if not path.exists())
            draw(runs, picture := next(free))
            print(f"picture: {printable(picture)}")
    except BrokenPipeError:  # `| head` has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (OSError, ImportError) as problem:
        stop(f"{problem} (requirements-cpu.txt lists the packages needed)")


if __name__ == "__main__":
    main()
