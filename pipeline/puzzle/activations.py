"""Hidden states of all windows between two layers: in memory up to a bound, beyond it in files.

One store is shared by everything that a stage keeps at a time: what reaches the layer at hand, what leaves the parent's
last layer, and one set per distinct prefix where children are walked together. States go in and out one group of
windows at a time, bit for bit; what a batch needs while it is computed is not counted.

Letters: N windows, B rows, T tokens, D hidden_size.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.data.packed import PackedTokens
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.puzzle.composition import ComposedLayer, embed, run_group, window_groups

Held = Tensor | tuple[Path, torch.device]
"""A group's states, or the file that holds them and the device they belong on."""


class ActivationStore:
    """Keeps tensors in memory while they fit a number of bytes, the others in files of a directory of its own."""

    def __init__(self, directory: Path, *, max_bytes: int) -> None:
        self._directory = directory
        self._free_bytes = max_bytes
        self._num_files = 0
        # What a killed run left is not continued: states are computed again in a fraction of the time of scores.
        shutil.rmtree(directory, ignore_errors=True)

    def put(self, states_BTD: Tensor) -> Held:
        """Keep a tensor."""
        if states_BTD.nbytes <= self._free_bytes:
            self._free_bytes -= states_BTD.nbytes
            return states_BTD
        self._directory.mkdir(parents=True, exist_ok=True)
        # A dot in front: it is no work to resume from.
        path = self._directory / f".states-{self._num_files}.safetensors"
        self._num_files += 1
        save_file({"states": states_BTD.contiguous()}, path)
        return path, states_BTD.device

    def get(self, held: Held) -> Tensor:
        """Return a kept tensor, on the device it came from."""
        if isinstance(held, Tensor):
            return held
        path, device = held
        return load_file(path, device=str(device))["states"]

    def drop(self, held: Held) -> None:
        """Forget a kept tensor."""
        if isinstance(held, Tensor):
            self._free_bytes += held.nbytes
        else:
            held[0].unlink()


class HiddenStates:
    """The states of every window of `packed` at one depth, in groups of windows that fit one batch."""

    def __init__(self, store: ActivationStore, packed: PackedTokens, compute: Callable[[int, slice], Tensor]) -> None:
        """Keep what `compute` gives for each group, by its number and its windows."""
        self.packed = packed
        self.groups = window_groups(packed)
        self._store = store
        self._held = [store.put(compute(number, rows)) for number, rows in enumerate(self.groups)]

    def __getitem__(self, number: int) -> Tensor:
        """Return one group's states, (B, T, D)."""
        return self._store.get(self._held[number])

    def __iter__(self) -> Iterator[Tensor]:
        """Give the states group by group."""
        return (self[number] for number in range(len(self.groups)))

    def behind(self, model: HeterogeneousLlamaForCausalLM, layers: Sequence[ComposedLayer]) -> "HiddenStates":
        """Return the states behind these layers; these here stay."""
        return HiddenStates(
            self._store, self.packed, lambda number, rows: run_group(model, layers, self[number], self.packed, rows)
        )

    def batches(self, num_windows: int) -> Iterator[tuple[slice, Tensor]]:
        """Give windows and their states so many at a time, wherever groups end; each group is read once."""
        start, waiting_BTD = 0, None
        for group_BTD in self:
            waiting_BTD = group_BTD if waiting_BTD is None else torch.cat([waiting_BTD, group_BTD])
            while len(waiting_BTD) >= num_windows:
                yield slice(start, start + num_windows), waiting_BTD[:num_windows]
                start, waiting_BTD = start + num_windows, waiting_BTD[num_windows:]
            if not len(waiting_BTD):
                waiting_BTD = None
        if waiting_BTD is not None:
            yield slice(start, start + len(waiting_BTD)), waiting_BTD

    def advance(
        self,
        model: HeterogeneousLlamaForCausalLM,
        layers: Sequence[ComposedLayer],
        *,
        watch: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        """Move on behind these layers; `watch` is shown what goes in and what comes out of each group."""
        for number, rows in enumerate(self.groups):
            input_BTD = self[number]
            output_BTD = run_group(model, layers, input_BTD, self.packed, rows)
            if watch is not None:
                watch(input_BTD, output_BTD)
            self._store.drop(self._held[number])
            self._held[number] = self._store.put(output_BTD)

    def release(self) -> None:
        """Give memory and files back."""
        for held in self._held:
            self._store.drop(held)
        self._held = []


def embedded(store: ActivationStore, model: HeterogeneousLlamaForCausalLM, packed: PackedTokens) -> HiddenStates:
    """Return the states that reach layer 0."""
    return HiddenStates(store, packed, lambda _, rows: embed(model, packed, rows))
