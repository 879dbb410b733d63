"""What goes wrong, as its user meets it: one line, exit code 2, nothing lost or half written."""

import gzip
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from itertools import product
from pathlib import Path

import pytest

os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read once, as datasets is imported

from conftest import (
    CHEAP, HERE, RUN, SAVED, arguments, command, furnish, lines, read_rows, same_weights, stopped,
    turn, weights,
)
from test_field import make_adapter
import infer
import laptop
import reasoning_model_grpo as script

slow = pytest.mark.slow
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GOOD, LONG = lines(laptop.generate_questions(12)).encode(), "a" * 5000


# ---- Malformed inputs ----------------------------------------------------------------------------
def row(answer, question="a") -> bytes:
    return lines([{"question": question, "answer": answer}]).encode()


def parquet(**columns):
    return lambda path: __import__("pandas").DataFrame(columns).to_parquet(path)


def folder(name, content):
    return lambda path: [path.mkdir(), (path / name).write_bytes(content)]


def shorten(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


ANSWERS = [None, True, {"a": 1}, "", "many", "1 #### many", math.nan, math.inf, "10,80", "x = 5",
           "x > 5", "$5 n$", "\0", "\ud800", [turn("5", "assistant")]]
QUESTIONS = [None, {"text": "a"}, "\n", [turn("a", "system")], [turn({"a": 1})],
             [{"role": "user"}], [[[["a"]]]]]
TEXTS = {  # by kind of file
    "jsonl": [
        *map(row, ANSWERS), *(row(1, question) for question in QUESTIONS), b"", b"\n \n\n", b"1\n2",
        row(1).replace(b'"a"', b'"\xe9"'), bytes(99), GOOD[:-9], GOOD.decode().encode("utf-16"),
        b"null\n", b"{'question': 'a', 'answer': 1}", GOOD + b"3\n", b"[" * 200_000,
        row(1).replace(b"1", b"1e999999999"), row(1).replace(b"1", b"9" * 5000)],
    "json": [b"", b'{"data": []}', b"3", b"[[{}]]", b'[{"question": ', b'{"a":' * 200_000,
             b'{"a": [{"question": 1}], "b": [1]}'],
    "csv": [b"", b"question,answer\n", b"question,answer\na,1,2\n", b'question,answer\n"a,1\n',
            b"question;answer\na;1\n", "question,answer\na,1\n".encode("utf-16")],
    "tsv": [b"question,answer\na,1\n"], "txt": [b"", b"a?\n"], "parquet": [b"", b"PAR1PAR1"],
    "zip": [b"PK\3\4"], "xlsx": [b"PK\3\4"], "gz": [gzip.compress(GOOD)], "arrow": [b"ARROW1"],
    "jsonl.gz": [GOOD, gzip.compress(GOOD)[:-20], gzip.compress(GOOD)[:-8] + bytes(8)],
    "py": [b"open('ran', 'w')"]}
DATA = {f"{n}.{kind}": content for kind, all in TEXTS.items() for n, content in enumerate(all)} | {
    "cut.parquet": lambda path: [parquet(question=["a"], answer=[1])(path), shorten(path)],
    "none.parquet": parquet(question=[], answer=[]), "other.parquet": parquet(q=["a"], a=[1]),
    "folder-empty": Path.mkdir, "folder-other": folder("readme", b"x"),
    "folder-columns": folder("train.jsonl", b'{"q": 1}\n'),
    "folder-info": folder("dataset_info.json", b"{"),
    "folder-dict": folder("dataset_dict.json", b'{"splits": 3}')}
CONFIGS = [  # texts that are no table of options, or say what no option takes
    "[1, 2]", "3", "a: [", "max-steps:\t\t- 2", "max-steps: 2\n beta: 1\n", "max-steps: *none",
    "!!python/object/apply:os.system ['touch ran']", "max-steps: 2\n---\nmax-steps: 3\n",
    "lerning_rate: 1", "max-steps: {a: 1}", "max-steps: [1, 2]", "max-steps: true",
    "learning-rate: .nan", "dry-run: maybe", "1: 2", "recipe: [qwen-3b, cookbook]",
    "\u0000\u0001\u0002", "<<: {max-steps: x}", "? [a, b]\n: 2", 'adapter: "\\ud800"']
CODE = [  # of a file whose reward is `f`
    *(f"def f(completions, **kwargs):\n    {body}\n" for body in (
        "return [0.0]", "return ['good'] * 2", "return [float('nan')] * 2", "return None",
        "return 1.0", "return [10**400] * 2", "return [1j] * 2", "return [[1.0]] * 2",
        "return {'a': 1, 'b': 2}", "return 'ab'", "raise ValueError('two\\nlines \\x1b[2J')",
        "return f(completions)", "raise SystemExit(0)", "raise StopIteration", "raise MemoryError",
        "return [None, float('nan')]", "import torch; return torch.zeros(2, 3)",
        "return (1 / 0 for _ in completions)")),
    "def f(:", "import nothing_of_that_name", "raise SystemExit(0)", "f = 3", "f = max",
    "def f(points, **kwargs): return [0.0] * 4", "class f: pass", "# \u00ff", "\u0000"]
TYPED = [[f"--{name}", value] for names, values in [
    ("lora-rank save-steps", ["0", "1.5", "x", "", "1e3"]), ("seed", ["-1", "4294967296"]),
    ("learning-rate lora-alpha temperature", ["0", "nan", "1e999"]), ("beta", ["-0.1", "inf"]),
    ("lora-dropout gpu-memory-utilization", ["1", "-1"]), ("num-generations", ["1", "3"]),
    ("reward-weights", ["nan", "-inf", "x"]), ("dtype loss-type recipe export", ["nope"]),
    ("chat-template-kwargs", ["{", "3"]), ("lora-targets dataset-config", ["q_proj,nope"]),
    ("set", ["nope=1", "top_k", "=1", "optim=nope", "adam_beta1=NaN", "logging_steps={}"]),
    ("dataset eval-dataset model adapter config",
     ["./nowhere/x", "owner/name/x", "\udcff", LONG, "data.jsonl/x"]),
    ("reward-funcs", ["nope", ":f", "f:", "./x.py:f", f"{LONG}:f", "outputs:f"]),
    ("question-column dataset", [""]), ("model adapter", [".."]), ("output-dir", [LONG]),
] for name, value in product(names.split(), values)] + [words.split() for words in (
    "--lerning-rate 1", "--max-step 2", "--", "stray", "--set", "--resume --output-dir nowhere",
    "--dry-run=3", "--full-finetune --adapter x", "--full-finetune --export merged",
    "--full-finetune --load-in-4bit", "--dtype float16", "--export hub", "--few-shot 99",
    "--eval-steps 2 --save-steps 3", "--reward-weights 1 2", "--max-prompt-length 1",
    "--vllm colocate", "--backend unsloth --vllm server",
    "--batch-size 3 --gradient-accumulation-steps 1")]


def record(**more):
    return lambda place: (place / CONFIG).write_text(
        json.dumps(json.loads((place / CONFIG).read_text()) | more))


def put(name, content: bytes):
    return lambda place: (place / name).write_bytes(content)


def tensors(change):
    def rewrite(place):
        from safetensors.torch import save_file

        changed = {k: v.contiguous() for k, v in change(weights(place)).items()}
        save_file(changed, place / WEIGHTS, {"format": "pt"})
    return rewrite


def pickled(content, place):
    import torch

    (place / WEIGHTS).unlink()
    file = place / "adapter_model.bin"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)


