"""Run by the Python of vLLM's own environment: loads models without weights and times prefill and decode steps.

python vllm_driver.py LOG NUM_THREADS CONFIGURATION

Of this project it imports CONFIGURATION alone, the file that reads a DeciLM config.json. Its first line is {"version"};
then it answers each line of JSON with another:

    {"load": NAME, "directory", "dtype", "max_tokens", "max_batch_size", "max_prefill_tokens", "cache_bytes"}
                                                                               -> {"kv_bytes_per_token"}
    {"time": NAME, "batch_size", "num_prompt_tokens", "num_tokens"}            -> {"steps_ms"}

or {"error"}. The first step reads the prompts and writes a token of each, every later one writes another. Weights are
random: time does not depend on their values. Whatever vLLM prints goes to LOG.
"""

import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from importlib.metadata import distributions
from typing import Any, TextIO


def register(configuration: str) -> None:
    """Make the model type known, so that no code that lies beside a model is run."""
    transformers = importlib.import_module("transformers")
    spec = importlib.util.spec_from_file_location("configuration_decilm", configuration)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    transformers.AutoConfig.register(module.DeciLMConfig.model_type, module.DeciLMConfig)


def load(request: dict[str, Any], engines: dict[str, Any]) -> dict[str, Any]:
    """Start an engine in this process and say what its cache takes."""
    vllm = importlib.import_module("vllm")
    model = vllm.LLM(
        model=request["directory"],
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=request["dtype"],
        max_model_len=request["max_tokens"],
        max_num_seqs=request["max_batch_size"],
        # A prefill is one step, and none is found in the cache.
        max_num_batched_tokens=request["max_prefill_tokens"],
        enable_prefix_caching=False,
        async_scheduling=False,
        kv_cache_memory_bytes=request["cache_bytes"],
    )
    engine = model.llm_engine
    engines[request["load"]] = engine
    cache = engine.engine_core.engine_core.scheduler.kv_cache_config
    num_tokens = cache.num_blocks * engine.vllm_config.cache_config.block_size
    # Layers of one shape are one tensor; each names the size of the allocation that all of them lie in.
    return {"kv_bytes_per_token": max(tensor.size for tensor in cache.kv_cache_tensors) / num_tokens}


def time_steps(request: dict[str, Any], engines: dict[str, Any]) -> dict[str, Any]:
    """Answer a batch of prompts and return the milliseconds of every step."""
    vllm = importlib.import_module("vllm")
    engine = engines[request["time"]]
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=request["num_tokens"], ignore_eos=True, detokenize=False)
    for index in range(request["batch_size"]):
        prompt = {"prompt_token_ids": [token % 64 for token in range(request["num_prompt_tokens"])]}
        engine.add_request(str(index), prompt, sampling)
    steps_ms = []
    while engine.has_unfinished_requests():
        began = time.perf_counter()
        engine.step()
        steps_ms.append(1000 * (time.perf_counter() - began))
    if len(steps_ms) != request["num_tokens"]:
        raise RuntimeError(f"{request} took {len(steps_ms)} steps: the prompts were not read in one")
    return {"steps_ms": steps_ms}


def say(answers: TextIO, found: dict[str, Any]) -> None:
    """Write one line."""
    answers.write(json.dumps(found) + "\n")
    answers.flush()


def main() -> None:
    """Answer standard input until it ends."""
    log_path, num_threads, configuration = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": num_threads,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    register(configuration)
    engines: dict[str, Any] = {}
    version = next(one.version for one in distributions() if one.name in ("vllm", "vllm-cpu"))
    say(answers, {"version": version})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            found = load(request, engines) if "load" in request else time_steps(request, engines)
        except Exception:  # noqa: BLE001 (whatever it is, it is the answer)
            found = {"error": traceback.format_exc()}
        say(answers, found)


if __name__ == "__main__":
    main()
