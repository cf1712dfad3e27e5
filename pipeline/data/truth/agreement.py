"""Rules that find steps that disagree with their answer: the question's sum, the last step's sum, the last values.

The rules judge only answers with one reading (one number, date, weekday or choice), against a last line that holds such
values. Every other row passes. A change of unit between the last step and the answer is no disagreement.
"""

from __future__ import annotations

import ast
import re
from fractions import Fraction

from pipeline.data.truth.calendar import dates_in, same_date, weekdays_in
from pipeline.data.truth.equality import unwrap
from pipeline.data.truth.numerals import DECIMAL, Quantity, fold, numbers_in, quantity

MAX_SUM = 120  # characters of an arithmetic expression
MAX_POWER = 64
_PART = rf"(?:{DECIMAL}|[()])"
_SUM = rf"(?:[-+]\s*)?{_PART}(?:\s*(?:[-+*/^×÷·∙]|\*\*)?\s*{_PART})*"
_EQUATION = re.compile(
    rf"(?<![\w.,/)\^*=\-])(?P<left>{_SUM})\s*=\s*[$¥€£]?\s*(?P<right>-?{DECIMAL})(?![\w.,]*\d)(?!\s*[*+/^×÷!√πa-z(\\]|\s+-\s*\d)"
)
_CONCLUDES = re.compile(
    r"\b(?:so|thus|therefore|hence|total|altogether|in all|left)\b|したがって|よって|だから|合計|全部で|残り|答え"
)
_CALLED_CORRECT = re.compile(
    r"(?<![\w(])\(?([A-J])\)? is (?:thus |therefore )?(?:the )?(?:most )?(?:correct|right|best)\b(?! only)"
    r"|(?:correct|right|best) (?:answer|option|choice) is \(?([A-J])\)?(?!\w)"
    r"|([A-J])(?:が正しい|が正解|が適切)"
)
_QUESTION = re.compile(
    rf"(?:what is|what's|calculate|compute|evaluate|work out)?\s*(?P<sum>{_SUM})\s*(?:=\s*)?"
    r"(?:\?|？|は?いくつですか。?|はいくつ\??|はいくらですか。?|を計算し(?:て|なさい|てください)。?|の答えは\??|=|\.)?\s*"
)


def objection(prompt: str, steps: str, answer: str) -> str | None:
    """The reason why the answer disagrees with steps or question; None where it agrees or no rule applies."""
    lines = [line for line in steps.splitlines() if re.search(r"\w", line)]
    line = lines[-1] if lines else ""
    value = quantity(unwrap(answer))
    if value is not None and len(lines) > 1 and _restates(line, answer):
        lines.pop()  # "Hence we get 80." is no step
        line, steps = lines[-1], "\n".join(lines)
    return (
        _wrong_sum(line)
        or (_against_question(prompt, value) if value else None)
        or _against_dates(line, answer)
        or _against_choice(steps, answer)
        or (_against_line(line, steps, value) if value else None)
    )


def _restates(line: str, answer: str) -> bool:
    """Whether the only numbers of a line are the answer's."""
    seen = set(numbers_in(line))
    return bool(seen) and seen <= set(numbers_in(answer)) and "=" not in line


def equations(line: str) -> list[tuple[Fraction, Fraction, int]]:
    """(value of the left side, value of the right side, end offset) of every equation of plain numbers in a line."""
    folded = _plain(line)
    found = []
    for match in _EQUATION.finditer(folded):
        left, right = evaluate(match["left"]), quantity(match["right"])
        if left is not None and right is not None and re.search(r"[-+*/^×÷]", match["left"].lstrip("+- ")):
            found.append((left, right.value, match.end()))
    return found


def evaluate(text: str) -> Fraction | None:
    """Exact value of an arithmetic expression; None for any other text, a division by zero, or out of bounds."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.strip())
    if len(text) > MAX_SUM:
        return None
    text = re.sub(r"[×·∙]", "*", text).replace("÷", "/").replace("^", "**")
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
        if isinstance(node.op, ast.Pow) and right.denominator == 1 and abs(right) <= MAX_POWER and abs(left) < 10**6:
            return Fraction(left**right.numerator)
    raise ValueError("no arithmetic")


def _plain(line: str) -> str:
    """A line with its numbers bare: no currency, no percent sign, no thousands' commas, no LaTeX signs."""
    text = fold(line).replace("\\times", "*").replace("\\cdot", "*").replace("\\div", "/")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"(\1/\2)", text)
    text = re.sub(r"(?<=\d)\s*%", "", text) if "%" in text and not re.search(r"%\s*(?:of|\*)", text) else text
    return re.sub(r"(?<=[\d)])\s*x\s*(?=[\d(])", " * ", re.sub(r"[$¥€£]|\\left|\\right", "", text))


