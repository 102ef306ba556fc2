#!/usr/bin/env bash
# What issues of science still want of GPUs, as one queue for a machine that is there for half an hour: two GPUs, or one.
#
#   MODEL=DIR TASKS=DIR GLUE=DIR MPNET=DIR GENERAL=FILE:COLUMN [WORK=/tmp/half] [GPUS=2] benchmarks/half_hour.sh start
#   benchmarks/half_hour.sh status          # what ended when, what runs, the last line of each log
#   OUT=DIR benchmarks/half_hour.sh collect [SECONDS]
#   FROM=DIR TO=docs/results benchmarks/half_hour.sh pages    # at home: what `collect` brought, beside what is published, as pages
#   benchmarks/half_hour.sh plan            # the queue with its minutes, nothing started
#
# MODEL is the 1.5 B decoder, TASKS what benchmarks/text_tasks.py makes, GLUE and MPNET the folders of gpus.sh; where MPNET is not there the
# steps of MPNet are left out, and where MODEL is not there those of the decoder. `start` copies the code to WORK, starts every lane under
# setsid and comes back at once: what a call leaves in the background without it ends with the call. Started again, it goes on: what is
# in WORK/done is not done again, and lanes that still run are left alone. A step that fails is tried once more where memory ran out,
# and stops nothing else; after UNTIL seconds of the first start nothing new begins. `collect` waits SECONDS at most (less where all
# is done) and leaves records.tgz (everything but answers) and answers.tgz.* of 15 MB in OUT: at most eight files.
# LANES="small_1" EARLY=1 starts some lanes alone and without their waiting, while the decoder is not there yet; `start` later adds the rest.
# DRY=1: two steps of a few rows on the CPU, for models as small as tests/half_hour.py makes them.
set -uo pipefail
cd "$(dirname "$0")/.."
WORK=${WORK:-/tmp/half} PY=${PY:-python3} UNTIL=${UNTIL:-1500} DRY=${DRY:-}
GPUS=${GPUS:-$(nvidia-smi -L 2>/dev/null | wc -l)}

# Lanes: what follows each other on one GPU; steps joined by + run side by side. Names end in the GPU. Minutes are of an H200 that others
# share: trainings of 1.5 B measured (64 adapters 614 s, nine tasks' moments 55 s), the rest of it from the logs of earlier runs; of
# MPNet from earlier studies by the number of trainings. Rounds and full fine-tuning were never timed: they come after what is sure.
BIG_0="q16_train:4 q16_fixed:5 wide_train:6 wide_kaiming+wide_contrastive_penalised:5 speed:5"
BIG_1="q15_train:3 q15_auto:13 joint_train:5 joint_fixed:2"
SMALL_0="rounds_0+rounds_1+rounds_2+full_0:14 full_1:10 full_2:10"
SMALL_1="arms:8 arms_page:1 fresh:3 fitted+heads:6"
lanes() { # all, or those of LANES
  if [ "${LANES:-}" ]; then
    echo "$LANES"
  elif [ "${GPUS:-1}" -gt 1 ]; then
    echo big_0 big_1 small_0 small_1
  else
    echo big_all small_all
  fi
}
steps_of() { # LANE
  case $1 in
    big_0) echo "$BIG_0" ;; big_1) echo "$BIG_1" ;; small_0) echo "$SMALL_0" ;; small_1) echo "$SMALL_1" ;;
    big_all) echo "q16_train:4 q16_fixed:5 q15_train:3 q15_auto:13 ${BIG_0#* * } ${BIG_1#* * }" ;; # in order of worth
    small_all) echo "$SMALL_1 $SMALL_0" ;;
  esac
}