class Code:
    """Unpickled, it makes a file `ran`."""

    def __reduce__(self):
        return os.system, ("touch ran",)


ADAPTERS = {
    **{f"config-{name}": put(CONFIG, content) for name, content in {
        "empty": b"", "list": b"[]", "open": b"{", "nothing": b"{}", "latin": b'{"r": "\xff"}',
        "deep": b"[" * 200_000}.items()},
    **{f"{field}-{value}": record(**{field: value}) for field, values in {
        "peft_type": ["IA3", "NOPE", None, 3], "lora_alpha": ["x"], "r": ["x", 0, 10**9, 4],
        "target_modules": [[], ["nope"], 3, ["q_proj"]],
        "base_model_name_or_path": [3, None, "owner/other", "./nowhere"],
    }.items() for value in values},
    **{f"weights-{n}": put(WEIGHTS, content) for n, content in enumerate([
        b"", b"\xff" * 8 + b"{}", b"\4" + bytes(7) + b"{{{{",
        b"\x40" + bytes(7) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,999]}}'.ljust(64),
    ])},
    **{f"tensors-{name}": tensors(change) for name, change in {
        "nan": lambda all: {k: v * math.nan for k, v in all.items()},
        "halved": lambda all: dict(list(all.items())[::2])}.items()},
    "cut": lambda place: shorten(place / WEIGHTS),
    "no-weights": lambda place: (place / WEIGHTS).unlink(),
    **{f"bin-{n}": lambda place, content=content: pickled(content, place) for n, content in
       enumerate([b"", b"x", [1, 2], {"a": Code()}, pickle.dumps(Code())])},
    **{f"args-{n}": put("args.json", content) for n, content in enumerate([b"", b"[1]", b"\xff"])},
    "tokenizer": lambda place: [put(f"tokenizer{k}.json", b"{")(place) for k in ("", "_config")],
    "weights-folder": lambda place: [(place / WEIGHTS).unlink(), (place / WEIGHTS).mkdir()],
    "file": lambda place: [shutil.rmtree(place), place.write_bytes(b"")]}
TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}", "{% for", "{{ 1 / 0 }}",
    "{{ messages.append(1) }}", "{{ raise_exception('no') }}", "{% include '/etc/passwd' %}"]


def plan(model, *more, data="data.jsonl") -> list[str]:
    return arguments(model, "--dry-run", *more, dataset=data)


def steps(run) -> list[int]:
    return [row["step"] for row in read_rows(Path(run) / "metrics.jsonl") if "loss" in row]


@pytest.fixture
def refused(workplace, capfd):
    """Called with words: they must end in one line that has a `subject`; nothing is written."""

    def check(argv, *subjects):
        there = {*workplace.rglob("*")}
        line = stopped(capfd, script.main, argv)
        assert len(line) > 30 and any(subject in line for subject in subjects), line
        new = {path.relative_to(workplace).parts[0] for path in {*workplace.rglob("*")} - there}
        assert new <= {"__pycache__"}, new

    return check


@pytest.mark.parametrize("name", DATA)
def test_a_malformed_data_set_is_named_in_one_line(name, refused, tiny_model):
    content = DATA[name]
    Path(name).write_bytes(content) if isinstance(content, bytes) else content(Path(name))
    refused(plan(tiny_model, "--eval-dataset", "data.jsonl", data=name), name)


@pytest.mark.parametrize("text", CONFIGS)
def test_a_malformed_configuration_ends_in_one_line(text, refused, tiny_model):
    Path("c.yaml").write_text(text)
    refused(plan(tiny_model, "--config", "c.yaml"), "c.yaml", "None",
            *re.findall(r"[\w-]+", text.replace("_", "-")))


@pytest.mark.parametrize("text", CODE)
def test_a_faulty_reward_is_named_in_one_line(text, refused, tiny_model):
    Path("r.py").write_text(text, "latin-1")
    refused(plan(tiny_model, "--reward-funcs", "r.py:f"), "r.py:f")


