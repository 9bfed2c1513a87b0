"""Why the parser does not take a token, in words that help.

A mistake is explained from what was read before it and from what could stand in its place.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from lark import Token

import peftc.language.errors as mistakes
import peftc.language.spelling as spelling
import peftc.language.tokens as tokens
import peftc.language.words as words
from peftc.diagnostics.diagnostic import Diagnostic, choices, suggest
from peftc.diagnostics.source import Source, Span
from peftc.language.tokens import BUDGET_OPERATORS, CLOSING, FILTER_OPERATORS, FIT_OPERATORS, NEWLINE, VERBS, WORDS
from peftc.language.tree import UNITS

_PLACE = {"DOTTED", "STRING", "REGEX"}
_SELECTOR = {"NAME", "LPAR", *_PLACE}
_VALUE = {"NAME", "NUMBER", "STRING", "TRUE", "FALSE", "LSQB"}
_KINDS = {
    "NAME": "a name",
    "NUMBER": "a number",
    "STRING": "a string in double quotes",
    "COMPARE": "a comparison",
    "_EQUAL": "'='",
    NEWLINE: "the end of the line",
}
_OTHER_LANGUAGES = {
    "and": "write '&' between sets, or a second 'where'",
    "or": "write ','",
    "not": "write 'except'",
    "on": "write 'to'",
    "|": "write ',' for a union",
}


@dataclass(frozen=True)
class Situation:
    """A token that the parser does not take, and what led there."""

    source: Source
    token: Token
    next: Token
    taken: list[Token]  # what the parser has read, without the line ends it never saw
    open: list[Token]  # the brackets among them that are not closed
    fresh: bool  # between statements
    accepts: set[str]  # the terminals that the parser would take

    @property
    def before(self) -> Token:
        return self.taken[-1] if self.taken else self.token

    @property
    def found(self) -> str:
        return _described(self.token)

    @property
    def span(self) -> Span:
        """Where the token stands; for an end of line or text, the place after the last word before it."""
        if self.token.type in (NEWLINE, tokens.END) and self.taken:
            end = tokens.span(self.source, self.taken[-1]).end
            return Span(self.source, end, end)
        return tokens.span(self.source, self.token)

    def diagnostic(self) -> Diagnostic:
        """The first explanation that fits, from the narrow to the general."""
        narrow = (
            self._operator,
            self._mistake,
            self._statement,
            self._slice,
            self._argument,
            self._selector,
            self._word,
        )
        return next(filter(None, (explain() for explain in narrow)), None) or self._general()

    def _operator(self) -> Diagnostic | None:
        if self.token.type not in ("_EQUAL", "BAD_OPERATOR") or "COMPARE" not in self.accepts:
            return None
        operators: tuple[str, ...] = FILTER_OPERATORS
        if self.taken[-2].type != "WHERE":
            verb = next(token.type for token in reversed(self.taken) if token.type in VERBS)
            operators = FIT_OPERATORS if verb == "FIT" else BUDGET_OPERATORS
        return unknown_operator(self.token, operators, self.span)

    def _mistake(self) -> Diagnostic | None:
        return _lexical_mistake(self.token, self.span)

    def _statement(self) -> Diagnostic | None:
        if self.fresh and self.token == "fit":  # a word of the language where another follows, and a name elsewhere
            return mistakes.Unexpected(
                expected=("a quantity",), found=_described(self.next), span=tokens.span(self.source, self.next)
            )
        if self.fresh:
            verbs = tuple(map(str.lower, VERBS))
            brought = words.meant(self.token)
            method = "write 'apply' before a method" if self.next.type in ("LPAR", "TO") else None
            hint = brought.label if brought else suggest(self.token, verbs) or method
            return mistakes.UnknownStatement(found=self.found, hint=hint, verbs=verbs, span=self.span)
        if self.token.type in VERBS and NEWLINE in self.accepts:
            return mistakes.SeveralStatements(verb=str(self.token), span=self.span)
        return None

    def _slice(self) -> Diagnostic | None:
        # In a list, the other use of square brackets, a comma or a string could stand instead.
        if not self.open or self.open[-1] != "[" or self.accepts & {"COMMA", "STRING"}:
            return None
        empty = self.token.type == "RSQB" and self.before.type == "LSQB"
        reason = "it is empty" if empty else f"expected {choices(_expected(self.accepts))}, found {self.found}"
        return mistakes.BadSlice(reason=reason, span=self.span)

    def _argument(self) -> Diagnostic | None:
        if self.before.type == "NUMBER" and self.token.type == "NAME" and self.next.type != "_EQUAL":
            if self.token in _OTHER_LANGUAGES:
                return self._general()
            if self.token == "using":  # as `fit`
                expected = ("'checkpoint'", "a storage")
                return mistakes.Unexpected(expected=expected, found=_described(self.next), span=self.span)
            return unknown_unit(str(self.token), self.span)
        if not self.open or "NUMBER" not in self.accepts:
            return None
        if self.before.type == "_EQUAL" and self.token.type in ("COMMA", "RPAR", "RSQB"):
            name = self.taken[-2]
            return mistakes.MissingValue(
                name=str(name), span=tokens.span(self.source, name).to(tokens.span(self.source, self.before))
            )
        if self.token.type in ("DOTTED", "REGEX"):
            return self._general(f'write "{self.token}"')
        return None

    def _selector(self) -> Diagnostic | None:
        if "DOTTED" not in self.accepts:
            return None
        if self.before.type == "COMMA" and self.token.type in (NEWLINE, "TO", "WITH"):
            return mistakes.TrailingComma(span=tokens.span(self.source, self.before))
        if self.before.type == "_EQUAL":
            return mistakes.Unexpected(expected=("a selector", "a method"), found=self.found, span=self.span)
        hint = f'for module names write "{self.token}"' if self.token.type == "NUMBER" else None
        if brought := words.meant(self.token):
            hint = brought.label
        after = _described(self.before)
        return mistakes.MissingSelector(after=after, found=self.found, hint=hint, span=self.span)

    def _word(self) -> Diagnostic | None:
        if self.open and self.token.type in ("TO", "WITH") and "COMMA" in self.accepts:
            return unclosed(self.source, self.open[-1], self.span)
        if self.accepts == {"STRING"} and self.token.type in ("NAME", "DOTTED"):
            return self._general(f'write "{self.token}"')
        if self.accepts == {"NAME"}:
            if self.before.type in ("APPLY", "WITH"):
                wanted = "a method" if self.before.type == "APPLY" else "a storage format"
                brought = words.meant(self.token)
                hint = brought.label if brought else None
                return mistakes.Unexpected(expected=(wanted,), found=self.found, hint=hint, span=self.span)
            if self.token.type in WORDS:
                return mistakes.ReservedName(word=str(self.token), span=self.span)
        if self.token.type not in _SELECTOR or self._hint():
            return None
        for word in {"TO", "WITH"} & self.accepts:
            return mistakes.MissingWord(word=word.lower(), before=self.found, span=self.span)
        return None

    def _hint(self) -> str | None:
        if self.next.type == "_EQUAL" and self.token.type == "NAME":
            if "LPAR" in self.accepts:
                return "write parameters in brackets"
            if "COMMA" in self.accepts and self.open:
                return "write ',' between parameters"
        if self.token.type in _PLACE and {"EXCEPT", "COMMA"} <= self.accepts:
            return "write ',' between selectors"
        if self.token.type == "LSQB" and "IN" in self.accepts:
            return "a slice is one of layers: in layers[a:b]"
        words = (word.lower() for word in WORDS if word in self.accepts)
        return _OTHER_LANGUAGES.get(self.token) or suggest(self.token, words)

    def _general(self, hint: str | None = None) -> Diagnostic:
        expected = _expected(self.accepts)
        return mistakes.Unexpected(expected=expected, found=self.found, hint=hint or self._hint(), span=self.span)


def unclosed(source: Source, opening: Token, found: Span | None) -> Diagnostic:
    """A bracket is never closed, though it should be before `found`."""
    span, wanted = tokens.span(source, opening), CLOSING[opening]
    return mistakes.UnclosedBracket(bracket=str(opening), wanted=wanted, span=span, found=found)


def _expected(accepts: set[str]) -> tuple[str, ...]:
    """What the parser could take: kinds of things, punctuation, words, the end of the line."""
    left = set(accepts)
    words = []
    if {"APPLY", *_VALUE} <= left:
        words.append("a parameter")
        left -= {*_VALUE, *WORDS}
    for kind, terminals in (("a selector", _SELECTOR), ("a value", _VALUE)):
        if terminals <= left:
            words.append(kind)
            left -= terminals
    literals = {terminal.name: f"'{terminal.pattern.value}'" for terminal in tokens.grammar().terminals}
    literals |= {word: f"'{word.lower()}'" for word in WORDS}
    words += sorted(_KINDS.get(terminal, literals[terminal]) for terminal in left - {NEWLINE})
    return (*words, _KINDS[NEWLINE]) if NEWLINE in left else tuple(words)


def _described(token: Token) -> str:
    if token.type in (NEWLINE, tokens.END):
        return "the end of the line"
    return f"'{token}'" if len(token) <= 40 else f"'{token[:37]}...'"


def bad_number(rest: str, span: Span) -> Diagnostic:
    """What follows the digits of a number is no unit: a misspelt one, or the whole is no number."""
    if rest.isalpha() and rest not in ("e", "E"):
        return unknown_unit(rest, Span(span.source, span.end - len(rest), span.end))
    return spelling.BadNumber(text=span.text, span=span)


def unknown_unit(unit: str, span: Span) -> Diagnostic:
    return spelling.UnknownUnit(unit=unit, hint=suggest(unit, UNITS), units=tuple(UNITS), span=span)


def unknown_operator(operator: str, operators: tuple[str, ...], span: Span) -> Diagnostic:
    meant = {"=": "==", "=<": "<=", "=>": ">=", "<>": "!=", "===": "=="}.get(operator)
    hint = f"did you mean '{meant}'?" if meant in operators else None
    return mistakes.UnknownOperator(operator=operator, hint=hint, operators=operators, span=span)


_CHARACTER_HINTS = {
    ";": "one statement a line",
    "\\": "a statement goes on in the next line inside brackets",
    "-": "names have '_' instead",
    "+": "write ',' for a union",
}
_PUNCTUATION = {
    **dict.fromkeys("\u201c\u201d\u201e\u2018\u2019", '"'),
    **dict.fromkeys("\u2013\u2014\u2212", "-"),
    **{"\u2264": "<=", "\u2265": ">=", "\u2260": "!="},
}
_LETTERS = str.maketrans("\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u03b1\u03bf", "aeopcyxijsao")


def _lexical_mistake(token: Token, span: Span) -> Diagnostic | None:
    """The diagnostic for a token of the grammar's mistake terminals."""
    text = str(token)
    match token.type:
        case "BAD_STRING":
            return spelling.UnclosedString(span=span)
        case "BAD_QUOTE":
            return spelling.WrongQuote(text=text, span=span)
        case "BAD_REGEX":
            return spelling.UnclosedRegex(comment=text.startswith("//"), span=span)
        case "BAD_NAME":
            at = next(index for index, letter in enumerate(text) if not letter.isascii())
            plain = unicodedata.normalize("NFKD", text.translate(_LETTERS)).encode("ascii", "ignore").decode()
            meant = plain if len(plain) == len(text) else None
            return spelling.BadName(word=text, character=text[at], meant=meant, span=span)
        case "BAD_CHARACTER":
            return spelling.BadCharacter(character=text, hint=_character_hint(text), span=span)
    return None


def _character_hint(character: str) -> str | None:
    plain = _PUNCTUATION.get(character) or unicodedata.normalize("NFKC", character)
    if plain == character or not plain.isascii() or len(plain) > 2:
        return _CHARACTER_HINTS.get(character)
    return "use an ordinary space" if plain == " " else f"did you mean '{plain}'?"