if [ "$DRY" ]; then
  ROWS=(--rows 4 --general-rows 3)
  TINY=(--set "data={root: $TASKS, train_rows: 16, validation_rows: 24, max_length: 24}" --set base.dtype=float32 --set lora.rank=2
    --set "statistics={samples: 4, pool: token, batch_size: 4}" --set tuning_rows=4 --set grid_rows=4
    --set "training={steps: 2, batch_size: 2, lr: 1.0e-3}")
  TINY_GLUE=(--set "data={root: $GLUE, train_rows: 16, validation_rows: 24, max_length: 24}" "${TINY[@]:2}")
  AUTO=(--texts 12 --new-tokens 3 --steps 2 --scales 0.6 --batch 12)
  ARMS_SET=(--set "seeds=[0]" --set "arms=[kaiming, {name: contrastive_curved, subspace: contrastive, like: kaiming, training: {constraint: penalised,
    constraint_options: {curvature: true}}}, {name: kaiming_drawn, subspace: kaiming, like: kaiming, training: {scale_from: 0.5}}]"
    --set "merges=[{name: task_arithmetic, scales: [0.3, 0.6]}]")
  FRESH=(--set "training={steps: 2, batch_size: 4, lr: 1.0e-3}" --set "data={root: $GLUE, train_rows: 16, max_length: 24}" --set lora.rank=2
    --set "statistics={samples: 4, pool: token}" --set base.dtype=float32)
  FITTED=(--texts 12 --rows 8 --device cpu) HEADS=(--texts 12 --rows 8 --length 24 --steps 2 --device cpu)
  SPEED=(--device cpu --adapters 2 --layers 1 --width 0.02 --limit 100 --only linear:all,regmean:all,ties:qv)
  JOINT=() THREADS=1 SCORERS=1 FRESH_SEEDS=9
else
  ROWS=() TINY=(--set "data.root=${TASKS:-}") TINY_GLUE=(--set "data.root=${GLUE:-}") AUTO=() ARMS_SET=()
  FRESH=(--set "data.root=${GLUE:-}" --set base.dtype=bfloat16 --set training.precision=bf16)
  FITTED=(--dtype bfloat16) HEADS=(--length 128 --rows 1000 --device cuda) SPEED=(--limit 300)
  JOINT=(--set training.steps=360) THREADS=6 SCORERS=6 FRESH_SEEDS=9,10
fi

text() { # STUDY FOLDER SCRIPT ARGUMENT...
  local study=$1 folder=$2 script=$3
  shift 3
  OMP_NUM_THREADS=$THREADS $PY -P "benchmarks/$script" --study "recipes/studies/$study.yaml" \
    --set base.model="$MODEL" "${TINY[@]}" "${ROWS[@]}" --general "$GENERAL" --out "$WORK/$folder/told" "$@"
}
of_mpnet() { # SCRIPT ARGUMENT...
  local script=$1
  shift
  $PY -P "benchmarks/$script" --study recipes/studies/arms-mpnet.yaml --set base.model="$MPNET" "${TINY_GLUE[@]}" "$@"
}

work() { # STEP
  case $1 in
    q16_train) text text-qwen15-16 q16 text_arms.py --do train:0:kaiming ;;
    q16_fixed) text text-qwen15-16 q16 text_arms.py --do fixed:0:kaiming ;;
    q15_train) text text-qwen15 q15 text_arms.py --do train:1:kaiming ;;
    q15_auto) text text-qwen15 q15 text_auto.py --seed 1 --positions written "${AUTO[@]}" ;;
    wide_train) text text-qwen15-wide wide text_arms.py --do train:0:kaiming,contrastive_penalised ;;
    wide_*) text text-qwen15-wide wide text_arms.py --do "fixed:0:${1#wide_}" ;;
    joint_*) text text-qwen15 joint text_arms.py "${JOINT[@]}" --do "${1#joint_}:1:joint" ;;
    rounds_*) of_mpnet rounds.py --set "seeds=[${1#rounds_}]" --out "$WORK/rounds" ;;
    full_*) of_mpnet full_finetuning.py --set "seeds=[${1#full_}]" --out "$WORK/full" ;;
    arms) $PY -P -m plait study run recipes/studies/arms-mpnet.yaml --out "$WORK/arms" --set base.model="$MPNET" "${TINY_GLUE[@]}" \
      --executor processes --workers 1 --scorers "$SCORERS" "${ARMS_SET[@]}" ;;
    arms_page) mkdir -p "$WORK/arms-page" && $PY -P -m plait study table "$WORK/arms" --to "$WORK/arms-page" \
      --about "hardware=one NVIDIA H200, shared" && $PY -P -m plait study archive "$WORK/arms" --to "$WORK/arms-page/arms-mpnet.tar.xz" \
      --overwrite --base all-mpnet-base-v2 --data GLUE ;;
    fresh) $PY -P -m plait run recipes/glue8-mpnet.yaml --out "$WORK/fresh" --set base.model="$MPNET" "${FRESH[@]}" --set "arms=[kaiming]" \
      --set "seeds=[$FRESH_SEEDS]" --set "merges=[task_arithmetic]" --set "evaluation.scales=[0.3]" ;;
    fitted) $PY -P benchmarks/fitted.py --base "$MPNET" --data "$GLUE" --adapters "$WORK/fresh/adapters/kaiming" --seeds "$FRESH_SEEDS" \
      --out "$WORK/fitted" "${FITTED[@]}" ;;
    heads) mkdir -p "$WORK/heads" && $PY -P benchmarks/learnt_heads.py --base "$MPNET" --data "$GLUE" --adapters "$WORK/fresh/adapters/kaiming" \
      --seeds "$FRESH_SEEDS" --tasks cola,sst2,mrpc,stsb,qqp,mnli,qnli,rte --name existing-heads-mpnet --out "$WORK/heads" "${HEADS[@]}" ;;
    speed) $PY -P benchmarks/speed/gpu.py --work "$WORK/8b" --out "$WORK/speed-gpu.json" "${SPEED[@]}" ;;
    *) echo "no step $1" >&2 && return 2 ;;
  esac
}

