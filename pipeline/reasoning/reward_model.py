"""A reward model on this machine: a sequence classifier with one output, which reads a request and an answer."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipeline.data.chat import render_chat, special_tokens
from pipeline.errors import CheckpointError, DataError
from pipeline.model.checkpoint import TORCH_DTYPES
from pipeline.recipe import RewardModelConfig

_SCORED_ROWS = 16


class RewardModel:
    """Says what answers to requests earn by the recipe's weight and bounds."""

    def __init__(self, config: RewardModelConfig, *, device: torch.device) -> None:
        """Load it.

        Raises:
            CheckpointError: when there is no trained classifier with one output in safetensors, or no chat template.
        """
        directory = Path(config.path).expanduser()
        if not list(directory.glob("*.safetensors")):
            raise CheckpointError(
                f"rl.reward_model.path is {config.path}, which holds no safetensors: name a Hugging Face directory"
            )
        self._config = config
        self._device = device
        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        if not self._tokenizer.chat_template:
            raise CheckpointError(f"the reward model in {directory} has no chat template to put an answer in")
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            directory,
            dtype=TORCH_DTYPES[config.precision],
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        lacking = sorted(loading["missing_keys"])
        if model.config.num_labels != 1 or lacking:
            raise CheckpointError(
                f"the model in {directory} has {model.config.num_labels} outputs and lacks the tensors {lacking[:3]}: "
                "a reward model has one output, and its head was trained"
            )
        self._model = model.to(device).eval()
        # Without a pad token transformers reads the score of whatever stands last, padding included.
        self._pad_id: int | None = model.config.get_text_config().pad_token_id
        self._max_tokens: int = model.config.get_text_config().max_position_embeddings

    @torch.no_grad()
    def rewards(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return what each (request, answer) earns; an empty answer, or one that fakes a turn, earns nothing.

        Raises:
            DataError: when a pair is longer than the model reads, or its score is not finite.
        """
        marks = special_tokens(self._tokenizer).values()
        rows = {
            place: self._ids(request, answer)
            for place, (request, answer) in enumerate(pairs)
            if answer and not any(mark in answer for mark in marks)
        }
        rewards = [0.0] * len(pairs)
        # Rows of like length share a pass: less padding.
        order = sorted(rows, key=lambda place: len(rows[place]))
        size = 1 if self._pad_id is None else _SCORED_ROWS
        for start in range(0, len(order), size):
            places = order[start : start + size]
            for place, score in zip(places, self._scores([rows[place] for place in places]), strict=True):
                kept = min(max(score, self._config.min_score), self._config.max_score)
                rewards[place] = self._config.weight * (kept - self._config.min_score)
        return rewards

    def _ids(self, request: str, answer: str) -> list[int]:
        messages = [{"role": "user", "content": request.strip()}, {"role": "assistant", "content": answer}]
        ids = render_chat(self._tokenizer, messages)
        if len(ids) > self._max_tokens:
            raise DataError(
                f"a request and its answer are {len(ids):,} tokens for rl.reward_model, which reads "
                f"{self._max_tokens:,}: lower rl.max_new_tokens, or choose another reward model"
            )
        return ids

    def _scores(self, rows: Sequence[list[int]]) -> list[float]:
        width = max(map(len, rows))
        input_ids_BT = torch.tensor([row + [self._pad_id or 0] * (width - len(row)) for row in rows])
        mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        output = self._model(input_ids=input_ids_BT.to(self._device), attention_mask=mask_BT.to(self._device))
        scores: list[float] = output.logits[:, 0].float().tolist()
        if not all(map(math.isfinite, scores)):
            raise DataError(f"the reward model in {self._config.path} gave scores that are not finite: {scores}")
        return scores
