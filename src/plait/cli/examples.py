"""The examples that stand below every command's help; the suite types all of them."""

from __future__ import annotations

EXAMPLES = {
    "new": r"""
plait new my.yaml --base base --task reviews=reviews.csv:review:sentiment \
    --task pairs=pairs.jsonl:premise,hypothesis:label""",
    "schema": """
plait schema --out recipe.schema.json""",
    "doctor": """
plait doctor
plait doctor --json > report.json""",
    "completion": """
plait completion bash > plait.bash
plait completion zsh > _plait""",
    "demo": """
plait demo --out plait-demo""",
    "run": """
plait run my.yaml --out my-run
plait run my.yaml --out quick --set training.epochs=1 --set arms=[kaiming]
plait run my.yaml --out my-run --executor processes --workers 2""",
    "plan": """
plait plan my.yaml --out my-run""",
    "validate": """
plait validate my.yaml
plait validate glue8-minilm --set lora.rank=16""",
    "cp": """
plait cp glue8-minilm mine.yaml
plait cp studies/glue8-mpnet .""",
    "ls": """
plait ls merges
plait ls recipes""",
    "report": """
plait report my-run
plait report my-run quick --to side-by-side""",
    "stats": r"""
# what a task feeds into the base's layers, from 100 of its rows
plait stats --base base --task reviews --train-file reviews.csv \
    --text review --label sentiment --out reviews.stats.safetensors
plait stats --recipe my.yaml --task pairs --out pairs.stats.safetensors""",
    "stats show": """
plait stats show reviews.stats.safetensors""",
    "stats merge": r"""
plait stats merge reviews.stats.safetensors pairs.stats.safetensors \
    --out pool.stats.safetensors""",
    "stats diff": """
plait stats diff reviews.stats.safetensors pairs.stats.safetensors""",
    "stats compress": r"""
plait stats compress reviews.stats.safetensors --rank 8 \
    --out small.stats.safetensors""",
    "stats check": """
plait stats check reviews.stats.safetensors""",
    "stats fisher": r"""
plait stats fisher reviews --recipe my.yaml --task reviews \
    --out reviews.fisher.safetensors""",
    "init": r"""
plait init --own reviews.stats.safetensors --others pairs.stats.safetensors \
    --rank 4 --out start
# for another trainer: what to put into its config
plait init --own reviews.stats.safetensors --others pairs.stats.safetensors \
    --for unsloth --task-type CAUSAL_LM --out start-lm""",
    "train": r"""
plait train start --task reviews --base base --train-file reviews.csv \
    --text review --label sentiment --out trained --set training.epochs=1
plait train start --task reviews --recipe my.yaml --out trained-2 \
    --statistics reviews.stats.safetensors \
    --statistics pairs.stats.safetensors""",
    "post": r"""
plait post reviews --own reviews.stats.safetensors \
    --others pairs.stats.safetensors --out moved""",
    "eval": r"""
plait eval reviews pairs merged --recipe my.yaml
plait eval merged --base base --task reviews --train-file reviews.csv \
    --text review --label sentiment --scales 0.5,1""",
    "merge": r"""
plait merge reviews pairs --out merged
plait merge reviews pairs --method ties --set density=0.3 --weights 1,0.5 \
    --out ties
# the plain sum, written into the base's weights
plait merge reviews pairs -m task_arithmetic --scale 1 --bake base --out full
# with statistics of the tasks; what a smaller rank would lose
plait merge reviews pairs --method regmean --out regmean \
    --stats reviews.stats.safetensors --stats pairs.stats.safetensors
plait merge reviews pairs --rank-curve
# method, weights and scale by texts without labels; then distilled into it
plait merge auto base reviews pairs --out chosen --refine 10 --repair 20 \
    --text reviews=reviews.csv:review \
    --text pairs=pairs.jsonl:premise,hypothesis""",
    "advise": r"""
plait advise reviews pairs
plait advise base reviews pairs --repair 0 --refine 0 \
    --text reviews=reviews.csv:review \
    --text pairs=pairs.jsonl:premise,hypothesis""",
    "compare": r"""
plait compare reviews pairs
plait compare reviews pairs --stats reviews.stats.safetensors \
    --stats pairs.stats.safetensors""",
    "inspect": """
plait inspect merged""",
    "convert": """
plait convert reviews --to peft --dtype bfloat16 --out reviews-bf16""",
    "edit": """
plait edit merged --remove pairs --out without-pairs
plait edit merged --weight pairs=0.5 --out pairs-halved""",
    "extract": """
plait extract finetuned --base base --rank 4 --out extracted""",
    "export": """
plait export merged --for peft --task reviews --out merged-reviews
plait export merged --for vllm --task reviews --out merged-vllm
plait export merged --for gguf --base base --out merged.gguf""",
    "try": r"""
plait try merged --base base --prompt "a film that never gets going"
plait try merged --base base --prompts prompts.txt --out answers.html""",
    "measure": r"""
plait measure merged --base base --base-4bit nf4 \
    --text reviews=reviews.csv:review \
    --text pairs=pairs.jsonl:premise,hypothesis""",
    "push": r"""
plait push merged --to user/merged --base user/base --dry-run
plait push merged --to user/merged --base user/base --private""",
    "check": """
plait check merged
plait check merged --for vllm""",
    "study": """
plait study run study.yaml --out my-study
plait study table my-study --to tables""",
    "study run": """
plait study run study.yaml --out my-study
plait study run glue8-mpnet --out glue8 --executor processes --workers 4""",
    "study table": """
plait study table my-study --to tables --about "machine=one laptop" """,
    "study archive": """
plait study archive my-study --to my-study.tar.xz --base all-MiniLM-L6-v2""",
    "job": """
plait job list study.yaml --out by-jobs --to jobs
plait job run jobs/job-000.json""",
    "job list": """
plait job list study.yaml --out by-jobs --workers 2 --to jobs""",
    "job run": """
plait job run jobs/job-000.json""",
}
EXAMPLES = {command: text.strip() for command, text in EXAMPLES.items()}
