"""What people bring, by kinds: `pytest test_field.py`, and `pytest -m slow test_field.py` for more.

Adapters of all of PEFT's options, rewards as TRL calls them, rows from Python, files as they are
published, paths and printed commands, and the places it runs in.
"""
# ruff: noqa: F811  (fixtures are imported, and named as arguments)

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from test_scripts import (  # noqa: F401  (first of ours: it keeps every test off the Hub)
    CHEAP, arguments, stopped, tiny_model, workplace,
)
import infer
import reasoning_model_grpo as script

slow, pytestmark = pytest.mark.slow, pytest.mark.filterwarnings("ignore")  # PEFT's own
QUESTION = "Ann has 3 pens and 4 books. How many?"


# ---- 1: an adapter answers as it was trained, or not at all --------------------------------------
FAMILIES = {  # kind: (configuration, LoRA targets, the name of the embeddings)
    "Llama": ({"attention_bias": True}, ["q_proj", "v_proj"], "embed_tokens"),
    "Qwen2": ({}, ["q_proj", "v_proj"], "embed_tokens"),
    "Gemma": ({"head_dim": 16}, ["q_proj", "v_proj"], "embed_tokens"),
    "GPT2": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 2048}, ["c_attn"], "wte"),
}


@pytest.fixture(scope="session")
def base_of(tiny_model, tmp_path_factory):
    """(kind, tied) -> the directory of a random model of that kind, its embeddings tied or not."""
    import torch
    import transformers

    place, made = tmp_path_factory.mktemp("families"), {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)

    def make(kind: str, tied: bool) -> Path:
        if (kind, tied) not in made:
            size = {"vocab_size": len(tokenizer), "initializer_range": 0.2, "pad_token_id": 0,
                    "tie_word_embeddings": tied, "eos_token_id": tokenizer.eos_token_id,
                    "bos_token_id": tokenizer.bos_token_id}
            if kind != "GPT2":
                size |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                         "num_attention_heads": 2, "num_key_value_heads": 1,
                         "max_position_embeddings": 2048}
            torch.manual_seed(1)
            config = getattr(transformers, f"{kind}Config")(**size | FAMILIES[kind][0])
            made[kind, tied] = place / f"{kind}-{tied}"
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made[kind, tied])
            tokenizer.save_pretrained(made[kind, tied])
        return made[kind, tied]

    return make


