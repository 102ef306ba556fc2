"""llama.cpp on the CPU: its own converters, and its library by way of node-llama-cpp's prebuilt build."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).with_name("probabilities.mjs")


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """Where it is installed: `node_modules`, the converters' `source`, and `python` with what they import."""

    root: Path

    @property
    def source(self) -> Path:
        """The folder of the converters."""
        found = sorted(self.root.glob("source/**/convert_lora_to_gguf.py"))
        if not found:
            raise FileNotFoundError(f"no convert_lora_to_gguf.py below {self.root / 'source'}")
        return found[0].parent

    def convert_base(self, base: Path, out: Path) -> None:
        """A model as GGUF in float32, unless it is there.

        Raises:
            RuntimeError: It is refused.
        """
        if not out.exists() and (why := self._converted("convert_hf_to_gguf.py", [[base, *_into(out)]])[0]):
            raise RuntimeError(f"the base: {why}")

    def convert_adapters(self, base: Path, pairs: list[tuple[Path, Path]]) -> list[str | None]:
        """PEFT folders as GGUF in float32, (folder, file) each; for each why it was refused, or None."""
        for _, out in pairs:
            out.unlink(missing_ok=True)
        wanted = [[folder, *_into(out), "--base", base] for folder, out in pairs]
        return self._converted("convert_lora_to_gguf.py", wanted)

    def _converted(self, script: str, wanted: list[list[str | Path]]) -> list[str | None]:
        path = os.pathsep.join(str(p) for p in (self.source / "gguf-py", self.source, self.root / "python"))
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("convert.py")), str(self.source / script)],
            input=json.dumps([[str(a) for a in arguments] for arguments in wanted]),
            capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{script}: {done.stderr[-2000:]}")
        found: list[str | None] = json.loads(done.stdout.splitlines()[-1])
        return found

    def probabilities(
        self, model: Path, adapters: list[Path | None], prompts: list[list[int]]
    ) -> tuple[str, list[list[dict[int, float]] | str]]:
        """The version, and for each adapter either why it was refused or each prompt's next tokens with their probabilities.

        Raises:
            RuntimeError: The program failed.
        """
        wanted = {"model": str(model), "adapters": [str(a) if a else None for a in adapters], "prompts": prompts}
        done = subprocess.run(
            ["node", str(SCRIPT), str(self.root)], input=json.dumps(wanted), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"node-llama-cpp: {done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        answers: list[list[dict[int, float]] | str] = [
            a if isinstance(a, str) else [{int(t): p for t, p in prompt} for prompt in a] for a in found["answers"]
        ]
        return f"{_package(self.root)} ({found['version']})", answers


def _package(root: Path) -> str:
    """The package that carries the build, with its version."""
    found = json.loads((root / "node_modules/node-llama-cpp/package.json").read_text())
    return f"{found['name']} {found['version']}"


def _into(out: Path) -> list[str | Path]:
    return ["--outfile", out, "--outtype", "f32"]
