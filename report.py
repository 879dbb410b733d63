"""Watching a run and showing it: progress line, health alarms, the best adapter, pictures, HTML."""

import html
import inspect
import json
import math
import signal
import time
from contextlib import suppress
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from transformers import TrainerCallback

from evaluate import METRICS, summarise
from models import stop
from rewards import completion_text, explain, is_correct

# metric: (lowest, highest, from which step, what to do). The ranges are axolotl's for GRPO.
HEALTHY = {
    "reward": (0.15, math.inf, 20, "read completions.html; try --warm-start, or easier questions"),
    "frac_reward_zero_std": (0, 0.8, 5, "groups agree, so they teach nothing: raise "
                             "--num-generations, or take questions of middling difficulty"),
    "completions/clipped_ratio": (0, 0.3, 5, "raise --max-completion-length"),
    "entropy": (0.05, 0.5, 5, "low: it repeats itself, lower --learning-rate; high: it rambles, "
                "raise --warm-start"),
    "kl": (0, 0.5, 1, "it drifts from the base: lower --learning-rate or raise --beta"),
    "grad_norm": (0.001, 1.0, 5, "low: no signal, see the rewards; high: lower --learning-rate"),
}  # fmt: skip
BLUE, ORANGE, GREEN, PINK, SKY, RED = (  # Okabe & Ito: told apart by colour-blind readers too
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00",
)  # fmt: skip
COMPLETIONS_KEPT = 8  # a step, for completions.html


class CheckedReward:
    """A reward function that is checked at every call; the journal keeps its batch and values."""

    def __init__(self, func, label: str, fmt: str, journal: dict):
        self.func, self.label, self.journal = func, label, journal
        self.__name__ = getattr(func, "__name__", label)  # TRL plots rewards/{__name__}
        self.extra = {"fmt": fmt} if "fmt" in inspect.signature(func).parameters else {}

    def __call__(self, prompts, completions, **columns) -> list[float]:
        try:
            values = self.func(prompts=prompts, completions=completions, **columns, **self.extra)
        except Exception as problem:  # a fault in a reward must not look like a bad model
            stop(f"reward {self.label} fails with {type(problem).__name__}: {problem}")
        n = len(values) if isinstance(values, (list, tuple)) else 0
        if n != len(completions):
            stop(f"reward {self.label} returned {n} values for {len(completions)} completions")
        numbers = [self.number(value) for value in values]
        self.journal["values"][self.__name__] = numbers
        texts = map(completion_text, completions)
        self.journal["batch"] = list(zip(columns["question"], columns["answer"], texts))
        self.journal["ids"] = columns.get("completion_ids", [])
        return numbers

    def number(self, value) -> float | None:
        """A finite float; None, which TRL leaves out of the sum, passes."""
        with suppress(TypeError, ValueError, RuntimeError):
            if value is None or not isinstance(value, str) and math.isfinite(float(value)):
                return None if value is None else float(value)
        stop(f"reward {self.label} returned {value!r}, which is no number")


def call_reward(func, rows: list[dict], texts: list[str]) -> list[float]:
    """Call a reward with all that TRL gives it."""
    columns = {name: [row[name] for row in rows] for name in ("question", "answer")}
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    return func(prompts=[row["prompt"] for row in rows], completions=completions, **columns,
                completion_ids=[[1] for _ in rows], trainer_state=None,
                log_extra=lambda *_: None, log_metric=lambda *_: None)


