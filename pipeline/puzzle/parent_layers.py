"""The parent's layers on one rank: some in a row, with the activations of every batch passed along a chain of ranks.

Rank r embeds or receives the hidden states, runs its own layers and sends what comes out of the last one on. It does
not wait for the next rank to take them, so that all ranks work at once, each on a batch of its own. What a layer sees
is the same bits whichever rank holds it.

Letters: N windows, B batch, T tokens, D hidden_size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.model.heterogeneous import HeterogeneousDecoderLayer, HeterogeneousLlamaForCausalLM, attention_inputs

# Batches that may be on their way to the next rank; more would only pile up before a slower one.
MAX_PENDING_SENDS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerActivations:
    """What one parent layer was given and gave, and the keyword arguments its attention took."""

    layer: int
    input_BTD: Tensor
    middle_BTD: Tensor
    output_BTD: Tensor
    attention_kwargs: dict[str, Any]


@dataclass(kw_only=True, slots=True)
class ParentLayers:
    """The layers this rank holds, and the ranks before and behind it; None where there is none.

    `model` is the whole parent's, of which only these layers, and the embedding if they begin with layer 0, need
    weights.
    """

    model: HeterogeneousLlamaForCausalLM
    layers: range
    device: torch.device
    previous_rank: int | None = None
    next_rank: int | None = None
    _pending: list[tuple[dist.Work, Tensor]] = field(default_factory=list)

    @classmethod
    def whole(cls, model: HeterogeneousLlamaForCausalLM) -> "ParentLayers":
        """Return all layers of a model that is on one device."""
        return cls(model=model, layers=range(len(model.model.layers)), device=next(model.parameters()).device)

    def layer(self, index: int) -> HeterogeneousDecoderLayer:
        """Return one of the layers."""
        found: Any = self.model.model.layers[index]
        return found

    def until(self, stop: int) -> range:
        """Return the layers below `stop` that this rank holds."""
        return range(self.layers.start, max(self.layers.start, min(self.layers.stop, stop)))

    def activations(self, tokens_BT: Tensor, position_ids_BT: Tensor, *, stop: int) -> Iterator[LayerActivations]:
        """Run this rank's layers below `stop` without gradients, keeping one layer's activations at a time.

        Every rank that holds a layer below `stop` must run the same batches in the same order.
        """
        with torch.no_grad():
            hidden_BTD = self.receive(tokens_BT)
            kwargs = self.attention_kwargs(hidden_BTD, position_ids_BT)
        for index in self.until(stop):
            layer = self.layer(index)
            with torch.no_grad():
                middle_BTD = layer.attend(hidden_BTD, **kwargs)
                output_BTD = layer.feed_forward(middle_BTD)
            yield LayerActivations(
                layer=index,
                input_BTD=hidden_BTD,
                middle_BTD=middle_BTD,
                output_BTD=output_BTD,
                attention_kwargs=kwargs,
            )
            hidden_BTD = output_BTD
        self.send(hidden_BTD, stop=stop)

    def receive(self, tokens_NT: Tensor) -> Tensor:
        """Return the hidden states that reach this rank's first layer, (N, T, D)."""
        if self.previous_rank is None:
            return self.model.model.embed_tokens(tokens_NT.to(self.device))
        dtype = next(self.layer(self.layers.start).parameters()).dtype
        hidden_NTD = torch.empty(*tokens_NT.shape, self.model.config.hidden_size, dtype=dtype, device=self.device)
        dist.recv(hidden_NTD, self.previous_rank)
        return hidden_NTD

    def send(self, hidden_NTD: Tensor, *, stop: int) -> None:
        """Send what comes out of this rank's last layer on, if a layer below `stop` is behind it."""
        if self.next_rank is None or stop <= self.layers.stop:
            return
        hidden_NTD = hidden_NTD.contiguous()
        work = dist.isend(hidden_NTD, self.next_rank)
        assert work is not None
        self._pending.append((work, hidden_NTD))
        self.wait(MAX_PENDING_SENDS)

    def wait(self, num_pending: int = 0) -> None:
        """Wait until no more than that many sends are pending."""
        while len(self._pending) > num_pending:
            work, _ = self._pending.pop(0)
            work.wait()

    def attention_kwargs(self, hidden_BTD: Tensor, position_ids_BT: Tensor) -> dict[str, Any]:
        """Return what the attention of any layer takes for these rows."""
        return attention_inputs(
            self.model,
            batch_size=hidden_BTD.shape[0],
            num_tokens=hidden_BTD.shape[1],
            device=self.device,
            dtype=hidden_BTD.dtype,
            position_ids_BT=position_ids_BT.to(self.device),
        )
