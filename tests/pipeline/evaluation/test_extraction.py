"""What is taken from a free reply: boxed, last number, last word or quotation."""

import pytest

from pipeline.evaluation.extraction import extract_answer


@pytest.mark.parametrize(
    ("reply", "reference", "wanted"),
    [
        ("17 + 25 = 42.", "42", "42"),
        ("The answer is **-3**", "42", "-3"),
        ("It is 9-6", "3", "6"),
        ("It is 9 \u2212 12 = \u22123", "-3", "-3"),
        ("In total 1,234,567.50 legs", "7", "1234567.50"),
        ("one, 1, 2,3", "3", "3"),
        ("\\boxed{7} legs of 12 animals", "7", "7"),
        ("\\boxed{6}, or rather \\boxed{\\text{7 legs}} of 12", "7", "7"),
        ("seven", "7", ""),
        ("\\boxed{\\text{naik, kian}} it is", "a, b", "naik, kian"),
        ("naik backward is *kian*.", "kian", "kian"),
        ('"naik" backward is kian !', "kian", "kian"),
        ('The list is "a, b".', "a, b", "a, b"),
        ("The list is \u201ca b\u201d.", "a b", "a b"),
        ("", "kian", ""),
        ("...", "kian", ""),
        ("", "7", ""),
    ],
)
def test_extract_answer_follows_the_kind_of_reference(reply: str, reference: str, wanted: str) -> None:
    assert extract_answer(reply, reference=reference) == wanted
