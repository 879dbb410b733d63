"""report.py on runs written here by hand: no model is loaded."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

import report

HERE = Path(__file__).resolve().parent
EVIL = "\x1b[2J\x1b]0;owned\x07 \u202egnp\r <script>alert(1)</script> [bold]$x_1$ \ud800"


def answers(marks: str, first: int = 0, **more) -> list[dict]:
    """A row a question, right where `marks` has a 1; its length is 10, 11, ..."""
    return [{"question": f"What is {first + i} + 1?", "gold": str(first + i + 1),
             "completion": f"answer {mark}", "tokens": 10 + i, "truncated": 0, "strict": int(mark),
             "flexible": 1, "format": int(mark)} | more for i, mark in enumerate(marks)]


def steps(n: int, reward=1.0) -> list[dict]:
    return [{"step": i, "loss": 0.1, "reward": reward, "rewards/correctness_reward_func/mean": 0.5,
             "rewards/_own/mean": 0.25, "completions/mean_length": 20.0,
             "completions/clipped_ratio": 0.5} for i in range(1, n + 1)]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_run(place: Path, metrics=(), record=None, **stages) -> Path:
    """A run's directory: before=rows is evaluation_before.jsonl, measured=rows evaluation.jsonl."""
    place.mkdir(parents=True)
    record = {"base_model": "base", "seed": 0, "options": {"max_steps": 9}} | (record or {})
    (place / "args.json").write_text(json.dumps(record))
    if metrics:
        (place / "metrics.jsonl").write_text(lines(metrics))
    for stage, rows in stages.items():
        name = "evaluation.jsonl" if stage == "measured" else f"evaluation_{stage}.jsonl"
        (place / name).write_text(lines(rows))
    return place


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "first", steps(4), before=answers("0000000000"),
                    warm_start=answers("0000000111"), after=answers("1111110111"))


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def undrawn(monkeypatch):
    """For what is no test of the picture: drawing takes half a second."""
    monkeypatch.setattr(report, "draw", lambda path, *_: path.write_text("picture"))


def fails(capsys, *argv) -> str:
    """The one line on stderr in which the command ends."""
    with pytest.raises(SystemExit) as ended:
        report.main(list(map(str, argv)))
    said = capsys.readouterr()
    assert ended.value.code == 2 and not said.out, said
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    return said.err


def shown(capsys, *argv) -> str:
    report.main(list(map(str, argv)))
    return capsys.readouterr().out