step() { # STEP
  local name=$1 began code try
  [ -e "$WORK/done/$name" ] && return 0
  for try in 1 2; do
    if [ $(($(date +%s) - $(cat "$WORK/started"))) -gt "$UNTIL" ]; then
      echo "$(date +%T) $name: not begun, time is up" >> "$WORK/steps" && return 1
    fi
    began=$(date +%s)
    echo "$(date +%T) $name: begins" >> "$WORK/steps"
    work "$name" > "$WORK/log/$name.log" 2>&1
    code=$?
    echo "$(date +%T) $name: ended with $code after $(($(date +%s) - began)) s" >> "$WORK/steps"
    [ $code = 0 ] && touch "$WORK/done/$name" && return 0
    cp "$WORK/log/$name.log" "$WORK/log/$name.failed-$try.log"
    grep -qi "out of memory\|OutOfMemory" "$WORK/log/$name.log" || return $code
    sleep 20
  done
  return "$code"
}

lane() { # LANE
  local gpu=${1##*_} entry one
  [ "$gpu" = all ] && gpu=0
  [ "$DRY" ] || export CUDA_VISIBLE_DEVICES=$gpu
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
  case ${EARLY:-$1} in
    small_0) until [ -e "$WORK/ended/q16_train" ]; do sleep 1; done ;; # a training of 1.5 B plans with the memory that is free
    small_1 | small_all) until [ -e "$WORK/ended/q15_train" ]; do sleep 1; done ;;
  esac
  for entry in $(steps_of "$1"); do
    for one in $(tr + ' ' <<< "${entry%:*}"); do
      wanted "$one" && {
        step "$one"
        touch "$WORK/ended/$one"
      } &
    done
    wait
    for one in $(tr + ' ' <<< "${entry%:*}"); do touch "$WORK/ended/$one"; done
  done
  echo "$(date +%T) lane $1 is through" >> "$WORK/steps"
}

wanted() { # STEP: whether what it needs is there
  case $1 in
    q1* | wide* | joint*) [ -e "${MODEL:-}/config.json" ] ;;
    speed) true ;;
    *) [ -e "${MPNET:-}/model.safetensors" ] ;;
  esac
}

start() {
  : "${MODEL:?}" "${TASKS:?}" "${GLUE:?}" "${MPNET:?}" "${GENERAL:?}"
  mkdir -p "$WORK/done" "$WORK/log" "$WORK/ended" "$WORK/lanes" "$WORK/fitted"
  rm -f "$WORK"/ended/*
  [ -e "$WORK/started" ] || date +%s > "$WORK/started"
  running || { rm -rf "$WORK/code" && mkdir "$WORK/code" && cp -r src benchmarks recipes "$WORK/code/"; }
  [ "$DRY" ] || [ -e "$WORK/fitted/existing-fitted.json" ] || cp docs/results/existing-fitted*.json "$WORK/fitted/" 2>/dev/null
  export WORK GPUS UNTIL DRY PY MODEL TASKS GLUE MPNET GENERAL
  export PYTHONPATH="$WORK/code/src:$WORK/code/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
  export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
  local name
  for name in $(lanes); do
    if [ -e "$WORK/lanes/$name" ] && kill -0 "$(cat "$WORK/lanes/$name")" 2>/dev/null; then continue; fi
    setsid bash "$WORK/code/benchmarks/half_hour.sh" lane "$name" > "$WORK/log/lane-$name.log" 2>&1 < /dev/null &
    echo $! > "$WORK/lanes/$name"
  done
  echo started "$(lanes)"
}

running() { # whether some lane is
  local file
  for file in "$WORK"/lanes/*; do [ -e "$file" ] && kill -0 "$(cat "$file")" 2>/dev/null && return 0; done
  return 1
}

status() {
  cat "$WORK/steps" 2>/dev/null
  tail -qn 1 "$WORK"/log/*.log 2>/dev/null | cut -c1-160 | grep -v '^$'
  nvidia-smi --query-gpu=memory.used,utilization.gpu --format=csv,noheader 2>/dev/null
  running && echo "some lane runs" || echo "no lane runs"
}

collect() { # [SECONDS]
  : "${OUT:?}"
  local end=$((SECONDS + ${1:-0})) part
  while [ $SECONDS -lt $end ] && running; do sleep 2; done
  mkdir -p "$OUT"
  (cd "$WORK" && tar czf "$OUT/records.tgz" --warning=no-file-changed \
    $(ls -d steps log */told/records rounds/records full/records arms-page fitted heads speed-gpu.json 2>/dev/null))
  (cd "$WORK" && part=$(ls -d */told/answers 2>/dev/null) && [ "$part" ] && tar cz $part | split -b 15000000 -d - "$OUT/answers.tgz.")
  if [ "$(find "$OUT" -name 'answers.tgz.*' | wc -l)" -gt 7 ]; then echo "more answers than seven files: those after are not taken" && rm -f "$OUT"/answers.tgz.0[7-9] "$OUT"/answers.tgz.[1-9]*; fi
  status
  ls -la "$OUT"
}

