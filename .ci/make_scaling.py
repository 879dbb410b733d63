"""Draw docs/scaling.png: what a step costs as the work grows. python .ci/make_scaling.py

Each point is a training step of four groups in a process of its own (`benchmark.train`); a legend
names the exponent of a power law through its points. Half an hour and more; the figures go to
outputs/scaling.json, from which it goes on.
"""

import json
import math
import statistics
import sys
from argparse import Namespace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import benchmark  # noqa: E402

PANELS = {  # what grows: (row's key, how the points differ)
    "completion length, tokens": ("length", [{"length": n} for n in (64, 128, 256, 512)]),
    "group size, completions": ("group", [{"group": n} for n in (4, 8, 16, 32)]),
    "prompt, tokens": ("prompt", [{"shots": n} for n in (0, 2, 4)]),
}
MEASURES = {"step": ("seconds a step", "#0072B2"), "generation": ("of it generation", "#E69F00"),
            "peak GB": ("peak memory, GB", "#009E73")}


def exponent(xs: list[float], ys: list[float]) -> float:
    """The slope of least squares through the logarithms."""
    return statistics.linear_regression(list(map(math.log, xs)), list(map(math.log, ys))).slope


def main() -> None:
    path, args = benchmark.script.find_model(benchmark.laptop.PACKAGE)[0], Namespace(
        small=False, steps=1, dtype="auto")
    file = ROOT / "outputs/scaling.json"
    done = json.loads(file.read_text()) if file.is_file() else {}  # goes on where it was
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.2), sharey=True)
    for axes, (what, (key, points)) in zip(panels, PANELS.items()):
        rows = []
        for point in points:
            point = {"length": 64, "group": 8, "shots": 0} | point
            name = json.dumps(point)
            if name not in done:
                done[name] = benchmark.in_child(name, benchmark.train, benchmark.SUITE,
                                                point["length"], args, path, point["group"],
                                                point["shots"])
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps(done, indent=1))
            counted = [row for row in done[name] if "step" in row]
            rows.append({m: statistics.median(row[m] for row in counted)
                         for m in (key, *MEASURES)})
        xs = [row[key] for row in rows]
        for measure, (label, color) in MEASURES.items():
            ys = [row[measure] for row in rows]
            slope = f"{label} (exponent {exponent(xs, ys):.2f})"
            axes.loglog(xs, ys, color=color, marker="o", label=slope)
        axes.set_xlabel(what)
        axes.set_xticks(xs, [f"{x:.0f}" for x in xs])
        axes.minorticks_off()
        axes.margins(y=0.3)  # room for the legend
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc="upper left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_title("4 x 8 completions, prompts of 67 tokens", fontsize=9)
    panels[1].set_title("4 groups, completions of 64 tokens", fontsize=9)
    panels[2].set_title("4 x 8 completions of 64 tokens", fontsize=9)
    figure.tight_layout()
    figure.savefig(ROOT / "docs/scaling.png", dpi=100)


if __name__ == "__main__":  # each process of its own imports this file, too
    main()
