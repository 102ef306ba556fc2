#!/usr/bin/env bash
# What issues of science still want of GPUs, as one queue for a machine that is there for half an hour: two GPUs, or one.
#
#   MODEL=DIR SMALLER=DIR TASKS=DIR GLUE=DIR MPNET=DIR SMOL=DIR TOKENIZER=DIR GENERAL=FILE:COLUMN [WORK=/tmp/half] [GPUS=2] \
#     benchmarks/half_hour.sh start
#   benchmarks/half_hour.sh status          # what ended when, what runs, the last line of each log
#   OUT=DIR benchmarks/half_hour.sh collect [SECONDS]
#   FROM=DIR TO=docs/results benchmarks/half_hour.sh pages    # at home: what `collect` brought, beside what is published, as pages
#   benchmarks/half_hour.sh plan            # the queue with its minutes, nothing started
#
# MODEL is the 1.5 B decoder and SMALLER the one of 0.5 B, TASKS what benchmarks/text_tasks.py makes, GLUE (with its three open tasks) and MPNET the
# folders of gpus.sh, SMOL a SmolLM2, TOKENIZER the larger decoders'; steps whose model is not there are left out. `start` copies the code to WORK, starts every lane
# under setsid and comes back at once: what a call leaves in the background without it ends with the call. Started again, it goes on: what
# is in WORK/done is not done again, and lanes that still run are left alone. A step that fails is tried once more where memory ran out,
# and stops nothing else; after UNTIL seconds of the first start nothing new begins. `collect` waits SECONDS at most (less where all
# is done) and leaves records.tgz (everything but answers) and answers.tgz.* of 15 MB in OUT: at most eight files.
# LANES="small_1" EARLY=1 starts some lanes alone and without their waiting, while the decoder is not there yet; `start` later adds the rest.
# DRY=1: two steps of a few rows on the CPU, for models as small as tests/half_hour.py makes them.
set -uo pipefail
cd "$(dirname "$0")/.."
WORK=${WORK:-/tmp/half} PY=${PY:-python3} UNTIL=${UNTIL:-1500} DRY=${DRY:-}
GPUS=${GPUS:-$(nvidia-smi -L 2>/dev/null | wc -l)}

# Lanes: what follows each other on one GPU; steps joined by + run side by side. Names end in the GPU. Minutes are of an H200 that others
# share, measured: nine adapters of 1.5 B with their moments 126 s, 33 of MPNet 230 s, one seed of more_texts.py on eight tasks 230 s. Steps that no lane
# names ran before, and a lane may name them again.
EIGHT_0="cuda_tests:1 masks_8b:2"
PRICE_0="q15_price:10 q15_refreshed:8"
SMALL_0="full_penalised:5"
ELEVEN_0="fresh:3 eleven_20:7 eleven_21:7" # seed 21 as far as time goes
BIG_1="q15_train:3 q15_nodata:5 q15_auto:15"
lanes() { # all, or those of LANES
  if [ "${LANES:-}" ]; then
    echo "$LANES"
  elif [ "${GPUS:-1}" -gt 1 ]; then
    echo eight_0 small_0 price_0 eleven_0 big_1
  else
    echo eight_all small_all price_all big_all
  fi
}
steps_of() { # LANE
  case $1 in
    eight_*) echo "$EIGHT_0" ;;
    big_1) echo "$BIG_1" ;;
    price_0) echo "$PRICE_0" ;;
    small_0) echo "$SMALL_0" ;;
    small_all) echo "$SMALL_0 $ELEVEN_0" ;;
    price_all) echo "q15_price:10 q15_nodata:5 q15_refreshed:8" ;; # the second seed is trained before the price is known
    big_all) echo "q15_train:3 q15_auto:15" ;;
    eleven_*) echo "$ELEVEN_0" ;;
  esac
}

if [ "$DRY" ]; then
  ROWS=(--rows 4 --general-rows 3)
  TINY=(--set "data={root: $TASKS, train_rows: 16, validation_rows: 24, max_length: 24}" --set base.dtype=float32 --set lora.rank=2
    --set "statistics={samples: 4, pool: token, batch_size: 4}" --set tuning_rows=4 --set grid_rows=4
    --set "training={steps: 2, batch_size: 2, lr: 1.0e-3}")
  TINY_GLUE=(--set "data={root: $GLUE, train_rows: 16, validation_rows: 24, max_length: 24}" "${TINY[@]:2}")
  AUTO=(--texts 12 --all-texts 16 --new-tokens 3 --steps 2 --repairs 3 --rates 3e-2,1e-2 --scales 0.6,0.9 --batch 12 --candidates 4)
  FRESH=(--set "training={steps: 2, batch_size: 4, lr: 1.0e-3}" --set "data={root: $GLUE, train_rows: 16, max_length: 24}" --set lora.rank=2
    --set "statistics={samples: 4, pool: token}" --set base.dtype=float32)
  MORE=(--texts 12 --rows 8 --device cpu --all-texts 16 --repairs 2)
  FLEET=(--device cpu --layers 1 --width 0.03 --tasks snli,wikisql --batch 2 --length 16)
  MASKS=(--device cpu --layers 1 --width 0.03 --rank 2) ROUNDS=(--set training.steps=4)
  THREADS=1 FRESH_SEEDS=20,21