def files_of(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


# ---- Statistics ----------------------------------------------------------------------------------
def test_statistics_match_published_values():
    for n in range(1, 200):
        assert report.wilson(0, n)[0] == 0 and report.wilson(n, n)[1] == 1
    assert [round(x, 3) for x in report.wilson(81, 263)] == [0.255, 0.366]  # Newcombe 1998
    assert round(report.mcnemar([1] * 5 + [0] * 15, [0] * 5 + [1] * 15), 4) == 0.0414  # binomial
    assert report.mcnemar([1, 0], [1, 0]) == 1.0
    assert report.pass_at_k(10, 3, 1) == pytest.approx(0.3) and report.pass_at_k(10, 3, 8) == 1.0
    change = report.verdict(answers("0" * 9 + "11"), answers("1" * 11))
    assert change["words"].startswith("strict accuracy rose by 81.8 points, McNemar p = 0.0039")
    change = report.verdict(answers("1" * 9 + "11"), answers("0" * 9 + "11"))
    assert change["words"].startswith("strict accuracy fell by 81.8 points")
    assert report.verdict(answers("10"), answers("01"))["words"].startswith("no significant")


def test_a_summary_counts_each_metric_and_estimates_pass_at_k():
    rows = [row | {"samples": ["a", "b", "c"], "right": right, "majority": int(right > 1)}
            for row, right in zip(answers("0111"), (0, 1, 2, 3))]
    summary = report.summarise(rows)
    assert (summary["n"], summary["mean_tokens"]) == (4, 11.5)
    assert [summary[metric]["count"] for metric in ("strict", "flexible", "majority")] == [3, 4, 2]
    assert summary["pass_at_k"] == {1: pytest.approx(0.5), 2: pytest.approx((0 + 2 / 3 + 2) / 4),
                                    3: 0.75}
    assert "majority" not in report.summarise(answers("01"))


def test_rows_are_paired_by_question_and_gold_in_whatever_order():
    first, second = answers("0110"), answers("1010")[::-1]
    second[0]["gold"] = "7"  # the same question, another gold: not the same
    second.append(second[1] | {"strict": 0})  # asked twice
    first.append(first[2])  # and the other way round: each answer counts once
    first.append(first[2])
    ours, theirs = report.shared(first, second)
    assert [row["question"] for row in ours] == [f"What is {i} + 1?" for i in (0, 1, 2, 2)]
    assert [row["strict"] for row in theirs] == [1, 0, 1, 0]


# ---- One run -------------------------------------------------------------------------------------
def test_one_run_shows_stages_changes_and_the_greatest_gain_and_writes_its_files(run, capsys):
    said = shown(capsys, run)
    assert "first: 4 of 9 GRPO steps" in said and "10 held-out questions, 95 % intervals" in said
    (strict,) = [line for line in said.splitlines() if "strict accuracy  " in line]
    assert re.findall(r"[\d.]+ % \([\d.]+–[\d.]+\)", strict) == [
        "0.0 % (0.0–27.8)", "30.0 % (10.8–60.3)", "90.0 % (59.6–98.2)"]
    assert "before → after warm start: no significant change of strict accuracy (+30.0" in said
    assert "before → after GRPO: strict accuracy rose by 90.0 points, McNemar p = 0.0039" in said
    assert "question: What is 0 + 1? (gold: 1)\n--- before (wrong)\nanswer 0\n--- after (right)\n" \
        "answer 1\n" in said
    assert said.splitlines()[-1] == f"in {run}: evaluation.json, progress.png"
    found = json.loads((run / "evaluation.json").read_text())
    assert list(found["stages"]) == ["before", "after warm start", "after GRPO"]
    assert found["stages"]["after GRPO"]["strict"]["count"] == 9
    assert list(found["changes"]) == ["before → after warm start", "after warm start → after GRPO",
                                      "before → after GRPO"]
    assert (run / "progress.png").read_bytes()[:4] == b"\x89PNG"


def test_show_does_the_same_from_python_and_rewrites_what_it_made(run, capsys):
    (run / "progress.png").write_text("old")
    assert report.show(run) is None
    assert "before → after GRPO: strict accuracy rose" in capsys.readouterr().out
    assert (run / "progress.png").read_bytes()[:4] == b"\x89PNG"
    assert files_of(run) == {"args.json", "metrics.jsonl", "evaluation.json", "progress.png",
                             *(f"evaluation_{s}.jsonl" for s in ("before", "warm_start", "after"))}


@pytest.mark.parametrize("record, label", [
    ({"adapter": "outputs/x/grpo_saved_lora"}, "outputs/x/grpo_saved_lora"), ({}, "base"),
    ({"base_model": None}, "m")])
def test_what_was_measured_alone_is_called_by_what_was_measured(tmp_path, capsys, record, label):
    rows = [row | {"samples": ["a", "b"], "right": 1, "majority": 1} for row in answers("0011")]
    said = shown(capsys, make_run(tmp_path / "m", record=record, measured=rows))
    assert list(json.loads((tmp_path / "m/evaluation.json").read_text())["stages"]) == [label]
    assert re.search(r"majority vote +│ 100\.0 %", said) and re.search(r"pass@1 +│ 50\.0 %", said)
    assert "GRPO" not in said and "question:" not in said  # nothing to compare it with
    assert not (tmp_path / "m/progress.png").exists()


def test_completions_become_a_page_that_shows_text_as_text(run, capsys, undrawn):
    (run / "completions").mkdir()
    for step in range(1, 13):
        table = pandas.DataFrame({
            "step": [step] * 9, "prompt": "asked", "completion": f"{EVIL[:-1]}\\nu\nv",
            "<i>_reward_func": 0.5, "advantage": 1.0, "answer": "1", "question": "q"})
        table.to_parquet(run / f"completions/c_{step:05d}.parquet")
    (run / "completions/c_00013.parquet").write_bytes(b"PAR1 torn")  # of the step it broke in
    report.main([str(run)])
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "c_00013.parquet is damaged" in said.err
    assert said.out.splitlines()[-1].endswith("progress.png, completions.html")
    page = (run / "completions.html").read_text()
    heads = re.findall("<th>(.*?)</th>", page)
    assert heads == ["step", "question", "answer", "completion", "&lt;i&gt;"]
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "\\nu\nv</td>" in page  # a backslash is no newline, a newline is one
    shown_steps = re.findall("<tr>\n +<td>(\\d+)</td>", page)
    assert len(shown_steps) == 8 * 7 and shown_steps[0] == "1" and shown_steps[-1] == "11"


# ---- Broken and damaged runs ---------------------------------------------------------------------
def test_a_run_that_broke_is_shown_as_far_as_it_came(run, capsys):
    (run / "evaluation_after.jsonl").unlink()
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole[:-30])
    report.main([str(run)])
    said = capsys.readouterr()
    assert said.err == f"watch: {run / 'metrics.jsonl'} ends in the middle of line 4, which is " \
        "left out\n"
    assert "first: 3 of 9 GRPO steps" in said.out and "before → after warm start: " in said.out
    assert "after GRPO" not in said.out and (run / "progress.png").is_file()


