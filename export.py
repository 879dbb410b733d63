"""Checking a saved adapter, and handing it on: merged weights, a GGUF file, the Hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from models import (
    Trained, complete, find_trained, load_tokenizer, load_trained, render_prompts, stop,
)


def check_adapter(model, tokenizer, prompt: list[dict], directory: Path) -> None:
    """Stop unless the adapter changes the model, and reads back as what was trained.

    Unsloth once rolled out from the bare base model without an error (its pull request 8701), and
    a saved adapter that loads with other names changes nothing, silently.
    """
    import torch

    ids = tokenizer.apply_chat_template([prompt], add_generation_prompt=True, return_tensors="pt",
                                        return_dict=True).to(model.device)  # fmt: skip
    model.eval()
    with torch.no_grad():
        adapted = model(**ids).logits
        with model.disable_adapter():
            plain = model(**ids).logits
    if torch.equal(adapted, plain):
        stop(f"the adapter in {directory} changes nothing: it gives the base model's own logits")
    written = complete(model, tokenizer, [prompt], max_tokens=32)
    model.load_adapter(str(directory), adapter_name="saved")
    trained = dict(model.named_parameters())
    for name, parameter in trained.items():  # PEFT reads it as float32, TRL may train in bfloat16
        if ".saved." in name:
            parameter.data = parameter.data.to(trained[name.replace(".saved.", ".default.")].dtype)
    model.set_adapter("saved")
    again = complete(model, tokenizer, [prompt], max_tokens=32)
    model.set_adapter("default")
    model.delete_adapter("saved")
    if again != written:
        stop(f"the adapter in {directory} reads back as another one: it wrote "
             f"{written[0].text!r}, and now {again[0].text!r}")


def ask_fast(model, tokenizer, prompt: list[dict], directory: Path, max_tokens: int) -> str:
    """One answer of the saved adapter from Unsloth's vLLM engine, as infer.py will get it."""
    from vllm import SamplingParams

    (text,) = render_prompts(tokenizer, [prompt])
    (reply,) = model.fast_generate(
        [text], sampling_params=SamplingParams(temperature=0.8, top_p=0.95, max_tokens=max_tokens),
        lora_request=model.load_lora(str(directory)))
    model.vllm_engine.sleep(1)  # the evaluation to come needs its memory
    return reply.outputs[0].text


def export(args, adapter: Path) -> None:
    """Write what --export asked for, beside the adapter."""
    base = args.model if args.model_named and adapter == args.adapter else None
    trained, run_dir = find_trained(base, adapter), adapter.parent
    merged = run_dir / "merged_16bit"
    if {"merged", "gguf"} & set(args.export):
        merge(trained, load_tokenizer(trained.load_from, args.chat_template), merged)
        print(f"merged: {merged}")
    if "gguf" in args.export:
        print(f"GGUF: {write_gguf(merged, run_dir / 'model.gguf')}")
    if "hub" in args.export:
        print(f"Hub: {push(trained, run_dir, args.hub_id)}")


def merge(trained: Trained, tokenizer, target: Path, dtype: str = "bfloat16") -> None:
    """Adapter and base as one model, on 16-bit weights: merging onto 4-bit ones loses digits."""
    if (target / "config.json").is_file():
        return
    # After training, the GPU is full.
    merged = load_trained(trained, dtype, False, "eager", on_cpu=True).merge_and_unload()
    merged.save_pretrained(target)
    tokenizer.save_pretrained(target)


def write_gguf(merged: Path, target: Path) -> Path:
    """llama.cpp's converter does it; it comes with a clone of llama.cpp, not from PyPI."""
    name = "convert_hf_to_gguf.py"
    places = [shutil.which(name), Path(os.environ.get("LLAMA_CPP", "llama.cpp")) / name]
    found = next((place for place in places if place and Path(place).is_file()), None)
    if found is None:
        stop(f"no {name}: git clone https://github.com/ggml-org/llama.cpp and set LLAMA_CPP to it; "
             f"the merged model is in {merged}")  # fmt: skip
    command = [sys.executable, str(found), str(merged), "--outfile", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        stop(f"{name} fails: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return target


def model_card(trained: Trained, run_dir: Path) -> str:
    """The recipe, and the measured table with its intervals; nothing that was not measured."""
    run, options = trained.run, trained.run.get("options", {})
    lines = ["---", f"base_model: {run.get('base_model', trained.name)}", "library_name: peft",
             "tags: [grpo, lora, reasoning]", "---", "",
             f"A LoRA adapter trained with GRPO, recipe `{run.get('recipe')}`, seed "
             f"{run.get('seed')}, on {options.get('dataset')}.", ""]  # fmt: skip
    path = run_dir / "evaluation.json"
    if path.is_file():
        from evaluate import METRICS, interval

        record = json.loads(path.read_text(encoding="utf-8"))
        stages = record["stages"]
        n = next(iter(stages.values()))["n"]
        lines += [f"Measured on {n} held-out questions, 95 % intervals:", "",
                  f"| | {' | '.join(stages)} |", "|---" * (len(stages) + 1) + "|"]  # fmt: skip
        lines += [f"| {label} | {' | '.join(interval(s[m]) for s in stages.values())} |"
                  for m, label in METRICS.items()]  # fmt: skip
        lines += ["", *(f"{pair}: {c['words']}." for pair, c in record["changes"].items())]
    else:
        lines.append("It was not evaluated.")
    return "\n".join(lines) + "\n"


def push(trained: Trained, run_dir: Path, hub_id: str) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        (trained.adapter / "README.md").write_text(model_card(trained, run_dir), encoding="utf-8")
        api.create_repo(hub_id, exist_ok=True)
        return str(api.upload_folder(repo_id=hub_id, folder_path=str(trained.adapter)))
    except (OSError, ValueError) as problem:
        stop(f"--export hub: {type(problem).__name__}: {problem}; log in with `hf auth login`")
