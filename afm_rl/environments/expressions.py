"""Arithmetic of untrusted text: whole and decimal numbers, + - * /, parentheses, signs; exact, bounded, never evaluated as code.

The text is parsed by Python's own grammar and only arithmetic nodes are walked. Its length bounds the work: products of
numbers that fit into `MAX_CHARS` characters stay short, and there is no power.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

#: Longer expressions are refused.
MAX_CHARS = 200
#: Decimal places of a result that is no whole number.
DECIMALS = 6
_ALLOWED = re.compile(r"[0-9+\-*/(). ]+")
_BINARY: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_UNARY: dict[type, Callable[[Fraction], Fraction]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class ExpressionError(ValueError):
    """Text that is not an expression this calculator knows; the message is for whoever wrote it."""


def evaluate(text: str) -> Fraction:
    """The exact value. Raises ExpressionError in a few words."""
    text = text.strip()
    if len(text) > MAX_CHARS:
        raise ExpressionError("too long")
    if not _ALLOWED.fullmatch(text) or "**" in text or "//" in text:
        raise ExpressionError("not arithmetic")
    try:
        return _value(ast.parse(text, mode="eval").body, text)
    except ZeroDivisionError as error:
        raise ExpressionError("division by zero") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ExpressionError("not arithmetic") from error


def show(value: Fraction) -> str:
    """A whole number, or a decimal of at most DECIMALS places without zeros at its end."""
    if value.denominator == 1:
        return str(value.numerator)
    scaled = round(value * 10**DECIMALS)
    sign, digits = "-" if scaled < 0 else "", f"{abs(scaled):0{DECIMALS + 1}d}"
    return f"{sign}{digits[:-DECIMALS]}.{digits[-DECIMALS:]}".rstrip("0").rstrip(".")


def _value(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_value(node.left, text), _value(node.right, text))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand, text))
    if isinstance(node, ast.Constant):
        return Fraction(text[node.col_offset : node.end_col_offset])  # as written: 0.1 is a tenth
    raise ExpressionError("not arithmetic")