@pytest.mark.parametrize("kept, last", [
    (["args.json"], "no evaluation and no GRPO step there yet"),
    (["args.json", "metrics.jsonl"], "in first: progress.png"),
    (["metrics.jsonl"], "in first: progress.png"),
    (["evaluation_before.jsonl"], "in first: evaluation.json"),
    (["evaluation_after.jsonl", "metrics.jsonl"], "in first: evaluation.json, progress.png"),
])
def test_any_file_of_a_run_may_be_missing(run, capsys, monkeypatch, kept, last):
    monkeypatch.chdir(run.parent)
    for path in run.iterdir():
        if path.name not in kept:
            path.unlink()
    assert shown(capsys, "first").splitlines()[-1] == last
    other = make_run(run.parent / "other", steps(1), after=answers("01"))
    said = shown(capsys, "first", "other")
    assert "other" in said and Path("comparison.png").is_file(), other


def test_steps_with_nothing_but_a_reward_are_drawn(tmp_path, capsys):
    rows = [{"step": 1, "reward": 1.0}, {"step": 2, "reward": float("nan")},
            {"step": 2, "reward": None, "completions/mean_length": "long"}, {"step": 3},
            {"step": 4, "eval_reward": 1.0}, {"train_runtime": 9.0}]
    assert "2 of 9" not in shown(capsys, make_run(tmp_path / "a", rows))
    assert (tmp_path / "a/progress.png").is_file()
    shown(capsys, tmp_path / "a", make_run(tmp_path / "b", steps(2)))
    assert (tmp_path / "comparison.png").is_file()


@pytest.mark.parametrize("name, text", [
    ("args.json", "{"), ("args.json", "[]"), ("metrics.jsonl", '{"step": 1\n{"step": 2}\n'),
    ("evaluation_after.jsonl", "1\n{}\n"), ("evaluation_after.jsonl", '{"question": "q"}\n'),
    ("evaluation_after.jsonl", b"\xff\n\n".decode("latin-1")),
    ("evaluation_before.jsonl", lines(answers("01", tokens="9"))),
    ("evaluation_before.jsonl", lines(answers("01", gold=None))),
    ("evaluation.jsonl", lines(answers("01", samples=["a"], right=2))),
    ("evaluation.jsonl", lines(answers("0", samples=["a"], right=1) + answers("0"))),
    ("evaluation.jsonl", lines(answers("01", strict=3))),
])
def test_a_damaged_file_is_named_in_one_line(run, capsys, name, text):
    (run / name).write_text(text, encoding="latin-1")
    assert f"{run / name} is damaged" in fails(capsys, run)
    assert not (run / "progress.png").exists()


