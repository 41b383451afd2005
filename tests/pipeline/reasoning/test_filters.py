"""Every filter drops the violation that is planted for it, under its own reason, and lets the sound row pass."""

import random
import re
from collections.abc import Sequence

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.data.decontamination import build_ngrams
from pipeline.data.reasoning_items import generate_items
from pipeline.errors import RecipeError
from pipeline.reasoning.filtering import (
    EvaluationGuard,
    Step,
    TokenisedRows,
    each,
    exact_duplicates_step,
    form_step,
    licence_step,
    num_unpaired_prompts,
    pairs_step,
    run_steps,
)
from pipeline.reasoning.near_duplicates import near_duplicates, near_duplicates_flaws
from pipeline.reasoning.rows import Mode, TraceRow
from pipeline.reasoning.text_filters import (
    check_languages,
    code_flaw,
    language_flaw,
    repetition_flaw,
)
from pipeline.recipe import ReasoningTask
from tests.pipeline.reasoning.builders import make_row

NO_NGRAMS = build_ngrams([], num_words=13)
SOUND = make_row()


def _only(step: Step, row: TraceRow) -> str | None:
    """Return the verdict on one row that stands behind a sound one."""
    first, verdict = step([SOUND, row])
    assert first is None
    return verdict


def test_run_steps_counts_rows_in_and_out_and_keeps_every_drop():
    rows = [make_row(question=f"{number}?") for number in range(6)]
    filtered = run_steps(
        rows,
        [
            ("odd", each(lambda row: "odd" if int(row.prompt_text[0]) % 2 else None)),
            ("big", lambda left: ["last" if row is left[-1] else None for row in left]),
        ],
    )
    assert [row.prompt_text for row in filtered.kept] == ["0?", "2?"]
    assert [(count.step, count.num_in, count.num_out, count.reasons) for count in filtered.counts] == [
        ("odd", 6, 3, {"odd": 3}),
        ("big", 3, 2, {"last": 1}),
    ]
    assert [(drop.row.prompt_text, drop.step) for drop in filtered.dropped] == [
        ("1?", "odd"),
        ("3?", "odd"),
        ("5?", "odd"),
        ("4?", "big"),
    ]


def test_licence_step_drops_what_is_not_listed():
    step = licence_step(["mit", "CC-BY-4.0"])
    assert _only(step, make_row(license="cc-by-4.0")) is None
    assert _only(step, make_row(license="CC-BY-NC-4.0")) == "licence 'CC-BY-NC-4.0'"


@pytest.mark.parametrize(
    ("output", "mode", "flaw"),
    [
        ("<think>\na\n</think>\n\n1", "on", None),
        ("1", "off", None),
        ("1", "none", None),
        ("1", "on", "thought never opens"),
        ("<think>\na 1", "on", "thought never closes"),
        ("<think>a</think><think>b</think>1", "on", "several thoughts"),
        ("<think>a<think>b</think>1", "on", "several thoughts"),
        ("Well <think>a</think>1", "on", "words before the thought"),
        ("</think>a<think>1", "on", "words before the thought"),
        ("<think>\n\n</think>\n\n1", "on", "empty thought"),
        ("<think>a</think>\n ", "on", "no answer"),
        ("<think>\na\n</think>\n\n1", "off", "think tag with thinking off"),
        ("a</think>1", "none", "think tag with thinking off"),
        (" \n", "off", "no answer"),
    ],
)
def test_form_step_malformed_thoughts(tokenizer: PreTrainedTokenizerFast, output: str, mode: Mode, flaw: str | None):
    assert _only(form_step(tokenizer), make_row(output=output, mode=mode)) == flaw


def test_form_step_cut_off_replies(tokenizer: PreTrainedTokenizerFast):
    step = form_step(tokenizer)
    assert _only(step, make_row(is_complete=False)) == "cut off"
    assert _only(step, make_row(output="5", mode="off", is_complete=False)) == "cut off"
    assert _only(step, make_row(output="Hi the", mode="off", category="chat", is_complete=False)) is None


@pytest.mark.parametrize(
    ("changes", "flaw"),
    [
        ({"history": (("system", "Be brief."),)}, "instructions in the system turn"),
        ({"system_prompt": "detailed thinking on. Be brief."}, "instructions in the system turn"),
        ({"system_prompt": "detailed thinking off"}, "system prompt and reasoning disagree"),
        ({"history": (("user", "And"),)}, "turns do not alternate from user to user"),
        ({"history": (("assistant", "Hi"),)}, "turns do not alternate from user to user"),
        ({"history": (("user", "Hi"), ("assistant", "Hello"))}, None),
        ({"question": "  "}, "turns do not alternate from user to user"),
        ({"question": "Hi<|im_end|>"}, "special token in the text"),
        ({"output": "<think>a</think><|im_start|>"}, "special token in the text"),
        ({"question": "What does <think> mean?"}, "think tag in the prompt"),
    ],
)
def test_form_step_conversations(tokenizer: PreTrainedTokenizerFast, changes: dict[str, object], flaw: str | None):
    assert _only(form_step(tokenizer), make_row(**changes)) == flaw  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("row", "flaw"),
    [
        (make_row(question="long " * 30), "prompt longer than 150 tokens"),
        (make_row(output=f"<think>{'x' * 70}</think>1"), "output longer than 80 tokens"),
        (make_row(question="q" * 80, output=f"<think>{'x' * 60}</think>1"), "longer than a window of 190 tokens"),
    ],
)
def test_length_step_prompt_output_and_window(tokenizer: PreTrainedTokenizerFast, row: TraceRow, flaw: str):
    step = TokenisedRows(tokenizer).length_step(max_prompt_tokens=150, max_output_tokens=80, max_tokens=190)
    assert _only(step, row) == flaw


