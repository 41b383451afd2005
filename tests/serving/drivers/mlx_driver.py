"""Run by the Python of mlx-lm's own environment: log-probabilities of a prompt and a greedy continuation of each model.

python mlx_driver.py REQUEST.json

The request names the models and where each answer goes: {"logprobs", "greedy", "version"}, or {"error"}.
"""

import json
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any


def answer(model_dir: str, request: dict[str, Any]) -> dict[str, Any]:
    """Load one model and ask it."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    ids = request["ids"]
    model, _ = load_model(Path(model_dir))
    logits = model(mx.array([ids]))[0].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    greedy = [int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=request["num_new_tokens"])]
    # As vLLM reports them: the row of each prompt token but the first, given those before it.
    return {"logprobs": logprobs[:-1].tolist(), "greedy": greedy, "version": version("mlx-lm")}


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    for model in asked["models"]:
        try:
            found = answer(model["directory"], asked)
        except Exception:  # noqa: BLE001 (whatever it is, it is this model's answer)
            found = {"error": traceback.format_exc()}
        Path(model["answer"]).write_text(json.dumps(found))
