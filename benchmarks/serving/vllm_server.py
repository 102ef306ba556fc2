"""vLLM on the CPU: its own server, started as its documentation has it, asked over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOP = 5
# float32 throughout; one thread, and no cores of its own, so that a busy machine is no failure; no network, no usage statistics.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
}
_OPTIONS = (
    "--served-model-name base --dtype float32 --max-model-len 256 --max-num-seqs 4 --enforce-eager --enable-lora "
    "--max-loras 2 --max-lora-rank 16 --max-cpu-loras 4 --host 127.0.0.1"
)


class Vllm:
    """A running server."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def load(self, name: str, folder: Path) -> str | None:
        """Load an adapter; why it was refused, or None."""
        return self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})[1]

    def unload(self, name: str) -> None:
        """Let go of an adapter."""
        self._ask("/v1/unload_lora_adapter", {"lora_name": name})

    def top(self, model: str, prompts: list[list[int]]) -> list[dict[int, float]]:
        """For each prompt the most probable next tokens with their log-probabilities, best first.

        Raises:
            RuntimeError: The server would not say.
        """
        wanted = {
            "model": model,
            "prompt": prompts,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": TOP,
            "return_tokens_as_token_ids": True,
        }
        text, refused = self._ask("/v1/completions", wanted)
        if refused is not None:
            raise RuntimeError(f"{model}: {refused}")
        choices = sorted(json.loads(text)["choices"], key=lambda c: c["index"])
        return [_best(choice["logprobs"]) for choice in choices]

    def version(self) -> str:
        """As the server says it."""
        with urllib.request.urlopen(f"{self._url}/version", timeout=60) as answer:
            return str(json.load(answer)["version"])

    def ready(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"{self._url}/health", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _ask(self, path: str, values: dict[str, Any]) -> tuple[str, str | None]:
        request = urllib.request.Request(
            self._url + path, json.dumps(values).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.read().decode(), None
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            try:
                found = json.loads(text)
                return text, str(found.get("error", found).get("message", text))
            except (ValueError, AttributeError):
                return text, f"HTTP {error.code}: {text[:400]}"


def _best(found: dict[str, Any]) -> dict[int, float]:
    """{token: log-probability}, the token that was chosen first."""
    by_token = {int(k.removeprefix("token_id:")): v for k, v in found["top_logprobs"][0].items()}
    chosen = int(found["tokens"][0].removeprefix("token_id:"))
    return {chosen: by_token[chosen], **dict(sorted(by_token.items(), key=lambda item: -item[1]))}


@contextmanager
def running(python: Path, base: Path, log: Path, patience: float = 600.0) -> Iterator[Vllm]:
    """Start a server, wait until it answers, and stop it and all its processes at the end.

    Args:
        python: The interpreter of vLLM's own environment.
        base: Folder of the base model.
        log: Where what it prints goes.
        patience: Seconds until it has to answer.

    Raises:
        RuntimeError: It ended, or did not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The module, not the `vllm` script: the distribution for the CPU has another name, which the script looks up.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(
            command + _OPTIONS.split(), stdout=out, stderr=out, start_new_session=True, env=_clean() | _ENVIRONMENT
        )
    server, end = Vllm(port), time.monotonic() + patience
    try:
        while not server.ready():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"vLLM does not answer:\n{log.read_text()[-2000:]}")
            time.sleep(2)
        yield server
    finally:
        _stop(process)


def _clean() -> dict[str, str]:
    """This process's environment without the way to its packages."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and the workers of its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=30)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
