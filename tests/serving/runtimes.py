"""What each runtime says of a model: the log-probabilities of a prompt, and how it goes on greedily."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pipeline.model.decilm import register
from pipeline.runtimes import find_python, require_llama_cpp

DRIVERS = Path(__file__).parent / "drivers"
NUM_NEW_TOKENS = 16
# The server reports no probabilities beside an end token or half a character, so the choice is forced; they are taken
# before anything is chosen, and do not see it.
ONE_PRINTABLE_TOKEN = {"n_predict": 1, "temperature": 0.0, "logit_bias": [[3, 1000.0]]}
START_S, ANSWER_S, DRIVER_S = 120.0, 240.0, 2700.0


class RuntimeRefusedError(Exception):
    """A runtime that ended with an error instead of an answer; the message is the end of what it printed."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Row t holds the log-probabilities of token t + 1 given those before it; `greedy` follows the last token."""

    logprobs_TV: torch.Tensor
    greedy: list[int]
    version: str


@torch.no_grad()
def ask_torch(model: Any, ids: list[int]) -> Answer:
    """The reference: every step a whole forward pass, no cache."""
    logits_TV = model(torch.tensor([ids]), use_cache=False).logits[0]
    sequence = list(ids)
    for _ in range(NUM_NEW_TOKENS):
        sequence.append(int(model(torch.tensor([sequence]), use_cache=False).logits[0, -1].argmax()))
    return Answer(
        logprobs_TV=logits_TV[:-1].log_softmax(dim=-1), greedy=sequence[len(ids) :], version=torch.__version__
    )


@torch.no_grad()
def ask_transformers(export_dir: Path, ids: list[int]) -> Answer:
    """The registered class, its own cache and its own generation."""
    from transformers import __version__ as version

    register()
    model: Any = AutoModelForCausalLM.from_pretrained(export_dir, dtype=torch.float32, local_files_only=True).eval()
    ids_BT = torch.tensor([ids])
    new_BT = model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
    )
    logprobs_TV = model(ids_BT).logits[0, :-1].log_softmax(dim=-1)
    return Answer(logprobs_TV=logprobs_TV, greedy=new_BT[0, len(ids) :].tolist(), version=version)


def run_driver(
    runtime: str, export_dirs: dict[str, Path], ids: list[int], *, vocab_size: int, work_dir: Path
) -> dict[str, Path]:
    """Run a script in the runtime's own environment over all models, for its imports take longer than any of them.

    Returns where each answer is; a model whose answer is missing took the process down.
    """
    python = find_python(runtime)
    assert python is not None, f"{runtime} is not installed: make install-{runtime}"
    answers = {name: work_dir / f"{runtime}-{index}.json" for index, name in enumerate(export_dirs)}
    request = {
        "ids": ids,
        "num_new_tokens": NUM_NEW_TOKENS,
        "vocab_size": vocab_size,
        "models": [
            {"directory": str(directory), "answer": str(answers[name])} for name, directory in export_dirs.items()
        ],
    }
    request_path = work_dir / f"{runtime}-request.json"
    request_path.write_text(json.dumps(request))
    with (work_dir / f"{runtime}.log").open("wb") as log:
        subprocess.run(
            [python, DRIVERS / f"{runtime}_driver.py", request_path],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=DRIVER_S,
            check=False,
        )
    return answers


def read_answer(path: Path) -> Answer:
    if not path.is_file():
        raise RuntimeRefusedError(f"{path} was not written: the process ended before it answered")
    found = json.loads(path.read_text())
    if "error" in found:
        raise RuntimeRefusedError(found["error"])
    return Answer(logprobs_TV=torch.tensor(found["logprobs"]), greedy=found["greedy"], version=found["version"])


def ask_llama_cpp(gguf: Path, ids: list[int], *, vocab_size: int) -> Answer:
    """Ask llama.cpp's own server: one request per prompt token, so that rows come from its cache, step by step."""
    rows = []
    with llama_server(gguf, "--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32") as url:
        for length in range(1, len(ids)):
            found = post(f"{url}/completion", {"prompt": ids[:length], "n_probs": vocab_size, **ONE_PRINTABLE_TOKEN})
            row = torch.empty(vocab_size)
            for entry in found["completion_probabilities"][0]["top_logprobs"]:
                row[entry["id"]] = entry["logprob"]
            rows.append(row)
        whole = {"prompt": ids, "n_predict": NUM_NEW_TOKENS, "temperature": 0.0, "return_tokens": True}
        greedy = post(f"{url}/completion", whole)["tokens"]
        version = get(f"{url}/props")["build_info"]
    return Answer(logprobs_TV=torch.stack(rows), greedy=greedy, version=version)


@contextmanager
def llama_server(gguf: Path, *options: str) -> Iterator[str]:
    """Serve a GGUF file on loopback while the block runs, and return the server's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log_path = gguf.with_suffix(".log")
    command = [require_llama_cpp("llama-server"), "--model", gguf, "--host", "127.0.0.1", "--port", str(port)]
    common = ["--ctx-size", "256", "--parallel", "1", "--threads", "1", "--no-warmup"]
    with log_path.open("wb") as log:
        server = subprocess.Popen([*command, *common, *options], stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_for(f"http://127.0.0.1:{port}", server, log_path)
            yield f"http://127.0.0.1:{port}"
        except urllib.error.URLError as err:
            server.poll()
            raise RuntimeRefusedError(f"{err}\n{_tail(log_path)}") from err
        finally:
            server.kill()
            server.wait()


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=ANSWER_S) as answer:
        return json.load(answer)


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
        return json.load(answer)


def _wait_for(url: str, server: "subprocess.Popen[bytes]", log_path: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeRefusedError(_tail(log_path))
        try:
            if get(f"{url}/health")["status"] == "ok":
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise RuntimeRefusedError(f"llama-server did not start within {START_S:.0f} s:\n{_tail(log_path)}")


def _tail(log_path: Path) -> str:
    return "\n".join(log_path.read_text(errors="replace").strip().splitlines()[-12:])
