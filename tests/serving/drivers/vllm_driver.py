"""Run by the Python of vLLM's own environment: log-probabilities of a prompt and a greedy continuation.

python vllm_driver.py MODEL_DIR REQUEST.json ANSWER.json
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm import __version__ as vllm_version

    model_dir, request_path, answer_path = sys.argv[1:]
    request = json.loads(Path(request_path).read_text())
    ids = request["ids"]
    engine = LLM(
        model=model_dir,
        trust_remote_code=True,
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
    # The first prompt token has no log-probabilities; those at position t are of the token t, given the ones before.
    rows = [
        [position[token].logprob for token in range(request["vocab_size"])] for position in output.prompt_logprobs[1:]
    ]
    answer = {"logprobs": rows, "greedy": list(output.outputs[0].token_ids), "version": vllm_version}
    Path(answer_path).write_text(json.dumps(answer))