else
  ROWS=() TINY=(--set "data.root=${TASKS:-}") TINY_GLUE=(--set "data.root=${GLUE:-}") AUTO=(--candidates 20 --all-texts 250 --repairs 160 --rates 3e-2,1e-2)
  FRESH=(--set "data.root=${GLUE:-}" --set data.train_rows=6000 --set data.validation_rows=200 --set base.dtype=bfloat16 --set training.precision=bf16
    --set training.epochs=null --set training.steps=400)
  MORE=(--dtype bfloat16 --all-texts 1000 --repairs 800) FLEET=() MASKS=() ROUNDS=()
  THREADS=6 FRESH_SEEDS=20,21
fi
PRICED=kaiming,contrastive_penalised,kaiming_penalised,osrm_mean,contrastive
TASKS11='[cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte,
  {name: snli, kind: classification, train: snli/train.parquet, validation: snli/validation.parquet, text: [premise, hypothesis]},
  {name: banking77, kind: classification, train: banking77/train.parquet, validation: banking77/test.parquet, text: [sentence]},
  {name: clinc_domain, kind: classification, train: clinc_domain/train.parquet, validation: clinc_domain/validation.parquet, text: [sentence]}]'
ELEVEN=cola,sst2,mrpc,stsb,qqp,mnli,qnli,rte,snli,banking77,clinc_domain
[ "$DRY" ] && ELEVEN=cola,stsb,snli && TASKS11="[cola, stsb, ${TASKS11#*rte,}"
[ "$DRY" ] && TASKS11="${TASKS11%%\{name: banking77*}]"

text() { # STUDY FOLDER SCRIPT ARGUMENT...
  local study=$1 folder=$2 script=$3
  shift 3
  OMP_NUM_THREADS=$THREADS $PY -P "benchmarks/$script" --study "recipes/studies/$study.yaml" \
    --set base.model="$MODEL" "${TINY[@]}" "${ROWS[@]}" --memory "${MEMORY:-1}" --general "$GENERAL" --out "$WORK/$folder/told" "$@"
}
fresh() { # TASKS ARM FOLDER
  $PY -P -m plait run recipes/glue8-mpnet.yaml --out "$WORK/$3" --set base.model="$MPNET" --set "tasks=$1" "${FRESH[@]}" \
    --set "seeds=[$FRESH_SEEDS]" --set "merges=[task_arithmetic]" --set "evaluation.scales=[0.3]" --set "arms=[$2]"
}
more() { # FOLDER TASKS NAME SEED
  $PY -P benchmarks/more_texts.py --base "$MPNET" --data "$GLUE" --adapters "$WORK/$1" --tasks "$2" --seeds "$4" \
    --out "$WORK/texts/$4" --name "$3" --alone --shorter "${MORE[@]}"
}

dense() { # STUDY BASE FOLDER ARMS ARGUMENT...
  local study=$1 base=$2 folder=$3 arms=$4
  shift 4
  OMP_NUM_THREADS=2 $PY -P benchmarks/full_finetuning.py --study "recipes/studies/$study.yaml" --set base.model="$base" "${TINY_GLUE[@]}" \
    --arms "$arms" --out "$WORK/$folder" "$@"
}

