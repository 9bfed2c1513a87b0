"""Specification text to a frozen syntax tree, and back: the language as the other modules see it.

`parse` reports all the mistakes of a text at once: after a bad statement it goes on with the next one.
`parse_file` also reads the files named by `use`. `unparse` is the inverse of `parse` up to white space and
comments. Nodes compare without their spans.
"""

from peftc.language.parse import LARGEST_FILE, parse, parse_file
from peftc.language.reader import MOST_MISTAKES
from peftc.language.tokens import BUDGET_OPERATORS, FILTER_OPERATORS, WORDS
from peftc.language.tree import (
    UNITS,
    Apply,
    Arg,
    Bool,
    Call,
    Checkpoint,
    Except,
    Filter,
    Freeze,
    Glob,
    Group,
    InLayers,
    InStack,
    Intersect,
    Let,
    ListValue,
    Name,
    Node,
    Number,
    Quantize,
    Regex,
    Require,
    Role,
    Selector,
    Spec,
    Statement,
    String,
    Task,
    Train,
    Union,
    Use,
    Value,
    Where,
)
from peftc.language.unparse import unparse

__all__ = [
    "LARGEST_FILE", "MOST_MISTAKES", "UNITS",
    "Apply", "Arg", "Bool", "Call", "Checkpoint", "Except", "Filter", "Freeze", "Glob", "Group", "InLayers",
    "InStack", "Intersect", "Let", "ListValue", "Name", "Node", "Number", "Quantize", "Regex", "Require", "Role",
    "Selector", "Spec", "Statement", "String", "Task", "Train", "Union", "Use", "Value", "Where",
    "parse", "parse_file", "unparse",
]  # fmt: skip

# As tests/language/test_syntax.py knows them.
_WORDS, _FILTER_OPERATORS, _BUDGET_OPERATORS = WORDS, FILTER_OPERATORS, BUDGET_OPERATORS
