"""What people bring, by kinds: `pytest test_field.py`, and `pytest -m slow test_field.py`."""

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache, partial
from itertools import product
from pathlib import Path

import pytest

from conftest import CHEAP, HERE, arguments, command, lines, load, read_rows, stopped, turn
import benchmark
import infer
import reasoning_model_grpo as script
import report

slow, pytestmark = pytest.mark.slow, pytest.mark.filterwarnings("ignore")  # PEFT's own
QUESTION = "Ann has 3 pens and 4 books. How many?"


def table(rows):
    import pandas

    return pandas.DataFrame(rows)


# ---- An adapter answers as it was trained, or not at all -----------------------------------------
FAMILIES = {  # kind: (configuration, LoRA targets, the name of the embeddings)
    "Llama": ({"attention_bias": True}, ["q_proj", "v_proj"], "embed_tokens"),
    "Qwen2": ({}, ["q_proj", "v_proj"], "embed_tokens"),
    "Gemma": ({"head_dim": 16}, ["q_proj", "v_proj"], "embed_tokens"),
    "GPT2": ({}, ["c_attn"], "wte"),
}


@pytest.fixture(scope="session")
def base_of(tiny_model, tmp_path_factory):
    """(kind, tied) -> the directory of a random model of that kind, its embeddings tied or not."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)

    @cache
    def make(kind: str, tied: bool) -> Path:
        size = {"vocab_size": len(tokenizer), "initializer_range": 0.2, "pad_token_id": 0,
                "tie_word_embeddings": tied, "eos_token_id": tokenizer.eos_token_id,
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1,
                "max_position_embeddings": 2048}
        torch.manual_seed(1)
        config = getattr(transformers, f"{kind}Config")(**size | FAMILIES[kind][0])
        place = tmp_path_factory.mktemp("families") / kind
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(place)
        tokenizer.save_pretrained(place)
        return place

    return make


def options(targets, table) -> dict:
    """What people ask of PEFT: a name -> LoraConfig's fields; `save`: whether with embeddings."""
    head = [*targets, "lm_head"]
    return {
        "plain": {}, ".bin": {"old": True}, "rslora": {"use_rslora": True},
        "dora": {"use_dora": True}, "ranks": {"rank_pattern": {targets[0]: 8}},
        "alphas": {"alpha_pattern": {targets[-1]: 32}},
        "bias": {"bias": "all"}, "bias of LoRA": {"lora_bias": True},
        "one layer": {"layers_to_transform": [1]}, "all linear": {"target_modules": "all-linear"},
        "regex": {"target_modules": rf".*\.1\..*({'|'.join(targets)})"},
        **{name: {"init_lora_weights": name} for name in (
            "gaussian", "olora", "pissa", "orthogonal")},
        "head": {"target_modules": head}, "table": {"target_modules": [*targets, table]},
        "both": {"target_modules": [table, "lm_head"]},
        "table, saved by default": {"target_modules": [*targets, table], "save": "auto"},
        "dora of the table": {"use_dora": True, "target_modules": [*targets, table]},
        "tied head": {"target_modules": head, "ensure_weight_tying": True},
        "whole both": {"modules_to_save": [table, "lm_head"]},
        "whole both, tied": {"modules_to_save": [table, "lm_head"], "ensure_weight_tying": True},
        "tokens": {"trainable_token_indices": [65, 66]},
        "tokens of both": {"trainable_token_indices": {table: [65, 66], "lm_head": [65, 70]}},
        "embeddings beside": {"save": True},
    }


