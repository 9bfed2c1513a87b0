"""`peftc lsp`, as an editor speaks with it: over standard input and output."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from peftc.cli.editor.document import look
from peftc.cli.editor.offers import offers

lsp: Any = pytest.importorskip("lsprotocol.types")
client: Any = pytest.importorskip("pygls.lsp.client")

SPEC = """\
let top = attn.q in layers[1:]
let small = lora(r=2)
apply small to top
# Ω𝄞
train "**.norm", nrom
"""


class Session:
    """A server, and what it has said of each text."""

    def __init__(self, folder: Path) -> None:
        self.client = client.LanguageClient("test", "0")
        self.folder = folder
        self.told: asyncio.Queue[Any] = asyncio.Queue()
        self.shown: asyncio.Queue[Any] = asyncio.Queue()
        self.client.feature(lsp.TEXT_DOCUMENT_PUBLISH_DIAGNOSTICS)(lambda given: self.told.put_nowait(given))
        self.client.feature(lsp.WINDOW_SHOW_MESSAGE)(lambda given: self.shown.put_nowait(given))
        self.version = 0

    async def start(self, *arguments: str, options: Any = None) -> None:
        await self.client.start_io(sys.executable, "-m", "peftc", "lsp", *arguments)
        given = lsp.InitializeParams(
            capabilities=lsp.ClientCapabilities(), root_uri=self.folder.as_uri(), initialization_options=options
        )
        await self.client.initialize_async(given)
        self.client.initialized(lsp.InitializedParams())

    def uri(self, name: str) -> str:
        return (self.folder / name).as_uri()

    def open(self, text: str, name: str = "spec.peft") -> None:
        item = lsp.TextDocumentItem(uri=self.uri(name), language_id="peft", version=0, text=text)
        self.client.text_document_did_open(lsp.DidOpenTextDocumentParams(text_document=item))

    def replace(self, line: int, start: int, end: int, text: str, name: str = "spec.peft") -> None:
        self.version += 1
        there = lsp.Range(lsp.Position(line, start), lsp.Position(line, end))
        self.client.text_document_did_change(
            lsp.DidChangeTextDocumentParams(
                text_document=lsp.VersionedTextDocumentIdentifier(version=self.version, uri=self.uri(name)),
                content_changes=[lsp.TextDocumentContentChangePartial(range=there, text=text)],
            )
        )

    async def diagnostics(self) -> list[Any]:
        """The next that are told."""
        found = [*(await asyncio.wait_for(self.told.get(), 60)).diagnostics]
        return found

    def at(self, line: int, column: int, name: str = "spec.peft") -> dict[str, Any]:
        document = lsp.TextDocumentIdentifier(uri=self.uri(name))
        return {"text_document": document, "position": lsp.Position(line, column)}

    async def labels(self, line: int, column: int) -> list[str]:
        found = await self.client.text_document_completion_async(lsp.CompletionParams(**self.at(line, column)))
        return [item.label for item in found.items]

    async def hover(self, line: int, column: int) -> str:
        found = await self.client.text_document_hover_async(lsp.HoverParams(**self.at(line, column)))
        return found.contents.value if found else ""


def speak(folder: Path, talk: Callable[[Session], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        session = Session(folder)
        try:
            await asyncio.wait_for(talk(session), 120)
        finally:
            await asyncio.wait_for(session.client.shutdown_async(None), 20)
            session.client.exit(None)
            await asyncio.wait_for(session.client.stop(), 20)

    asyncio.run(all_of_it())


def test_a_spec_is_written(tmp_path: Path) -> None:
    async def talk(session: Session) -> None:
        await session.start()
        session.open(SPEC)
        (problem,) = await session.diagnostics()
        assert (problem.code, problem.range.start) == ("unknown-role", lsp.Position(4, 17))
        assert "did you mean 'norm'?" in problem.message
        session.replace(4, 17, 21, "norm")
        assert await session.diagnostics() == []

        # Definitions of a selector's and a method's name.
        for line, column, target in (2, 16, lsp.Position(0, 4)), (2, 7, lsp.Position(1, 4)):
            found = await session.client.text_document_definition_async(
                lsp.DefinitionParams(**session.at(line, column))
            )
            assert (found.uri, found.range.start) == (session.uri("spec.peft"), target)
        assert "Hu et al. 2021" in await session.hover(1, 13)
        assert "rank" in await session.hover(1, 17)
        assert "attn.q in layers[1:]" in await session.hover(2, 16)

        session.replace(3, 0, 5, "apply lora(r=8, ")  # 𝄞 is two of UTF-16's units, and one character
        (problem,) = await session.diagnostics()
        assert problem.code == "unclosed-bracket"
        assert "Hu et al. 2021" in await session.hover(3, 8), "a method of a line that cannot be read"
        labels = await session.labels(3, 16)
        assert "alpha" in labels
        assert "r" not in labels
        session.replace(3, 0, 16, "apply l")
        await session.diagnostics()
        assert {"lora", "small", "adapter"} <= {*await session.labels(3, 7)}
        session.replace(3, 0, 7, "apply lora(r=8, init=pissa) to a")
        await session.diagnostics()
        assert {"attn.q", "top"} <= {*await session.labels(3, 32)}
        assert "pissa" in await session.labels(3, 21)
        session.replace(3, 31, 32, "attn.q ")
        await session.diagnostics()
        assert {"in", "where", "except"} == {*await session.labels(3, 38)}

        options = lsp.FormattingOptions(tab_size=4, insert_spaces=True)
        document = lsp.TextDocumentIdentifier(uri=session.uri("spec.peft"))
        (edit,) = await session.client.text_document_formatting_async(
            lsp.DocumentFormattingParams(text_document=document, options=options)
        )
        assert "to attn.q\ntrain" in edit.new_text

    speak(tmp_path, talk)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", {"fit", "require"}), ("fit ", {"memory", "trainable"}), ("fit memory(", {"batch", "seq"}),
        ("fit memory <= 3 GB using ", {"checkpoint", "nf4"}), ("fit memory <= 3 GB using int8, ", {"nf4"}),
        ("fit memory <= 3 GB ", {"using"}), ("apply lora(r=", {"auto"}), ("let fit = attn.q\ntrain ", {"fit"}),
    ],
)  # fmt: skip
def test_a_fit_is_written(text: str, wanted: set[str]) -> None:
    labels = {offer.label for offer in offers(look(text, None, {}), len(text))}
    assert wanted <= labels
    assert "total" not in labels


def test_a_used_file(tmp_path: Path) -> None:
    """Its mistakes stand at the line that uses it, also before it is saved."""
    (tmp_path / "common.peft").write_text("let wide = mlp.*\n")

    async def talk(session: Session) -> None:
        await session.start()
        session.open('use "common.peft"\ntrain wide\n')
        assert await session.diagnostics() == []
        found = await session.client.text_document_definition_async(lsp.DefinitionParams(**session.at(1, 8)))
        assert (found.uri, found.range.start) == (session.uri("common.peft"), lsp.Position(0, 4))
        session.open("let wide = mlp.*\n", "common.peft")
        assert await session.diagnostics() == []
        session.replace(0, 11, 16, "mlq.*", "common.peft")
        (own,), (other,) = await session.diagnostics(), await session.diagnostics()
        assert (own.range.start, other.range.start) == (lsp.Position(0, 11), lsp.Position(0, 4))
        assert other.related_information[0].location.uri == session.uri("common.peft")

    speak(tmp_path, talk)


@pytest.mark.slow
def test_a_model(tmp_path: Path) -> None:
    """A setting of the client; one that runs code is refused there."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "model.py").write_text("raise SystemExit('it ran')\n")

    async def talk(session: Session) -> None:
        await session.start(options={"model": "model.py:make"})
        assert "would run code" in (await session.shown.get()).message
        settings = {"peftc": {"model": "config.json"}}
        session.client.workspace_did_change_configuration(lsp.DidChangeConfigurationParams(settings=settings))
        session.open('let top = attn.q in layers[1:]\ntrain top\ntrain norm in layers[5:]\ntrain "model.la\n')
        (problem,) = await session.diagnostics()
        assert problem.code == "unclosed-string"
        assert (await session.diagnostics())[0].code == "unclosed-string"  # again, as there is a model
        names = await session.labels(3, 15)
        assert names[0] == "model.layers.*.self_attn.q_proj"
        assert "model.layers.1.mlp.down_proj" in names
        assert "1 place of LlamaForCausalLM: model.layers.1.self_attn.q_proj" in await session.hover(1, 7)
        assert "2 places" in await session.hover(0, 12)
        session.replace(3, 0, 15, "")
        assert await session.diagnostics() == []
        (problem,) = await session.diagnostics()
        assert (problem.code, problem.range.start.line) == ("no-match", 2)

    speak(tmp_path, talk)


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from peftc.cli import main
    from peftc.cli.editor import lsp as command

    monkeypatch.setattr(command, "find_spec", lambda _: None)
    assert main(["lsp"]) == 1
    assert 'pip install "peftc[lsp]"' in capsys.readouterr().err