@pytest.mark.parametrize("typed", TYPED)
def test_what_no_option_takes_ends_in_one_line(typed, refused, tiny_model):
    named = re.findall(r"\w[\w/-]*", " ".join(typed))
    refused(plan(tiny_model, *typed), *named if named and " ".join(typed).isascii() else [""])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model) -> Path:
    place = tmp_path_factory.mktemp("adapter")
    make_adapter(tiny_model, place, {"r": 8, "target_modules": ["q_proj", "v_proj"]})
    return place


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_malformed_adapter_ends_in_one_line(name, refused, adapter):
    ADAPTERS[name](Path(shutil.copytree(adapter, name)))
    refused([*CHEAP, "--adapter", name, "--dataset", "data.jsonl"], name, "Hub", "nowhere",
            "chat-template")


NASTY = [b"\0", b"\xff", b"\xed\xa0\x80", b'"', b"{", b"]", b",", b"\n", b"null", b"NaN", b"1e999",
         b"[[[[", b"\xe2\x80\xa8", b": ", b"- ", b"!!python/x "]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few bytes lost, doubled, or put in."""
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randrange(len(content) + 1), rng.randrange(1, 30)
        content = rng.choice([
            content[:at] + content[at + n :], content[: at + n] + content[at:], content[:at],
            content[:at] + rng.choice(NASTY) + content[at + rng.choice([0, 1, n]) :]])
    return content


@pytest.mark.parametrize("count", [64, pytest.param(800, marks=slow)])
def test_a_spoilt_file_is_taken_or_refused_in_one_line(
        count, workplace, tiny_model, adapter, capfd):
    rng, refusals, mad = random.Random(count), 0, Path(shutil.copytree(adapter, "mad"))
    parquet(question=[f"q{n}" for n in range(12)], answer=range(12))(Path("m.parquet"))
    files = {"m.jsonl": GOOD, "m.json": b"[" + GOOD.strip().replace(b"\n", b",\n") + b"]",
             "m.csv": b"question,answer\n" + b'"a, b",1\n' * 12, "m.jsonl.gz": gzip.compress(GOOD),
             "m.parquet": Path("m.parquet").read_bytes(),
             "m.yaml": b"max-steps: 2\nlearning-rate: 0.003\nset: [top_k=5]\n"}
    files |= {f"mad/{name}": (mad / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    for i in range(count):
        name = list(files)[i % len(files)]
        Path(name).write_bytes(mutated(files[name], rng))
        words = ["--adapter", "mad"] if name.startswith("mad") else [
            "--config" if name == "m.yaml" else "--dataset", name]
        capfd.readouterr()
        try:
            script.main(plan(tiny_model, *words))
        except SystemExit as end:
            refusals += 1
            assert end.code == 2 and capfd.readouterr().err.count("\n") == 1, (i, name)
        Path(name).write_bytes(files[name])
    assert count / 4 < refusals < count and not Path("ran").exists()


# ---- Faults that show only later -----------------------------------------------------------------
LATER = {  # what a reward that was right before training gives in its second step
    "[float('nan')] * n": "for the completion '", "[1 / 0]": "ZeroDivisionError", "exit(0)": "",
    "[0.0] * (n - 1)": "3 values for 4", "['good'] * n": "string to float: 'good'",
    "None": "TypeError"}
TURNS = """
import os
def turns(completions, trainer_state=None, **kwargs):
    n = len(completions)
    if trainer_state and trainer_state.global_step == 1 and not os.path.exists("ok"):
        return {}
    return [sum(c in "aeiou0123" for c in m[-1]["content"]) / 8 for m in completions]
