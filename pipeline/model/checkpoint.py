"""Reading and writing checkpoint directories; the only IO of tensors.

    architecture.json                   Architecture.to_json(); tensors have Hugging Face's Llama names
    model.safetensors                   above 5 GB: model-00001-of-0000N.safetensors and model.safetensors.index.json
    tokenizer.json, tokenizer_config.json, chat_template.jinja

Nothing is ever unpickled: weights that are not safetensors are not read.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pipeline.architecture import Architecture
from pipeline.artifacts import write_atomically
from pipeline.errors import CheckpointError
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM, empty_model
from pipeline.model.shards import (
    INDEX_FILE,
    MAX_SHARD_BYTES,
    SUBBLOCKS_DIR,
    WEIGHTS_FILE,
    checkpoint_shapes,
    index_json,
    shard_name,
)

ARCHITECTURE_FILE = "architecture.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


class TensorReader:
    """The tensors of a directory by name, each read from disk when it is asked for.

    Raises:
        CheckpointError: when there are no safetensors, the index points outside the directory or at a missing shard,
            or a shard is cut off.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        index = _read_index(directory)
        shards = sorted(set(index.values())) if index is not None else [WEIGHTS_FILE]
        self._files = {shard: _open_shard(directory / shard) for shard in shards}
        held = {name: shard for shard, file in self._files.items() for name in file.keys()}  # noqa: SIM118
        for name, shard in (index or {}).items():
            if held.get(name) != shard:
                raise CheckpointError(f"{directory / INDEX_FILE} puts {name} in {shard}, which does not hold it")
        self._shard_of = held

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, sorted."""
        return tuple(sorted(self._shard_of))

    def path(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self.directory / self._held_in(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype without reading it.

        Raises:
            CheckpointError: for anything but fp32, bf16 and fp16, as quantised checkpoints hold.
        """
        stored = self._slice(name).get_dtype()
        if stored not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{name} in {self.directory} is stored as {stored}; weights must be F32, BF16 or F16: convert the "
                "checkpoint first"
            )
        return SAFETENSORS_DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """Return one tensor, as it is stored, in memory of its own."""
        self.dtype(name)
        # A copy: a tensor on the mapped file would break when that file is replaced.
        return self._file(name).get_tensor(name).clone()

    def read_prefix(self, prefix: str) -> dict[str, Tensor]:
        """Return every tensor below `prefix` (`model.layers.3.`), named relative to it."""
        return {name.removeprefix(prefix): self.read(name) for name in self.names if name.startswith(prefix)}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Read all tensors in turn, in the order of their names."""
        for name in self.names:
            yield name, self.read(name)

    def _held_in(self, name: str) -> str:
        if name not in self._shard_of:
            raise CheckpointError(f"{self.directory} holds no tensor {name}")
        return self._shard_of[name]

    def _file(self, name: str) -> Any:
        return self._files[self._held_in(name)]

    def _slice(self, name: str) -> Any:
        return self._file(name).get_slice(name)


def save_checkpoint(
    directory: Path,
    *,
    architecture: Architecture,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    tokenizer_dir: Path | None,
) -> None:
    """Write a checkpoint; `tensors` may be a state dict (a tied head in it is left out) or a stream.

    Args:
        directory: where the files go; made where it is missing.
        architecture: what the tensors are; every name and shape is checked against it.
        tensors: saved with the dtype they have.
        tokenizer_dir: a checkpoint to copy the tokenizer files from; None when they are written otherwise.

    Raises:
        CheckpointError: when a tensor is missing, unexpected or of the wrong shape, or a tied head is not tied.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(tensors, Mapping):
        tensors = _without_tied_head(cast("Mapping[str, Tensor]", tensors), architecture).items()
    write_tensors(directory, _checked(tensors, checkpoint_shapes(architecture), where=str(directory)))
    write_architecture(directory, architecture)
    if tokenizer_dir is not None:
        copy_tokenizer(tokenizer_dir, directory)