def make_adapter(base: Path, place: Path, fields: dict):
    """An adapter whose every weight has moved, as PEFT saves it; what PEFT answers, not merged."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fields = {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 8} | fields
    save, old = fields.pop("save", False), fields.pop("old", False)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    torch.manual_seed(3)
    moved = [p for p in model.parameters() if p.requires_grad]
    if save is True:  # trained beside the adapter
        moved += [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    for weight in moved:
        weight.data.add_(torch.randn_like(weight) / 5)
    shutil.rmtree(place, ignore_errors=True)
    model.save_pretrained(place, save_embedding_layers=save, safe_serialization=not old)
    AutoTokenizer.from_pretrained(base).save_pretrained(place)
    return model.eval()


ONCE_WRONG = [  # of each, what a family or its tied embeddings once got wrong
    ("Llama", True, ".bin"), ("Llama", True, "head"), ("Llama", True, "table"),
    ("Llama", False, "pissa"), ("Qwen2", True, "olora"), ("Qwen2", True, "tokens of both"),
    ("Gemma", True, "embeddings beside"), ("GPT2", True, "both"), ("GPT2", False, "ranks")]
# vLLM reads r, lora_alpha, use_rslora and lora_A, lora_B of layers; it knows no other rank, alpha
# or beginning, and passes over biases (Gemma has none) and saved embeddings (its peft_helper).
VLLM_TAKES = {"plain", ".bin", "rslora", "one layer", "regex", "all linear", "gaussian"}
BEYOND_PEFT = {("GPT2", "olora"), ("GPT2", "tied head"), ("Gemma", "bias of LoRA")}


@pytest.mark.parametrize("kind, tied, name", [
    pytest.param(*case, marks=[slow] * (case not in ONCE_WRONG))
    for case in product(FAMILIES, (True, False), options(["a"], "b"))
    if case[::2] not in BEYOND_PEFT])  # which can't read what it saved, or not merge
def test_an_adapter_of_any_option_answers_as_it_was_trained(
        kind, tied, name, base_of, workplace, capsys):
    """What infer.py says and what is exported are PEFT's model, not merged."""
    import torch
    from transformers import AutoModelForCausalLM

    _, targets, table = FAMILIES[kind]
    base = base_of(kind, tied)
    right = make_adapter(base, Path("brought"),
                         {"target_modules": targets} | options(targets, table)[name])
    assert kind == "Gemma" or (infer.beyond_vllm(Path("brought")) is None) == (name in VLLM_TAKES)
    asked = ["--adapter", "brought", "--model", str(base)]
    infer.main([QUESTION, *asked, "--json", "--max-tokens", "8", "--dtype", "float32"])
    said = json.loads(capsys.readouterr().out)["completion"]
    tokenizer = script.load_tokenizer(script.find_base(str(base), "brought", True))
    text = infer.render(QUESTION, {}, tokenizer)
    assert said == script.complete(right, tokenizer, [text], max_tokens=8)[0].text
    script.main([*asked, "--export", "merged"])
    merged = AutoModelForCausalLM.from_pretrained("merged_16bit", dtype=torch.float32)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        right, merged = right(ids).logits, merged(ids).logits
    assert (merged - right).norm() / right.norm() < 0.05  # 16-bit weights keep three digits


