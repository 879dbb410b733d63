"""A GPU's code, every line but the card's own, on a CPU: `pytest -m slow test_engine.py`.

Unsloth with vLLM's engine inside, both pinned as in requirements.txt, on a pretended card
(.ci/pretend_gpu.py) with a tiny random Qwen2. The environment (.ci/make_engine.py, 3 minutes) is
made while other tests run; ENGINE_PYTHON names the Python of one that is there.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import HERE, furnish, lines, made, read_rows

sys.path.insert(0, str(HERE / ".ci"))
import engine_checks  # noqa: E402

pytestmark = pytest.mark.slow
before_release = pytest.mark.skipif(
    "ENGINE_ALL" not in os.environ, reason="before a release: bash .ci/engine_check.sh")
AGREE = 0.01  # between engine and trainer, of the tokens' log-probabilities; see what is lost
# Rates at which a random model of two layers moves visibly in a step.
OPTIONS = ["--dataset", "data.jsonl", "--reward-funcs", "engine_rewards.py:peak",
           "--max-prompt-length", "800", "--max-completion-length", "8", "--max-steps", "3",
           "--batch-size", "4", "--num-generations", "4", "--learning-rate", "0.002",
           "--warm-start", "8", "--warm-start-learning-rate", "0.01", "--eval-questions", "4",
           "--report-to", "none", "--output-dir", "run", "--no-load-in-4bit"]
COLOCATE = ["--backend", "transformers", "--vllm", "colocate"]
REWARDS = '''
import os, signal
from pathlib import Path

def peak(completions, trainer_state=None, **kwargs):
    """Differs even between random completions, and is highest after the first step."""
    step = trainer_state.global_step if trainer_state else 0
    if os.environ.get("KILL") and Path("run/checkpoint-2/trainer_state.json").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum(c[-1]["content"].encode()) % 17 - 20 * abs(step - 1) for c in completions]
'''


@pytest.fixture(scope="session")
def engine_python(environments, tmp_path_factory) -> str:
    return made(tmp_path_factory, "engine_python")


@pytest.fixture(scope="session")
def tiny_qwen(tiny_model, tmp_path_factory) -> Path:
    """A random Qwen2 of two layers, in bfloat16, whose ends are those of Qwen2.5-Instruct: one ends
    a turn, the other is also what pads. Heads of 32, as vLLM's CPU kernels take no smaller ones."""
    import torch
    import transformers
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    transformers.set_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        tie_word_embeddings=True, initializer_range=0.05, eos_token_id=end, pad_token_id=pad,
        bos_token_id=None)).to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad)
    directory = tmp_path_factory.mktemp("qwen") / "tiny-qwen"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def on_card(engine_python, tiny_qwen):
    """run(place, card, script, *argv, code=0, **environment) -> the finished process."""
    def run(place: Path, card: str, script: str, *argv, code=0, **more):
        env = os.environ | {"PRETEND_GPU": card, "PYTHONPATH": "", "COLUMNS": "120",
                            "ENGINE_LOG": str(place / "engine.log")} | more
        argv = ["--model", tiny_qwen, *OPTIONS, *argv] if "grpo" in script else argv
        (furnish(place) / "engine_rewards.py").write_text(REWARDS)
        done = subprocess.run(
            [engine_python, HERE / ".ci/pretend_gpu.py", HERE / script, *map(str, argv)],
            cwd=place, env=env, text=True, capture_output=True, timeout=600)
        assert done.returncode == code, done.stderr[-3000:]
        return done

    return run


@pytest.fixture(scope="module")
def one_run(on_card, tmp_path_factory):
    """one_run(card, *argv, **environment) of two steps -> (where, what it printed, the log)."""
    def run(card: str, *argv, **env):
        place = tmp_path_factory.mktemp(card)
        argv = "reasoning_model_grpo.py", "--max-steps", "2", *argv
        printed = on_card(place, card, *argv, **env).stdout
        assert "step 2/2" in printed and "ask it:" in printed
        return place, printed, take_log(place)

    return run


def take_log(place: Path) -> list[dict]:
    """What the engine was asked since this was last called."""
    file = place / "engine.log"
    rows = read_rows(file)
    file.unlink()
    return rows


def checksum(directory: Path) -> float:
    from safetensors.torch import load_file

    return sum(float(value.double().abs().sum())
               for name, value in load_file(directory / "adapter_model.safetensors").items()
               if "lora_B" in name)


# ---- A run on each kind of card, killed and resumed ----------------------------------------------
@pytest.fixture(scope="module", params=[
    pytest.param(card, marks=pytest.mark.xdist_group(f"engine on {card}"))  # trained once
    for card in ("a10g", "t4")])