"""


@slow
@pytest.mark.parametrize("kind", ["def", "async def"])  # the second is not tried before training
@pytest.mark.parametrize("gives", LATER)
def test_a_reward_that_fails_in_training_is_named_and_mended_it_goes_on(
        gives, kind, workplace, tiny_model, capfd):
    (workplace / "turns.py").write_text(TURNS.replace("{}", gives).replace("def", kind))
    line = stopped(capfd, script.main, arguments(
        tiny_model, "--save-steps", "1", "--eval-questions", "0", reward="turns.py:turns"))
    assert "turns.py:turns" in line and LATER[gives] in line
    (workplace / "ok").touch()
    script.main(["--resume"])
    assert steps(RUN) == [1, 2] and (SAVED / WEIGHTS).is_file()


def test_a_warm_start_whose_gradient_is_not_finite_says_so(
        workplace, tiny_model, monkeypatch, capfd):
    import trl

    compute = trl.SFTTrainer.compute_loss
    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", lambda self, *given, **how: (
        compute(self, *given, **how) * (math.nan if self.state.global_step == 1 else 1)))
    line = stopped(capfd, script.main, arguments(tiny_model, "--warm-start", "3"))
    assert "the gradient of supervised step 2 was not finite" in line
    assert "--warm-start-learning-rate" in line
    assert not (RUN / "warm_start_lora").exists() and not (RUN / "metrics.jsonl").exists()


# ---- No room, no right to write, damaged files ---------------------------------------------------
@pytest.fixture
def remount(workplace):
    """What mounts a tmpfs at `disk` anew, with other options."""
    def mount(options):
        subprocess.run(["mount", "-o", options, "-t", "tmpfs", "tmpfs", str(workplace / "disk")],
                       capture_output=True, check=True)

    (workplace / "disk").mkdir()
    try:
        mount("size=64m")
    except (OSError, subprocess.CalledProcessError) as problem:
        pytest.skip(f"a file system can't be mounted here: {problem}")
    yield lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", "-l", str(workplace / "disk")], check=True)  # what is open may stay


@slow
@pytest.mark.parametrize("options", ["size=8k", "size=120k", "size=550k", "ro"])
def test_a_full_disk_ends_in_one_line_and_with_room_the_run_goes_on(
        options, remount, tiny_model, capfd):
    argv, run = arguments(tiny_model, "--warm-start", "1", "--save-steps", "1", "--max-steps", "3",
                          "--output-dir", "disk/run"), Path("disk/run")
    remount(options)
    assert "disk/run" in stopped(capfd, script.main, argv)
    for file in (*run.glob("[!.]*.json*"), *run.glob("*_lora/*.json")):  # whole or not there
        rows = file.read_text().split("\n") if file.suffix == ".jsonl" else [file.read_text()]
        assert [json.loads(row) for row in rows if row], file
    remount("rw,size=64m")
    script.main(["--resume", *argv[-2:]] if (run / "args.json").exists() else argv)
    assert steps(run) == [1, 2, 3] and (run / "evaluation_after.jsonl").is_file()
    if options == "size=550k":
        script.main([*argv[:-1], "whole"])
        assert same_weights(run / "grpo_saved_lora", "whole/grpo_saved_lora")


@slow
@pytest.mark.parametrize("file, content", [
    ("args.json", b"{"), ("args.json", b"[]"), ("evaluation_before.jsonl", b"{\n"),
    ("checkpoint-1/trainer_state.json", b"{")])
def test_a_run_with_a_broken_file_ends_in_one_line(file, content, workplace, tiny_model, capfd):
    script.main(arguments(tiny_model, "--max-steps", "1"))
    (RUN / file).write_bytes(content)
    assert Path(file).name in stopped(capfd, script.main, ["--resume", "--max-steps", "2"])


# ---- What others wrote: nothing of it runs, leaves its directory, or steers the terminal ---------
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("main", [script.main, infer.main])
def test_a_chat_template_runs_no_code_and_its_fault_is_one_line(
        main, template, workplace, tiny_model, capfd):
    shutil.copytree(tiny_model, "model")
    Path("model/chat_template.jinja").write_text(template)
    argv = arguments("model") if main is script.main else ["2 + 3?", "--model", "model"]
    assert "model" in stopped(capfd, main, argv)
    assert not RUN.exists() and not Path("ran").exists()


@slow
@pytest.mark.parametrize("kind", ["llama", "unheard-of"])
def test_a_models_own_code_is_not_run(kind, workplace, tiny_model):
    model = Path(shutil.copytree(tiny_model, "model"))
    (model / "own.py").write_text("open('ran', 'w')\nfrom transformers import LlamaConfig as C, "
                                  "LlamaForCausalLM as M\n")
    for name, more in (("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.T", None]}}),
                       ("config.json", {"model_type": kind, "auto_map": {
                           "AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}})):
        (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | more))
    for file, argv in (("reasoning_model_grpo.py", arguments(model, "--dry-run")),
                       ("infer.py", ["2 + 3?", "--model", model, "--max-tokens", "2"])):
        done = command(file, *argv, cwd=workplace)
        assert not Path("ran").exists() and "Traceback" not in done.stderr, done.stderr
        assert kind == "llama" or (done.returncode, len(done.stderr.splitlines())) == (2, 1)


EVIL = ["../../x", "<script>alert(1)</script>", "\x1b[2J\x07\x9b31m", "a\u202eb", "$(touch ran)",
        "`touch ran`", "\"; touch ran; '; touch ran; '", "{{ 7 * 7 }}", "\r\b"]


def test_a_question_is_no_path_no_page_no_command_and_does_not_steer_the_terminal(
        tmp_path, tiny_model, monkeypatch):
    place, printed = tmp_path / "in", io.StringIO()
    place.mkdir()
    (furnish(place) / "evil.jsonl").write_text(lines({
        "question": f"{' '.join(EVIL)} {n}?", "answer": f"{' '.join(EVIL)}\n#### {n}"}
        | {word: word for word in EVIL} for n in range(20)))
    monkeypatch.chdir(place)
    with redirect_stdout(printed), redirect_stderr(printed):
        script.main(arguments(tiny_model, "--few-shot", "1", "--warm-start", "1",
                              "--eval-questions", "2", "--max-prompt-length", "1500",
                              dataset="evil.jsonl"))
        infer.main(["--file", "evil.jsonl", "--adapter", str(SAVED), "--max-tokens", "2"])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    page = (RUN / "completions.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    said = printed.getvalue()
    assert not {c for c in said if not c.isprintable()} - set("\n\t")
    line = said[said.index("ask it:") :].partition("infer.py ")[2].partition("\n")[0]
    subprocess.run(["bash", "-c", f"true {line}"], timeout=20)
    assert {path.name for path in place.iterdir()} <= {
        "data.jsonl", "evil.jsonl", "noisy.py", "outputs", "__pycache__"}, line


# ---- Broken off for real -------------------------------------------------------------------------
FORKED = multiprocessing.get_context("forkserver")  # it loads the libraries once
FORKED.set_forkserver_preload([
    "hypothesis", "matplotlib.pyplot", "pandas", "datasets", "trl.trainer.grpo_trainer",
    "trl.trainer.sft_trainer", "transformers.models.llama.modeling_llama"])


def run_in(place, words):
    os.chdir(place)
    sys.stdout = sys.stderr = open("log.txt", "w", buffering=1)  # noqa: SIM115
    script.main(words)


def start(place, *words):
    """A run in a process of its own; what it says goes to log.txt."""
    process = FORKED.Process(target=run_in, args=(place, list(map(str, words))))
    process.start()
    return process


def ended(process, place, seconds=120):
    """(its exit code, or None where it hangs; what it said)."""
    process.join(seconds)
    return process.exitcode, (place / "log.txt").read_text()


def result(run: Path):
    return (run / "grpo_saved_lora" / WEIGHTS).read_bytes(), (run / "evaluation.json").read_text()


def wait_for(there, lives) -> None:
    begun = time.time()
    while not there():
        assert lives() and time.time() - begun < 120
        time.sleep(0.002)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny_model):
    """(where, the arguments, and the result of a run that nothing breaks)."""
    place = furnish(tmp_path_factory.mktemp("unbroken"))
    argv = arguments(tiny_model, "--max-steps", "4", "--save-steps", "2", "--warm-start", "6",
                     "--eval-questions", "all", "--max-completion-length", "48")
    code, said = ended(start(place, *argv, "--output-dir", "whole"), place)
    assert code == 0, said
    return place, argv, result(place / "whole")


PHASES = {  # where Ctrl-C comes: the file that is there by then, how often, how the run ends
    "the first evaluation": ("args.json", 1, 130),
    "the warm start": ("warm_start/checkpoint-2/trainer_state.json", 1, 130),
    "the second evaluation": ("warm_start_lora/args.json", 1, 130),
    "a step": ("checkpoint-2/trainer_state.json", 1, 0),
    "a step, twice": ("checkpoint-2/trainer_state.json", 2, 130),
    "the last evaluation": ("grpo_saved_lora/args.json", 1, 130)}


@slow
@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_in_every_phase_says_how_to_go_on_and_that_goes_on(phase, unbroken):
    (place, argv, whole), (marker, times, right) = unbroken, PHASES[phase]
    process = start(place, *argv, "--output-dir", phase)
    wait_for((place / phase / marker).exists, process.is_alive)
    for _ in range(times):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.05)
    code, said = ended(process, place)
    assert code == right and "Traceback" not in said, said
    told = re.search("go on with: python .*reasoning_model_grpo.py (.*)", said)[1]
    code, said = ended(start(place, *shlex.split(told)), place)
    assert code == 0 and result(place / phase) == whole, said


@slow
@pytest.mark.parametrize("kills, more", [(40, []), (8, ["--eval-steps", "1"])])
def test_killed_at_any_moment_a_run_ends_with_the_adapter_of_an_unbroken_one(
        kills, more, tmp_path, tiny_model):
    """None of so many kills, at moments of all phases, loses, halves or changes anything."""
    place, rng, runs, begun = furnish(tmp_path), random.Random(0), 0, time.time()
    argv = arguments(tiny_model, "--max-steps", "3", "--warm-start", "3", "--save-steps", "1",
                     "--learning-rate", "1e-3", *more)
    code, said = ended(start(place, *argv, "--output-dir", "whole"), place)
    assert code == 0, said
    whole, slowest = result(place / "whole"), time.time() - begun
    while kills > 0:
        run, patience, code = place / f"run{runs}", slowest / 2, None
        runs += 1
        while code is None:
            words = ["--resume"] if (run / "args.json").exists() else argv
            process = start(place, *words, "--output-dir", run.name)
            code, said = ended(process, place, rng.uniform(0.02, patience))
            if code is None:
                process.kill()
                process.join()
                kills, patience = kills - 1, patience * 1.1  # so that a slow phase comes to its end
            for file in run.glob("*.json*"):
                rows = re.split("\n" if file.suffix == ".jsonl" else "$", file.read_text())
                assert [json.loads(row) for row in rows if row.strip()], file
        assert code == 0 and result(run) == whole, (run, said[-3000:])


@pytest.mark.parametrize("script", ["reasoning_model_grpo.py", "infer.py", "benchmark.py"])
def test_ctrl_c_while_it_loads_ends_without_a_traceback(script, workplace, tiny_model):
    """torch's start swallows the interrupt and is broken then; this one does so for certain."""
    (workplace / "torch.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(1)\n"
        "except BaseException:\n    pass\n"
        "raise RecursionError\n")
    argv = {"infer.py": ["12 - 5?", "--model", tiny_model], "benchmark.py": []}.get(
        script, arguments(tiny_model))
    run = subprocess.run([sys.executable, HERE / script, *argv], capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(workplace)}, timeout=60)
    assert run.returncode in (130, -signal.SIGINT) and "Traceback" not in run.stderr, run.stderr