def test_no_run_is_one_line_that_says_what_to_type(run, capsys, monkeypatch):
    (run / "grpo_saved_lora").mkdir()
    (run / "grpo_saved_lora/args.json").write_text("{}")  # an adapter has one, too
    for path in (run.parent, run.parent / "frist", run / "grpo_saved_lora", run / "metrics.jsonl"):
        said = fails(capsys, path)
        assert f"error: {path} is no run: it has no args.json, metrics.jsonl or evaluation" in said
        assert said.endswith(f"type {run}\n")


@pytest.mark.parametrize("argv, wanted", [
    ([], "required: RUN"), (["first", "--jsno"], "unrecognized arguments: --jsno"),
    (["first", "first/"], "given twice"), (["first", "--output", "a.png"], "of several runs"),
    (["first", "b", "--output", "a.jpg"], "must end in .png"),
    (["first", "b", "--output", "no/a.png"], "no directory no"),
    (["first", "b", "--json", "--output", "a.png"], "--json draws nothing"),
    (["x" * 300], "File name too long"), (["\x1b[2J"], "error:  [2J is no run"),
])
def test_a_wrong_command_is_one_line(run, capsys, monkeypatch, argv, wanted):
    monkeypatch.chdir(run.parent)
    assert wanted.replace("  ", " ") in fails(capsys, *argv)
    assert files_of(run.parent) == {"first"}


