"""The mistakes in a single character, word or value of a specification."""

from __future__ import annotations

import unicodedata

from peftc.diagnostics.diagnostic import Diagnostic, choices
from peftc.language.errors import Hinted


def _named(character: str) -> str:
    """`U+00A0 NO-BREAK SPACE`, for characters that one cannot see or tell apart."""
    return f"U+{ord(character):04X} {unicodedata.name(character, 'control character')}"


class BadCharacter(Hinted):
    """A character that no word of the language has."""

    code = "bad-character"
    character: str

    @property
    def title(self) -> str:
        if self.character.isascii() and self.character.isprintable():
            return f"unexpected character '{self.character}'"
        return f"unexpected character {_named(self.character)}"


class BadName(Diagnostic):
    """A word with letters other than ASCII ones, often a look-alike from another alphabet."""

    code = "bad-name"
    notes = ("names have ASCII letters, digits and '_'; module names with others go in double quotes",)
    word: str
    character: str
    meant: str | None = None

    @property
    def title(self) -> str:
        return f"'{self.word}' has the character {_named(self.character)}"

    @property
    def label(self) -> str:
        return f"did you mean '{self.meant}'?" if self.meant else ""


class UnclosedString(Diagnostic):
    code = "unclosed-string"
    title = "string is never closed"
    label = "no '\"' up to the end of the line"


class WrongQuote(Diagnostic):
    code = "wrong-quote"
    title = "strings stand in double quotes"
    text: str

    @property
    def label(self) -> str:
        return f"""write "{self.text.strip("'")}\""""


class BadEscape(Diagnostic):
    code = "bad-escape"
    notes = (r"""escapes are \\ \" \n \r \t and \uXXXX""",)
    escape: str

    @property
    def title(self) -> str:
        return f"unknown escape '{self.escape}' in a string"


class UnclosedRegex(Diagnostic):
    code = "unclosed-regular-expression"
    comment: bool = False

    @property
    def title(self) -> str:
        return "regular expression is empty" if self.comment else "regular expression is never closed"

    @property
    def label(self) -> str:
        return "a comment starts with '#'" if self.comment else "no '/' up to the end of the line"


class BadRegex(Diagnostic):
    code = "bad-regular-expression"
    reason: str

    @property
    def title(self) -> str:
        return f"bad regular expression: {self.reason}"


class BadGlob(Diagnostic):
    code = "bad-name-pattern"
    notes = ("in name patterns '*' is one segment, '**' any number of segments, '{a,b}' a choice",)
    reason: str

    @property
    def title(self) -> str:
        return f"bad name pattern: {self.reason}"


class BadRole(Diagnostic):
    """A dotted word that cannot be a role: digits or '*' inside, an empty part."""

    code = "bad-role"
    notes = ("roles are dotted words such as attn.q or mlp.*, with '*' last if at all",)
    text: str

    @property
    def title(self) -> str:
        return f"'{self.text}' is not a role"

    @property
    def label(self) -> str:
        names = "**" if self.text == "*" else self.text.strip(".")
        return f'for module names write "{names}"'


class BadNumber(Diagnostic):
    code = "bad-number"
    notes = ("numbers look like 8, -4, 1_000, 0.05, 1e-5, 1%, 24 GiB",)
    text: str

    @property
    def title(self) -> str:
        return f"'{self.text}' is not a number"


class UnknownUnit(Hinted):
    code = "unknown-unit"
    unit: str
    units: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"unknown unit '{self.unit}'"

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"units are {choices(self.units, 'and')}",)


class NumberTooLarge(Diagnostic):
    code = "number-too-large"
    title = "number is too large"
    notes = ("whole numbers reach to 2**63 - 1, others to 1.8e308",)
