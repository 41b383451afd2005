"""Importing Hugging Face Llamas: every plain one is taken over exactly, everything else is refused with one reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from pipeline.architecture import gqa, swiglu
from pipeline.errors import CheckpointError
from pipeline.model.checkpoint import TensorReader, load_model, load_tokenizer
from pipeline.model.hf_import import import_checkpoint
from pipeline.model.tokenizer_files import LLAMA3_TEMPLATE
from tests.pipeline.model.builders import (
    LLAMA3_ROPE,
    make_architecture,
    make_blocks,
    make_llama,
    make_tokenizer_dir,
    random_ids,
)

LLAMA3_RULE = LLAMA3_ROPE.model_dump()


def saved_llama(directory: Path, *, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any) -> Path:
    """What save_pretrained of transformers writes, with a tokenizer."""
    make_tokenizer_dir(directory / "tokenizer")
    make_llama(make_architecture(**changes)).to(dtype).save_pretrained(directory, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(directory / "tokenizer" / name, directory / name)
    shutil.rmtree(directory / "tokenizer")
    return directory


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; ... deletes one."""
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


SHAPES = {
    "gqa_tied": {},
    "mha_untied": {"blocks": make_blocks(*[(gqa(4), swiglu(48))] * 2), "tie_word_embeddings": False},
    "llama3": {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500_000.0},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 12},
    "sharded": {"shard": "20KB"},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_import_of_a_saved_llama_is_exact(tmp_path: Path, name: str):
    source = saved_llama(tmp_path / "hf", **SHAPES[name])
    changes = {key: value for key, value in SHAPES[name].items() if key not in ("dtype", "shard")}
    dtype = SHAPES[name].get("dtype", torch.float32)
    architecture = import_checkpoint(source, out_dir=tmp_path / "parent")
    assert architecture == make_architecture(**changes)
    assert (source / "model.safetensors.index.json").is_file() == (name == "sharded")
    reader = TensorReader(tmp_path / "parent")
    assert {reader.dtype(tensor) for tensor in reader.names} == {dtype}
    ids_BT = random_ids(11)
    reference = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    logits = load_model(tmp_path / "parent", dtype=torch.float32)(ids_BT).logits
    assert torch.equal(logits, reference(ids_BT).logits)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": LLAMA3_RULE},
        {"rope_parameters": {**LLAMA3_RULE, "rope_theta": 5e5}, "rope_theta": ..., "rope_scaling": ...},
        {"rope_parameters": {**LLAMA3_RULE, "rope_theta": 5e5}, "rope_theta": 5e5, "rope_scaling": LLAMA3_RULE},
        {
            "rope_parameters": ...,
            "rope_theta": 5e5,
            "rope_scaling": {"type": "llama3", **{key: LLAMA3_RULE[key] for key in LLAMA3_RULE if key != "rope_type"}},
        },
    ],
    ids=["scaling", "parameters", "both", "old_type_key"],
)
def test_every_spelling_of_rope_is_the_same_architecture(tmp_path: Path, spelling: dict[str, Any]):
    source = saved_llama(tmp_path / "hf", rope_scaling=LLAMA3_ROPE, rope_theta=5e5)
    edit_json(source / "config.json", **spelling)
    architecture = import_checkpoint(source, out_dir=tmp_path / "parent")
    assert architecture == make_architecture(rope_scaling=LLAMA3_ROPE, rope_theta=5e5)


def test_old_config_without_optional_keys_gets_their_defaults(tmp_path: Path):
    blocks = make_blocks(*[(gqa(4), swiglu(48))] * 2)
    source = saved_llama(tmp_path / "hf", blocks=blocks, tie_word_embeddings=False)
    absent = ("head_dim", "num_key_value_heads", "rope_parameters", "attention_bias", "mlp_bias", "pad_token_id")
    edit_json(source / "config.json", **dict.fromkeys(absent, ...))
    edit_json(source / "generation_config.json", eos_token_id=[2, 0], pad_token_id=...)
    architecture = import_checkpoint(source, out_dir=tmp_path / "parent")
    expected = make_architecture(blocks=blocks, tie_word_embeddings=False, eos_token_ids=(2, 0), pad_token_id=None)
    assert architecture == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
        ({"auto_map": {"AutoConfig": "evil.Config"}}, "auto_map"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'yarn'"),
        ({"rope_parameters": {**LLAMA3_RULE, "beta": 1}}, "not a llama3 rule"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": LLAMA3_RULE}, "disagree"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"per_layer_config": {"0": {"skip": ["mlp"]}}}, "per_layer_config"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"num_key_value_heads": 3}, "cannot|does not divide"),
        ({"eos_token_id": 5000}, "names token 5000"),
        ({"intermediate_size": 64}, "has shape"),
        ({"num_hidden_layers": 2}, "is not part of this architecture"),
        ({"num_hidden_layers": 4}, "tensors are missing"),
        ({"tie_word_embeddings": False}, r"the first is lm_head\.weight"),
        ({"rope_interleaved": True}, "rope_interleaved"),
    ],
)
def test_config_that_is_no_plain_llama_is_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    source = saved_llama(tmp_path / "hf")
    edit_json(source / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(source, out_dir=tmp_path / "parent")


def change_tensors(source: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")


def break_head(source: Path) -> None:
    change_tensors(source, lambda tensors: tensors.update({"lm_head.weight": torch.ones(320, 32)}))


def quantise(source: Path) -> None:
    change_tensors(source, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))


def truncate(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def only_pickle(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def huge_token(source: Path) -> None:
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 320, "content": "<|one more|>"})
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (break_head, r"tie_word_embeddings, but lm_head\.weight is there and differs"),
        (quantise, "stored as I8"),
        (truncate, "cut off"),
        (only_pickle, r"pickle \(pytorch_model\.bin\)"),
        (lambda source: (source / "tokenizer.json").unlink(), r"no tokenizer\.json"),
        (lambda source: (source / "tokenizer.json").write_text("{"), "is not a tokenizer"),
        (lambda source: (source / "config.json").unlink(), r"config\.json is missing"),
        (lambda source: (source / "config.json").write_text("[1]"), "not a JSON object"),
        (lambda source: (source / "config.json").write_text("{"), "is not JSON"),
        (huge_token, "has token 320"),
        (lambda source: edit_json(source / "tokenizer_config.json", eos_token=...), "names no eos_token"),
        (lambda source: edit_json(source / "tokenizer_config.json", eos_token="</s>"), "does not have"),
    ],
)
def test_broken_or_unsafe_files_are_refused(tmp_path: Path, harm: Callable[[Path], object], message: str):
    source = saved_llama(tmp_path / "hf")
    harm(source)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(source, out_dir=tmp_path / "parent")


