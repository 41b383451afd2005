"""Instruction checkers: of each kind planted passes and planted failures, and properties over any text."""

import json
import re
import string
import time
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from pipeline.data.instructions import (
    Instruction,
    LetterFrequency,
    NumWords,
    are_followed,
    are_loosely_followed,
    count_keyword,
    count_paragraphs,
    count_sentences,
    count_words,
)
from pipeline.recipe import InstructionKind

_ANY: TypeAdapter[Instruction] = TypeAdapter(Instruction)


def _make(kind: str, **values: object) -> Instruction:
    return _ANY.validate_python({"kind": kind, **values})


# kind, its values, answers that follow it, answers that do not.
_PLANTED: list[tuple[str, dict[str, object], list[str], list[str]]] = [
    ("num_words", {"relation": "at_least", "count": 3}, ["one two three", "Don't be so-called."], ["one two", "a-b c"]),
    ("num_words", {"relation": "at_most", "count": 2}, ["one two.", "won't do"], ["one two three"]),
    ("num_words", {"relation": "exactly", "count": 4}, ["It is 3.5"], ["It is three", "It is not 3.5"]),
    (
        "num_sentences",
        {"relation": "exactly", "count": 2},
        ["Yes. No", 'He said "yes." I left...'],
        ["Yes.", "A. B. C."],
    ),
    ("num_sentences", {"relation": "at_most", "count": 1}, ["Is it 3.5 or 4?!"], ["Is it? It is."]),
    ("num_sentences", {"relation": "at_least", "count": 2}, ["Oh! So?"], ["Oh so", "... ... ..."]),
    ("num_paragraphs", {"relation": "exactly", "count": 2}, ["a\nb\n\nc", "a\n \t\n\nb\n\n"], ["a\nb", "a\n\nb\n\nc"]),
    ("num_paragraphs", {"relation": "at_least", "count": 2}, ["a\n\nb\n\nc"], ["a"]),
    ("num_paragraphs", {"relation": "at_most", "count": 2}, ["a"], ["a\n\nb\n\nc"]),
    ("include_keywords", {"words": ["river", "bread"]}, ["Bread by the RIVER."], ["bread by rivers", "river"]),
    (
        "keyword_frequency",
        {"word": "tea", "relation": "exactly", "count": 2},
        ["Tea, tea!"],
        ["tea", "tea tea teas tea"],
    ),
    ("keyword_frequency", {"word": "tea", "relation": "at_least", "count": 1}, ["my tea"], ["my team"]),
    ("keyword_frequency", {"word": "tea", "relation": "at_most", "count": 1}, ["no", "tea team"], ["tea tea"]),
    ("exclude_keywords", {"words": ["very", "good"]}, ["goods are every thing"], ["It is Very nice", "good."]),
    ("letter_frequency", {"letter": "e", "relation": "at_least", "count": 3}, ["Eve sees"], ["ever"]),
    ("letter_frequency", {"letter": "z", "relation": "at_most", "count": 1}, ["zoo", "no"], ["Zoo zone"]),
    ("letter_frequency", {"letter": "q", "relation": "exactly", "count": 1}, ["Queen"], ["queue for quiche"]),
    ("all_lowercase", {}, ["all of it, 3 times"], ["Not all", "123"]),
    ("all_uppercase", {}, ["ALL OF IT, 3 TIMES"], ["ALL of it", "123"]),
    ("no_commas", {}, ["one; two"], ["one, two"]),
    ("starts_with", {"phrase": "To begin"}, ["to begin with", '"To begin'], ["Well, to begin"]),
    ("ends_with", {"phrase": "The end."}, ["So. the END.", 'So. The end."\n'], ["The end. Or not", "The end"]),
    ("num_bullets", {"count": 2}, ["Look:\n- a\n* b", "  - a\n- b"], ["- a", "- a\n- b\n- c", "-a\n-b", "a - b\n- c"]),
    (
        "json_only",
        {},
        ['{"a": [1]}', '```json\n{"a": 1}\n```', " {} "],
        ["3", "[1]", '{"a": 1} yes', "{'a': 1}", "{" * 9000],
    ),
    ("json_only", {}, ['{"a": null}'], ['{"a": NaN}', '{"a":' * 5000, '{"a": ' + "9" * 5000 + "}"]),
    ("quoted", {}, ['"a b"', ' "a\nb" '], ['"a', 'a "b"', '"', '""', '" "']),
    ("title", {}, ["<<My title>>\nSo it is.", "So. <<x>>"], ["<My title>", "<<>>", "<< >>", "<<a\nb>>", "<<...>>"]),
    (
        "num_sections",
        {"count": 2},
        ["Section 1\na\nSection 2: b", "## SECTION 1\na\n**section 2** b"],
        ["Section 1\na"],
    ),
    (
        "num_sections",
        {"count": 2},
        [],
        ["Section 2\na\nSection 1\nb", "Section 1\nSection 2\nSection 3", "in Section 1"],
    ),
    ("postscript", {}, ["So.\nP.S. One more.", "a\np. s. b", "P.S.b"], ["So. P.S. no", "P.S.", "PS more"]),
]