def trained(request, on_card, tmp_path_factory):
    """(card, its directory, the adapter's checksum at the kill, the two processes, their logs)."""
    card, place = request.param, tmp_path_factory.mktemp(request.param)
    first = on_card(place, card, "reasoning_model_grpo.py", "--eval-steps", "1", code=-9, KILL="1")
    log, killed = take_log(place), checksum(place / "run/checkpoint-2")
    second = on_card(place, card, "reasoning_model_grpo.py", "--resume")
    assert "shards" not in second.stderr  # vLLM's bars
    return SimpleNamespace(card=card, place=place, run=place / "run", killed=killed,
                           printed=(first.stdout, second.stdout), logs=(log, take_log(place)))


def test_a_card_writes_with_the_adapter_as_it_is_and_a_killed_run_goes_on(trained):
    for log in trained.logs:
        engine_checks.check_rollouts(log)
        engine_checks.check_rests(log)
    # First the start's validation; then each step's rollouts, and the validation of its end.
    assert [len(engine_checks.rollouts_of(log)) for log in trained.logs] == [6, 2]
    engine_checks.check_agreement(trained.run, AGREE)
    # Beside the rollouts: before, after the warm start; after GRPO.
    wakes = [sum(row["kind"] == "wake_up" for row in log) for log in trained.logs]
    assert wakes == [6 + 2, 2 + 1]
    (engine,) = [row for row in trained.logs[0] if row["kind"] == "engine"]
    dtype, share, backend = {"a10g": ("bfloat16", 0.77, "FLASH_ATTN"),
                             "t4": ("float16", 0.74, "None")}[trained.card]  # None: vLLM chooses
    assert engine["dtype"] == dtype and f"parameters, {dtype}, LoRA" in trained.printed[0]
    assert engine["share"] == pytest.approx(share, abs=0.011)
    assert engine["asked_backend"] == backend
    assert engine["sleeps"] and engine["max_model_len"] == 808 and engine["lora_rank"] == 16
    steps = [re.findall("^step ./3", printed, re.M) for printed in trained.printed]
    assert steps == [["step 1/3", "step 2/3"], ["step 3/3"]]
    going_on = engine_checks.rollouts_of(trained.logs[1])[0]
    assert going_on["sent"] == pytest.approx(trained.killed, rel=1e-6)
    assert going_on["sent"] == engine_checks.rollouts_of(trained.logs[0])[-1]["sent"]
    assert "kept: step 1 (best validation reward" in trained.printed[1]
    kept = checksum(trained.run / "grpo_saved_lora")
    # Saving rounds to 16 bits; a step moves far more.
    assert kept == pytest.approx(checksum(trained.run / "checkpoint-1"), rel=1e-4)
    assert kept != pytest.approx(checksum(trained.run / "checkpoint-3"), rel=1e-4)
    (measured,) = [row for row in trained.logs[1]
                   if row["kind"] == "asked" and not row["for_training"]]
    assert measured["sent"] == pytest.approx(kept, rel=1e-6)


@pytest.mark.parametrize("engine", ["unsloth", "vllm", "transformers"])
def test_infer_says_what_was_measured(engine, trained, on_card):
    rows = read_rows(trained.run / "evaluation_after.jsonl")
    before = read_rows(trained.run / "evaluation_before.jsonl")
    assert all(row["completion"] != other["completion"] for row, other in zip(rows, before))
    (trained.place / "ask.jsonl").write_text(lines({"question": r["question"]} for r in rows))
    done = on_card(trained.place, trained.card, "infer.py", "--adapter", "run/grpo_saved_lora",
                   "--engine", engine, "--file", "ask.jsonl", "--jsonl", f"{engine}.jsonl")
    assert f"; engine {engine} (" in done.stderr and "shards" not in done.stderr, done.stderr
    # In bfloat16 two tokens may be as likely, and kernels differ in the last digit.
    share = 0.75 if trained.card == "a10g" else 1.0
    engine_checks.check_same_answers(trained.run, trained.place / f"{engine}.jsonl", share)
    if engine != "transformers":
        (asked,) = [row for row in take_log(trained.place) if row["kind"] == "asked"]
        assert asked["sent"] == pytest.approx(checksum(trained.run / "grpo_saved_lora"), rel=1e-6)


# ---- Two steps each of what else there is --------------------------------------------------------
@pytest.mark.parametrize("fault, more", [
    ("no-adapter", []), pytest.param("no-weights", COLOCATE, marks=before_release)])
def test_what_does_not_reach_the_engine_would_be_seen(fault, more, one_run):
    place, _, log = one_run("a10g", "--skip-evaluation", *more, ENGINE_FAULT=fault)
    if not more:
        with pytest.raises(AssertionError, match="written with an adapter of sum 0"):
            engine_checks.check_rollouts(log)
    with pytest.raises(AssertionError, match="above"):
        engine_checks.check_agreement(place / "run", AGREE)