def write_tensors(directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a stream of tensors as safetensors, holding at most one shard of 5 GB in memory."""
    shards: list[dict[str, Tensor]] = [{}]
    parts: list[Path] = []
    names_of_part: list[list[str]] = []
    total_bytes = shard_bytes = 0

    def flush() -> None:
        part = directory / f".part-{len(parts)}.safetensors"
        save_file(shards[0], part, metadata={"format": "pt"})
        part.chmod(0o644)  # safetensors leaves 0600, and a store may be shared
        parts.append(part)
        names_of_part.append(list(shards[0]))
        shards[0] = {}

    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if shards[0] and shard_bytes + num_bytes > MAX_SHARD_BYTES:
            flush()
            shard_bytes = 0
        shards[0][name] = tensor.detach().contiguous().cpu()
        shard_bytes += num_bytes
        total_bytes += num_bytes
    flush()

    if len(parts) == 1:
        parts[0].replace(directory / WEIGHTS_FILE)
        return
    weight_map = {}
    for number, (part, names) in enumerate(zip(parts, names_of_part, strict=True), start=1):
        shard = shard_name(number, num_shards=len(parts))
        part.replace(directory / shard)
        weight_map |= dict.fromkeys(names, shard)
    write_atomically(directory / INDEX_FILE, index_json(weight_map, tensor_bytes=total_bytes))


def write_architecture(directory: Path, architecture: Architecture) -> None:
    """Write architecture.json, which makes the directory a checkpoint: a reader sees it whole or not at all."""
    write_atomically(directory / ARCHITECTURE_FILE, (json.dumps(architecture.to_json(), indent=1) + "\n").encode())


def read_architecture(directory: Path) -> Architecture:
    """Return what the checkpoint is.

    Raises:
        CheckpointError: when architecture.json is missing or not valid.
    """
    path = directory / ARCHITECTURE_FILE
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {ARCHITECTURE_FILE}: it is not a checkpoint of this pipeline")
    try:
        return Architecture.model_validate_json(path.read_bytes())
    except ValidationError as err:
        raise CheckpointError(f"{path} is not a valid architecture: {err}") from err


def load_model(directory: Path, *, dtype: torch.dtype) -> HeterogeneousLlamaForCausalLM:
    """Return the checkpoint's model on the CPU, in evaluation mode.

    Raises:
        CheckpointError: when a tensor is missing, unexpected, cut off or of the wrong shape.
    """
    architecture = read_architecture(directory)
    checked = _checked(TensorReader(directory), checkpoint_shapes(architecture), where=str(directory))
    return model_from_tensors(architecture, checked, dtype=dtype)


def unread_model(directory: Path, *, dtype: torch.dtype) -> HeterogeneousLlamaForCausalLM:
    """Return the checkpoint's model on the CPU without its weights: tensors of its shapes that nothing was written to.

    Raises:
        CheckpointError: when there is no architecture.
    """
    architecture = read_architecture(directory)
    shapes = checkpoint_shapes(architecture)
    return model_from_tensors(architecture, ((n, torch.empty(s, dtype=dtype)) for n, s in shapes.items()), dtype=dtype)


def load_layers(
    directory: Path, layers: range, *, dtype: torch.dtype, device: torch.device
) -> HeterogeneousLlamaForCausalLM:
    """Return the checkpoint's model with the weights of some layers alone, and the embedding if layer 0 is among them.

    Everything else stays on the meta device: a rank's share of a model that fits none.

    Raises:
        CheckpointError: when a tensor is missing, cut off or of the wrong shape.
    """
    architecture = read_architecture(directory)
    prefixes = (*(f"model.layers.{layer}." for layer in layers), *((_EMBEDDING,) if 0 in layers else ()))
    expected = {name: shape for name, shape in checkpoint_shapes(architecture).items() if name.startswith(prefixes)}
    reader = TensorReader(directory)
    named = ((name, reader.read(name)) for name in reader.names if name.startswith(prefixes))
    tensors = {name: tensor.to(device, dtype) for name, tensor in _checked(named, expected, where=str(directory))}
    model = empty_model(architecture)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.model.rotary_emb.to(device)
    return model


def model_from_tensors(
    architecture: Architecture, named: Iterable[tuple[str, Tensor]], *, dtype: torch.dtype
) -> HeterogeneousLlamaForCausalLM:
    """Return a model on the CPU, in evaluation mode, that holds these tensors; a tied head need not be among them."""
    tensors = {name: tensor.to(dtype) for name, tensor in named}
    if architecture.tie_word_embeddings:
        tensors[_HEAD] = tensors[_EMBEDDING]
    model = empty_model(architecture)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    return model


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Return the checkpoint's tokenizer, chat template included; no code of the checkpoint is run.

    Raises:
        CheckpointError: when there is no tokenizer.json.
    """
    if not (directory / "tokenizer.json").is_file():
        raise CheckpointError(f"{directory} has no tokenizer.json, and text cannot be made into tokens without it")
    return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy the tokenizer files of one checkpoint into another."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
        elif name != "chat_template.jinja":
            raise CheckpointError(f"{source} has no {name}, and text cannot be made into tokens without it")


def _without_tied_head(tensors: Mapping[str, Tensor], architecture: Architecture) -> Mapping[str, Tensor]:
    if not architecture.tie_word_embeddings or _HEAD not in tensors:
        return tensors
    if not torch.equal(tensors[_HEAD], tensors[_EMBEDDING]):
        raise CheckpointError(
            f"{_HEAD} differs from {_EMBEDDING} though the model's embeddings are tied: save it with "
            "tie_word_embeddings false, or tie the two"
        )
    return {name: tensor for name, tensor in tensors.items() if name != _HEAD}


def _checked(
    tensors: Iterable[tuple[str, Tensor]], expected: Mapping[str, tuple[int, ...]], *, where: str
) -> Iterator[tuple[str, Tensor]]:
    seen = set()
    for name, tensor in tensors:
        if name not in expected:
            raise CheckpointError(f"{where}: tensor {name} is not part of this architecture")
        if tuple(tensor.shape) != expected[name]:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {tuple(tensor.shape)}, its architecture asks for {expected[name]}"
            )
        seen.add(name)
        yield name, tensor
    missing = sorted(set(expected) - seen)
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]}"
        )


def _read_index(directory: Path) -> dict[str, str] | None:
    """Return the shard of each tensor, or None when all are in model.safetensors."""
    path = directory / INDEX_FILE
    if path.is_file():
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            shard_of = {str(name): str(shard) for name, shard in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise CheckpointError(f"{path} has no weight_map of tensor names to files") from err
        for shard in shard_of.values():
            file = shard.removeprefix(f"{SUBBLOCKS_DIR}/")
            if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{path} names the shard {shard!r}; a shard is a .safetensors file in the same directory, or in "
                    f"its {SUBBLOCKS_DIR}"
                )
        return shard_of
    if (directory / WEIGHTS_FILE).is_file():
        return None
    pickled = sorted(file.name for file in directory.glob("*") if file.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        raise CheckpointError(
            f"{directory} holds its weights as pickle ({pickled[0]}), which can run code when read: convert them to "
            "safetensors"
        )
    raise CheckpointError(f"{directory} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}")


def _open_shard(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: download the checkpoint again")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as err:
        raise CheckpointError(f"{path} is cut off or not safetensors ({err}): download it again") from err
