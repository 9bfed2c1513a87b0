"""Tokens to a parse tree, with all mistakes of the text: after a bad statement it goes on with the next one."""

from __future__ import annotations

import itertools

from lark import Token, Tree, UnexpectedToken

import peftc.language.errors as mistakes
import peftc.language.tokens as tokens
import peftc.language.words as words
from peftc.diagnostics.diagnostic import MOST_MISTAKES, Diagnostic
from peftc.diagnostics.source import Source
from peftc.language.explain import Situation, unclosed
from peftc.language.tokens import BRACKETS, CLOSING, END, NEWLINE

# Brackets in brackets, filters on filters: keeps every walk over a tree within Python's own stack.
DEEPEST = 64
LONGEST_WORD = 4096  # characters; also of a string or a pattern
MOST_WORDS = 50_000  # with signs, of a text and all the files that it uses


class Reader:
    """Feeds tokens to the LALR parser and puts it back to the start of the statement after a mistake.

    Putting back is cutting the parser's stacks to their height at that point: below it lies only what whole
    statements have left, and nothing that the bad statement did has touched that.
    """

    def __init__(self, source: Source, most: int = MOST_WORDS) -> None:
        """`most`: how many tokens there may be; of a text with more, none is read."""
        self.source = source
        self.problems: list[Diagnostic] = []
        self.tokens = _joined(tokens.tokens(source, most))
        self.count = len(self.tokens) - 2
        if self.count > most:
            limit = mistakes.TooManyWords(limit=MOST_WORDS, span=tokens.span(source, self.tokens[most]))
            self.problems.append(limit)
            self.tokens = self.tokens[-2:]
        self.parser = tokens.grammar().parse_interactive()
        self.taken: list[Token] = []  # what the parser has read, without the line ends it never saw
        self.open: list[Token] = []  # brackets
        self.start = (1, 0)  # height of the parser's stack and of `open` where the present statement starts
        self.outer_starts: list[tuple[int, int]] = []  # the same for the tasks around it
        self.fresh = True  # between statements

    def read(self) -> Tree[Token]:
        """The tree of the good statements; `problems` has the others."""
        last = len(self.tokens) - 1
        return self._end(self.tokens[last]) if self._feed_until(last) else Tree("spec", [])

    def following(self) -> frozenset[str]:
        """The kinds of token that may follow the text, whose last statement need not be whole."""
        if not self._feed_until(len(self.tokens) - 2):  # but for the line end that it need not have
            return frozenset()
        accepts: set[str] = self.parser.accepts()  # type: ignore[no-untyped-call]
        return frozenset(accepts)

    def _feed_until(self, end: int) -> bool:
        """Gives the parser the tokens before one; whether there were not too many mistakes."""
        index = 0
        while index < end:
            token = self.tokens[index]
            problem = self._bracket_problem(index)
            if problem is None and token.type == NEWLINE and self._in_brackets():
                index += 1
                continue
            problem = problem or self._feed(index)
            if problem is None:
                index += 1
                continue
            self.problems.append(problem)
            if len(self.problems) > MOST_MISTAKES:
                return False
            if isinstance(problem, mistakes.UnclosedBracket):
                del self.open[self.start[1] :]  # nothing to skip to
            index = self._recover(index)
        return True

    def defined(self) -> frozenset[str | None]:
        """The names that a `let` or `group` of the text gives, in a good statement or a bad one; None for a `use`."""
        found: set[str | None] = set()
        names = False
        for token, following in itertools.pairwise(self.tokens):
            names = token.type in ("LET", "GROUP") or (names and token.type in ("NAME", "COMMA"))
            if names and following.type == "NAME":
                found.add(str(following))
            if token.type == "USE":
                found.add(None)
        return frozenset(found)

    def _feed(self, index: int) -> Diagnostic | None:
        """Give the parser one token, or explain why it does not take it."""
        token = self.tokens[index]
        if len(token) > LONGEST_WORD:
            return mistakes.TooLong(limit=LONGEST_WORD, span=tokens.span(self.source, token))
        try:
            self.parser.feed_token(token)
        except UnexpectedToken:
            return self._situation(index).diagnostic()
        if self.fresh and token.type not in (NEWLINE, "RBRACE"):
            self.start = (len(self.parser.parser_state.state_stack) - 1, len(self.open))
        self.fresh = token.type in (NEWLINE, "LBRACE")
        bracket = BRACKETS.get(token.type)
        if bracket in CLOSING:
            self.open.append(token)
        elif bracket:
            self.open.pop()
        if bracket == "{":
            self.outer_starts.append(self.start)
        elif bracket == "}":
            self.start = self.outer_starts.pop()
        self.taken.append(token)
        return None

    def _situation(self, index: int) -> Situation:
        following = self.tokens[min(index + 1, len(self.tokens) - 1)]
        accepts = self.parser.accepts()  # type: ignore[no-untyped-call]
        return Situation(self.source, self.tokens[index], following, self.taken, self.open, self.fresh, accepts)

    def _end(self, end: Token) -> Tree[Token]:
        """Close the tasks that the text leaves open, so that what they hold is still checked."""
        while self.open:
            self.problems.append(unclosed(self.source, self.open[-1], None))
            self.open.pop()
            for terminal in ("RBRACE", NEWLINE):
                self.parser.feed_token(Token.new_borrow_pos(terminal, "", end))
        tree: Tree[Token] = self.parser.feed_token(end)
        return tree

    def _in_brackets(self) -> bool:
        return bool(self.open) and self.open[-1] != "{"

    def _starts_statement(self, index: int) -> bool:
        """A verb first on its line, and not the name of a parameter (`group=32`)."""
        first = index > 0 and self.tokens[index - 1].type == NEWLINE
        return first and self.tokens[index].type in tokens.VERBS and self.tokens[index + 1].type != "_EQUAL"

    def _bracket_problem(self, index: int) -> Diagnostic | None:
        """Brackets that do not match; the parser could only say that it expected something else."""
        token = self.tokens[index]
        span, bracket = tokens.span(self.source, token), BRACKETS.get(token.type)
        if self._in_brackets():
            if self._starts_statement(index):
                return unclosed(self.source, self.open[-1], span)
            if self.tokens[index + 1].type == END:
                return unclosed(self.source, self.open[-1], None)
        if bracket is None:
            return None
        if bracket in CLOSING:
            return mistakes.TooDeep(limit=DEEPEST, span=span) if len(self.open) >= DEEPEST else None
        if not self.open:
            return mistakes.UnopenedBracket(bracket=bracket, span=span)
        wanted = CLOSING[self.open[-1]]
        if bracket == wanted:
            return None
        return mistakes.MismatchedBracket(
            bracket=bracket, opening=tokens.span(self.source, self.open[-1]), wanted=wanted, span=span
        )

    def _recover(self, index: int) -> int:
        """Forget the bad statement; the index of a token that can be read next, such as its line end."""
        brackets = blocks = 0  # of the bad statement, that are still open: ( or [, and { at the end of a line
        if not self.fresh:
            height, opened = self.start
            del self.parser.parser_state.state_stack[height:]
            del self.parser.parser_state.value_stack[height - 1 :]
            brackets = len(self.open) - opened
            del self.open[opened:]
            self.fresh = True
        while (token := self.tokens[index]).type != END:
            if not blocks and (
                self._starts_statement(index)
                or (token.type == NEWLINE and not brackets)
                or (token.type == "RBRACE" and self.open)
            ):
                break
            if token.type == "LBRACE":
                blocks += self.tokens[index + 1].type == NEWLINE
            elif token.type == "RBRACE":
                blocks, brackets = max(blocks - 1, 0), 0
            elif bracket := BRACKETS.get(token.type):
                brackets = brackets + 1 if bracket in CLOSING else max(brackets - 1, 0)
            index += 1
        return index


def _joined(found: list[Token]) -> list[Token]:
    """Words that people bring with a hyphen, `all-linear`, as one name each; no name that a spec gives has one.

    So the rest of the statement is read, and what the word is here is told by who finds that nothing is called so.
    """
    joined: list[Token] = []
    for token in found:
        joined.append(token)
        if len(joined) < 3 or not all(map(_is_word, (joined[-3], token))) or joined[-2] != "-":
            continue
        first, hyphen = joined[-3:-1]
        if first.end_pos == hyphen.start_pos and hyphen.end_pos == token.start_pos:
            whole = Token.new_borrow_pos("NAME", f"{first}-{token}", first)
            whole.end_line, whole.end_column, whole.end_pos = token.end_line, token.end_column, token.end_pos
            if words.meant(whole):
                joined[-3:] = [whole]
    return joined


def _is_word(token: Token) -> bool:
    return token.type == "NAME" or token.type in tokens.WORDS
