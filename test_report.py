"""report.py on runs written here by hand: no model is loaded."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

import report

EVIL = "\x1b[2J\x1b]0;owned\x07 \u202egnp\r <script>alert(1)</script> [bold]$x_1$ \ud800"


def answers(marks: str, first: int = 0, **more) -> list[dict]:
    """A row a question, right where `marks` has a 1; its length is 10, 11, ..."""
    return [{"question": f"What is {first + i} + 1?", "gold": str(first + i + 1),
             "completion": f"answer {mark}", "tokens": 10 + i, "truncated": 0, "strict": int(mark),
             "flexible": 1, "format": int(mark)} | more for i, mark in enumerate(marks)]


def steps(n: int) -> list[dict]:
    return [{"step": i, "reward": 1.0, "rewards/_own/mean": 0.25, "completions/mean_length": 20.0,
             "completions/clipped_ratio": 0.5} for i in range(1, n + 1)]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_run(place: Path, **files) -> Path:
    """A run's directory: evaluation_before=rows is evaluation_before.jsonl."""
    place.mkdir(parents=True)
    for name, rows in files.items():
        (place / f"{name}.jsonl").write_text(lines(rows))
    return place


@pytest.fixture
def run(tmp_path) -> Path:
    metrics = [*steps(4), {"step": 4, "eval_reward": 1.0}, {"step": 4, "train_runtime": 9.0}]
    return make_run(tmp_path / "first", metrics=metrics, evaluation_before=answers("0" * 10),
        evaluation_warm_start=answers("0" * 7 + "111"), evaluation_after=answers("1111110111"))


def fails(capsys, function, argument) -> str:
    """The one line on stderr in which the call ends."""
    with pytest.raises(SystemExit, match="^2$"):
        function(argument)
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1, line
    return line


def shown(capsys, *argv) -> str:
    report.main(list(map(str, argv)))
    return capsys.readouterr().out


def test_statistics_match_published_values():
    for n in range(1, 200):
        assert report.wilson(0, n)[0] == 0 and report.wilson(n, n)[1] == 1
    assert [round(x, 3) for x in report.wilson(81, 263)] == [0.255, 0.366]  # Newcombe 1998
    many = report.verdict(answers("0" * 15 + "1" * 5), answers("1" * 15 + "0" * 5))
    assert round(many["p"], 4) == 0.0414  # binomial
    change = report.verdict(answers("0" * 9 + "11"), answers("1" * 11))
    assert change["words"].startswith("strict accuracy rose by 81.8 points, McNemar p = 0.0039")
    same = report.verdict(answers("10"), answers("01"))
    assert same["words"].startswith("no significant") and same["p"] == 1.0


def test_rows_are_paired_by_question_and_gold_in_whatever_order():
    first, second = answers("0110"), answers("1010")[::-1]
    second[0]["gold"] = "7"  # the same question, another gold: not the same
    pairs = report.shared([*first, first[2]], second)  # each question once
    assert [(old["gold"], new["strict"]) for old, new in pairs] == [("1", 1), ("2", 0), ("3", 1)]


def test_one_run_shows_stages_changes_and_the_greatest_gain_and_writes_its_files(run, capsys):
    (run / "progress.png").write_text("old")
    report.show(run)
    said = capsys.readouterr().out
    assert re.search(r"strict accuracy +0.0 % \(0.0–27.8\) +30.0 % \(10.8–60.3\) +90.0 % \(5", said)
    for line in ("held-out questions, 95 % intervals\n", "GRPO\nstrict accuracy ",
                 "before → after warm start: no significant change of strict accuracy (+30.0",
                 "before → after GRPO: strict accuracy rose by 90.0 points, McNemar p = 0.0039",
                 "question: What is 0 + 1? (gold: 1)\n--- before (wrong)\nanswer 0\n--- after ("):
        assert line in said
    found = json.loads((run / "evaluation.json").read_text())
    assert list(found["stages"]) == ["before", "after warm start", "after GRPO"]
    assert found["stages"]["after GRPO"]["strict"]["count"] == 9 and len(found["changes"]) == 3
    assert (run / "progress.png").read_bytes()[:4] == b"\x89PNG" and len(os.listdir(run)) == 6


def test_what_was_measured_alone_shows_majority_vote_and_pass_at_k(tmp_path, capsys):
    rows = [row | {"samples": ["a", "b", "c"], "right": n, "majority": int(n > 1)}
            for n, row in enumerate(answers("0111"))]
    said = shown(capsys, make_run(tmp_path / "m", evaluation=rows))
    assert set(os.listdir(tmp_path / "m")) == {"evaluation.json", "evaluation.jsonl"}
    assert "measured alone" in said and "question:" not in said  # nothing to compare it with
    for label, text in {"majority vote": "50.0 %", "pass@1": "50.0 %", "pass@2": "66.7 %",
                        "pass@3": "75.0 %", "strict accuracy": "75.0 %", "mean tokens": "12",
                        "questions": "4"}.items():
        assert re.search(f"{label} +{text}", said), label


def test_completions_become_a_page_that_shows_text_as_text(run):
    (run / "completions").mkdir()
    table = pandas.DataFrame({"step": [1] * 9, "prompt": "asked", "<i>": 0.5, "advantage": 1.0,
                              "completion": f"{EVIL[:-1]}\\nu\nv", "answer": "1" * 99})
    for step in range(1, 17):
        table.to_parquet(run / f"completions/c_{step:05d}.parquet")
    report.main([str(run)])
    page = (run / "completions.html").read_text()
    assert re.findall("<th>(.*?)</th>", page) == ["step", "&lt;i&gt;", "completion", "answer"]
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "1" * 99 in page
    assert "\\nu\nv</td>" in page  # a backslash is no newline, a newline is one
    assert page.count("<tr>") == 6 * 8 and "prompt" not in page