REFUSED = {  # what is no adapter of this base as it was trained: (LoraConfig's fields, the line)
    "random beginning": ({"init_lora_weights": "pissa_niter_2"}, "began at random"),
    "on for some tokens": ({"alora_invocation_tokens": [70]}, "aLoRA does not support merging"),
    "layers twice": ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
    "a bias where there is none": ({"lora_bias": True}, "has no bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_answer_as_trained_is_refused_before_anything(
        name, base_of, workplace, capsys):
    fields, says = REFUSED[name]
    asked = ["--adapter", "brought", "--model", str(base := base_of("Gemma", True))]
    make_adapter(base, Path("brought"), fields)
    line = stopped(capsys, script.main, [*CHEAP, *asked, "--dataset", "data.jsonl", "--dry-run"])
    assert says in line
    assert says in stopped(capsys, infer.main, ["2 + 3?", *asked], informed=True)
    assert says in stopped(capsys, script.main, [*asked, "--export", "merged"])
    assert not Path("outputs").exists() and not Path("merged_16bit").exists()


def test_what_training_would_lose_or_change_twice_is_refused(base_of, workplace, capsys):
    told = arguments(base_of("Llama", True), "--dry-run")
    make_adapter(base_of("Llama", True), Path("brought"), {"save": True})
    assert "--export merged" in stopped(capsys, script.main, [*told, "--adapter", "brought"])
    for target in ("lm_head", "embed_tokens"):
        line = stopped(capsys, script.main, [*told, "--lora-targets", "q_proj", target])
        assert "one matrix" in line
    script.main(arguments(base_of("Llama", False), "--dry-run", "--lora-targets", "lm_head"))


# ---- A reward gets what TRL gives ----------------------------------------------------------------
def rank(completions, trainer_state, prompts, **kwargs):
    """As rewards do that compare: a group side by side, each place once."""
    assert len(prompts) % 4 == 0 and trainer_state.max_steps == 2
    assert all(prompt == prompts[i - i % 4] for i, prompt in enumerate(prompts))
    return [i % 4 / 4 for i in range(len(prompts))]


NAMES = ["text", "tokens", "solution", "fmt", "row", "images", "label", "prompt", "columns"]
TRLS = ["prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"]


def test_the_trial_calls_as_a_step_does_with_every_column(tiny_model, workplace, capsys):
    lists = [{"in": [1, 2], "out": None}, {"in": [], "out": "x"}]
    table(row | {name: f"{name} {i}" for name in NAMES + TRLS} | {"cases": lists}
          for i, row in enumerate(read_rows("data.jsonl"))).to_parquet("named.parquet")
    seen = {}

    def spy(fmt, solution, **given):
        seen.update(given, fmt=fmt, solution=solution)
        return rank(**given)

    script.main(arguments(tiny_model, "--dry-run", "--batch-size", "8", dataset="named.parquet"),
                reward_funcs=spy)
    assert seen.keys() == {*NAMES, *TRLS, "question", "answer", "level", "cases"}
    number = seen["row"][0].split()[1]
    assert all(seen[name][:4] == [f"{name} {number}"] * 4 for name in NAMES)
    assert seen["cases"] == [lists] * 8 and len(seen["completions"]) == 8
    assert seen["trainer_state"].global_step == 0
    seen["log_extra"]("name", [1] * 8)
    seen["log_metric"]("name", 1.0)
    said = [line for line in capsys.readouterr().out.splitlines() if "completion_ids" in line]
    assert len(said) == 1 and "TRL" in said[0] and all(name in said[0] for name in TRLS)
    for name in TRLS:  # our own rewards mind no column
        script.main(arguments(tiny_model, "--dry-run", "--question-column", name, "--reward-funcs",
                              *script.RECIPES["cookbook"]["reward_funcs"], dataset="named.parquet"))


BROUGHT = '''
import asyncio, functools
from concurrent.futures import ProcessPoolExecutor

import neighbour_of_mine

def score(completion):
    return float(len(completion[-1]["content"]) % 7)

def executor(completions, **kwargs):
    with ProcessPoolExecutor(2) as pool:
        return list(pool.map(score, completions))

def neighbour(completions, **kwargs):
    return [neighbour_of_mine.score(completion) for completion in completions]

shorter = lambda completions, **kwargs: [-score(completion) for completion in completions]
half = functools.partial(lambda share, completions, **kwargs: [share for _ in completions], 0.5)

class Scorer:
    def __call__(self, completions, **kwargs):
        return shorter(completions)

class Later(Scorer):
    async def __call__(self, completions, **kwargs):
        await asyncio.sleep(0)
        return shorter(completions)

async def later(completions, **kwargs):
    return shorter(completions)

scorer, awaited = Scorer(), Later()
partial_later = functools.partial(later, kind="soon")
'''
CALLED = ["executor", "neighbour", "shorter", "half", "scorer", "awaited", "later", "partial_later"]


@pytest.fixture
def brought(workplace) -> Path:
    """A file of rewards, in a directory of its own, beside a file that it imports."""
    place = workplace / "my rewards"
    place.mkdir()
    (place / "neighbour_of_mine.py").write_text("score = len")
    (place / "brought-1.py").write_text(BROUGHT)
    return place / "brought-1.py"


@pytest.mark.parametrize("name", ["brought-1", "rewards", "json", "sitecustomize", "a b"])
def test_rewards_of_all_kinds_in_a_file_of_any_name_are_called(name, tiny_model, brought, capsys):
    file = brought.rename(brought.with_name(f"{name}.py"))
    script.main([*arguments(tiny_model, "--dry-run"), "--reward-funcs",
                 *(f"{file}:{func}" for func in CALLED)])
    assert f"rewards:   {' + '.join(f'1 {func}' for func in CALLED)}\n" in capsys.readouterr().out
    assert json.loads("[1]") == [1]  # the library of that name is still itself


def test_values_of_all_kinds_are_taken(tiny_model, workplace):
    import numpy
    import torch

    for kind in (numpy.array, partial(torch.tensor, requires_grad=True), lambda x: [None, *x[1:]],
                 lambda x: map(torch.tensor, x), lambda x: (value > 3 for value in x)):
        script.main(arguments(tiny_model, "--dry-run"), reward_funcs=lambda completions, kind=kind,
                    **_: kind([float(len(one[-1]["content"]) % 7) for one in completions]))


@pytest.mark.parametrize("given, says", [
    *(({"reward_funcs": given}, "not callable") for given in (
        "model/of/rewards", [None], [["a"]], {"a": 1})),
    *(({"train": given}, "question|rows") for given in (
        "openai/gsm8k", [], iter(()), [["a", 1]], {"train": []}, 5,
        {"question": ["a"], "answer": ["1"]}))])
def test_what_are_no_rewards_or_no_rows_is_named_in_one_line(
        given, says, tiny_model, workplace, capsys):
    told = arguments(tiny_model, "--dry-run")
    assert re.search(says, stopped(capsys, partial(script.main, **given), told))


@slow
def test_rewards_that_rank_their_group_do_so_in_training_and_validation(tiny_model, brought):
    calls, keys = set(), []

    def spy(**given):
        keys.append(given.keys())
        calls.add((given["trainer_state"].global_step, len(given["completions"])))
        return rank(**given)

    told = arguments(tiny_model, "--eval-steps", "1")
    script.main(told, reward_funcs=spy, train=read_rows("data.jsonl"))
    assert all(one - keys[0] <= {"environments"} and keys[0] <= one for one in keys)
    assert (1, 4) in calls and all(size % 4 == 0 for _, size in calls)
    script.main([*told, "--output-dir", "all", "--reward-funcs",
                 *(f"{brought}:{name}" for name in CALLED)])
    (first, *_) = [row for row in read_rows("all/metrics.jsonl") if "loss" in row]
    assert all(f"rewards/{name}/mean" in first for name in CALLED)


# ---- From Python, as TRL and datasets take it ----------------------------------------------------
def shapes(rows: list[dict]) -> dict:
    import datasets
    import numpy
    import pandas

    whole = datasets.Dataset.from_list(rows)
    parts = {"train": datasets.Dataset.from_list(rows[:30]),
             "test": datasets.Dataset.from_list(rows[30:])}
    return {
        "rows": rows, "generator": (row for row in rows), "Dataset": whole,
        "numpy": numpy.array(rows, dtype=object),
        "DataFrame of odd columns": pandas.DataFrame(rows).assign(a=1).rename(columns={"a": 0}),
        "IterableDataset": whole.to_iterable_dataset(), "formatted": whole.with_format("torch"),
        "DatasetDict": datasets.DatasetDict(parts), "dict": parts,
        "only a test split": datasets.DatasetDict({"test": whole}),
        "IterableDatasetDict": datasets.IterableDatasetDict(
            {name: part.to_iterable_dataset() for name, part in parts.items()}),
    }


def test_rows_come_as_trl_and_datasets_give_them_and_none_is_lost(tiny_model, workplace, capsys):
    rows = [row | {"answer": int(row["answer"].split()[-1])} for row in read_rows("data.jsonl")]
    other = [{"question": f"q{n}", "answer": n} for n in range(5)]
    told = arguments(tiny_model, "--dry-run", "--eval-questions", "all")
    for name in shapes(rows):
        split = name in ("dict", "DatasetDict", "IterableDatasetDict")
        for given, found in (
                ({"train": shapes(rows)[name]}, (30, 10) if split else (36, 4)),
                ({"train": other, "test": shapes(rows)[name]}, (5, 10 if split else 40))):
            script.main(told, **given)
            said = capsys.readouterr().out
            assert "the rows given: {} to train on, {} held out".format(*found) in said, name


# ---- Files and folders as they are published -----------------------------------------------------
TEN = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(10)]


