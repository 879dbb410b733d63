#!/usr/bin/env bash
# Everything that needs a GPU, once, as one table: each backend trains, is measured before and after,
# saves, and reads its adapter back (a run stops where that differs). About 25 minutes on a big card.
#
#   bash gpu_check.sh                                    # Qwen2.5-0.5B on GSM8K, from the Hub
#   bash gpu_check.sh --model DIR --dataset train.jsonl --eval-dataset test.jsonl
set -u
cd "$(dirname "$0")"
out=${OUT:-outputs/gpu-check-$(date +%Y%m%d-%H%M%S)}  # a run never writes over another
common=(--recipe small-models --model Qwen/Qwen2.5-0.5B-Instruct --report-to none --max-steps 60
        --eval-questions all --max-completion-length 256 --warm-start 20 "$@")
mkdir -p "$out"
check() {  # name, then the options that make it
    name=$1
    shift
    echo "== $name"
    python reasoning_model_grpo.py "${common[@]}" "$@" --output-dir "$out/$name" 2>&1 |
        tee "$out/$name.log" | grep -v "^step "
}
python reasoning_model_grpo.py --check-env
check transformers --backend transformers --vllm off --no-load-in-4bit
check transformers-4bit --backend transformers --vllm off --load-in-4bit
check unsloth-4bit --backend unsloth --vllm off --load-in-4bit
check unsloth-4bit-vllm --backend unsloth --vllm colocate --load-in-4bit
python - "$out" <<'TABLE'
import json, pathlib, re, sys

from evaluate import interval

print("| backend | strict before | after | tokens/s | minutes | peak GB | estimated GB |")
print("|---|---|---|---|---|---|---|")
for log in sorted(pathlib.Path(sys.argv[1]).glob("*.log")):
    text, run = log.read_text(), log.with_suffix("")
    if not (run / "evaluation.json").is_file():
        print(f"| {log.stem} | {text.strip().splitlines()[-1][:90]} | | | | | |")
        continue
    stages = json.loads((run / "evaluation.json").read_text())["stages"]
    rates = [interval(stage["strict"]) for stage in stages.values()]
    speed = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["tokens_per_second"]
    minutes, peak = re.search(r"([\d.]+) minutes, peak memory ([\d.]+) GB", text).groups()
    guess = re.search(r"memory: +about ([\d.]+) GB", text).group(1)
    print(f"| {log.stem} | {rates[0]} | {rates[-1]} | {speed:.0f} | {minutes} | {peak} | {guess} |")
TABLE