# ---- Long runs, several processes ----------------------------------------------------------------
ODD = r"""
import os
from pathlib import Path

def spread(completions, **kwargs):  # another one for each text
    return [sum(m[-1]["content"].encode()) % 97 / 97 for m in completions]

def resident(completions, trainer_state=None, **kwargs):
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    with open("resident.txt", "a") as file:
        print(pages * os.sysconf("SC_PAGESIZE") / 1e6, file=file)
    return spread(completions)

def known(completions, trainer_state=None, **kwargs):
    if trainer_state and trainer_state.global_step:
        Path(f"rank-{os.environ['RANK']}-{os.getpid()}").touch()
    return spread(completions)

def written(self, prompt_ids, *_, **__):  # of a prompt's copies each another text, by itself
    group = self.num_generations if self.model.training else 1
    return [[9 + (sum(ids) + 7 * (i % group) + k * k) % 250 for k in range(6)]
            for i, ids in enumerate(prompt_ids)], None

if os.environ.get("FIXED"):
    import trl
    trl.GRPOTrainer._generate_single_turn = written
"""


@slow
def test_three_hundred_steps_take_no_more_memory_and_leave_two_checkpoints(workplace, tiny_model):
    import numpy

    (workplace / "odd.py").write_text(ODD)
    done = command("reasoning_model_grpo.py", *arguments(
        tiny_model, "--max-steps", "300", "--save-steps", "20", "--eval-questions", "0",
        "--eval-steps", "0", reward="odd.py:resident"), cwd=workplace)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = [float(size) for size in Path("resident.txt").read_text().split()][-150:]
    slope = numpy.polyfit(range(150), sizes, 1)[0]  # fails unless every step was counted
    assert slope < 0.03  # a step's logits, were they kept; its line of the log takes some kB
    assert sorted(path.name for path in RUN.glob("checkpoint-*")) == [
        "checkpoint-280", "checkpoint-300"]