def said(place, *more):
    train, test = load("--dataset", str(Path(place).resolve()), *more)
    assert {row["question"] for row in train + test} <= {row["question"] for row in TEN}
    return len(train), len(test)


ODD_NAMES = ["a b.jsonl", "it's \"mine\".jsonl", "café ünï 数据.jsonl", "train[1].jsonl",
             "a*b?.jsonl", "a::b.jsonl", "{a}.jsonl", "100%.jsonl", "#1.jsonl", "-a.jsonl",
             "v1.0-train.final.jsonl", "x&y;z.jsonl", "a:b.jsonl"]


def test_files_of_any_name_compressed_or_not_are_read(workplace):
    for name in (*ODD_NAMES, "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zip"):
        table(TEN).to_json(name, orient="records", lines=True)
        assert said(name) == (9, 1), name
    for name, comma in (("a.csv.bz2", ","), ("a.tsv.xz", "\t")):
        table(TEN).to_csv(name, index=False, sep=comma)
        assert said(name) == (9, 1), name


def published(place: str, card="", **files) -> Path:
    """A folder of files of rows, with the configurations of `card`."""
    for name, rows in files.items():
        file = Path(place, name.replace("__", "/") + ".jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(lines(rows))
    Path(place, "README.md").write_text(f"---\nconfigs:\n{card}---\n" if card else "# Data\n")
    return Path(place)


def configuration(name: str, **splits) -> str:
    files = "".join(f"  - split: {split}\n    path: {path}\n" for split, path in splits.items())
    return f"- config_name: {name}\n  data_files:\n{files}"


def test_a_configuration_of_a_folder_is_read_or_the_line_names_them(workplace, capsys):
    card = configuration("main", train="main/train*", test="main/test*") + configuration(
        "socratic", train="socratic/train*")
    place = published("cloned", card, main__train=TEN[:7], main__test=TEN[7:],
                      socratic__train=TEN[:5])
    assert said(place, "--dataset-config", "main") == said(place / "main") == (7, 3)
    assert said(place, "--dataset-config", "socratic") == (4, 1)
    for more in ([], ["--dataset-config", "mian"]):
        line = stopped(capsys, load, "--dataset", str(place), *more)
        assert "main" in line and "socratic" in line


def test_folders_of_any_name_of_one_split_or_of_many_parts_are_read(workplace):
    for name in ODD_NAMES:
        if not any(sign in name for sign in ("[", "*", "::")):  # of which datasets makes patterns
            assert said(published(name, train=TEN)) == (9, 1), name
    for split in ("train", "test", "validation", "gsm8k"):
        assert said(published(f"only {split}", **{split: TEN})) == (9, 1), split
    shards = {f"data__train-0000{i}-of-00002": TEN[5 * i : 5 * i + 5] for i in range(2)}
    assert said(published("shards", **shards)) == (9, 1)
    assert said(published("split", train=TEN[:6], test=TEN[8:], validation=TEN[6:8])) == (6, 2)


CHATS = [  # around a question
    lambda text: [turn([{"type": "text", "text": "Think."}, {"type": "text", "text": text}])],
    lambda text: [turn([{"type": "image"}, {"type": "text", "text": text}])],
    lambda text: [{"from": "system", "value": "s"}, {"from": "human", "value": text},
                  {"from": "gpt", "value": "1"}]]


@pytest.mark.parametrize("chat", CHATS)
def test_conversations_of_all_layouts_give_their_question(chat, workplace):
    rows = [{"chat": chat(row["question"]), "answer": row["answer"]} for row in TEN]
    Path("chat.jsonl").write_text(lines(rows))
    table(rows).to_parquet("chat.parquet")
    named = ["--question-column", "chat"]
    loaded = [load("--dataset", file, *named) for file in ("chat.jsonl", "chat.parquet")]
    loaded.append(script.load_questions(script.parse_options(named), table(rows))[1:])
    for train, test in loaded:
        asked = {row["question"].removeprefix("Think.").strip() for row in train + test}
        assert asked == {row["question"] for row in TEN}


def test_a_layout_that_is_not_read_is_told_those_that_are(workplace, capsys):
    Path("odd.jsonl").write_text(lines([{"chat": [["user", "a"]], "answer": 1}]))
    line = stopped(capsys, load, "--dataset", "odd.jsonl", "--question-column", "chat")
    assert all(word in line for word in ("role", "content", "from", "value", "row 1", "odd.jsonl"))


@pytest.mark.parametrize("name", [
    "a.jsonl", "a.parquet", "folder/train.jsonl", "deep/data/train-0.parquet",
    "base/model.safetensors", "base/tokenizer.json"])
def test_what_git_lfs_has_not_fetched_is_said(name, tiny_model, workplace, capsys, caplog):
    file = Path(name)
    shutil.copytree(tiny_model, "base")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    caplog.set_level(logging.CRITICAL, logger="datasets")  # as DATASETS_VERBOSITY in a process
    asked = (script.main, arguments("base")) if "base" in name else (
        load, "--dataset", file.parts[0])
    assert "git lfs pull" in stopped(capsys, *asked, informed=True)


# ---- Paths, and the commands that are printed ----------------------------------------------------
@pytest.fixture
def home(workplace, tiny_model, monkeypatch) -> Path:
    place = workplace / "at home"
    place.mkdir()
    monkeypatch.setenv("HOME", str(place))
    shutil.copytree(tiny_model, place / "base")
    for name in ("data.jsonl", "noisy.py"):
        shutil.move(name, place)
    (place / "held.jsonl").write_text(lines(TEN))
    make_adapter(place / "base", place / "brought", {})
    (place / "run.yaml").write_text("dataset: ~/data.jsonl\noutput_dir: ~/runs/one\n")
    return place


def told_of(place) -> list[str]:
    return [f"--model={place}/base", f"--adapter={place}/brought", f"--dataset={place}/data.jsonl",
            f"--eval-dataset={place}/held.jsonl", "--reward-funcs", f"{place}/noisy.py:vowels"]


def test_a_tilde_is_the_home_wherever_a_path_is_taken(home, capsys):
    told = [*told_of("~"), "--output-dir=~/runs/two"]
    written = script.parse_options([word.replace("~", str(home)) for word in told])
    assert script.parse_options(told).asked == written.asked
    for args in (script.parse_options(["--config=~/run.yaml"]), infer.parse_options([
            "--adapter=~/brought", "--model=~/base", "--file=~/q.txt", "--jsonl=~/a.jsonl"]),
            infer.parse_options(["--evaluate", "--adapter=~/brought", "--output-dir=~/here",
                                 "--dataset=~/data.jsonl"])):
        given = " ".join(map(str, vars(args).values()))
        assert "~" not in given and given.count(str(home)) > 1
    assert str(home / "runs/none") in stopped(capsys, report.main, ["~/runs/none"])
    line = stopped(capsys, benchmark.main, ["--model=~/base", "--output=~/base"], informed=True)
    assert f"--output {home / 'base'}" in line
    script.main([*CHEAP, *told, "--dry-run"])
    assert str(home) in capsys.readouterr().out and not Path("~").exists()


def test_a_run_goes_on_with_what_has_moved(home, capsys, monkeypatch):
    def broken(run, config):
        run.dir.mkdir(parents=True)
        script.write_whole(run.dir / "args.json", run.record)

    home.rename("old")
    with monkeypatch.context() as patch:
        patch.setattr(script, "run_phases", broken)
        script.main([*CHEAP, *told_of("old"), "--output-dir=run"])
    going_on = ["--resume", "--dry-run", "--output-dir=run"]
    script.main(going_on)
    monkeypatch.chdir("old")
    script.main([*going_on[:2], "--output-dir=../run"])
    monkeypatch.chdir("..")
    Path("old").rename("new place")
    assert "old/brought" in stopped(capsys, script.main, going_on)
    found = told_of("new place")
    script.main([*going_on, *found])
    told = [line for line in capsys.readouterr().out.splitlines() if "as typed; the run" in line]
    assert len(told) == 5 and all("new place" in line and "old" in line for line in told)
    assert "old/" in stopped(capsys, script.main, [*going_on, *found[1:]], informed=True)
    other = [word.replace("vowels", "later") for word in found]
    line = stopped(capsys, script.main, [*going_on, *other], informed=True)
    assert "leave them out" in line
    args = Path("run/args.json")  # as of a run without held-out questions
    args.write_text(re.sub('"eval_dataset": "[^"]*"', '"eval_dataset": null', args.read_text()))
    line = stopped(capsys, script.main, [*going_on, *found], informed=True)
    assert "eval_dataset was None" in line


def test_an_evaluation_goes_on_from_any_directory(home, capsys, monkeypatch):
    ask = ["--evaluate", "--model", str(home / "base"), "--dataset", str(home / "data.jsonl"),
           "--eval-questions", "2", "--max-tokens", "2", "--output-dir", str(home / "graded")]
    infer.main([*ask, "--adapter", os.path.relpath(home / "brought")])
    assert json.loads((home / "graded/args.json").read_text())["adapter"] == str(home / "brought")
    monkeypatch.chdir(home)
    infer.main([*ask, "--adapter", "brought", "--resume"])


def typed(shown: str, cwd) -> subprocess.CompletedProcess:
    """A printed command, typed into a shell as it stands, with this Python as `python`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(shown, shell=True, text=True, capture_output=True, cwd=cwd,
                          stdin=subprocess.DEVNULL, env=os.environ | {"PATH": path})


@slow
@pytest.mark.parametrize("beside", [True, False])
def test_every_printed_command_runs_as_it_stands(beside, tiny_model, tmp_path):
    place = tmp_path / "it's \"my\" $HOME & runs"
    scripts = place if beside else tmp_path / "the scripts'"
    place.mkdir()
    scripts.mkdir(exist_ok=True)
    for file in HERE.glob("*.py"):
        shutil.copy(file, scripts)
    (place / "my rewards.py").write_text(
        "import os, signal\n"
        "def stops(completions, trainer_state, **kwargs):\n"
        "    if trainer_state.global_step == 1:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return [len(c[0]['content'].encode()) % 7 for c in completions]\n")
    (place / "data 'mine'.jsonl").write_text(lines(
        {"question": f"\"It's\" $5 `x` {n}\n+ 1; how many\\?", "answer": n} for n in range(40)))
    told = arguments(tiny_model, "--max-steps", "4", dataset="data 'mine'.jsonl",
                     reward="my rewards.py:stops")
    done = command(scripts / "reasoning_model_grpo.py", *told, cwd=place)
    (going_on,) = re.findall("^go on with: (.*)", done.stdout, re.M)
    done = typed(going_on, place)
    assert done.returncode == 0 and "step 4/4" in done.stdout, done.stdout + done.stderr
    asked = done.stdout[done.stdout.index("ask it:") + 7 :].strip()
    done = typed(asked, place)
    assert done.returncode == 0 and "answer:" in done.stdout, asked + done.stderr
    for words in (going_on, asked):  # a reader that has enough
        done = typed(f"{words} | head -1", place)
        assert done.stdout.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr


# ---- Where it runs -------------------------------------------------------------------------------
def remade(model, change) -> Path:
    """A copy of a model whose tokenizer and template are changed by a function."""
    from transformers import AutoTokenizer

    place = Path(shutil.copytree(model, "remade", dirs_exist_ok=True))
    tokenizer = AutoTokenizer.from_pretrained(place)
    change(tokenizer)
    tokenizer.save_pretrained(place)
    return place


def test_a_pad_token_without_a_row_or_none_is_replaced(tiny_model, workplace, capsys):
    Path("q.txt").write_text("1 + 1?\nHow many are 22 and 333?\n")  # of unlike length: padded
    for change in (lambda one: one.add_special_tokens({"pad_token": "[PAD]"}),
                   lambda one: setattr(one, "pad_token", None)):
        model = remade(tiny_model, change)
        script.main(arguments(model, "--dry-run"))
        infer.main(["--model", str(model), "--file", "q.txt", "--max-tokens", "3"])
        assert capsys.readouterr().out.count("answer:") == 2


def template(end: str) -> str:
    return ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}" + end + "\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}")


@pytest.mark.parametrize("own, end, says", [
    ("<bos>", "<|over|>", "no row for the token <.over.> .*resize"),  # ChatML put on a base model
    (None, "", "no end token")])
def test_a_tokenizer_that_does_not_fit_is_refused_in_a_dry_run(
        own, end, says, tiny_model, workplace, capsys):
    def change(tokenizer):
        tokenizer.add_special_tokens({"additional_special_tokens": [end] if end else []})
        tokenizer.eos_token = tokenizer.pad_token = own
        tokenizer.chat_template = template(end)

    model = remade(tiny_model, change)
    for main, told in ((script.main, arguments(model, "--dry-run")),
                       (infer.main, ["2 + 3?", "--model", str(model)])):
        assert re.search(says, stopped(capsys, main, told, informed=True))


@pytest.mark.parametrize("end", [
    "</s>", "<|im_end|>", "<｜end▁of▁sentence｜>", "[/INST]", "a", "ende.", "<конец>", "。",
    "abcdefghijklm", "nopqrstuvwxyz"])
def test_an_end_token_of_any_letters_ends_a_turn(end, tiny_model, workplace):
    """None of its letters is taken for the reply's, and what it ends is cut there."""
    model = Path(shutil.copytree(tiny_model, "remade"))
    for file in model.glob("*.json*"):  # in place of a token that has a row
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace("<|start_header_id|>", end), encoding="utf-8")
    (model / "chat_template.jinja").write_text(template(end), encoding="utf-8")
    tokenizer = script.load_tokenizer(script.find_base(str(model), None, True))
    assert tokenizer.eos_token == end
    script.main(arguments(model, "--dry-run"))


