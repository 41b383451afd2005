"""The random parent: reproducible, complete, and with a tokenizer that loses nothing."""

from pathlib import Path

import pytest
import torch

from pipeline.errors import RecipeError
from pipeline.model.checkpoint import load_model, load_tokenizer, read_architecture
from pipeline.model.random_parent import make_random_parent
from pipeline.recipe import RandomParent

CONFIG = RandomParent(
    kind="random",
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.05,
    tie_word_embeddings=False,
    seed=3,
)

TEXTS = [
    "plain words",
    "  spaces\t\ttabs \r\n\n and 12 345 . , 's n't",
    "héllo wörld, 日本語, 🎉, e\u0301",
    "\x00\x01\x7f control",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|reserved_7|> <|not a token|>",
    "",
]


def test_same_seed_gives_the_same_files(tmp_path: Path):
    for name in ("a", "b"):
        make_random_parent(CONFIG, out_dir=tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [
        "architecture.json",
        "chat_template.jinja",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_weights_are_drawn_as_asked(tmp_path: Path):
    architecture = make_random_parent(CONFIG, out_dir=tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    assert read_architecture(tmp_path) == architecture
    assert torch.equal(model.model.norm.weight, torch.ones(32))
    weight = model.model.embed_tokens.weight.detach()
    assert float(weight.std()) == pytest.approx(0.05, rel=0.05)
    assert float(weight.mean()) == pytest.approx(0.0, abs=0.003)


@pytest.mark.parametrize("text", TEXTS)
def test_decode_of_encode_is_the_text(tmp_path: Path, text: str):
    make_random_parent(CONFIG, out_dir=tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_every_id_can_be_decoded_and_special_ids_are_fixed(tmp_path: Path):
    architecture = make_random_parent(CONFIG, out_dir=tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert architecture.vocab_size == len(tokenizer) == 320
    assert None not in tokenizer.convert_ids_to_tokens(list(range(320)))
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(specials) == [0, 1, 2]
    assert tokenizer.eos_token_id == 2


def test_chat_template_is_chatml_without_a_default_system_prompt(tmp_path: Path):
    make_random_parent(CONFIG, out_dir=tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_heads_that_do_not_fit_are_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match="do not fit"):
        make_random_parent(CONFIG.model_copy(update={"num_attention_heads": 3}), out_dir=tmp_path)