pages() {
  : "${FROM:?}" "${TO:?}"
  local home at name
  home=$(mktemp -d)
  export PYTHONPATH="src:benchmarks${PYTHONPATH:+:$PYTHONPATH}"
  mkdir "$home/new" && tar xzf "$FROM/records.tgz" -C "$home/new" || return 1
  ls "$FROM"/answers.tgz.* > /dev/null 2>&1 && cat "$FROM"/answers.tgz.* | tar xz -C "$home/new"
  [ -d "$home/new/joint/told" ] && mkdir -p "$home/new/q15" && for at in records/fixed-1-joint.json answers/fixed-1-joint.npz; do
    mkdir -p "$home/new/q15/told/${at%/*}" && cp "$home/new/joint/told/$at" "$home/new/q15/told/${at/joint/joint_360}" 2>/dev/null
  done
  for name in q15:text-qwen15:--tested=1,2 q16:text-qwen15-16: wide:text-qwen15-wide:; do
    at=${name%%:*} name=${name#*:}
    ls "$home/new/$at/told/records"/*.json > /dev/null 2>&1 || continue # nothing of it was scored
    mkdir -p "$home/$at/told" && [ -e "docs/results/${name%:*}-run.tar.gz" ] && tar xzf "docs/results/${name%:*}-run.tar.gz" -C "$home/$at"
    cp -rn "$home/new/$at/told" "$home/$at/" # what is published stays
    $PY -P benchmarks/text_page.py $(cd "$home/$at" && for c in told bare; do [ -d $c ] && echo "$c=$home/$at/$c"; done) \
      --name "${name%:*}" --study "${name%:*}" --to "$TO" ${name#*:} > "$home/$at.log" 2>&1 || { tail -n 3 "$home/$at.log" && continue; }
    (cd "$home/$at" && tar czf "$home/$at.tgz" */records */answers) && mv "$home/$at.tgz" "$TO/${name%:*}-run.tar.gz"
    echo "${name%:*}.md"
  done
  for name in rounds:rounds full:full_finetuning; do
    [ -d "$home/new/${name%:*}/records" ] && $PY -P "benchmarks/${name#*:}.py" --study recipes/studies/arms-mpnet.yaml \
      --out "$home/new/${name%:*}" --page-only --to "$TO" > "$home/log" 2>&1 && echo "${name#*:}.md" | tr _ -
  done
  for at in arms-page fitted heads speed-gpu.json; do
    [ -e "$home/new/$at" ] && find "$home/new/$at" -type f ! -name '*.html' -exec cp {} "$TO/" \; -printf '%f\n'
  done
  rm -rf "$home"
}

plan() {
  local name entry minutes
  for name in $(lanes); do
    minutes=0
    case $name in small_0) minutes=4 ;; small_1) minutes=3 ;; small_all) minutes=12 ;; esac # they wait for a training
    for entry in $(steps_of "$name"); do
      printf '%-8s from minute %2d: %s, %d min\n' "$name" "$minutes" "${entry%:*}" "${entry#*:}"
      minutes=$((minutes + ${entry#*:}))
    done
  done
}

case ${1:-} in
  start | status | collect | pages | plan | lane | work) "$@" ;;
  *) sed -n '2,19p' "$0" && exit 2 ;;
esac
