"""What must hold of a run that wrote its rollouts with vLLM's engine inside Unsloth.

    python .ci/engine_checks.py RUN_DIRECTORY ENGINE_LOG [ANSWERS.jsonl ...]

The log is engine_log.py's; ANSWERS are what `infer.py --jsonl` said to the held-out questions. Used
on a real card (gpu_check.sh) and on a pretended one (test_engine.py). Ends with code 1 at a fault.
"""

import json
import re
import sys
from pathlib import Path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line]


def rollouts_of(log: list[dict]) -> list[dict]:
    """What the engine was asked for training or validation."""
    return [row for row in log if row["kind"] == "asked" and row["for_training"]]


def check_rollouts(log: list[dict]) -> str:
    """Each rollout is written with the adapter as the model has it at that moment."""
    rollouts = rollouts_of(log)
    assert rollouts, "no rollout came from the engine"
    for i, row in enumerate(rollouts, 1):
        sent, of_model = row["sent"] or 0.0, row["of_model"]
        assert of_model > 0, f"rollout {i}: the model's adapter is still zero"
        assert abs(sent - of_model) <= 1e-4 * of_model, (
            f"rollout {i}: written with an adapter of sum {sent:.6g}, not {of_model:.6g}")
    sums = [round(row["of_model"], 9) for row in rollouts]
    assert len(set(sums)) > 1 or len(sums) == 1, "the adapter stayed the same in all steps"
    return f"{len(sums)} rollouts, adapter sum {sums[0]:.4g} to {sums[-1]:.4g}"


def check_rests(log: list[dict]) -> str:
    """The engine is awake only while it is asked: its memory is free while the model trains."""
    letters = {"sleep": "s", "wake_up": "w", "asked": "a"}
    story = "".join(letters.get(row["kind"], "") for row in log)
    assert re.fullmatch("s(was)*", story), f"the engine slept and woke as {story}"
    return f"woke and slept {story.count('w')} times"


def check_agreement(run: Path, largest: float = 0.02) -> str:
    """Engine and trainer give the sampled tokens the same log-probability, up to rounding."""
    name = "sampling/sampling_logp_difference/mean"
    means = [row[name] for row in read_rows(run / "metrics.jsonl") if name in row]
    assert means, f"no {name} was logged"
    assert max(means) <= largest, f"{name} is up to {max(means):.4g}, above {largest:g}"
    return f"{name} at most {max(means):.2g}"


def check_same_answers(run: Path, answers: Path, share: float = 1.0) -> str:
    """infer.py says what the last evaluation was told, greedily, in this share of the questions."""
    measured = {row["question"]: row["completion"]
                for row in read_rows(run / "evaluation_after.jsonl")}
    said = {row["question"]: row["completion"] for row in read_rows(answers)}
    assert said and said.keys() <= measured.keys(), f"{answers} answers other questions"
    same = sum(said[question] == measured[question] for question in said)
    assert same >= share * len(said), f"{answers}: {same} of {len(said)} texts are the same"
    return f"{answers.name}: {same} of {len(said)} texts are the same"


def main(run: Path, log: Path, *answers: Path) -> int:
    rows, faults = read_rows(log), 0
    # On a card the sums of two kernels differ in their last digits, and long greedy texts fork.
    checks = [lambda: check_rollouts(rows), lambda: check_rests(rows),
              lambda: check_agreement(run, 0.05),
              *(lambda file=file: check_same_answers(run, file, 0.8) for file in answers)]
    for check in checks:
        try:
            print(f"holds:  {check()}")
        except AssertionError as fault:
            faults += 1
            print(f"FAULT:  {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main(*map(Path, sys.argv[1:])))