@pytest.mark.parametrize(("kind", "values", "good", "bad"), _PLANTED, ids=lambda value: str(value)[:24])
def test_is_followed_planted_answers(kind: str, values: dict[str, object], good: list[str], bad: list[str]):
    instruction = _make(kind, **values)
    assert [answer for answer in good if not instruction.is_followed(answer)] == []
    assert [answer for answer in bad if instruction.is_followed(answer)] == []


def test_every_kind_of_the_recipe_has_a_planted_pass_and_a_planted_failure():
    passes = {kind for kind, _, good, _ in _PLANTED if good}
    failures = {kind for kind, _, _, bad in _PLANTED if bad}
    assert passes == failures == set(get_args(InstructionKind))


def test_are_followed_an_answer_without_words_follows_nothing():
    instructions = (_make("no_commas"), _make("num_words", relation="at_most", count=5))
    assert are_followed(instructions, " \n") == (False, False)
    assert are_loosely_followed(instructions, "") == (False, False)


def test_are_loosely_followed_forgives_what_stands_around_the_answer_and_nothing_else():
    lower, starts = _make("all_lowercase"), _make("starts_with", phrase="to begin")
    around = "Sure, here it is:\n**to begin** with.\nAnything else?"
    assert are_followed((lower, starts), around) == (False, False)
    assert are_loosely_followed((lower, starts), around) == (True, True)
    assert are_loosely_followed((lower,), "So\nIt\nGoes") == (False,)


_TEXTS = st.text(alphabet=string.ascii_letters + string.digits + " .!?,\n-'\"<>*#", max_size=200)


@given(_TEXTS)
def test_counts_agree_with_counting_by_hand(text: str):
    # Letters one by one; words by splitting at whatever is neither letter, digit, apostrophe nor hyphen.
    parts = re.split(r"[^0-9A-Za-z'-]+", text)
    words = sum(len([piece for piece in re.split(r"^['-]+|['-]{2,}|['-]+$", part) if piece]) for part in parts)
    assert count_words(text) == words
    assert count_keyword(text, "a") == sum(token.lower() == "a" for token in re.split(r"[^0-9A-Za-z_]", text))
    paragraphs, is_inside = 0, False
    for line in text.split("\n"):
        paragraphs += bool(line.strip()) and not is_inside
        is_inside = bool(line.strip())
    assert count_paragraphs(text) == paragraphs
    letters = LetterFrequency(
        kind="letter_frequency", letter="e", relation="exactly", count=sum(c in "eE" for c in text)
    )
    assert letters.is_followed(text)


@given(
    st.lists(st.sampled_from(["so it is", "no", "3.5 is more"]), min_size=1, max_size=6),
    st.sampled_from([".", "!", "?!"]),
)
def test_count_sentences_of_joined_sentences(sentences: list[str], mark: str):
    assert count_sentences(" ".join(sentence + mark for sentence in sentences)) == len(sentences)


@given(_TEXTS, st.integers(0, 40))
def test_relations_at_least_and_at_most_together_are_exactly(text: str, count: int):
    least, most, exactly = (
        NumWords(kind="num_words", relation=relation, count=count).is_followed(text)
        for relation in ("at_least", "at_most", "exactly")
    )
    assert (least and most) == exactly
    assert least or most


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.none() | st.lists(st.booleans()), max_size=4))
def test_json_only_takes_every_object(value: dict[str, object]):
    assert _make("json_only").is_followed(json.dumps(value, indent=2))


@pytest.mark.parametrize(
    "text", ["." * 40_000 + "a", "<<" * 20_000, "-\n" * 20_000, "'a" * 20_000, "\n \n" * 20_000 + "x", "<<a" * 20_000]
)
def test_checkers_take_no_time_over_what_a_broken_policy_writes(text: str):
    instructions = tuple(_make(kind, **values) for kind, values, _, _ in _PLANTED)
    began = time.process_time()
    are_followed(instructions, text)
    assert time.process_time() - began < 2.0  # quadratic ones take minutes


def test_text_names_what_is_wanted():
    assert _make("num_words", relation="at_most", count=1).text() == "Write at most 1 word."
    assert _make("exclude_keywords", words=["a", "b", "c"]).text() == 'Do not use the words "a", "b" or "c".'
    assert _make("include_keywords", words=["a"]).text() == 'Include the word "a".'
