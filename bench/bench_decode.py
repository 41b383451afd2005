"""What leaving attention out of every second layer is worth when decoding: python bench/bench_decode.py.

Two random models of SmolLM2-135M's layer shape, a third as deep, measured in turn on this machine by the harness that
measures children.
"""

import torch

from pipeline.architecture import NO_ATTENTION, Architecture, BlockSpec, gqa, swiglu
from pipeline.hardware import describe_hardware
from pipeline.model.heterogeneous import build_model
from pipeline.progress import SilentReporter
from pipeline.puzzle.measure import measure_models, median_interval
from pipeline.recipe import MeasurementConfig, Scenario

NUM_LAYERS = 10
NUM_THREADS = 2
SCENARIO = Scenario(name="chat-1k", batch_size=1, prompt_tokens=1024, generation_tokens=64)
MEASUREMENT = MeasurementConfig(rounds=9, warmups=2)


def architecture(*, attention_every: int) -> Architecture:
    """Return the model whose layers keep attention at every so many."""
    return Architecture(
        vocab_size=8192,
        hidden_size=576,
        num_attention_heads=9,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        rope_scaling=None,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=2,
        blocks=tuple(
            BlockSpec(
                attention=gqa(3) if layer % attention_every == 0 else NO_ATTENTION,
                ffn=swiglu(1536),
                parent_layers=(layer,),
            )
            for layer in range(NUM_LAYERS)
        ),
    )


def main() -> None:
    """Measure both and print the ratio of their medians."""
    models = {
        name: build_model(architecture(attention_every=every), dtype=torch.float32, seed=1).eval()
        for name, every in (("parent", 1), ("child", 2))
    }
    measured = measure_models(
        models, [SCENARIO], measurement=MEASUREMENT, threads=NUM_THREADS, reporter=SilentReporter()
    )
    parent, child = (median_interval(measured.times_ms[name, SCENARIO.name, "decode"]) for name in ("parent", "child"))
    for name, times in (("parent", parent), ("child", child)):
        print(f"{name}: {times.median:.2f} ms per token [{times.low:.2f}, {times.high:.2f}], n = {times.num_samples}")
    print(f"decode: {parent.median / child.median:.2f} times as fast without every second attention")
    print(f"({describe_hardware()}, {NUM_THREADS} threads, fp32, batch 1 behind {SCENARIO.prompt_tokens} tokens)")


if __name__ == "__main__":
    main()
