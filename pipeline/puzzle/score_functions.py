"""What a score may be: any function of a model and data that follows from the states behind its last layer.

A function brings its own windows and adds up, group by group, what it needs of each model; all functions of a run are
evaluated in the same walk over the layers. To add one, write a class like the two here: its sums must be a dataclass of
JSON values, and its measures fields of Divergence.

Letters: B rows, T tokens, D hidden_size, S tokens in a slice, V vocab_size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.data.benchmarks import MultipleChoiceItem
from pipeline.data.choice_texts import TokenCodec, scored_text
from pipeline.data.packed import IGNORED_LABEL, PackedTokens
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.puzzle.divergence import SLICE_TOKENS, Divergence, DivergenceSums, ParentSlices, add_divergences


class ScoreFunction(Protocol):
    """One function over model and data."""

    @property
    def packed(self) -> PackedTokens:
        """The windows it reads."""
        ...

    @property
    def sums_type(self) -> type[Any]:
        """The dataclass in which one model's sums are kept; called without arguments it is nothing added yet."""
        ...

    def add(
        self,
        sums: Sequence[Any],
        model: HeterogeneousLlamaForCausalLM,
        finals: Sequence[Tensor],
        parent_BTD: Tensor,
        rows: slice,
    ) -> None:
        """Add what each model's states behind its last layer (`finals`) say about these windows; the parent's beside.

        Groups of windows come in their order, each once.
        """
        ...

    def measures(self, sums: Any) -> Mapping[str, float]:
        """Return the measures of one model by their names."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class DivergenceScore:
    """KL, LM loss, cosine of hidden states and top-1 agreement on text; an instance is for one parent."""

    packed: PackedTokens
    sums_type: type[DivergenceSums] = DivergenceSums
    parent_slices: ParentSlices = field(default_factory=ParentSlices, repr=False)

    def add(
        self,
        sums: Sequence[DivergenceSums],
        model: HeterogeneousLlamaForCausalLM,
        finals: Sequence[Tensor],
        parent_BTD: Tensor,
        rows: slice,
    ) -> None:
        """Add as add_divergences does."""
        add_divergences(
            sums,
            model,
            finals,
            parent_BTD,
            self.packed.labels_NT[rows],
            parent_slices=self.parent_slices,
            first_token=rows.start * self.packed.sequence_length,
        )

    def measures(self, sums: DivergenceSums) -> Mapping[str, float]:
        """Return means over tokens."""
        return sums.measures


@dataclass(slots=True)
class TaskSums:
    """Log-likelihood of each choice, in the order of the windows."""

    log_likelihoods: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """Share of multiple-choice items in which another than the right choice has the greatest log-likelihood.

    A window is one prompt with one choice, padded on the right, behind everything that a causal model looks at; labels
    stand at the choice's tokens alone.
    """

    packed: PackedTokens
    num_choices: tuple[int, ...]
    gold: tuple[int, ...]
    sums_type: type[TaskSums] = TaskSums

    @classmethod
    def of(cls, items: Sequence[MultipleChoiceItem], *, tokenizer: TokenCodec, max_tokens: int) -> "TaskScore":
        """Return the score on these items; a text beyond `max_tokens` loses the prompt's beginning."""
        texts = [
            scored_text(item.prompt, choice=choice, tokenizer=tokenizer, max_tokens=max_tokens)
            for item in items
            for choice in item.choices
        ]
        shape = len(texts), max(len(text.ids) for text in texts)
        tokens_NT, labels_NT = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED_LABEL)
        for row, text in enumerate(texts):
            ids, end = torch.tensor(text.ids), len(text.ids)
            tokens_NT[row, :end] = ids
            labels_NT[row, end - text.num_choice_tokens : end] = ids[-text.num_choice_tokens :]
        return cls(
            packed=PackedTokens(
                tokens_NT=tokens_NT, labels_NT=labels_NT, position_ids_NT=torch.arange(shape[1]).expand(shape)
            ),
            num_choices=tuple(len(item.choices) for item in items),
            gold=tuple(item.gold for item in items),
        )

    def add(
        self,
        sums: Sequence[TaskSums],
        model: HeterogeneousLlamaForCausalLM,
        finals: Sequence[Tensor],
        parent_BTD: Tensor,
        rows: slice,
    ) -> None:
        """Add each window's sum of log q(token) over its choice; the head is applied to those positions alone."""
        next_BT = self.packed.labels_NT[rows, 1:].to(parent_BTD.device)
        row_S, place_S = (next_BT != IGNORED_LABEL).nonzero(as_tuple=True)
        for one, final_BTD in zip(sums, finals, strict=True):
            hidden_SD = model.model.norm(final_BTD[row_S, place_S])
            total_B = torch.zeros(len(next_BT), dtype=torch.float64, device=hidden_SD.device)
            for start in range(0, len(row_S), SLICE_TOKENS):
                part = slice(start, start + SLICE_TOKENS)
                log_q_SV = model.lm_head(hidden_SD[part]).float().log_softmax(dim=-1)
                log_q_S = log_q_SV.gather(-1, next_BT[row_S[part], place_S[part], None])[:, 0]
                total_B.index_add_(0, row_S[part], log_q_S.double())
            one.log_likelihoods += total_B.tolist()

    def measures(self, sums: TaskSums) -> Mapping[str, float]:
        """Return the error over the items; among equal choices the first counts as taken."""
        num_wrong = begin = 0
        for count, gold in zip(self.num_choices, self.gold, strict=True):
            of_item = sums.log_likelihoods[begin : begin + count]
            begin += count
            num_wrong += of_item.index(max(of_item)) != gold
        return {"task_error": num_wrong / len(self.gold)}


def divergence_of(functions: Sequence[ScoreFunction], sums: Sequence[Any]) -> Divergence:
    """Return one model's measures by all functions of a run."""
    found: dict[str, Any] = {}
    for function, one in zip(functions, sums, strict=True):
        found |= function.measures(one)
    return Divergence(**found)


def sums_to_json(sums: Sequence[Any]) -> list[dict[str, Any]]:
    """Return one model's sums as JSON values."""
    return [asdict(one) for one in sums]


def sums_from_json(functions: Sequence[ScoreFunction], rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return what sums_to_json was given."""
    return [function.sums_type(**row) for function, row in zip(functions, rows, strict=True)]