def _rounded(exact: Fraction, shown: Fraction) -> bool:
    """Whether `shown` is `exact` rounded to the digits that it shows, or cut there."""
    if exact == shown:
        return True
    size = Fraction(1)
    while (shown / size).denominator != 1 and size > Fraction(1, 10**12):
        size /= 10
    return exact.denominator not in (1,) and abs(exact - shown) < size


def _wrong_sum(line: str) -> str | None:
    if re.search(r"\bmod\b|remainder|余り|あまり|…|≈|\bbase\b|進法|%|!", fold(line)):
        return None
    for left, right, _ in equations(line):
        if not _rounded(left, right):
            return f"arithmetic of the last step: {_show(left)} is written as {_show(right)}"
    return None


def _against_question(prompt: str, answer: Quantity) -> str | None:
    """The disagreement with a question that is only a sum."""
    found = _QUESTION.fullmatch(_plain(prompt).strip())
    if found is None or not re.search(r"[-+*/^×÷]", found["sum"].strip().lstrip("+-")):
        return None
    value = evaluate(found["sum"])
    if value is None or _rounded(value, answer.value):
        return None
    return f"the question's own sum is {_show(value)}, the answer {_show(answer.value)}"


def _against_dates(line: str, answer: str) -> str | None:
    wanted, seen = dates_in(answer), dates_in(line)
    if len(wanted) == 1 and seen and len(answer) <= 40:
        return None if any(same_date(wanted[0], date) for date in seen) else "the last step ends in another date"
    days, passed = weekdays_in(answer), weekdays_in(line)
    if len(days) == 1 and len(answer) <= 12 and passed and days[0] not in passed:
        return "the last step ends in another weekday"
    return None


def _against_choice(steps: str, answer: str) -> str | None:
    """The disagreement between the letter of the answer and a choice that the steps call correct."""
    letter = re.fullmatch(r"(?:option |choice )?\(?([A-Ja-j])[).:]?(?:\s.{0,80})?", unwrap(answer))
    if letter is None:
        return None
    called = {(found[1] or found[2] or found[3]).upper() for found in _CALLED_CORRECT.finditer(steps)}
    if called and letter[1].upper() not in called:
        return f"the steps call {', '.join(sorted(called))} correct"
    return None


def _against_line(line: str, steps: str, answer: Quantity) -> str | None:
    """The disagreement between a one-number answer and the numbers of the last line."""
    if dates_in(line) or re.search(r"\d:\d\d|時\s*\d|時半", fold(line)) or answer.unit in ("月", "時", "日"):
        return None
    seen = set(numbers_in(line))
    if not seen:
        return None
    close = {value for value in seen if _close(value, answer.value)}
    sums = equations(line)
    if len(sums) == 1 and not re.search(r"\w", _plain(line)[sums[0][2] :]):  # the line ends in its one equation
        result = sums[0][1]
        if not _close(result, answer.value) and not _other_unit(result, answer.value):
            return f"the last step ends in {_show(result)}, the answer is {_show(answer.value)}"
    if close or any(_other_unit(value, answer.value) for value in seen):
        return None
    if "=" not in line and len(seen) <= 6 and _combines(seen, answer.value):
        return None  # "12 times 3": the line asks for the step that gives the answer
    elsewhere = any(_close(value, answer.value) for value in numbers_in(steps))
    if (len(seen) == 1 and _CONCLUDES.search(fold(line))) or not elsewhere:
        return f"no number of the last step is the answer {_show(answer.value)}"
    return None


def _combines(seen: set[Fraction], wanted: Fraction) -> bool:
    """Whether one arithmetic operation on two of the numbers gives the wanted number."""
    pairs = [(a, b) for a in seen for b in seen if a != b]
    return any(wanted in (a + b, a - b, a * b) or (b and wanted == a / b) for a, b in pairs)


def _close(exact: Fraction, answer: Fraction) -> bool:
    """Whether the answer equals the exact value or is its rounding."""
    return exact == answer or _rounded(exact, answer)


def _other_unit(a: Fraction, b: Fraction) -> bool:
    """Whether the values may be one quantity in two units: percent, cents, minutes, hours, metres."""
    return a != 0 and b != 0 and (a / b in _RATIOS or b / a in _RATIOS)


_RATIOS = {Fraction(n) for n in (60, 100, 1000, 3600, 1_000_000)}


def _show(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"
