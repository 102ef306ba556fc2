"""Sketches on the features of real models: what rank 64 keeps of contrastive's objective."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from plait.statistics import collect_statistics
from plait.statistics.sketch import compress_statistics
from plait.subspaces import compute_subspaces

MODELS = Path(os.environ.get("PLAIT_MODELS", "/nonexistent"))
DATA = Path(__file__).parents[3] / "shared" / "data" / "glue"
COLUMNS = {"sst2": ["sentence"], "mrpc": ["sentence1", "sentence2"], "qnli": ["question", "sentence"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "targets", "layers"), [("mpnet", ["attn.q"], [0, 11]), ("smollm2", ["q_proj"], [0, 29])]
)
@pytest.mark.parametrize("rho", [1e-3, 0.1])
def test_rank_64_keeps_98_percent_of_the_objective(name, targets, layers, rho, collected):
    exact = collected(name, targets, layers)
    small = {t: compress_statistics(s, 64) for t, s in exact.items()}
    options = {"rho": rho}
    wanted, found = (compute_subspaces("contrastive", s, options=options) for s in (exact, small))
    for task in exact:
        for module, info in exact[task].modules.items():
            m = {t: s.sites[info.site].normalised(torch.float64) for t, s in exact.items()}
            d = info.shape[1]
            R = sum(m[t] for t in m if t != task) / (len(m) - 1) + rho / d * torch.eye(d)
            best, mine = (objective(x[task][module].A.double(), m[task], R) for x in (wanted, found))
            assert 0.98 * best < mine <= best * (1 + 1e-6)
            assert small[task].sites[info.site].error < 1e-3 * exact[task].sites[info.site].trace


def objective(A, own, R) -> float:
    return float(torch.trace(torch.linalg.solve(A @ R @ A.T, A @ own @ A.T)))


@pytest.fixture(scope="module")
def collected():
    known = {}

    def get(name: str, targets: list[str], layers: list[int]):
        if name not in known:
            known[name] = collect(name, targets, layers)
        return known[name]

    return get


def collect(name: str, targets: list[str], layers: list[int]):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    if not (MODELS / name).is_dir() or not DATA.is_dir():
        pytest.skip("needs PLAIT_MODELS (../shared/models/prepare.py) and ../shared/data/glue")
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(MODELS / name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = hf.AutoModel.from_pretrained(MODELS / name).eval().float()
    found = {}
    for task, columns in COLUMNS.items():
        rows = parquet.read_table(DATA / task / "train.parquet").slice(0, 96).to_pydict()
        batches = [
            tokenizer(
                *[rows[c][i : i + 16] for c in columns],
                padding=True,
                truncation=True,
                max_length=128,
                return_tensors="pt",
            )
            for i in range(0, 96, 16)
        ]
        found[task] = collect_statistics(model, batches, targets, layers_to_transform=layers)
    return found
