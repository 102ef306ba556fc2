#!/usr/bin/env bash
# Everything published that wants GPUs, in order; each step once: started again, it goes on where it stopped.
#
#   MPNET=DIR SMOLLM2=DIR MINILM=DIR DATA=DIR OUT=DIR [GPUS=2] [SCORERS=12] benchmarks/gpus.sh [STEP...]
#
# DATA holds TASK/train.parquet and so on: GLUE's tasks and snli, banking77, clinc_domain. A finished step leaves OUT/done/STEP, its
# log is OUT/log/STEP.log, and OUT/steps says when each began and ended. The study of MPNet goes on from
# docs/results/glue8-mpnet.tar.xz where that is unpacked into OUT (same base: the weights in float16).
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
GPUS=${GPUS:-2} SCORERS=${SCORERS:-12} PY=${PY:-python3}
mkdir -p "$OUT/done" "$OUT/log"

step() { # NAME COMMAND...
  local name=$1 began=$SECONDS
  shift
  [ -e "$OUT/done/$name" ] && return 0
  echo "$(date +%T) begin $name" >> "$OUT/steps"
  if "$@" > "$OUT/log/$name.log" 2>&1; then
    touch "$OUT/done/$name"
    echo "$(date +%T) done $name, $((SECONDS - began)) s" >> "$OUT/steps"
  else
    echo "$(date +%T) FAILED $name, $((SECONDS - began)) s" >> "$OUT/steps"
    return 1
  fi
}

study() { # NAME RECIPE FOLDER BASE [--set ...]
  local name=$1 recipe=$2 folder=$3 base=$4
  shift 4
  step "$name" $PY -P -m plait study run "recipes/studies/$recipe.yaml" --out "$OUT/$folder" --set base.model="$base" \
    --set data.root="$DATA" --executor processes --workers "$GPUS" --scorers "$SCORERS" "$@"
}

mpnet() { study mpnet glue8-mpnet glue8-mpnet "$MPNET" ${MPNET_SET:-}; }
tasks11() { study tasks11 tasks11-mpnet tasks11-mpnet "$MPNET" ${TASKS11_SET:-}; }
finalists() { study finalists glue8-mpnet-finalists glue8-mpnet "$MPNET" ${MPNET_SET:-}; }
smollm2() { study smollm2 text3-smollm2 text3-smollm2 "$SMOLLM2" ${SMOLLM2_SET:-}; }

# Studies that are one of the above with some settings changed. Those in the folder of another use what it has answered again, and leave
# their own settings there: make the other's tables before, or from its archive.
SHORT_MERGES='{name: task_arithmetic, scales: [0.15, 1.0]}, {name: tsv, scales: [0.35, 1.4]}, {name: iso_c, scales: [0.7, 2.0]},
  {name: regmean, scales: [0.7, 2.0]}, {name: task_arithmetic_pico, method: task_arithmetic, calibrate: pico, scales: [0.3, 1.2]}'
RHO='options: {rho: 0.001}'
PENALISED='training: {constraint: penalised, constraint_options: {beta: 1.0}}'
KAIMING_PENALISED="{name: kaiming_penalised, subspace: kaiming, like: kaiming, $PENALISED}"
CONTRASTIVE_PENALISED="{name: contrastive_penalised, subspace: contrastive, $RHO, like: contrastive, $PENALISED}"
FINALISTS="kaiming, orthonormal_shared, {name: osrm_mean, subspace: osrm, pool: mean}, {name: contrastive, $RHO},
  {name: contrastive_permuted, $RHO}, $KAIMING_PENALISED,
  $CONTRASTIVE_PENALISED"
PLAIN_AND_OURS="kaiming, gaussian, {name: contrastive, $RHO}, $CONTRASTIVE_PENALISED"
BETAS=$PLAIN_AND_OURS
for beta in 0.1 0.3 3 10 30; do # how hard the penalty holds
  BETAS="$BETAS, {name: contrastive_penalised_${beta/./_}, subspace: contrastive, $RHO, like: contrastive,
    training: {constraint: penalised, constraint_options: {beta: $beta}}}"
done
TEMPLATE=(--set 'tasks.snli.template="{premise}\n{hypothesis}\nAnswer:"' --set 'tasks.banking77.template="{sentence}\nAnswer:"'
  --set 'tasks.clinc_domain.template="{sentence}\nAnswer:"')
WIDE=(--set "rates=[1.0e-3, 3.0e-3, 1.0e-2]" --set lora.rank=32 --set lora.alpha=64 --set "arms=[$PLAIN_AND_OURS, $KAIMING_PENALISED]") # A's rows are shorter