def test_a_terminal_that_can_not_show_a_sign_gets_a_question_mark(
        tiny_model, workplace, monkeypatch):
    Path("data.jsonl").write_text(lines(
        {"question": f"Zo {n} ½ 数 · — “Äpfel”?", "answer": n} for n in range(40)))
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    script.main(arguments(tiny_model, "--dry-run"))
    shown.flush()
    assert b"Zo" in shown.buffer.getvalue()


@slow
@pytest.mark.parametrize("home", [None, "/"])
def test_a_whole_run_and_its_answer_come_wherever_it_runs(home, tiny_model, workplace):
    """In the C locale, of a user whom the machine does not know where that can be, in a directory
    that any user may write to, with scripts, model and data in it."""
    more = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HOME": home,
            "XDG_CACHE_HOME": None}
    unknown = ["setpriv", "--reuid", "54321", "--clear-groups", sys.executable]
    if not shutil.which("setpriv") or subprocess.run(
            [*unknown, "-c", "import torch"], capture_output=True).returncode:
        unknown = [sys.executable]  # it takes root, and an environment for others to read
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        for file in HERE.glob("*.py"):
            shutil.copy(file, place)
        shutil.copytree(tiny_model, place / "model")
        shutil.copy("noisy.py", place)
        (place / "data.jsonl").write_text(lines(
            {"question": f"Zoë has {n} ½ 数?", "answer": f"{n} · 1\n#### {n}"} for n in range(40)))
        subprocess.run(["chmod", "-R", "a+rwX", place], check=True)
        env = {key: value for key, value in (os.environ | more).items() if value is not None}
        for told in (["reasoning_model_grpo.py", *arguments("model", "--warm-start", "1")],
                     ["infer.py", "Zoë has 3 数?"], ["report.py", "outputs/smollm2-135m"]):
            done = subprocess.run([*unknown, *told], cwd=place, env=env, capture_output=True)
            assert done.returncode == 0, (told[0], done.stderr[-2000:].decode("utf-8", "replace"))


def test_options_typed_after_run_in_a_notebook_are_read(monkeypatch, capsys):
    """%run sets sys.argv, as Spyder's runfile does; a kernel's own arguments are none of ours."""
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    for main, file in ((script.main, "reasoning_model_grpo.py"), (infer.main, "infer.py")):
        monkeypatch.setattr(sys, "argv", [f"/somewhere/{file}", "--modle", "3"])
        assert "did you mean --model" in stopped(capsys, main)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    assert script.parse_options(None).typed == set()