def launched(processes: int, *argv, **env):
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1",
         *["--multi_gpu"] * (processes > 1), "--num_processes", str(processes),
         "--mixed_precision", "no", "--dynamo_backend", "no",
         str(HERE / "reasoning_model_grpo.py"), *argv], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | env, start_new_session=True)


@slow
def test_when_one_of_two_processes_is_killed_the_other_ends_too(workplace, tiny_model):
    (workplace / "odd.py").write_text(ODD)
    run = launched(2, *arguments(tiny_model, "--batch-size", "2", "--max-steps", "9999",
                                 "--eval-steps", "1", "--warm-start", "1", reward="odd.py:known"))
    try:
        wait_for(lambda: len([*workplace.glob("rank-*")]) == 2, lambda: run.poll() is None)
        ranks = dict(path.name.split("-")[1:] for path in workplace.glob("rank-*"))
        os.kill(int(ranks["1"]), signal.SIGKILL)
        printed, said = run.communicate(timeout=90)
        assert run.returncode and re.search("SIGKILL|Signal 9|-9", said), said[-3000:]
        assert printed.count("recipe:") == 1 and printed.count("step 1/9999") == 1
        with pytest.raises(ProcessLookupError):
            os.kill(int(ranks["0"]), 0)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)


@slow
def test_two_processes_learn_what_one_with_twice_the_batch_does(workplace, tiny_model):
    """Given the same completions: draws differ, as every process has a seed of its own."""
    (workplace / "odd.py").write_text(ODD)
    runs = []
    for n, batch in ((1, "8"), (2, "4")):
        run = launched(n, *arguments(
            tiny_model, "--batch-size", batch, "--output-dir", str(n), "--max-steps", "4",
            "--learning-rate", "1e-3", reward="odd.py:spread"), FIXED="1")
        printed, said = run.communicate(timeout=300)
        assert run.returncode == 0 and "4 x 2 questions x 4 completions" in printed, said[-3000:]
        assert printed.count("step 4/4") == 1 and Path(f"{n}/evaluation_after.jsonl").is_file()
        runs.append([row for row in read_rows(f"{n}/metrics.jsonl") if "loss" in row])
    for one, two in zip(*runs, strict=True):
        assert one["reward"] == pytest.approx(two["reward"], abs=1e-6) and one["reward_std"] > 0
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
    one, two = (weights(f"{n}/grpo_saved_lora") for n in (1, 2))
    apart = max(float((one[name] - two[name]).abs().max()) for name in one)
    moved = max(float(one[name].abs().max()) for name in one if "lora_B" in name)
    assert apart < moved / 50, f"weights {apart:.1e} apart, moved by {moved:.1e}"
