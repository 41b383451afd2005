"""Who samples the replies that reinforcement learning judges: the model that is trained, or vLLM with its weights.

Both give the log-probabilities that they sampled with. How far they lie from the trainer's is reported at every step
(`sampler_mismatch_nats`), and corrected for by truncated importance weights.
"""

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import ClassVar, Protocol, Self

import torch

from pipeline.costs import BYTES_PER_PARAMETER, kv_bytes_per_token
from pipeline.fingerprint import fingerprint
from pipeline.model.checkpoint import TORCH_DTYPES, save_checkpoint
from pipeline.model.export_decilm import export_decilm
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.model.repacking import portable
from pipeline.model.sampling import Completion, sample_completions, seeded_generator
from pipeline.model.vllm_process import VLLM
from pipeline.recipe import Precision

# vLLM gives its cache out in blocks of some tokens.
_SLACK_TOKENS = 64
# More rows than this are sampled in turns: decoding gains little beyond, and the cache grows with them.
_MAX_ROWS = 512
_NAME = "policy"


class Sampler(Protocol):
    """Samples replies of the policy; `name` is what `execution.sampler` calls it."""

    name: ClassVar[str]

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        stop_ids: Collection[int],
        seed: Sequence[int | str],
    ) -> list[list[Completion]]:
        """Return `num_samples` completions of every prompt; what they are depends on weights and seed alone."""
        ...

    def refresh(self) -> None:
        """Take note that the policy's weights have changed."""
        ...


class OwnSampler:
    """Samples with the model itself, in this process."""

    name: ClassVar[str] = "torch"

    def __init__(self, model: HeterogeneousLlamaForCausalLM) -> None:
        self._model = model

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        stop_ids: Collection[int],
        seed: Sequence[int | str],
    ) -> list[list[Completion]]:
        """Sample in one batch."""
        self._model.eval()
        return sample_completions(
            self._model,
            prompts,
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=1.0,
            stop_ids=stop_ids,
            generator=seeded_generator(*seed, device=self._model.device),
        )

    def refresh(self) -> None:
        """Do nothing: there is one set of weights."""


class VLLMSampler:
    """Samples with vLLM in a process of its own, which is given the policy's weights whenever they have changed.

    They go through files, re-packed as an export is. A batch of prompts is one question to it.
    """

    name: ClassVar[str] = "vllm"

    def __init__(
        self,
        model: HeterogeneousLlamaForCausalLM,
        *,
        tokenizer_dir: Path,
        work_dir: Path,
        precision: Precision,
        max_tokens: int,
        num_rows: int,
        num_threads: int,
    ) -> None:
        """Start nothing yet: the first sample does.

        Args:
            model: the policy; its weights are read at the first sample after each `refresh`.
            tokenizer_dir: a checkpoint whose tokenizer goes with the weights.
            work_dir: a directory of this rank for weights and vLLM's log; weights are removed at the end.
            precision: that vLLM computes in.
            max_tokens: of a prompt and its reply.
            num_rows: completions that are sampled at once, up to 512.
            num_threads: of a CPU.

        Raises:
            RuntimeMissingError: when vLLM is not installed.
        """
        work_dir.mkdir(parents=True, exist_ok=True)
        self._model = model
        self._tokenizer_dir = tokenizer_dir
        self._weights_dir = work_dir / "weights"
        self._precision: Precision = precision
        self._max_tokens = max_tokens
        self._num_rows = min(num_rows, _MAX_ROWS)
        device = model.device.index if model.device.type == "cuda" else None
        self._vllm = VLLM(work_dir=work_dir, num_threads=num_threads, device="" if device is None else str(device))
        self._is_loaded = False
        self._is_stale = True

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End vLLM and remove the weights it read."""
        self._vllm.__exit__()
        shutil.rmtree(self._weights_dir, ignore_errors=True)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        stop_ids: Collection[int],
        seed: Sequence[int | str],
    ) -> list[list[Completion]]:
        """Sample with the weights that the policy has now.

        Raises:
            StageError: with what vLLM said last when it cannot.
        """
        if self._is_stale:
            self._hand_over_weights()
        answer = self._vllm.ask(
            {
                "sample": _NAME,
                "prompts": [list(prompt) for prompt in prompts],
                "num_samples": num_samples,
                "max_new_tokens": max_new_tokens,
                "temperature": temperature,
                "stop_ids": sorted(stop_ids),
                "seed": int(fingerprint(list(seed))[:7], 16),
            }
        )
        return [
            [
                Completion(ids=tuple(one["ids"]), logprobs=tuple(one["logprobs"]), is_terminated=one["is_terminated"])
                for one in group
            ]
            for group in answer["groups"]
        ]

    def refresh(self) -> None:
        """Hand the weights over again before the next sample."""
        self._is_stale = True

    def _hand_over_weights(self) -> None:
        shutil.rmtree(self._weights_dir, ignore_errors=True)
        own_dir, served_dir = self._weights_dir / "own", self._weights_dir / "served"
        dtype = TORCH_DTYPES[self._precision]
        with torch.no_grad():
            save_checkpoint(
                own_dir,
                architecture=self._model.architecture,
                tensors=((name, weight.to("cpu", dtype)) for name, weight in self._model.named_parameters()),
                tokenizer_dir=self._tokenizer_dir,
            )
        export_decilm(own_dir, out_dir=served_dir)
        self._vllm.ask({"reload" if self._is_loaded else "load": _NAME, **self._engine_settings(served_dir)})
        self._is_loaded = True
        self._is_stale = False

    def _engine_settings(self, directory: Path) -> dict[str, object]:
        served = portable(self._model.architecture).architecture
        cached_tokens = self._num_rows * (self._max_tokens + _SLACK_TOKENS)
        return {
            "directory": str(directory),
            "with_weights": True,
            "dtype": str(TORCH_DTYPES[self._precision]).removeprefix("torch."),
            "max_tokens": self._max_tokens,
            "max_batch_size": self._num_rows,
            "max_prefill_tokens": max(2048, self._max_tokens),
            "cache_bytes": int(
                cached_tokens * kv_bytes_per_token(served, bytes_per_value=BYTES_PER_PARAMETER[self._precision])
            ),
        }