FOREIGN = {
    "de": "Der Hund und die Katze sind nicht auf dem Dach, und das ist auch nicht von Bedeutung, wenn es regnet.",
    "fr": "Le chat est sur la table et nous ne savons pas pour qui sont les gants, mais cette fois vous avez une idee.",
    "es": "El perro y el gato no son del mismo pueblo, pero cuando llueve los dos duermen con las gallinas sin miedo.",
    "it": "Il gatto che non dorme nel letto della nonna viene anche quando piove, e questo non piace alla zia.",
    "pt": "Os gatos foram pelo caminho com muito cuidado, mas isso foi ao fim um dos dias onde ela viu uma luz.",
    "nl": "Het huis van de buren wordt niet verkocht, maar dat werd pas laat bekend, en deze week zijn wij er ook.",
}


@pytest.mark.parametrize("language", FOREIGN)
def test_language_flaw_other_languages_in_latin_script(language: str):
    row = make_row(output=f"<think>{FOREIGN[language]}</think>5")
    assert language_flaw(row, languages=["en"]) == f"output in {language}"
    assert language_flaw(row, languages=["en", language]) is None


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("\u8fd9\u4e2a\u95ee\u9898\u7684\u7b54\u6848\u662f\u4e94\u3002\u6211\u4eec\u8ba1\u7b97", "cjk"),
        (
            "\u041e\u0442\u0432\u0435\u0442 \u0440\u0430\u0432\u0435\u043d \u043f\u044f\u0442\u0438",
            "cyrillic",
        ),
    ],
)
def test_language_flaw_other_scripts(text: str, script: str):
    flaw = language_flaw(make_row(question=text), languages=["en"])
    assert flaw == f"prompt in {script} script"


@pytest.mark.parametrize(
    "text",
    [
        "12 + 5 = 17. 17 - 3 = 14.",
        "The angle \u03b1 is twice \u03b2, so \u03b1 + \u03b2 = 3\u03b2.",
        "e, l, e, p, h, a, n, t. o o o o o o y y y y y y.",
        "The total of it is 5, and that is what was to be found for this.",
        "The greeting \u4f60\u597d is Chinese, and it is what was asked for in the question of this exercise.",
    ],
)
def test_language_flaw_english_and_formulas_pass(text: str):
    assert language_flaw(make_row(output=text, mode="off"), languages=["en"]) is None


def test_check_languages_refuses_what_cannot_be_told():
    check_languages(["en", "de"])
    with pytest.raises(RecipeError, match="names xx, which cannot be told"):
        check_languages(["en", "xx"])


def test_repetition_flaw_drops_a_loop():
    loop = make_row(output="<think>" + "wait, let me think again. " * 20 + "</think>5")
    assert repetition_flaw(loop, num_words=4, max_share=0.5) == "more than 50% of it repeats"
    assert repetition_flaw(SOUND, num_words=4, max_share=0.5) is None


@pytest.mark.parametrize(
    ("answer", "thought", "flaw"),
    [
        ("```python\nprint('\\d')\n```", "plan", None),
        ("Use\n```\nx = 1\n```\nand\n```py\ny = 2\n```", "plan", None),
        ("x = 1", "plan", "no fenced code"),
        ("```python\nx = 1\n```", "```python\nx = 1\n```", "code inside the thought"),
        ("```python\ndef f(:\n```", "plan", "code does not parse"),
        ("```python\nx = 1\n```\n```python\nif\n```", "plan", "code does not parse"),
        ("```python\nx = \0\n```", "plan", "code does not parse"),
        ("```python\n" + "(" * 5000 + "\n```", "plan", "code does not parse"),
        ("```cpp\nint x;\n```", "plan", "code in cpp, which is not parsed"),
    ],
)
def test_code_flaw_parses_and_runs_nothing(answer: str, thought: str, flaw: str | None):
    row = make_row(output=f"<think>\n{thought}\n</think>\n\n{answer}", category="code")
    assert code_flaw(row) == flaw
    assert code_flaw(make_row(output=row.output, category="math")) is None


def test_exact_duplicates_step_case_and_spacing_do_not_matter():
    rows = [
        make_row(question="Two and three?", output="5", mode="off"),
        make_row(question="two  AND three? ", output="5 ", mode="off"),
        make_row(question="Two and three?", output="five", mode="off"),
        make_row(question="Two and three?", output="5", mode="none"),
    ]
    assert exact_duplicates_step(rows) == [None, "exact duplicate", None, None]


