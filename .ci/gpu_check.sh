#!/usr/bin/env bash
# What needs a GPU, as one table: each backend trains 60 steps, is measured before and after, saves,
# and reads its adapter back. Where vLLM writes the rollouts, engine_checks.py then holds the run to
# what test_engine.py asks of a pretended card.
#
#   bash .ci/gpu_check.sh                       # all four; Qwen2.5-0.5B and GSM8K from the Hub
#   bash .ci/gpu_check.sh unsloth-4bit-vllm     # one of them
#   MODEL=DIR TRAIN=train.jsonl TEST=test.jsonl WHEELS=DIR bash .ci/gpu_check.sh   # without a network
#
# On a bare machine (Python 3.12, a CUDA torch preinstalled) it installs what is missing first.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-outputs/gpu-check-$(date +%Y%m%d-%H%M%S)}  # a run never writes over another
python -c "import trl, peft, datasets" 2>/dev/null || python -m pip install -q \
    ${WHEELS:+--no-index --find-links "$WHEELS"} -r "${REQUIREMENTS:-requirements.txt}"
common=(--recipe small-models --model "${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}" --report-to none
        --max-steps "${STEPS:-60}" --eval-questions "${EVAL:-200}" --max-completion-length 256
        --warm-start 20 --eval-steps 0 ${TRAIN:+--dataset "$TRAIN"} ${TEST:+--eval-dataset "$TEST"})
declare -A checks=(
    [transformers]="--backend transformers --vllm off --no-load-in-4bit"
    [transformers-4bit]="--backend transformers --vllm off --load-in-4bit"
    [unsloth-4bit]="--backend unsloth --vllm off --load-in-4bit"
    [unsloth-4bit-vllm]="--backend unsloth --vllm colocate --load-in-4bit")
mkdir -p "$out"
for name in ${@:-transformers transformers-4bit unsloth-4bit unsloth-4bit-vllm}; do
    echo "== $name"
    # shellcheck disable=SC2086
    ENGINE_LOG="$out/$name.engine" python .ci/engine_log.py reasoning_model_grpo.py \
        "${common[@]}" ${checks[$name]} ${MORE:-} --output-dir "$out/$name" 2>&1 |
        tee "$out/$name.log" | grep -v "^step "
    [[ $name == *-vllm ]] || continue
    python -c "import json, sys
for line in open(sys.argv[1]): print(json.dumps({'question': json.loads(line)['question']}))" \
        "$out/$name/evaluation_after.jsonl" > "$out/$name/asked.jsonl"
    for engine in unsloth vllm transformers; do
        python infer.py --adapter "$out/$name/grpo_saved_lora" --engine "$engine" \
            --file "$out/$name/asked.jsonl" --jsonl "$out/$name/$engine.jsonl"
    done
    python .ci/engine_checks.py "$out/$name" "$out/$name.engine" \
        "$out/$name"/{unsloth,vllm,transformers}.jsonl
done
python - "$out" <<'TABLE'
import json, pathlib, re, sys

print("| backend | strict before | warm start | after | tokens/s | minutes | peak GB |")
print("|---|---|---|---|---|---|---|")
for log in sorted(pathlib.Path(sys.argv[1]).glob("*.log")):
    text, run = log.read_text(), log.with_suffix("")
    if not (run / "evaluation.json").is_file():
        print(f"| {log.stem} | {text.strip().splitlines()[-1][:90]} | | | | | |")
        continue
    stages = json.loads((run / "evaluation.json").read_text())["stages"].values()
    rates = " | ".join(f"{100 * stage['strict']['rate']:.1f} %" for stage in stages)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speed = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    minutes, peak = re.search(r"([\d.]+) minutes, peak memory ([\d.]+) GB", text).groups()
    print(f"| {log.stem} | {rates} | {speed[len(speed) // 2]:.0f} | {minutes} | {peak} |")
TABLE