# ---- Several runs --------------------------------------------------------------------------------
def test_several_runs_are_one_table_one_picture_and_mcnemar(run, capsys):
    second = make_run(run.parent / "second", steps(2), {"seed": 7},
                      before=answers("1" + 9 * "0"), after=answers("1000000000")[::-1])
    said = shown(capsys, run, second)
    first_row, second_row = (next(i for i, line in enumerate(said.splitlines())
                                  if line.startswith(name)) for name in ("first ", "second "))
    rows = said.splitlines()
    assert rows[first_row].split() == ["first", "0.0", "%", "30.0", "%", "90.0", "%", "90.0", "%",
                                       "14", "10"]
    assert rows[second_row].split() == ["second", "10.0", "%", "–", "10.0", "%", "10.0", "%", "14",
                                        "10"]
    assert "4 steps" in rows[first_row + 1] and "(59.6–98.2)" in rows[first_row + 1]
    assert "\nseed: 0 | 7\n" in said and "base_model:" not in said  # what differs
    assert ("first → second, after GRPO: strict accuracy fell by 80.0 points, McNemar p = 0.0078, "
            "n = 10 shared questions") in said
    assert rows[-1] == f"picture: {run.parent / 'comparison.png'}"
    assert (run.parent / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert "progress.png" not in files_of(run) | files_of(second)


def test_only_questions_that_both_answered_are_compared(run, capsys, undrawn):
    other = make_run(run.parent / "b", after=answers("11111", first=6))
    apart = make_run(run.parent / "c", measured=answers("11", first=60))
    said = shown(capsys, run, other, apart)
    assert re.search("first → b, after GRPO: no significant.*n = 4 shared questions", said)
    assert "first (after GRPO) → c (measured): they share no question" in said
    assert "Bonferroni" not in said  # one test
    rows = answers("0000000", samples=["a", "b"], right=1, majority=1)
    said = shown(capsys, run, other, make_run(run.parent / "d", measured=rows))
    assert re.search("majority .*\n.* vote ", said) and "100.0 %" in said
    assert "of 3 tests some may look significant by chance: ask for p < 0.017" in said


def test_runs_of_one_name_are_told_apart(tmp_path, capsys):
    paths = [make_run(tmp_path / part / "run", after=answers("01")) for part in ("a", "b", "b/c")]
    said = json.loads(shown(capsys, *paths, make_run(tmp_path / "own", after=answers("0")),
                            "--json"))
    assert [one["name"] for one in said["runs"]] == ["a/run", "b/run", "c/run", "own"]


def test_nothing_saved_is_overwritten(run, capsys, undrawn):
    other = make_run(run.parent / "b", after=answers("11111"))
    for name in ("comparison.png", "comparison-2.png", "mine.png"):
        (run.parent / name).write_text("kept")
    assert shown(capsys, run, other).endswith(f"picture: {run.parent / 'comparison-3.png'}\n")
    mine = run.parent / "mine.png"
    said = shown(capsys, run, other, "--output", mine)
    assert said.endswith(f"picture: {mine.with_name('mine-2.png')}\n")
    assert (run.parent / "comparison.png").read_text() == mine.read_text() == "kept"


def test_json_is_one_object_and_writes_nothing(run, capsys):
    other = make_run(run.parent / "b", record={"adapter": EVIL}, measured=answers("11111"))
    said = shown(capsys, run, other, "--json")
    found = json.loads(said)
    assert [(one["name"], one["steps"]) for one in found["runs"]] == [("first", 4), ("b", 0)]
    assert found["runs"][0]["stages"]["after GRPO"]["strict"]["rate"] == 0.9
    assert found["runs"][0]["changes"]["before → after GRPO"]["change"] == 0.9
    (comparison,) = found["comparisons"]
    assert comparison["runs"] == ["first", "b"] and comparison["shared"] == 5
    assert comparison["p"] == 1.0 and not {c for c in said if not c.isprintable()} - {"\n"}
    assert files_of(other) == {"args.json", "evaluation.jsonl"}
    assert "progress.png" not in files_of(run) and files_of(run.parent) == {"first", "b"}


# ---- The screen, the picture, the start ----------------------------------------------------------
def test_no_text_steers_the_terminal_or_the_picture(tmp_path, capsys):
    name = EVIL[:-1].replace("/", "")
    rows = [row | {"question": EVIL, "gold": EVIL, "completion": EVIL} for row in answers("01")]
    metrics = [row | {f"rewards/{name}/mean": 0.5} for row in steps(2)]
    record = {"seed": EVIL, "adapter": EVIL}
    run = make_run(tmp_path / name, metrics, record, before=rows, after=rows)
    said = shown(capsys, run)
    other = make_run(tmp_path / "_other", metrics, measured=rows)
    said += shown(capsys, run, other, make_run(tmp_path / "m", record=record, measured=rows))
    assert not {c for c in said if not c.isprintable()} - set("\n\t")
    assert "[bold]" in said and "owned" in said  # shown, as text
    assert (run / "progress.png").is_file() and (tmp_path / "comparison.png").is_file()


def test_names_in_a_table_are_no_markup(capsys):
    report.print_table(":smile:", ["[bold]x"], [["[red]y[/]"]])
    said = capsys.readouterr().out
    assert ":smile:" in said and "[bold]x" in said and "[red]y[/]" in said


def test_names_in_the_picture_are_no_formulas_and_are_not_hidden():
    from matplotlib.mathtext import MathTextParser

    assert report.as_label("_own").strip() == "_own" and not report.as_label("_own").startswith("_")
    assert report.as_label("a$b$") == r"a\$b\$" and len(report.as_label("x" * 99)) == 48
    MathTextParser("agg").parse(report.as_label("$\\frac{$"))  # raises where it is a formula


@pytest.mark.parametrize("argv", [["--help"], ["first", "--json"]])
def test_it_starts_without_what_it_does_not_need(run, argv):
    code = f"""
import runpy, sys
sys.argv[1:] = {argv}
try:
    runpy.run_path({str(HERE / "report.py")!r}, run_name="__main__")
except SystemExit:
    pass
heavy = {{"torch", "matplotlib", "pandas", "rewards", "transformers", "rich"}}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=run.parent, text=True,
                          capture_output=True, check=True)
    assert done.stderr.strip() == "[]" and done.stdout


def test_alone_in_a_directory_it_shows_a_run(run, tmp_path):
    place = tmp_path / "alone"
    place.mkdir()
    (place / "report.py").write_bytes((HERE / "report.py").read_bytes())
    done = subprocess.run([sys.executable, "report.py", run], cwd=place, text=True,
                          capture_output=True, env={"PATH": "", "MPLBACKEND": "TkAgg"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "progress.png" in done.stdout