work() { # STEP
  local seed
  case $1 in
    cuda_tests) PYTHONPATH="$PWD:${PYTHONPATH:-}" $PY -P -m pytest -q -p no:cacheprovider -o addopts= tests/merging/test_cuda.py ;;
    fleet_8b) $PY -P benchmarks/training_8b.py --study recipes/studies/text-qwen15.yaml --set data.root="$TASKS" --tokenizer "$TOKENIZER" \
      --work "$WORK/8b" --out "$WORK/training-8b.json" "${FLEET[@]}" && rm -rf "$WORK/8b" ;;
    masks_8b) $PY -P benchmarks/speed/gpu.py --work "$WORK/masks" --out "$WORK/masks-8b.json" --only ties:qv,dare_ties:qv "${MASKS[@]}" &&
      rm -rf "$WORK/masks" ;;
    q05_*) MODEL=$SMALLER text text-qwen05 q05 text_arms.py --do "train:${1#q05_} fixed:${1#q05_}" ;;
    q15_train) text text-qwen15 q15 text_arms.py --do train:2:kaiming ;;
    q15_nodata) text text-qwen15 q15 text_arms.py --do nodata:2:kaiming ;;
    q15_price) text text-qwen15 q15 text_arms.py --elsewhere recipes/studies/text-qwen15-16.yaml:sst2,cola \
      --do "train:1:$PRICED price:1:$PRICED" ;;
    q15_refreshed) text text-qwen15 q15 text_rounds.py --seed 2 "${ROUNDS[@]}" --arms restarted,refreshed ;;
    q15_auto) text text-qwen15 q15 text_auto.py --seed 2 --positions written "${AUTO[@]}" ;;
    fresh) fresh "$TASKS11" kaiming fresh ;;
    eleven_*) more fresh/adapters/kaiming "$ELEVEN" existing-texts-eleven-more "${1#eleven_}" ;;
    full_penalised) dense arms-mpnet "$MPNET" full kaiming@1e-3,contrastive_penalised@1e-3 --set "seeds=[0]" ;;
    full_smollm2) dense text3-smollm2 "$SMOL" smol full@2e-5,full_penalised@5e-5,full@5e-5,full_penalised@1e-4,kaiming@1e-3,contrastive_penalised@1e-3 \
      --name full-finetuning-smollm2 --set "seeds=[0]" ;;
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
  case $1 in # shares of a GPU that lanes of large models have in common; small ones take what is left
    price_*) export MEMORY=0.36 ;;
    big_all) export MEMORY=0.42 ;;
  esac
  case ${EARLY:-$1} in # masks are timed alone; a training of 1.5 B plans with the memory that is free
    small_* | price_* | eleven_0 | big_all) until [ -e "$WORK/ended/masks_8b" ]; do sleep 1; done ;;
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
    q05*) [ -e "${SMALLER:-}/config.json" ] ;;
    q1* | wide*) [ -e "${MODEL:-}/config.json" ] ;;
    *_8b | cuda_tests) true ;;
    full_smollm2) [ -e "${SMOL:-}/model.safetensors" ] ;;
    *) [ -e "${MPNET:-}/model.safetensors" ] ;;
  esac
}

start() {
  : "${MODEL:?}" "${SMALLER:?}" "${TASKS:?}" "${GLUE:?}" "${MPNET:?}" "${SMOL:?}" "${GENERAL:?}" "${TOKENIZER:?}"
  mkdir -p "$WORK/done" "$WORK/log" "$WORK/ended" "$WORK/lanes" "$WORK/texts"
  running || rm -f "$WORK"/ended/*
  [ -e "$WORK/started" ] || date +%s > "$WORK/started"
  running || { rm -rf "$WORK/code" && mkdir "$WORK/code" && cp -r src benchmarks recipes tests pyproject.toml "$WORK/code/"; }
  export WORK GPUS UNTIL DRY PY MODEL SMALLER TASKS GLUE MPNET SMOL GENERAL TOKENIZER
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
    $(ls -d steps log */told/records full/records smol/records texts *-8b.json 2>/dev/null))
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
  for name in q15:text-qwen15:--tested=1,2 q05:text-qwen05:; do
    at=${name%%:*} name=${name#*:}
    ls "$home/new/$at/told/records"/*.json > /dev/null 2>&1 || continue # nothing of it was scored
    mkdir -p "$home/$at/told" && [ -e "docs/results/${name%:*}-run.tar.gz" ] && tar xzf "docs/results/${name%:*}-run.tar.gz" -C "$home/$at"
    cp -rn "$home/new/$at/told" "$home/$at/" # what is published stays
    $PY -P benchmarks/text_page.py $(cd "$home/$at" && for c in told bare; do [ -d $c ] && echo "$c=$home/$at/$c"; done) \
      --name "${name%:*}" --study "${name%:*}" --to "$TO" ${name#*:} > "$home/$at.log" 2>&1 || { tail -n 3 "$home/$at.log" && continue; }
    (cd "$home/$at" && tar czf "$home/$at.tgz" */records */answers) && mv "$home/$at.tgz" "$TO/${name%:*}-run.tar.gz"
    echo "${name%:*}.md"
  done
  for name in $(cd "$home/new/texts" 2>/dev/null && find . -name '*.json' -printf '%f\n' | sort -u); do
    $PY -P benchmarks/more_texts.py --join "$home/new/texts"/*/"$name" --out "$TO" --name "${name%.json}" && echo "${name%.json}.md"
  done
  for name in full:arms-mpnet:full-finetuning smol:text3-smollm2:full-finetuning-smollm2; do
    at=${name%%:*} name=${name#*:}
    [ -d "$home/new/$at/records" ] && $PY -P benchmarks/full_finetuning.py --study "recipes/studies/${name%:*}.yaml" --name "${name#*:}" \
      --out "$home/new/$at" --page-only --to "$TO" > "$home/log" 2>&1 && echo "${name#*:}.md"
  done
  [ -e "$home/new/training-8b.json" ] && cp "$home/new/training-8b.json" "$TO/" && echo training-8b.json
  rm -rf "$home"
}

plan() {
  local name entry minutes
  for name in $(lanes); do
    minutes=0
    case $name in small_* | price_* | eleven_0 | big_all) minutes=3 ;; esac # they wait for the masks
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
