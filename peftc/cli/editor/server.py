"""The language server: what an editor asks, by pygls, and what `document`, `offers` and `pointing` know."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any, BinaryIO

from lsprotocol import types as lsp
from pygls import uris
from pygls.lsp.server import LanguageServer

import peftc
from peftc.cli.editor.document import Document, look, own_place, words
from peftc.cli.editor.layout import laid_out
from peftc.cli.editor.model import Asked, Worker
from peftc.cli.editor.offers import offers
from peftc.cli.editor.places import Place, both, offset
from peftc.cli.editor.pointing import definition, hover
from peftc.diagnostics.diagnostic import Diagnostic, PeftcError
from peftc.diagnostics.source import Label, Source, Span

PAUSE = 0.1  # seconds without a key before a text is looked at
KINDS = {
    "method": lsp.CompletionItemKind.Function,
    "storage": lsp.CompletionItemKind.Function,
    "parameter": lsp.CompletionItemKind.Property,
    "keyword": lsp.CompletionItemKind.Keyword,
    "let": lsp.CompletionItemKind.Variable,
    "group": lsp.CompletionItemKind.Variable,
    "role": lsp.CompletionItemKind.Class,
    "place": lsp.CompletionItemKind.Field,
}


class Editor:
    """What an editor has open, and the answers to what it asks.

    A model is the command line's or the client's setting `peftc.model`. One that runs Python code is taken from the
    command line alone: a client may have its settings from a folder that somebody else made.
    """

    def __init__(self, asked: Asked | None) -> None:
        self.server = LanguageServer("peftc", peftc.__version__)
        self.documents: dict[str, Document] = {}  # as they were last looked at, by URI
        self.planned: dict[str, tuple[Diagnostic, ...]] = {}  # what a model makes of these
        self.asked = asked
        self.settings: Any = None  # that the client began with
        self.worker = Worker(self._from_worker(self._failed), self._from_worker(self._ready))
        self.loop: asyncio.AbstractEventLoop | None = None
        for name, function, *options in (
            (lsp.INITIALIZE, self.initialize),
            (lsp.INITIALIZED, self.initialized),
            (lsp.TEXT_DOCUMENT_DID_OPEN, self.opened),
            (lsp.TEXT_DOCUMENT_DID_CHANGE, self.changed),
            (lsp.TEXT_DOCUMENT_DID_CLOSE, self.closed),
            (lsp.WORKSPACE_DID_CHANGE_CONFIGURATION, self.configured),
            (lsp.TEXT_DOCUMENT_COMPLETION, self.complete, lsp.CompletionOptions(trigger_characters=[*'."(,=&'])),
            (lsp.TEXT_DOCUMENT_HOVER, self.hover),
            (lsp.TEXT_DOCUMENT_DEFINITION, self.definition),
            (lsp.TEXT_DOCUMENT_FORMATTING, self.format),
        ):
            self.server.feature(name, *options)(_plain(function))

    def serve(self, given: BinaryIO, told: BinaryIO) -> None:
        """Answers until the editor ends it."""
        self.server.start_io(given, told)

    # ---- texts --------------------------------------------------------------------------------------------------

    def opened(self, given: lsp.DidOpenTextDocumentParams) -> None:
        self._look(given.text_document.uri)

    async def changed(self, given: lsp.DidChangeTextDocumentParams) -> None:
        """Looks at a text once nobody has typed for a moment."""
        document = given.text_document
        await asyncio.sleep(PAUSE)
        texts = self.server.workspace.text_documents
        if document.uri in texts and texts[document.uri].version == document.version:
            path = os.path.realpath(self._path(document.uri) or "")
            using = [uri for uri, one in self.documents.items() if path in one.files()]
            for uri in dict.fromkeys([document.uri, *using]):
                self._look(uri)

    def closed(self, given: lsp.DidCloseTextDocumentParams) -> None:
        uri = given.text_document.uri
        self.documents.pop(uri, None)
        self.planned.pop(uri, None)
        self._publish(uri, [])

    def _look(self, uri: str) -> Document:
        """What a text says by now, which is told to the editor and asked of the model."""
        texts = self.server.workspace.text_documents
        paths = {one: path for one in texts if (path := self._path(one)) is not None}
        unsaved = {Path(os.path.realpath(path)): texts[one].source for one, path in paths.items() if one != uri}
        document = look(texts[uri].source, self._path(uri), unsaved)
        self.documents[uri] = document
        self.planned.pop(uri, None)
        self._tell(uri)
        if document.intentions is not None:
            answer = self._from_worker(lambda problems: self._answered(uri, document, problems))
            self.worker.plan(uri, document.intentions, answer)
        return document

    def _now(self, uri: str) -> Document:
        """A document that is looked at no later than it was changed."""
        known = self.documents.get(uri)
        text = self.server.workspace.get_text_document(uri).source
        return known if known is not None and known.source.text == text else self._look(uri)

    def _answered(self, uri: str, document: Document, problems: tuple[Diagnostic, ...]) -> None:
        if self.documents.get(uri) is document:
            self.planned[uri] = problems
            self._tell(uri)

    def _tell(self, uri: str) -> None:
        document = self.documents[uri]
        self._publish(
            uri, [self._diagnostic(document, one) for one in (*document.problems, *self.planned.get(uri, ()))]
        )

    def _publish(self, uri: str, found: list[lsp.Diagnostic]) -> None:
        self.server.text_document_publish_diagnostics(lsp.PublishDiagnosticsParams(uri=uri, diagnostics=found))

    def _diagnostic(self, document: Document, problem: Diagnostic) -> lsp.Diagnostic:
        span, others = own_place(document, problem)
        return lsp.Diagnostic(
            range=self._range(span), message=words(problem), severity=lsp.DiagnosticSeverity.Error, code=problem.code,
            source="peftc", related_information=[self._related(label) for label in others] or None,
        )  # fmt: skip

    def _related(self, label: Label) -> lsp.DiagnosticRelatedInformation:
        return lsp.DiagnosticRelatedInformation(location=self._location(label.span), message=label.text)

    # ---- questions ----------------------------------------------------------------------------------------------

    def complete(self, given: lsp.CompletionParams) -> lsp.CompletionList:
        """What may stand at a place."""
        document = self._now(given.text_document.uri)
        at = self._offset(document.source, given.position)
        known = self.worker.known
        found = offers(document, at, known.names() if known else ())
        items = [
            lsp.CompletionItem(
                label=one.label, kind=KINDS.get(one.kind, lsp.CompletionItemKind.Value), detail=one.detail or None,
                sort_text=f"{index:04}", filter_text=one.label,
                text_edit=lsp.TextEdit(range=self._range(Span(document.source, one.start, at)), new_text=one.label),
            )
            for index, one in enumerate(found)
        ]  # fmt: skip
        return lsp.CompletionList(is_incomplete=any(one.kind == "place" for one in found), items=items)

    def hover(self, given: lsp.HoverParams) -> lsp.Hover | None:
        """What something is."""
        document = self._now(given.text_document.uri)
        known = self.worker.known
        found = hover(document, self._offset(document.source, given.position), known.match if known else None)
        if found is None:
            return None
        return lsp.Hover(lsp.MarkupContent(lsp.MarkupKind.Markdown, found.text), self._range(found.span))

    def definition(self, given: lsp.DefinitionParams) -> lsp.Location | None:
        """Where a name is given."""
        document = self._now(given.text_document.uri)
        found = definition(document, self._offset(document.source, given.position))
        return self._location(found, given.text_document.uri) if found else None

    def format(self, given: lsp.DocumentFormattingParams) -> list[lsp.TextEdit] | None:
        """The text in its layout; nothing where it cannot be read, which its diagnostics say."""
        source = self._now(given.text_document.uri).source
        try:
            text = laid_out(source)
        except PeftcError:
            return None
        return [lsp.TextEdit(self._range(Span(source, 0, len(source.text))), text)] if text != source.text else []

    # ---- the model ----------------------------------------------------------------------------------------------

    def initialize(self, given: lsp.InitializeParams) -> None:
        self.settings = given.initialization_options

    def initialized(self, _: lsp.InitializedParams) -> None:
        self.loop = asyncio.get_running_loop()
        if self.asked is not None:
            self.worker.use(self.asked)
        else:
            self._set(self.settings)

    def configured(self, given: lsp.DidChangeConfigurationParams) -> None:
        if self.asked is None:  # the command line's word stands
            self._set(given.settings)

    def _set(self, settings: Any) -> None:
        """The model of a client's settings, `{"peftc": {"model": …, "task": …, "labels": …}}` or what is inside."""
        own = settings.get("peftc", settings) if isinstance(settings, dict) else None
        text = own.get("model") if isinstance(own, dict) else None
        if not isinstance(own, dict) or not isinstance(text, str) or not text:
            return
        if ".py:" in text or text.endswith(".py"):
            self._failed(f"{text} would run code: name it on the command line, peftc lsp --model {text}")
            return
        near = Path(self.server.workspace.root_path or ".") / text
        task, labels = own.get("task"), own.get("labels")
        self.worker.use(
            Asked(
                str(near) if near.exists() else text,
                task if isinstance(task, str) else None,
                labels if isinstance(labels, int) and labels > 0 else None,
            )
        )

    def _ready(self) -> None:
        for uri in [*self.documents]:
            self._look(uri)

    def _failed(self, reason: str) -> None:
        told = lsp.ShowMessageParams(lsp.MessageType.Error, f"peftc has no plan for a model: {reason}")
        self.server.window_show_message(told)

    def _from_worker(self, function: Any) -> Any:
        """The same function for the worker's thread: it is called on the one that answers."""

        def called(*given: Any) -> None:
            if self.loop is not None and not self.loop.is_closed():
                self.loop.call_soon_threadsafe(function, *given)

        return called

    # ---- places -------------------------------------------------------------------------------------------------

    def _path(self, uri: str) -> Path | None:
        path = uris.to_fs_path(uri) if uri.startswith("file:") else None
        return Path(path) if path else None

    @property
    def _encoding(self) -> str:
        return str(getattr(self.server.workspace.position_encoding, "value", self.server.workspace.position_encoding))

    def _offset(self, source: Source, position: lsp.Position) -> int:
        return offset(source, Place(position.line, position.character), self._encoding)

    def _range(self, span: Span) -> lsp.Range:
        start, end = both(span, self._encoding)
        return lsp.Range(lsp.Position(*start), lsp.Position(*end))

    def _location(self, span: Span, uri: str = "") -> lsp.Location:
        known = next((one for one, document in self.documents.items() if document.source is span.source), uri)
        path = Path(span.source.name)
        found = (
            known if known and self.documents[known].source is span.source else uris.from_fs_path(str(path.resolve()))
        )
        return lsp.Location(found or known, self._range(span))


def _plain(method: Any) -> Any:
    """A method as a function, on which pygls writes what it is for."""
    if asyncio.iscoroutinefunction(method):

        async def awaited(given: Any) -> Any:
            return await method(given)

        return awaited

    def called(given: Any) -> Any:
        return method(given)

    return called