def _jaccard(first: str, second: str, *, num_words: int) -> float:
    sets = []
    for text in (first, second):
        words = re.findall(r"\w+", text.lower())
        sets.append({tuple(words[i : i + num_words]) for i in range(len(words) - num_words + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_near_duplicates_agree_with_brute_force():
    generator = random.Random(0)
    vocabulary = [f"w{number}" for number in range(300)]
    texts: list[str] = []
    for _ in range(40):
        words = generator.choices(vocabulary, k=60)
        texts.append(" ".join(words))
        for num_changed in (1, 3, 8):
            changed = list(words)
            for place in generator.sample(range(60), num_changed):
                changed[place] = generator.choice(vocabulary)
            texts.append(" ".join(changed))
    kept: list[int] = []
    wanted: list[int] = []
    for place, text in enumerate(texts):
        is_repeated = any(_jaccard(text, texts[other], num_words=3) >= 0.7 for other in kept)
        (wanted if is_repeated else kept).append(place)
    assert near_duplicates(texts, shingle_words=3, min_jaccard=0.7) == wanted
    assert 40 < len(wanted) < 120


def test_near_duplicates_flaws_drop_all_rows_of_the_later_prompt_but_no_generated_one():
    first = "A train leaves at noon with ten people and five of them get off at the second stop"
    second = first + " today"
    task = ReasoningTask(name="chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    items = generate_items(task, num_items=2, seed=1, exclude_questions=set())
    rows = [
        make_row(question=first),
        make_row(question=second),
        make_row(question=second, output="4", mode="off"),
        make_row(question=first, output="5", mode="off"),
        *(make_row(question=item.question, item=item) for item in items),
    ]
    dropped = near_duplicates_flaws(rows, shingle_words=3, min_jaccard=0.8)
    assert dropped == [None, *["prompt nearly repeats another"] * 2, None, None, None]


def _shares_words(text: str, others: Sequence[str], *, num_words: int) -> bool:
    """The oracle: every run of words as words."""

    def runs(value: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[^\W_]+", value.lower())
        return {tuple(words[start : start + num_words]) for start in range(len(words) - num_words + 1)}

    return any(runs(text) & runs(other) for other in others)


def test_decontamination_finds_every_planted_overlap_and_nothing_else():
    generator = random.Random(1)
    vocabulary = [f"v{number}" for number in range(2000)]
    evaluation = [" ".join(generator.choices(vocabulary, k=80)) for _ in range(30)]
    guard = EvaluationGuard(
        questions=frozenset({"How many legs have two cats?"}),
        all_ngrams=build_ngrams(evaluation, num_words=13),
        text_ngrams=NO_NGRAMS,
    )
    rows: list[TraceRow] = []
    is_planted: list[bool] = []
    for number in range(200):
        words = generator.choices(vocabulary, k=60)
        length = (0, 12, 13, 20)[number % 4]
        source = generator.choice(evaluation).split()
        start = generator.randrange(len(source) - 20)
        words[20 : 20 + length] = [word.upper() + "," for word in source[start : start + length]]
        text = " ".join(words)
        in_prompt = number % 8 < 4
        rows.append(make_row(question=text) if in_prompt else make_row(output=f"<think>{text}</think>5"))
        is_planted.append(length >= 13)
    verdicts = guard.step()(rows)
    assert [verdict is not None for verdict in verdicts] == is_planted
    assert [_shares_words(f"{row.prompt_text}\n{row.output}", evaluation, num_words=13) for row in rows] == is_planted
    kept = [row for row, verdict in zip(rows, verdicts, strict=True) if verdict is None]
    assert guard.step()(kept) == [None] * 100


def test_decontamination_whole_questions_and_tasks_of_their_own():
    task = ReasoningTask(name="leg_counting", config={"min_animals": 2, "max_animals": 2, "max_instances": 4})
    asked, other = generate_items(task, num_items=2, seed=1, exclude_questions=set())
    guard = EvaluationGuard(
        questions=frozenset({asked.question}),
        all_ngrams=build_ngrams([asked.question], num_words=13),
        text_ngrams=NO_NGRAMS,
    )
    step = guard.step()
    assert _only(step, make_row(question=asked.question.upper(), item=asked)) == "an evaluation question"
    assert _only(step, make_row(question=other.question, item=other)) is None
    assert _only(step, make_row(question=other.question)) == "shares an n-gram with an evaluation set"


def test_pairs_step_drops_prompts_in_one_mode_but_for_chat():
    on, off = make_row(question="A?"), make_row(question="A? ", output="5", mode="off")
    alone = make_row(question="B?")
    chat = make_row(question="Hi", output="Hello", mode="off", category="chat")
    assert pairs_step([on, off, alone, chat]) == [None, None, "prompt is there in one mode only", None]
    assert num_unpaired_prompts([on, off, alone, chat]) == 1
