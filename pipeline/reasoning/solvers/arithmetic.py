"""Solvers of number tasks.

Steps are kept to what a model of a hundred million parameters can do in one leap: one digit at a time where a carry may
happen, subtraction rather than `mod`, no quotient without its product.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from reasoning_gym.arithmetic.leg_counting import ANIMALS

from pipeline.reasoning.solvers.trace import Trace


def chain_sum(metadata: Mapping[str, Any]) -> Trace:
    """Add and subtract from left to right; a two-digit term goes in as its tens, then its ones."""
    first, *rest = metadata["expression"].split(" ")
    total = int(first)
    steps = []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        value = int(term)
        is_added = (operator == "+") == (value >= 0)
        for part in _place_values(abs(value)):
            changed = total + part if is_added else total - part
            steps.append(f"{total} {'+' if is_added else '-'} {part} = {changed}.")
            total = changed
    return Trace(text=" ".join(steps), answer=str(total))


def products(metadata: Mapping[str, Any]) -> Trace:
    """Multiply digit by digit of one factor, then add the rows.

    A factor of one digit meets the other's digits one at a time; otherwise the rows are those of the smaller factor.
    """
    first, *rest = metadata["expression"].split(" * ")
    total = int(first)
    steps = []
    for factor in map(int, rest):
        small, large = sorted((total, factor), key=abs)
        whole, split = (small, large) if abs(small) < 10 else (large, small)
        rows = []
        for part in _place_values(split):
            steps.append(f"{whole} * {part} = {whole * part}.")
            rows.append(whole * part)
        total = rows[0]
        for row in rows[1:]:
            steps.append(_added(total, row))
            total += row
    return Trace(text=" ".join(steps), answer=str(total))


def gcd(metadata: Mapping[str, Any]) -> Trace:
    """Euclid's algorithm, each remainder found by a product and a subtraction."""
    numbers = [int(number) for number in metadata["numbers"]]
    divisor = numbers[0]
    steps = []
    for number in numbers[1:]:
        steps += _euclid_steps(divisor, number)
        divisor = _gcd(divisor, number)
    return Trace(text=" ".join([*steps, f"The GCD is {divisor}."]), answer=str(divisor))


def lcm(metadata: Mapping[str, Any]) -> Trace:
    """Divide one number by the greatest common divisor and multiply by the other."""
    numbers = [int(number) for number in metadata["numbers"]]
    multiple = numbers[0]
    steps = []
    for number in numbers[1:]:
        steps += _euclid_steps(multiple, number)
        divisor = _gcd(multiple, number)
        quotient = min(multiple, number) // divisor
        steps.append(f"The GCD is {divisor}. {min(multiple, number)} / {divisor} = {quotient}.")
        steps.append(f"{max(multiple, number)} * {quotient} = {max(multiple, number) * quotient}.")
        multiple = max(multiple, number) * quotient
    return Trace(text=" ".join(steps), answer=str(multiple))


def leg_counting(metadata: Mapping[str, Any]) -> Trace:
    """Multiply the legs of one animal, add to the total."""
    total = 0
    steps = []
    for animal, num_animals in metadata["animals"].items():
        legs = num_animals * ANIMALS[animal]
        steps.append(f"{animal}: {num_animals} * {ANIMALS[animal]} = {legs}.")
        if total:
            steps.append(_added(total, legs))
        total += legs
    return Trace(text=" ".join(steps), answer=str(total))


def count_bits(metadata: Mapping[str, Any]) -> Trace:
    """Take away the largest power of two, again and again, numbering the times."""
    rest = int(metadata["number"])
    num_ones = 0
    steps = []
    while rest:
        num_ones += 1
        power = 1 << (rest.bit_length() - 1)
        steps.append(f"{num_ones}: {rest} - {power} = {rest - power}.")
        rest -= power
    return Trace(text=" ".join([*steps, f"The number of ones is {num_ones}."]), answer=str(num_ones))


def prime_factorization(metadata: Mapping[str, Any]) -> Trace:
    """Trial division: each prime that is tried is named, whether it divides or not."""
    rest = int(metadata["number"])
    factors = []
    steps = []
    candidate = 2
    while candidate * candidate <= rest:
        if rest % candidate == 0:
            steps.append(f"{rest} / {candidate} = {rest // candidate}.")
            factors.append(candidate)
            rest //= candidate
        else:
            steps.append(f"{rest}: not {candidate}.")
            candidate += 1 if candidate == 2 else 2
    factors.append(rest)
    steps.append(f"{rest} is prime.")
    return Trace(text=" ".join(steps), answer=" × ".join(map(str, factors)))  # noqa: RUF001 - the task asks for this sign


_LINEAR = re.compile(
    r"(?:(?P<constant>-?\d+) (?P<sign>[+-]) )?(?P<negative>-)?(?:(?P<coefficient>\d+)\*)?(?P<variable>[a-z])"
    r"(?: (?P<trailing_sign>[+-]) (?P<trailing>\d+))?"
)


def simple_equations(metadata: Mapping[str, Any]) -> Trace | None:
    """Bring the constant to the right-hand side, then divide; None when it is not `a*x + b = c` over integers."""
    left, _, right_text = metadata["equation"].partition(" = ")
    match = _LINEAR.fullmatch(left)
    if match is None:
        return None
    right, variable = int(right_text), match["variable"]
    coefficient = int(match["coefficient"] or 1)
    if match["sign"] == "-" or match["negative"]:
        coefficient = -coefficient
    constant = int(match["constant"] or 0)
    constant += int(match["trailing"] or 0) * (-1 if match["trailing_sign"] == "-" else 1)
    # The side with the unknown is kept positive: c - b for a > 0, b - c for a < 0.
    minuend, subtrahend = (right, constant) if coefficient > 0 else (constant, right)
    size, rest = abs(coefficient), minuend - subtrahend
    if rest % size:
        return None
    steps = []
    if constant or coefficient < 0:
        sign = "-" if subtrahend >= 0 else "+"
        steps.append(f"{_term(size, variable)} = {minuend} {sign} {abs(subtrahend)} = {rest}.")
    if size != 1:
        steps.append(f"{variable} = {rest} / {size} = {rest // size}.")
    return Trace(text=" ".join(steps), answer=str(rest // size))


def _place_values(value: int) -> list[int]:
    """Return 347 as [300, 40, 7]; zero digits are left out, and zero itself is [0]."""
    sign = -1 if value < 0 else 1
    digits = str(abs(value))
    parts = [sign * int(digit) * 10 ** (len(digits) - 1 - place) for place, digit in enumerate(digits) if digit != "0"]
    return parts or [0]


def _added(total: int, part: int) -> str:
    return f"{total} {'+' if part >= 0 else '-'} {abs(part)} = {total + part}."


def _euclid_steps(first: int, second: int) -> Iterator[str]:
    large, small = max(first, second), min(first, second)
    while small > 1:  # a remainder of 1 settles it, as 0 does
        product = large // small * small
        if product != small:
            yield f"{small} * {large // small} = {product}."
        yield f"{large} - {product} = {large - product}."
        large, small = small, large - product


def _gcd(first: int, second: int) -> int:
    while second:
        first, second = second, first % second
    return first


def _term(coefficient: int, variable: str) -> str:
    return variable if coefficient == 1 else f"{coefficient}*{variable}"