@pytest.mark.parametrize("kept, made", [
    ({"metrics.jsonl"}, {"progress.png"}), ({"evaluation_before.jsonl"}, {"evaluation.json"}),
    ({"evaluation_after.jsonl", "metrics.jsonl"}, {"evaluation.json", "progress.png"})])
def test_a_run_that_broke_is_shown_as_far_as_it_came(run, kept, made):
    for name in set(os.listdir(run)) - kept:
        (run / name).unlink()
    report.show(run)
    assert set(os.listdir(run)) == kept | made


@pytest.mark.parametrize("name, text", [
    ("metrics.jsonl", '{"step": 1\n{"step": 2}\n'), ("metrics.jsonl", '{"step": 1}\n{"st'),
    ("evaluation_after.jsonl", "1\n{}\n"), ("evaluation_after.jsonl", '{"question": "q"}\n'),
    ("evaluation_after.jsonl", "\xff\n\n"), ("completions/c_1.parquet", "PAR1 torn"),
    ("evaluation.jsonl", lines(answers("01", samples=["a"], right=2)))])
def test_a_damaged_file_is_named_in_one_line(run, capsys, name, text):
    (run / "completions").mkdir()
    (run / name).write_text(text, encoding="latin-1")
    assert f"{run / name} is damaged" in fails(capsys, report.show, run)


@pytest.mark.parametrize("argv, wanted", [
    (["."], "error: . holds no metrics.jsonl or evaluation*.jsonl: name a run's directory"),
    (["frist"], "frist holds no"), (["first/metrics.jsonl"], "first/metrics.jsonl holds no"),
    ([], "required: RUN"), (["first", "--jsno"], "unrecognized arguments: --jsno"),
    (["first", "--output", "a.png"], "several"), (["a", "b", "--json", "--output", "c"], "several"),
    (["x" * 300], "File name too long"), (["\x1b[2J"], "[2J holds no")])
def test_a_wrong_command_is_one_line(run, capsys, monkeypatch, argv, wanted):
    monkeypatch.chdir(run.parent)
    assert wanted in fails(capsys, report.main, argv)
    assert os.listdir(run.parent) == ["first"]


def test_several_runs_are_one_table_one_picture_and_mcnemar(run, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    make_run(Path("second"), metrics=steps(2), evaluation_before=answers("1000000000"),
             evaluation_after=answers("0000000001"))
    make_run(Path("c"), evaluation=answers("11", first=60))
    said = shown(capsys, "first", "second", "c")
    rows = [re.split("  +", line.strip()) for line in said.splitlines()[2:8]]
    assert rows[2] == ["after GRPO", "90.0 % (59.6–98.2)", "90.0 % (59.6–98.2)", "14", "10"]
    assert [" ".join(row[:-4]) for row in rows] == ["first before", "after warm start",
        "after GRPO", "second before", "after GRPO", "c measured alone"]
    assert ("first, after GRPO → second, after GRPO: strict accuracy fell by 80.0 points, "
            "McNemar p = 0.0078, n = 10") in said
    assert "first, after GRPO → c, measured alone: nothing to compare, n = 0" in said
    assert said.splitlines()[-1] == f"picture: {run.parent / 'comparison.png'}"
    Path("mine.png").write_text("kept")
    for more, made in ([], "comparison-2.png"), (["--output", "mine.png"], "mine-2.png"):
        assert shown(capsys, "first", "c", *more).splitlines()[-1].endswith(made)
    assert Path("mine.png").read_text() == "kept"


def test_json_is_one_object_and_writes_nothing(run, capsys):
    other = make_run(run.parent / "b", evaluation=answers("11111"))
    found = json.loads(shown(capsys, run, other, "--json"))
    assert [one["name"] for one in found["runs"]] == [str(run), str(other)]
    assert found["runs"][0]["changes"]["before → after GRPO"]["change"] == 0.9
    assert [(change["n"], change["p"]) for change in found["comparisons"].values()] == [(5, 1.0)]
    assert os.listdir(other) == ["evaluation.jsonl"] and "progress.png" not in os.listdir(run)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_no_text_steers_the_terminal_or_the_picture(tmp_path, capsys):
    rows = [row | {"question": EVIL, "gold": EVIL, "completion": EVIL} for row in answers("01")]
    metrics = [row | {"rewards/$\\frac{$/mean": 0.5} for row in steps(2)]
    run = make_run(tmp_path / EVIL[:-1].replace("/", ""), metrics=metrics, evaluation_before=rows,
                   evaluation_after=rows)
    other = make_run(tmp_path / "_other", metrics=metrics, evaluation=rows)
    said = shown(capsys, run) + shown(capsys, run, other)
    assert not {c for c in said if not c.isprintable()} - set("\n\t")
    assert "[bold]" in said and "owned" in said  # shown, as text


@pytest.mark.parametrize("argv", [["--help"], ["first", "--json"]])
def test_it_starts_without_what_it_does_not_need(run, argv):
    command = [sys.executable, "-X", "importtime", report.__file__, *argv]
    done = subprocess.run(command, cwd=run.parent, capture_output=True, text=True, check=True)
    assert "argparse" in done.stderr and done.stdout
    assert not re.search(r"\| +(torch|matplotlib|pandas|rewards|rich)\n", done.stderr)