class RunWatch(TrainerCallback):
    """Writes metrics.jsonl and completions.jsonl, shows progress, and guards the weights.

    `journal` is filled by the reward functions with the last batch and its values. `validate()`
    returns (strict accuracy, format share) on validation questions; it is called every `eval_steps`
    optimiser steps, and the weights that did best are put back at the end. A gradient that is not
    finite is thrown away and ends the run, so the weights stay those of the last good step.
    """

    def __init__(self, run_dir: Path, journal: dict, validate, eval_steps: int = 0):
        self.run_dir, self.journal = run_dir, journal
        self.validate, self.eval_steps = validate, eval_steps
        self.alarms, self.best, self.interrupted, self.broken = {}, None, False, None
        self.validated, self.tokens, self.console = 0, 0, Console()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.main = state.is_world_process_zero
        for name in ("metrics.jsonl", "completions.jsonl") if self.main else ():
            forget_after(self.run_dir / name, state.global_step)
        if self.eval_steps and state.global_step and (self.run_dir / "best.pt").is_file():
            self.validated, self.best = torch.load(self.run_dir / "best.pt")  # before the break
        self.begun, self.first_step = time.time(), state.global_step
        self.bar = Progress(BarColumn(), TextColumn("{task.description}"), console=self.console,
                            disable=not (self.main and self.console.is_terminal))  # fmt: skip
        self.bar.start()
        self.task = self.bar.add_task("the first step is under way", total=state.max_steps)
        self.bar.update(self.task, completed=state.global_step)
        self.previous_handler = signal.getsignal(signal.SIGINT)
        try:  # the first Ctrl-C ends after this step, saved; the second at once
            signal.signal(signal.SIGINT, self.interrupt)
        except ValueError:  # not in the main thread
            self.previous_handler = None

    def interrupt(self, signum, frame):
        print("\nending after this step, saved; Ctrl-C again ends at once", flush=True)
        self.interrupted = True
        signal.signal(signal.SIGINT, self.previous_handler)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if getattr(args, "fp16", False):
            return  # its loss scaler meets such gradients by design, and skips them itself
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if not all(whole(torch.isfinite(grad).all()) for grad in grads):
            self.broken = state.global_step + 1
            for parameter in model.parameters():
                parameter.grad = None  # the optimiser leaves these weights as they are

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.eval_steps and state.global_step % self.eval_steps == 0:
            self.validated += 1
            # One process's figure for all: they gather the weights together, or wait for ever.
            (score,) = broadcast_object_list([self.validate()])
            if self.best is None or score > self.best[1]:  # on a tie the earlier one stays
                self.best = (state.global_step, score, trainable_weights(model))
                if self.main:  # whole or not at all
                    torch.save((self.validated, self.best), self.run_dir / "best.tmp")
                    (self.run_dir / "best.tmp").replace(self.run_dir / "best.pt")
        if self.interrupted or self.broken:
            control.should_save, control.should_training_stop = self.interrupted, True
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self.main or "loss" not in logs:  # the last call sums up the run
            return
        self.tokens += sum(map(len, self.journal.pop("ids", [])))
        seconds = time.time() - self.begun
        done = state.global_step - self.first_step
        logs["tokens_per_second"] = round(self.tokens / seconds, 1)  # of completions, all stages in
        with open(self.run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        self.keep_completions(state.global_step)
        minutes = seconds / max(done, 1) * (state.max_steps - state.global_step) / 60
        line = progress_line(state.global_step, state.max_steps, logs, minutes)
        self.bar.update(self.task, completed=state.global_step, description=line)
        if not self.console.is_terminal:
            print(line, flush=True)
        for alarm in left_ranges(logs, state.global_step):
            if alarm[0] not in self.alarms:
                self.alarms[alarm[0]] = f"step {state.global_step}: {alarm[1]}"
                self.bar.console.print(f"[bold]watch:[/] {self.alarms[alarm[0]]}", highlight=False)

    def keep_completions(self, step: int) -> None:
        batch = self.journal.get("batch")
        if batch is None:
            return
        with open(self.run_dir / "completions.jsonl", "a", encoding="utf-8") as file:
            for i, (question, gold, completion) in enumerate(batch[:COMPLETIONS_KEPT]):
                values = {name: values[i] for name, values in self.journal["values"].items()}
                row = {"step": step, "question": question, "gold": gold,
                       "completion": completion, "rewards": values}  # fmt: skip
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.bar.stop()
        if self.previous_handler is not None:
            signal.signal(signal.SIGINT, self.previous_handler)
        if self.best:
            put_back(model, self.best[2])

    def summary(self) -> list[str]:
        """What the user should know at the end, a line each."""
        lines = [f"watch: {alarm}" for alarm in self.alarms.values()]
        if self.best:
            step, (strict, shape), _ = self.best
            lines.append(f"kept: step {step}, the best of {self.validated} validations "
                         f"(strict {100 * strict:.0f} %, format {100 * shape:.0f} %)")
        if self.broken:
            lines.append(f"stopped: the gradient of step {self.broken} was not finite; saved is "
                         f"step {self.broken - 1}. Lower --learning-rate, or --dtype float32")
        return lines


def whole(tensor):
    """All of a tensor, where FSDP left each process a part; every process must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trainable_weights(model) -> dict:
    return {name: whole(parameter.detach()).cpu().clone()
            for name, parameter in model.named_parameters() if parameter.requires_grad}


def put_back(model, weights: dict) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                weight = weights[name].to(parameter.device)
                if hasattr(parameter, "full_tensor"):
                    from torch.distributed.tensor import distribute_tensor

                    weight = distribute_tensor(weight, parameter.device_mesh, parameter.placements)
                parameter.copy_(weight)
                parameter.__dict__.pop("_fast_lora", None)  # Unsloth's copy of it for decoding


def progress_line(step: int, total: int, logs: dict, minutes: float) -> str:
    parts = [f"step {step}/{total}", f"reward {logs.get('reward', 0):.2f}"]
    for name in [key for key in logs if key.startswith("rewards/") and key.endswith("/mean")]:
        if "correct" in name or "format" in name:
            parts.append(f"{'right' if 'correct' in name else 'format'} {logs[name]:.2f}")
    parts.append(f"length {logs.get('completions/mean_length', 0):.0f}")
    parts.append(f"{logs['tokens_per_second']:.0f} tokens/s")
    return " · ".join([*parts, f"{minutes:.0f} min left"])


def left_ranges(logs: dict, step: int) -> list[tuple[str, str]]:
    """(metric, one line with the remedy) for each metric outside its healthy range."""
    found = []
    for metric, (low, high, start, remedy) in HEALTHY.items():
        value = logs.get(metric)
        if step >= start and isinstance(value, (int, float)) and not low <= value <= high:
            bounds = f"below {low:g}" if value < low else f"above {high:g}"
            found.append((metric, f"{metric} is {value:.3g}, {bounds}: {remedy}"))
    return found


def show_samples(rows, completions, values: dict, weights: list[float], fmt: str) -> None:
    """Print what one completion of each question earns, and why."""
    table = Table(title="A few rollouts before training, and what they earn", show_lines=True)
    for column in ("completion", "gold", "reward", "why"):
        table.add_column(column, overflow="fold")
    for i, (row, completion) in enumerate(zip(rows, completions)):
        if i and row["question"] == rows[i - 1]["question"]:
            continue
        reasons = explain(completion.text, row["answer"], fmt)
        why = [f"{v[i]} {name}: {reasons.get(name, ('', 'your own'))[1]}"
               for name, v in values.items()]
        total = sum(weight * (v[i] or 0) for weight, v in zip(weights, values.values()))
        table.add_row(shorten(completion.text, 300), row["answer"], f"{total:g}", "\n".join(why))
    Console(markup=False).print(table)


def show_one_question(before: list[dict], after: list[dict]) -> None:
    """One question's completion before and after; one that training put right, if there is any."""
    old, new = max(zip(before, after), key=lambda pair: pair[1]["strict"] - pair[0]["strict"])
    print(f"\nquestion: {old['question']} (gold: {old['gold']})")
    for name, row in (("before", old), ("after", new)):
        print(f"--- {name} ({'right' if row['strict'] else 'wrong'})\n{row['completion'].strip()}")
    print()


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


# ---- Pictures and pages --------------------------------------------------------------------------
def draw(run_dir: Path, stages: dict[str, list[dict]]) -> Path | None:
    """progress.png: rewards, lengths and evaluations at a glance. None where there is nothing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log = read_jsonl(run_dir / "metrics.jsonl")
    steps = [row["step"] for row in log]
    figure, (rewards, lengths, accuracy) = plt.subplots(1, 3, figsize=(16, 4.6))
    names = sorted({key.split("/")[1] for row in log for key in row if key.startswith("rewards/")})
    for name, color, marker in zip(names, [BLUE, ORANGE, GREEN, PINK, SKY, RED] * 3, "osD^vP" * 3):
        mean = [row.get(f"rewards/{name}/mean") or 0 for row in log]
        spread = [row.get(f"rewards/{name}/std") or 0 for row in log]
        label = name.removesuffix("_reward_func")
        rewards.plot(steps, mean, color=color, marker=marker, markersize=3, label=label)
        low, high = ([m + sign * s for m, s in zip(mean, spread)] for sign in (-1, 1))
        rewards.fill_between(steps, low, high, color=color, alpha=0.08)
    rewards.set(title="Rewards: mean, and one standard deviation", xlabel="GRPO step")
    if names:
        rewards.legend(fontsize=8)
    mean_length = [row.get("completions/mean_length") for row in log]
    lengths.plot(steps, mean_length, color=BLUE, label="mean tokens")
    lengths.set(title="Completion length", xlabel="GRPO step", ylabel="tokens", ylim=(0, None))
    share = lengths.twinx()
    clipped = [100 * (row.get("completions/clipped_ratio") or 0) for row in log]
    share.plot(steps, clipped, color=RED, linestyle="--", label="cut off")
    share.set(ylabel="cut off at the length limit, %", ylim=(0, 100))
    lines = lengths.get_lines() + share.get_lines()
    lengths.legend(lines, [line.get_label() for line in lines], fontsize=8, loc="center right")
    shown = {"strict": (BLUE, "o"), "flexible": (ORANGE, "s"), "format": (GREEN, "D")}
    for offset, (metric, (color, marker)) in zip((-0.08, 0, 0.08), shown.items()):
        parts = [summarise(results)[metric] for results in stages.values()]
        rates = [100 * part["rate"] for part in parts]
        errors = [[100 * (part["rate"] - part["low"]) for part in parts],
                  [100 * (part["high"] - part["rate"]) for part in parts]]  # fmt: skip
        at = [i + offset for i in range(len(parts))]
        accuracy.errorbar(at, rates, yerr=errors, color=color, marker=marker, capsize=4,
                          label=METRICS[metric])  # fmt: skip
    accuracy.set_xticks(range(len(stages)), stages)
    n = len(next(iter(stages.values()), []))
    accuracy.set(title=f"{n} held-out questions, 95 % intervals", ylabel="%", ylim=(0, 103))
    if stages:
        accuracy.legend(fontsize=8)
    for axes in (rewards, lengths, accuracy):
        axes.spines[["top"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(run_dir / "progress.png", dpi=110)
    plt.close(figure)
    return run_dir / "progress.png"


PAGE = """<!doctype html><meta charset="utf-8"><title>Completions</title>
<style>body{{font:15px/1.45 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}}
pre{{white-space:pre-wrap;background:#f4f4f4;padding:.6em;margin:.3em 0;border-left:5px solid}}
pre{{border-color:#D55E00}}
pre.right{{border-color:#009E73}}small{{color:#555}}</style>
<h1>Completions during training</h1><p>A few of each step, newest last. Green and ✓: the answer is
right; orange and ✗: it is not.</p>{body}"""


def write_html(run_dir: Path, fmt: str, steps_shown: int = 8) -> Path:
    """completions.html: sampled questions at several steps, each completion with its rewards."""
    rows = read_jsonl(run_dir / "completions.jsonl")
    steps = sorted({row["step"] for row in rows})
    if len(steps) > steps_shown:
        steps = [steps[round(i * (len(steps) - 1) / (steps_shown - 1))] for i in range(steps_shown)]
    body = []
    for step in steps:
        body.append(f"<h2>Step {step}</h2>")
        question = None
        for row in (row for row in rows if row["step"] == step):
            if row["question"] != question:
                question, gold = row["question"], html.escape(row["gold"])
                body.append(f"<p><b>{html.escape(question)}</b> (gold: {gold})</p>")
            right = is_correct(row["completion"], row["gold"], fmt=fmt)
            style, mark = ("right", "✓") if right else ("wrong", "✗")
            values = " · ".join(f"{name} {value}" for name, value in row["rewards"].items())
            body.append(f'<pre class="{style}">{mark} {html.escape(row["completion"])}</pre>'
                        f"<small>{html.escape(values)}</small>")
    path = run_dir / "completions.html"
    path.write_text(PAGE.format(body="\n".join(body)), encoding="utf-8")
    return path


def forget_after(path: Path, step: int) -> None:
    """Drop the rows of steps that a resumed run is about to do again."""
    kept = [row for row in read_jsonl(path) if row["step"] <= step]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    path.write_text("".join(lines), encoding="utf-8")


def read_jsonl(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:  # splitlines() would also split at U+2028
        return [json.loads(line) for line in file]