def test_equal_head_of_a_tied_checkpoint_and_stored_frequencies_are_dropped(tmp_path: Path):
    source = saved_llama(tmp_path / "hf")
    change_tensors(
        source,
        lambda tensors: tensors.update(
            {
                "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            }
        ),
    )
    import_checkpoint(source, out_dir=tmp_path / "parent")
    names = TensorReader(tmp_path / "parent").names
    assert "lm_head.weight" not in names
    assert not [name for name in names if "inv_freq" in name]


def test_nothing_but_the_known_files_is_copied(tmp_path: Path):
    source = saved_llama(tmp_path / "hf")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    (source / "training_args.bin").write_bytes(b"pickle")
    edit_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.Tokenizer", None]})
    import_checkpoint(source, out_dir=tmp_path / "parent")
    assert sorted(path.name for path in (tmp_path / "parent").iterdir()) == [
        "architecture.json",
        "chat_template.jinja",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "auto_map" not in (tmp_path / "parent" / "tokenizer_config.json").read_text()


def test_chat_template_inside_the_tokenizer_config_is_kept(tmp_path: Path):
    source = saved_llama(tmp_path / "hf")
    template = (source / "chat_template.jinja").read_text()
    (source / "chat_template.jinja").unlink()
    for spelling in (template, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]):
        edit_json(source / "tokenizer_config.json", chat_template=spelling)
        import_checkpoint(source, out_dir=tmp_path / "parent")
        assert load_tokenizer(tmp_path / "parent").chat_template == template


# What Llama 3.2's template does: a knowledge cut-off and today's date before the system prompt.
LLAMA32_TEMPLATE = (
    "{{- bos_token }}{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}"
    "{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)


def test_llama3_parent_gets_a_template_whose_system_turn_is_the_system_prompt_alone(tmp_path: Path):
    source = saved_llama(tmp_path / "hf")
    (source / "chat_template.jinja").write_text(LLAMA32_TEMPLATE)
    import_checkpoint(source, out_dir=tmp_path / "parent")
    messages = [{"role": "system", "content": "detailed thinking on"}, {"role": "user", "content": "2 + 2?"}]
    theirs, ours = load_tokenizer(source), load_tokenizer(tmp_path / "parent")
    assert "Today Date" in str(theirs.apply_chat_template(messages, tokenize=False))
    rendered = str(ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    assert rendered == (
        f"{ours.bos_token}<|start_header_id|>system<|end_header_id|>\n\ndetailed thinking on<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    # Only that changes: the turns of users and assistants are what the parent was trained on.
    _, _, their_turns = str(theirs.apply_chat_template(messages, tokenize=False)).partition("<|eot_id|>")
    _, _, our_turns = str(ours.apply_chat_template(messages, tokenize=False)).partition("<|eot_id|>")
    assert our_turns == their_turns


def test_llama3_template_without_dates_is_kept(tmp_path: Path):
    """One that refuses a conversation without a user, too."""
    source = saved_llama(tmp_path / "hf")
    strict = "{% if messages[-1]['role'] == 'system' %}{{ raise_exception('no user') }}{% endif %}"
    plain = strict + LLAMA3_TEMPLATE.replace("{{ bos_token }}", "{{- bos_token -}}")
    (source / "chat_template.jinja").write_text(plain)
    import_checkpoint(source, out_dir=tmp_path / "parent")
    assert load_tokenizer(tmp_path / "parent").chat_template == plain


def test_parent_without_chat_template_gets_one_that_ends_turns_with_its_own_end_token(tmp_path: Path):
    source = saved_llama(tmp_path / "hf")
    (source / "chat_template.jinja").unlink()
    import_checkpoint(source, out_dir=tmp_path / "parent")
    tokenizer = load_tokenizer(tmp_path / "parent")
    messages = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|user|>\nhi<|im_end|>\n<|assistant|>\n"