def test_in_4_bits(one_run):
    place, printed, log = one_run("a10g", "--load-in-4bit", "--skip-evaluation", "--batch-size",
                                  "2", "--num-generations", "2", "--warm-start", "1")
    assert ", 4-bit, " in printed
    assert [row["quantization"] for row in log if row["kind"] == "engine"] == ["bitsandbytes"]
    engine_checks.check_rollouts(log)
    engine_checks.check_rests(log)
    engine_checks.check_agreement(place / "run", AGREE)


@pytest.mark.parametrize("card, dtype, rollouts, typed, lacking, since", [
    ("a10g", "bfloat16", "bfloat16", [], "unsloth,unsloth_zoo", "unsloth is not installed"),
    pytest.param("t4", "float32", "float16", COLOCATE, "", "as", marks=before_release)])
def test_trls_own_engine_gets_the_weights(card, dtype, rollouts, typed, lacking, since, one_run):
    """Merged, at each step; of a T4's type TRL says nothing to it."""
    place, printed, log = one_run(card, *typed, PRETEND_WITHOUT=lacking)
    assert f"parameters, {dtype}, LoRA" in printed
    assert f"backend transformers, since {since}" in printed and "rollouts through vLLM" in printed
    (engine,) = [row for row in log if row["kind"] == "engine"]
    assert engine["dtype"] == rollouts and engine["share"] == 0.5
    assert engine["asked_backend"] == ("TRITON_ATTN" if card == "t4" else "None")
    assert len(engine_checks.rollouts_of(log)) == 2
    engine_checks.check_agreement(place / "run", AGREE)


@before_release
def test_unsloth_without_vllm(one_run):
    _, printed, log = one_run("a10g", PRETEND_WITHOUT="vllm")
    assert "since a GPU and unsloth; rollouts without vLLM, which is not installed" in printed
    assert [row["kind"] for row in log] == ["card"]


@before_release
@pytest.mark.parametrize("typed", [[], ["--backend", "transformers", "--vllm", "off"]])
def test_two_cards_and_one_process_train_as_one(typed, one_run):
    _, printed, log = one_run("two-t4", *typed)
    assert printed.count("one of several GPUs is used") == 1
    assert "steps:     2 x 1 questions x 4 completions" in printed
    assert log[0]["count"] == 2
    if not typed:
        engine_checks.check_rollouts(log)


@before_release
@pytest.mark.parametrize("packed", [[], ["bitsandbytes"]])
def test_plain_vllms_pass_takes_the_graph_of_an_adapter(packed, engine_python, tiny_qwen):
    done = subprocess.run([engine_python, HERE / ".ci/lora_graph.py", tiny_qwen, *packed],
                          text=True, capture_output=True, env=os.environ | {"PYTHONPATH": ""})
    assert "the pass succeeds" in done.stdout, done.stdout + done.stderr[-3000:]
    assert int(re.search(r"(\d+) slices", done.stdout)[1]) > 0


# ---- The decisions, in the README's table --------------------------------------------------------
MACHINES = {  # the README's column: the pretended card, its environment, what is typed
    "T4, 15 GB": ("t4", {}, []),
    "L4 or A10, 24 GB": ("l4", {}, []),
    "A100, 40 GB": ("a100", {}, []),
    "two T4, `accelerate launch`, `--recipe qwen-0.5b-fp32`":
        ("t4", {"WORLD_SIZE": "2"}, ["--recipe", "qwen-0.5b-fp32"]),
}


def column(cell: dict) -> list[str]:
    """What the README's table says of a machine."""
    why = re.search("backend (.*?)(; vLLM's share|$)", cell["device"])[1]
    return [f"{cell['dtype']}; {cell['weights']}", cell.get("attention", "–"),
            f"{cell['share']:.2f}" if "share" in cell else "–",
            f"{cell['questions']} x {cell['completions']}", f"`backend {why}`"]


def test_the_readmes_decisions_are_those_of_the_cards(engine_python, tiny_qwen, tmp_path):
    furnish(tmp_path)
    running = [subprocess.Popen(
        [engine_python, HERE / ".ci/pretend_gpu.py", HERE / ".ci/decisions.py", "--model",
         tiny_qwen, "--dataset", "data.jsonl", *typed], text=True, cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PRETEND_GPU": card, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"} | more)
        for card, more, typed in MACHINES.values()]
    columns = []
    for machine, process in zip(MACHINES, running):
        out, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]
        columns.append([machine, *column(json.loads(out.splitlines()[-1]))])
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    for row in zip(*columns):
        assert f" | {' | '.join(row)} |\n" in readme, row
