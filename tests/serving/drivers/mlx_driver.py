"""Run by the Python of mlx-lm's own environment: log-probabilities of a prompt and a greedy continuation.

python mlx_driver.py MODEL_DIR REQUEST.json ANSWER.json
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model_dir, request_path, answer_path = sys.argv[1:]
    request = json.loads(Path(request_path).read_text())
    ids = request["ids"]
    model, _ = load_model(Path(model_dir))
    logits = model(mx.array([ids]))[0].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    greedy = [int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=request["num_new_tokens"])]
    # As vLLM reports them: the row of each prompt token but the first, given those before it.
    answer = {"logprobs": logprobs[:-1].tolist(), "greedy": greedy, "version": version("mlx-lm")}
    Path(answer_path).write_text(json.dumps(answer))
