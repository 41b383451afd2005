"""Run by the Python of vLLM's own environment: log-probabilities of a prompt and a greedy continuation of each model.

python vllm_driver.py REQUEST.json

The request names the models and where each answer goes: {"logprobs", "greedy", "version"}, or {"error"}.
"""

import contextlib
import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def answer(model_dir: str, request: dict[str, Any]) -> dict[str, Any]:
    """Load one model, ask it, and let it go again."""
    from vllm import LLM, SamplingParams, __version__
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    ids = request["ids"]
    engine = None
    try:
        engine = LLM(
            model=model_dir,
            trust_remote_code=True,  # of the two files that our own export wrote beside the weights
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            max_model_len=len(ids) + request["num_new_tokens"],
            max_num_seqs=1,
            max_logprobs=-1,
        )
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=request["num_new_tokens"],
            prompt_logprobs=-1,
            ignore_eos=True,
            detokenize=False,
        )
        output = engine.generate([{"prompt_token_ids": ids}], sampling)[0]
        # The first prompt token has no log-probabilities; those at position t are of token t, given the ones before.
        rows = [
            [position[token].logprob for token in range(request["vocab_size"])]
            for position in output.prompt_logprobs[1:]
        ]
        return {"logprobs": rows, "greedy": list(output.outputs[0].token_ids), "version": __version__}
    finally:
        del engine
        gc.collect()
        with contextlib.suppress(Exception):
            cleanup_dist_env_and_memory()


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    for model in asked["models"]:
        try:
            found = answer(model["directory"], asked)
        except Exception:  # noqa: BLE001 (whatever it is, it is this model's answer)
            found = {"error": traceback.format_exc()}
        Path(model["answer"]).write_text(json.dumps(found))
