"""Measuring a model on questions: accuracy with its interval, and whether a change is luck.

Strict accuracy counts an answer only in its one closed answer block; flexible accuracy takes the
last number of the text instead where there is no such block, as lm-evaluation-harness does. The
first is what the rewards train, the second shows how much of a gain is format.

    >>> [round(100 * x, 1) for x in wilson(30, 100)]
    [21.9, 39.6]
    >>> round(mcnemar([0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 0]), 3)
    0.125
"""

import json
from collections import Counter
from math import comb, sqrt
from pathlib import Path

from models import complete
from rewards import answer_block, format_fault, is_correct, parse_number

METRICS = {"strict": "strict accuracy", "flexible": "flexible accuracy",  # 0/1 columns of the rows
           "format": "strict format", "truncated": "truncated"}  # fmt: skip


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927), as two numbers in 0–1."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # The bounds of none and all are 0 and 1 exactly, which rounding would miss by 1e-16.
    return middle - half if successes else 0.0, middle + half if successes < n else 1.0


def mcnemar(before: list, after: list) -> float:
    """Two-sided exact p of McNemar's test: the same questions, right or wrong before and after."""
    gained = sum(not b and bool(a) for b, a in zip(before, after, strict=True))
    lost = sum(bool(b) and not a for b, a in zip(before, after, strict=True))
    n = gained + lost
    return min(1.0, 2 * sum(comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate that one of k samples is right, from n (Chen et al., arXiv:2107.03374)."""
    return 1.0 - comb(n - right, k) / comb(n, k)


def vote(texts: list[str], fmt: str) -> tuple[str | None, int]:
    """The answer most samples give and how many do, first seen on a tie (arXiv:2203.11171).

    Answers that are no number don't vote; (None, 0) if none is.
    """
    numbers = [parse_number(answer_block(text, fmt) or "") for text in texts]
    votes = Counter(number for number in numbers if number is not None)
    return next(((str(n), count) for n, count in votes.most_common(1)), (None, 0))


def grade(completion, gold: str, fmt: str) -> dict:
    """One completion's row: its text and the 0/1 columns of METRICS."""
    return {
        "completion": completion.text,
        "tokens": completion.tokens,
        "strict": int(is_correct(completion.text, gold, fmt=fmt)),
        "flexible": int(is_correct(completion.text, gold, mode="flexible", fmt=fmt)),
        "format": int(format_fault(completion.text, fmt) is None),
        "truncated": int(completion.truncated),
    }


def evaluate(
    model, tokenizer, rows: list[dict], fmt: str, *, max_tokens: int, path: Path | None = None,
    label: str = "", samples: int = 1, temperature: float = 0.0,
) -> list[dict]:  # fmt: skip
    """Answer every row ({"prompt", "question", "answer"}) and grade it; one result row a question.

    Greedy by default. With samples > 1 a row also has "right" (how many samples are strictly right)
    and "majority" (whether their vote is), and its other columns are those of the first sample.
    Written to `path` (.jsonl) when all are done; a `label` stands before a progress bar.
    """
    prompts = [row["prompt"] for row in rows for _ in range(samples)]
    completions = complete(model, tokenizer, prompts, max_tokens=max_tokens, label=label,
                           temperature=temperature)
    results = []
    for i, row in enumerate(rows):
        mine = completions[i * samples : (i + 1) * samples]
        result = {"question": row["question"], "gold": row["answer"]}
        result |= grade(mine[0], row["answer"], fmt)
        if samples > 1:
            chosen, _ = vote([completion.text for completion in mine], fmt)
            result["samples"] = [completion.text for completion in mine]
            result["right"] = sum(is_correct(c.text, row["answer"], fmt=fmt) for c in mine)
            result["majority"] = int(
                chosen is not None and parse_number(chosen) == parse_number(row["answer"])
            )
        results.append(result)
    if path:
        lines = (json.dumps(result, ensure_ascii=False) + "\n" for result in results)
        path.write_text("".join(lines), encoding="utf-8")
    return results


def validate(model, tokenizer, rows: list[dict], args) -> tuple[float, float]:
    """(strict accuracy, strict format share) on validation rows, to choose the best adapter by."""
    results = evaluate(model, tokenizer, rows, args.format, max_tokens=args.max_completion_length)
    return tuple(sum(r[metric] for r in results) / len(results) for metric in ("strict", "format"))


def summarise(results: list[dict]) -> dict:
    """Per metric {"rate", "low", "high", "count"}, with "n" and "mean_tokens" beside them."""
    n = len(results)
    summary = {"n": n, "mean_tokens": round(sum(r["tokens"] for r in results) / max(n, 1), 1)}
    metrics = [*METRICS, "majority"] if results and "majority" in results[0] else METRICS
    for metric in metrics:
        count = sum(r[metric] for r in results)
        low, high = wilson(count, n)
        summary[metric] = {"rate": count / max(n, 1), "low": low, "high": high, "count": count}
    if results and "right" in results[0]:
        k_max = len(results[0]["samples"])
        summary["pass_at_k"] = {
            k: sum(pass_at_k(k_max, r["right"], k) for r in results) / n
            for k in sorted({1, *(2**i for i in range(1, 10) if 2**i <= k_max), k_max})
        }
    return summary


def verdict(before: list[dict], after: list[dict], metric: str = "strict") -> dict:
    """The change of one metric between two evaluations of the same questions, in words too."""
    p = mcnemar([r[metric] for r in before], [r[metric] for r in after])
    change = (sum(r[metric] for r in after) - sum(r[metric] for r in before)) / max(len(before), 1)
    moved = "rose" if change > 0 else "fell"
    if p < 0.05:
        words = f"{METRICS[metric]} {moved} by {abs(100 * change):.1f} points"
    else:
        words = f"no significant change of {METRICS[metric]} ({100 * change:+.1f} points)"
    return {"change": change, "p": p, "words": f"{words}, McNemar p = {p:.2g}, n = {len(before)}"}


def report(stages: dict[str, list[dict]], path: Path) -> None:
    """Print the table of all stages and what changed from each to the next and over all.

    Writes the same to `path` (evaluation.json).
    """
    from rich.console import Console
    from rich.table import Table

    summaries = {stage: summarise(results) for stage, results in stages.items()}
    table = Table(title=f"{len(next(iter(stages.values())))} held-out questions, 95 % intervals")
    for column in ("", *stages):
        table.add_column(column, justify="left" if not column else "right")
    for metric in [*METRICS, "majority"]:
        if all(metric in summary for summary in summaries.values()):
            cells = [interval(summary[metric]) for summary in summaries.values()]
            table.add_row(METRICS.get(metric, "majority vote"), *cells)
    for k in next(iter(summaries.values())).get("pass_at_k", {}):
        cells = [f"{100 * summary['pass_at_k'][k]:.1f} %" for summary in summaries.values()]
        table.add_row(f"pass@{k}", *cells)
    table.add_row("mean tokens", *(f"{s['mean_tokens']:.0f}" for s in summaries.values()))
    Console().print(table)
    names = list(stages)
    pairs = list(zip(names, names[1:]))
    if len(names) > 2:
        pairs.append((names[0], names[-1]))
    changes = {f"{a} → {b}": verdict(stages[a], stages[b]) for a, b in pairs}
    print(*(f"{pair}: {change['words']}" for pair, change in changes.items()), sep="\n")
    record = {"stages": summaries, "changes": changes}
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def interval(metric: dict) -> str:
    return f"{100 * metric['rate']:.1f} % ({100 * metric['low']:.1f}–{100 * metric['high']:.1f})"
