#!/usr/bin/env bash
# The arms of the written tasks on GPUs, one condition of the prompts on each: seeds trained, then scored, an arm a process.
#
#   MODEL=DIR TASKS=DIR GENERAL=FILE:COLUMN OUT=DIR [SEEDS="1 2"] [CURVES=1] [AUTO=1] [STUDY=text-qwen15] [ARMS="..."] \
#     [SET="--set ..."] benchmarks/text_gpus.sh told:0 bare:1
#
# Each argument is CONDITION:GPU and runs by itself, into OUT/CONDITION; OUT/steps says what ended when, OUT/log holds the rest. A seed is
# scored while the next one trains. What is there is not done again, and what has failed for want of memory is done once more at the end, by
# itself. On one H200 a seed of five arms takes 245 s to train and 240 s to score. AUTO=1: `merge auto` of the plain arm's first seed, told.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
ARMS="${ARMS:-kaiming kaiming_penalised osrm_mean contrastive contrastive_penalised}"
STUDY="${STUDY:-text-qwen15}"
mkdir -p "$OUT/log"

script() { # CONDITION NAME ARGUMENT...
  local condition=$1 name=$2 file=$3
  shift 3
  ${PY:-python3} -P "benchmarks/$file" --study "recipes/studies/$STUDY.yaml" --set base.model="$MODEL" --set data.root="$TASKS" ${SET:-} \
    --condition "$condition" --out "$OUT/$condition" --general "$GENERAL" "$@" > "$OUT/log/$condition-$name.log" 2>&1
  local code=$?
  echo "$(date +%T) $condition $name: $code" >> "$OUT/steps"
  return $code
}

part() { # CONDITION WHAT
  script "$1" "${2//[: ]/_}" text_arms.py --do "$2" || echo "$1 $2" >> "$OUT/failed-$1"
}

scored() { # CONDITION SEED
  for arm in $ARMS; do part "$1" "fixed:$2:$arm" & done
  [ "$STUDY:$2" = text-qwen15:1 ] && { part "$1" "train:1:joint"; part "$1" "fixed:1:joint"; } &
  wait
}

condition() { # CONDITION GPU
  export CUDA_VISIBLE_DEVICES=$2
  for seed in ${SEEDS:-1 2}; do
    part "$1" "train:$seed:${ARMS// /,}"
    scored "$1" "$seed" &
  done
  wait
  if [ -e "$OUT/failed-$1" ]; then
    mv "$OUT/failed-$1" "$OUT/again-$1"
    while read -r _ what; do part "$1" "$what"; done < "$OUT/again-$1"
  fi
  [ "${AUTO:-}" ] && [ "$1" = told ] && script told auto text_auto.py --seed "${SEEDS%% *}"
  [ "${CURVES:-}" ] && for arm in kaiming contrastive contrastive_penalised; do part "$1" "curves:${SEEDS%% *}:$arm" & done
  wait
}

for each in "$@"; do condition "${each%%:*}" "${each##*:}" & done
wait
