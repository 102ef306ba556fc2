#!/usr/bin/env bash
# The arms of the written tasks on GPUs, one condition of the prompts on each: seeds trained, then scored, an arm a process.
#
#   MODEL=DIR TASKS=DIR GENERAL=FILE:COLUMN OUT=DIR [SEEDS="1 2"] [CURVES=1] benchmarks/text_gpus.sh told:0 bare:1
#
# Each argument is CONDITION:GPU and runs by itself, into OUT/CONDITION; OUT/steps says what ended when, OUT/log holds the rest. Started
# again, what is there is not done again. On one H200 a seed of five arms takes 245 s to train and 240 s to score.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
ARMS="kaiming kaiming_penalised osrm_mean contrastive contrastive_penalised"
mkdir -p "$OUT/log"

part() { # CONDITION WHAT
  ${PY:-python3} -P benchmarks/text_arms.py --study recipes/studies/text-qwen15.yaml --set base.model="$MODEL" --set data.root="$TASKS" \
    --condition "$1" --out "$OUT/$1" --general "$GENERAL" --do "$2" > "$OUT/log/$1-${2//[: ]/_}.log" 2>&1
  echo "$(date +%T) $1 $2: $?" >> "$OUT/steps"
}

condition() { # CONDITION GPU
  export CUDA_VISIBLE_DEVICES=$2
  for seed in ${SEEDS:-1 2}; do
    part "$1" "train:$seed:${ARMS// /,}"
    for arm in $ARMS; do part "$1" "fixed:$seed:$arm" & done
    [ "$seed" = 1 ] && { part "$1" "train:1:joint"; part "$1" "fixed:1:joint"; } &
    wait
  done
  [ "${CURVES:-}" ] && for arm in kaiming contrastive contrastive_penalised; do part "$1" "curves:${SEEDS%% *}:$arm" & done
  wait
}

for each in "$@"; do condition "${each%%:*}" "${each##*:}" & done
wait
