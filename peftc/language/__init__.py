"""The specification language: text to a frozen syntax tree, and back.

`parse` reports all the mistakes of a text at once: after a bad statement it goes on with the next one.
`parse_file` also reads the files named by `use`. `unparse` is the inverse of `parse` up to white space and
comments. Nodes compare without their spans.

Imports go one way: tree <- build, unparse; tokens <- explain <- reader; parse puts them together.
"""

from peftc.language.parse import LARGEST_FILE, parse, parse_file
from peftc.language.tokens import BUDGET_OPERATORS, FILTER_OPERATORS, FIT_OPERATORS, WORDS
from peftc.language.tree import (
    UNITS,
    Apply,
    Arg,
    Bool,
    Call,
    Checkpoint,
    Except,
    Filter,
    Fit,
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
    within,
)
from peftc.language.unparse import unparse

__all__ = [
    "BUDGET_OPERATORS", "FILTER_OPERATORS", "FIT_OPERATORS", "LARGEST_FILE", "UNITS", "WORDS",
    "Apply", "Arg", "Bool", "Call", "Checkpoint", "Except", "Filter", "Fit", "Freeze", "Glob", "Group",
    "InLayers", "InStack", "Intersect", "Let", "ListValue", "Name", "Node", "Number", "Quantize", "Regex", "Require",
    "Role", "Selector", "Spec", "Statement", "String", "Task", "Train", "Union", "Use", "Value", "Where",
    "parse", "parse_file", "unparse", "within",
]  # fmt: skip