def options(targets, table) -> dict:
    """What people ask of PEFT: a name -> LoraConfig's fields; `save`: whether with embeddings."""
    head = [*targets, "lm_head"]
    return {
        "plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
        "ranks": {"rank_pattern": {targets[0]: 8}}, "alphas": {"alpha_pattern": {targets[-1]: 32}},
        "bias all": {"bias": "all"}, "bias lora_only": {"bias": "lora_only"},
        "bias of LoRA": {"lora_bias": True}, "one layer": {"layers_to_transform": [1]},
        "regex": {"target_modules": rf".*\.1\..*({'|'.join(targets)})"},
        "all linear": {"target_modules": "all-linear"},
        "gaussian": {"init_lora_weights": "gaussian"}, "olora": {"init_lora_weights": "olora"},
        "pissa": {"init_lora_weights": "pissa"},
        "orthogonal": {"init_lora_weights": "orthogonal"},
        "head": {"target_modules": head}, "table": {"target_modules": [*targets, table]},
        "both": {"target_modules": [table, "lm_head"]},
        "head, saved by default": {"target_modules": head, "save": "auto"},
        "table, saved by default": {"target_modules": [*targets, table], "save": "auto"},
        "dora of the table": {"use_dora": True, "target_modules": [*targets, table]},
        "tied head": {"target_modules": head, "ensure_weight_tying": True},
        "whole head": {"modules_to_save": ["lm_head"]},
        "whole table": {"modules_to_save": [table]},
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

    fields, added = dict(fields), fields.get("added", 0)
    save, _ = fields.pop("save", False), fields.pop("added", None)
    model = AutoModelForCausalLM.from_pretrained(base)
    if added:
        model.resize_token_embeddings(model.config.vocab_size + added, mean_resizing=False)
    model = peft.get_peft_model(model, peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | fields))
    torch.manual_seed(3)
    moved = [p for p in model.parameters() if p.requires_grad]
    if save is True:  # trained beside the adapter
        moved += [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    for weight in moved:
        weight.data.add_(torch.randn_like(weight) / 5)
    shutil.rmtree(place, ignore_errors=True)
    model.save_pretrained(place, save_embedding_layers=save)
    AutoTokenizer.from_pretrained(base).save_pretrained(place)
    return model.eval()


def found(base: Path, adapter: str = "brought"):
    return script.find_base(str(base), adapter, True)


HOW = SimpleNamespace(dtype="float32", attn_implementation="auto", full_finetune=False,
                      load_in_4bit=False, export=[], adapter="brought", lora_targets=[])


def logits(model, ids):
    import torch

    with torch.no_grad():
        return model(ids).logits


def answers_as_trained(base: Path, fields: dict, capsys, ask=False) -> None:
    """What is loaded, what is exported and what infer.py says are PEFT's model, not merged."""
    import torch
    from transformers import AutoModelForCausalLM

    trained = make_adapter(base, Path("brought"), fields)
    tokenizer = script.load_tokenizer(found(base))
    text = infer.render(QUESTION, {}, tokenizer)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    right = logits(trained, ids)
    script.check_model(argparse_like(export=["merged"]), found(base))  # of a dry run
    given = logits(script.load_saved(HOW, found(base), Path("brought")), ids)
    assert (given - right).abs().max() < 2e-3
    shutil.rmtree("merged_16bit", ignore_errors=True)
    script.export(argparse_like(export=["merged"]), found(base), None, tokenizer)
    merged = logits(AutoModelForCausalLM.from_pretrained("merged_16bit", dtype=torch.float32), ids)
    apart = (merged - right).norm() / right.norm()
    assert apart < 0.05, apart  # 16-bit weights keep three digits
    if ask:
        capsys.readouterr()
        infer.main([QUESTION, "--adapter", "brought", "--model", str(base), "--json",
                    "--max-tokens", "8", "--dtype", "float32"])
        said = json.loads(capsys.readouterr().out)["completion"]
        assert said == script.complete(trained, tokenizer, [text], max_tokens=8)[0].text


def argparse_like(**more):
    return SimpleNamespace(**vars(HOW) | more)


ONCE_WRONG = [  # of each, what a family or its tied embeddings once got wrong
    ("Llama", True, "head"), ("Llama", True, "table"), ("Qwen2", True, "tokens of both"),
    ("Llama", False, "pissa"), ("Qwen2", True, "olora"), ("Gemma", True, "embeddings beside"),
    ("GPT2", True, "both"), ("GPT2", False, "ranks")]


@pytest.mark.parametrize("kind, tied, name", ONCE_WRONG)
def test_an_adapter_answers_as_it_was_trained(kind, tied, name, base_of, workplace, capsys):
    fields = {"target_modules": FAMILIES[kind][1]} | options(*FAMILIES[kind][1:])[name]
    answers_as_trained(base_of(kind, tied), fields, capsys, ask=name == "head")


@slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_an_adapter_of_any_option_answers_as_it_was_trained(kind, tied, base_of, workplace, capsys):
    beyond_peft = {("GPT2", "olora"), ("GPT2", "tied head"), ("Gemma", "bias of LoRA")}
    for name, fields in options(*FAMILIES[kind][1:]).items():
        if (kind, name) not in beyond_peft:  # which can't read what it saved, or not merge
            fields = {"target_modules": FAMILIES[kind][1]} | fields
            answers_as_trained(base_of(kind, tied), fields, capsys, ask=True)


REFUSED = {  # what is no adapter of this base as it was trained: (LoraConfig's fields, the line)
    "random beginning": ({"init_lora_weights": "pissa_niter_2"}, "began at random"),
    "on for some tokens": ({"alora_invocation_tokens": [70]}, "aLoRA does not support merging"),
    "layers twice": ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
    "a bias where there is none": ({"lora_bias": True}, "has no bias"),
    "more tokens": ({"added": 8, "modules_to_save": ["embed_tokens", "lm_head"]}, "can't be put"),
    "more tokens, beside": ({"added": 8, "save": True}, "can't be put"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_answer_as_trained_is_refused_before_anything(
        name, base_of, workplace, capsys):
    fields, says = REFUSED[name]
    base = base_of("Gemma", True)
    make_adapter(base, Path("brought"), {"target_modules": ["q_proj"]} | fields)
    asked = ["--adapter", "brought", "--model", str(base)]
    line = stopped(capsys, script.main, [*CHEAP, *asked, "--dataset", "data.jsonl", "--dry-run"])
    assert says in line
    assert says in stopped(capsys, infer.main, ["2 + 3?", *asked], informed=True)
    assert says in stopped(capsys, script.main, [*asked, "--export", "merged"])
    assert not Path("outputs").exists() and not Path("merged_16bit").exists()


def test_training_does_not_lose_the_embeddings_that_an_adapter_brings(base_of, workplace, capsys):
    base = base_of("Llama", True)
    make_adapter(base, Path("brought"), {"target_modules": ["q_proj"], "save": True})
    line = stopped(capsys, script.main, [*CHEAP, "--adapter", "brought", "--model", str(base),
                                         "--dataset", "data.jsonl", "--dry-run"])
    assert "embed_tokens.weight" in line or "lm_head.weight" in line
    assert "--export merged" in line


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_target_that_shares_its_matrix_is_refused_in_a_dry_run(
        target, base_of, workplace, capsys):
    told = "--dry-run", "--lora-targets", "q_proj", target
    assert "one matrix" in stopped(capsys, script.main, arguments(base_of("Llama", True), *told))
    if target == "lm_head":
        script.main(arguments(base_of("Llama", False), *told))


VLLM_TAKES = {"plain", "rslora", "one layer", "regex", "all linear", "gaussian"}


def test_what_vllm_would_leave_out_in_silence_goes_to_transformers(base_of, workplace):
    """vLLM reads r, lora_alpha, use_rslora and lora_A, lora_B of layers; of another rank, alpha or
    beginning it knows nothing, and passes over saved embeddings (its peft_helper, lora_model)."""
    import torch
    from safetensors.torch import load_file

    _, targets, table = FAMILIES["Llama"]
    for name, fields in options(targets, table).items():
        make_adapter(base_of("Llama", True), Path("brought"), {"target_modules": targets} | fields)
        assert (infer.beyond_vllm(Path("brought")) is None) == (name in VLLM_TAKES), name
    for name in ("table, saved by default", "plain"):  # the same in the older kind of file
        make_adapter(base_of("Llama", True), Path("brought"),
                     {"target_modules": targets} | options(targets, table)[name])
        torch.save(load_file("brought/adapter_model.safetensors"), "brought/adapter_model.bin")
        Path("brought/adapter_model.safetensors").unlink()
        assert (infer.beyond_vllm(Path("brought")) is None) == (name == "plain")
    Path("brought/adapter_model.bin").write_bytes(b"no weights")
    assert "can't be read" in infer.beyond_vllm(Path("brought"))
