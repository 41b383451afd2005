"""Chat templates: which tokens are trained, one BOS, and thoughts taken apart."""

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import (
    format_thinking,
    generation_prompt_ids,
    reasoning_messages,
    render_chat,
    split_thinking,
    stop_token_ids,
    tokenize_conversation,
)
from pipeline.errors import DataError
from tests.pipeline.data.builders import CHATML_WITH_DEFAULT_SYSTEM, chatml_tokenizer, llama3_tokenizer, make_tokenizer

TOKENIZERS = {"chatml": chatml_tokenizer(), "llama3": llama3_tokenizer()}
END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}
TALK = [
    {"role": "user", "content": "2 + 3?"},
    {"role": "assistant", "content": "5\n\nIt is five."},
    {"role": "user", "content": "And 4 + 4?"},
    {"role": "assistant", "content": "8"},
]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_conversation_trains_exactly_the_assistant_and_its_end_token(name: str):
    sample = tokenize_conversation(TOKENIZERS[name], TALK)
    trained = TOKENIZERS[name].decode([i for i, on in zip(sample.ids, sample.trained_mask, strict=True) if on])
    assert trained == f"5\n\nIt is five.{END[name]}8{END[name]}"
    assert sample.num_trained_tokens == sum(sample.trained_mask) < len(sample.ids)
    assert list(sample.ids) == render_chat(TOKENIZERS[name], TALK)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_conversation_mask_agrees_with_character_offsets(name: str):
    """The oracle looks for the words in the rendered text and asks the tokenizer which tokens cover them."""
    tokenizer = TOKENIZERS[name]
    text = tokenizer.decode(render_chat(tokenizer, TALK))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    wanted = [False] * len(encoded["input_ids"])
    for words in ("5\n\nIt is five.", "8"):
        first = text.index(words + END[name])
        last = first + len(words + END[name])
        for index, (start, end) in enumerate(encoded["offset_mapping"]):
            wanted[index] |= first <= start and end <= last
    assert list(tokenize_conversation(tokenizer, TALK).trained_mask) == wanted


@pytest.mark.parametrize("name", TOKENIZERS)
def test_conversation_starts_with_one_bos(name: str):
    tokenizer = TOKENIZERS[name]
    for ids in (render_chat(tokenizer, TALK), generation_prompt_ids(tokenizer, TALK[:1])):
        assert ids[0] == tokenizer.bos_token_id
        assert ids[1] != tokenizer.bos_token_id


def test_conversation_with_template_that_doubles_bos_is_refused():
    tokenizer = make_tokenizer(["<s>", "</s>"], bos="<s>", eos="</s>", chat_template="{{ bos_token + bos_token }}hi")
    with pytest.raises(DataError, match="<s> twice"):
        render_chat(tokenizer, TALK)


def test_prompt_of_date_printing_template_does_not_depend_on_today():
    assert "Today: 26 Jul 2024" in TOKENIZERS["llama3"].decode(render_chat(TOKENIZERS["llama3"], TALK))


def test_prompt_with_mode_replaces_the_default_system_message():
    tokenizer = TOKENIZERS["chatml"]
    text = tokenizer.decode(generation_prompt_ids(tokenizer, reasoning_messages(" 1 + 1? \n", thinking=True)))
    assert text == (
        "<|im_start|>system\ndetailed thinking on<|im_end|>\n"
        "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "You are helpful." in tokenizer.decode(generation_prompt_ids(tokenizer, TALK[:1]))


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([{"role": "user", "content": "stop <|im_end|> here"}], "special token <|im_end|>".replace("|", r"\|")),
        ([{"role": "user", "content": "hello"}], "no assistant turn"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\nleading break"}],
            "merge with the prompt",
        ),
    ],
)
def test_conversation_that_cannot_be_trained_is_refused(messages: list[dict[str, str]], match: str):
    with pytest.raises(DataError, match=match):
        tokenize_conversation(TOKENIZERS["chatml"], messages)


@pytest.mark.parametrize(
    ("template", "match"),
    [
        (None, "no chat template"),
        (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
            "could never learn to stop",
        ),
        (
            CHATML_WITH_DEFAULT_SYSTEM.replace("message['content']", "message['content'] * (2 if loop.last else 1)"),
            "rewrites earlier turns",
        ),
    ],
)
def test_conversation_under_unusable_template_is_refused(template: str | None, match: str):
    tokenizer: PreTrainedTokenizerFast = make_tokenizer(
        ["<|im_start|>", "<|im_end|>"], bos=None, eos="<|im_end|>", chat_template=template
    )
    with pytest.raises(DataError, match=match):
        tokenize_conversation(tokenizer, TALK)


def test_thinking_round_trip_is_well_formed():
    parsed = split_thinking(format_thinking("2 + 2 = 4\n4 + 1 = 5", "5"))
    assert (parsed.num_blocks, parsed.is_well_formed) == (1, True)
    assert (parsed.trace, parsed.answer) == ("2 + 2 = 4\n4 + 1 = 5", "5")


@pytest.mark.parametrize(
    ("text", "num_blocks", "trace", "answer"),
    [
        ("5", 0, None, "5"),
        ("", 0, None, ""),
        ("<think>\nnever ends", 1, None, ""),
        ("<think>\nt\n</think>\n\n", 1, "t", ""),
        ("<think>\n\n</think>\n\n5", 1, "", "5"),
        ("Well. <think>t</think> 5", 1, "t", "5"),
        ("t</think>5", 1, None, "5"),
        ("</think>5<think>", 1, None, "5<think>"),
        ("<think>a</think><think>b</think>5", 2, "a", "5"),
        ("<think>a<think>b</think>5", 2, "a<think>b", "5"),
    ],
)
def test_thinking_out_of_form_is_not_well_formed(text: str, num_blocks: int, trace: str | None, answer: str):
    parsed = split_thinking(text)
    assert not parsed.is_well_formed
    assert (parsed.num_blocks, parsed.trace, parsed.answer) == (num_blocks, trace, answer)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_stop_tokens_are_the_templates_end_of_turn_and_the_models_own(name: str):
    tokenizer = TOKENIZERS[name]
    end_id = tokenizer.convert_tokens_to_ids(END[name])
    assert isinstance(end_id, int)
    assert stop_token_ids(tokenizer, ()) == stop_token_ids(tokenizer, (end_id,)) == (end_id,)
    assert stop_token_ids(tokenizer, (10_001, end_id, 10_002)) == (end_id, 10_001, 10_002)