smollm2_finalists() { # in the folder of smollm2
  study smollm2_finalists text3-smollm2 text3-smollm2 "$SMOLLM2" --set "name=text3-smollm2-finalists" --set "arms=[$FINALISTS]" \
    --set "seeds=[0,1,2,3,4,5,6,7,8,9]" ${SMOLLM2_SET:-}
}
smollm2_template() { # one template for all tasks: their own ones end in different words, which tells the tasks apart
  study smollm2_template text3-smollm2 text3-smollm2-one-template "$SMOLLM2" --set "name=text3-smollm2-one-template" \
    --set "arms=[gaussian, osrm, $FINALISTS]" --set "merges=[$SHORT_MERGES]" \
    "${TEMPLATE[@]}" ${TEMPLATE_SET:-}
}
smollm2_beta() { # in the folder of smollm2_template
  study smollm2_beta text3-smollm2 text3-smollm2-one-template "$SMOLLM2" --set "name=text3-smollm2-beta" --set "arms=[$BETAS]" \
    --set "merges=[$SHORT_MERGES]" "${TEMPLATE[@]}" ${TEMPLATE_SET:-}
}
smollm2_rank32() {
  study smollm2_rank32 text3-smollm2 text3-smollm2-rank32 "$SMOLLM2" --set "name=text3-smollm2-rank32" "${WIDE[@]}" \
    --set "merges=[$SHORT_MERGES]" ${RANK32_SET:-}
}
minilm_rank32() {
  study minilm_rank32 glue8-minilm glue8-minilm-rank32 "$MINILM" --set "name=glue8-minilm-rank32" "${WIDE[@]}" --set "variants=[]" \
    --set "repair=null" --set "merges=[$SHORT_MERGES]" ${RANK32_SET:-}
}
minilm_beta() { # in the folder of minilm
  study minilm_beta glue8-minilm glue8-minilm "$MINILM" --set "name=glue8-minilm-beta" --set "arms=[$BETAS]" --set "variants=[]" \
    --set "repair=null" --set "merges=[{name: task_arithmetic, scales: [0.15, 0.84]}, {name: tsv, scales: [0.35, 1.4]},
      {name: regmean, scales: [0.7, 2.8]}, {name: task_arithmetic_pico, method: task_arithmetic, calibrate: pico, scales: [0.3, 1.2]}]" \
    ${MINILM_SET:-}
}
minilm() { study minilm glue8-minilm glue8-minilm "$MINILM" --set "variants=[]" ${MINILM_SET:-}; }
ablations() { study ablations glue8-minilm glue8-minilm "$MINILM" ${MINILM_SET:-}; }

existing() { # adapters that knew nothing of each other, at seeds on which no measure of fidelity was tried
  export CUDA_VISIBLE_DEVICES=0
  step fresh $PY -P -m plait run recipes/glue8-mpnet.yaml --out "$OUT/fresh" --set base.model="$MPNET" --set data.root="$DATA" \
    --set base.dtype=bfloat16 --set training.precision=bf16 --set "arms=[kaiming]" --set "seeds=[3,4,5]" \
    --set "merges=[task_arithmetic]" --set "evaluation.scales=[0.3]" ${FRESH_SET:-} || return
  mkdir -p "$OUT/existing"
  step existing $PY benchmarks/existing.py --base "$MPNET" --data "$DATA" --adapters "$OUT/fresh/adapters/kaiming" \
    --dtype bfloat16 --grid-rows 200 --rows 1500 --out "$OUT/existing" ${EXISTING_OPTIONS:-}
}

causal() { # three tasks of text through the whole line, and the merge of existing adapters by fidelity alone
  export CUDA_VISIBLE_DEVICES=$((GPUS - 1))
  step text3 $PY -P -m plait run recipes/text3-smollm2.yaml --out "$OUT/text3" --set base.model="$SMOLLM2" --set data.root="$DATA" \
    ${TEXT3_SET:-} || return
  mkdir -p "$OUT/causal"
  step causal $PY benchmarks/existing_causal.py --recipe text3-smollm2 --run "$OUT/text3" --set base.model="$SMOLLM2" \
    --set data.root="$DATA" --general "$DATA/mrpc/train.parquet:sentence1" --out "$OUT/causal" ${CAUSAL_OPTIONS:-}
}

qwen15() { # nine written tasks at 1.5 B: QWEN15=DIR, and TEXT=DIR with open/ and text/; one seed takes 15 minutes of an H200
  export CUDA_VISIBLE_DEVICES=0
  local arms="kaiming contrastive contrastive_penalised osrm_mean kaiming_penalised" run="$OUT/text-qwen15" arm
  step qwen15_tasks $PY benchmarks/text_tasks.py --data "$TEXT" --to "$OUT/text-tasks" || return
  text_arms() { $PY benchmarks/text_arms.py --study recipes/studies/text-qwen15.yaml --set base.model="$QWEN15" --set data.root="$OUT/text-tasks" \
    --out "$run" --general "$DATA/mrpc/train.parquet:sentence1" --do "$1" ${QWEN15_SET:-}; }
  step qwen15_train text_arms train:0 || return
  for arm in $arms; do step "qwen15_$arm" text_arms "fixed:0:$arm curves:0:$arm" & done # writing waits for the host
  wait
  step qwen15_page $PY benchmarks/text_page.py "told=$run" --name text-qwen15 --to docs/results
}

side() {
  existing &
  causal &
  wait
}

init() { step init $PY benchmarks/init.py gpu --parts solver,qv,qv-2 --json "$OUT/init.json" ${INIT_OPTIONS:-}; }
two() { step two $PY benchmarks/two_gpus.py --out "$OUT/two_gpus.json" ${TWO_OPTIONS:-}; }

for name in "${@:-mpnet finalists tasks11 side init two smollm2 smollm2_finalists smollm2_template smollm2_beta smollm2_rank32 minilm ablations minilm_beta minilm_rank32}"; do
  for one in $name; do $one; done
done
