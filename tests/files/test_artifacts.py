"""What happens to an artifact that something happened to, and to one that is being written when something does."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftc
from subjects import compiled, subject
from variants import statement
from zoo import ZOO

# ---- Claim 5 on its own: what happens to an artifact that something happened to -----------------------------------

SPEC = "apply lora(r=2) to attn.q, mlp.down\ntrain norm"
TENSORS, MANIFEST = "adapter.safetensors", "peftc.json"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    case = compiled("plain", SPEC)
    case.randomise()
    folder = tmp_path / "adapter"
    case.module.save(folder)
    return folder


def refused(folder: Path, code: str, base: nn.Module | None = None) -> None:
    """Loading fails with a diagnostic, and the base model is as it was."""
    with pytest.raises(peftc.PeftcError) as raised:
        peftc.load(folder, base or subject("plain").base)
    assert [diagnostic.code for diagnostic in raised.value.diagnostics] == [code]
    assert subject("plain").is_untouched()


@pytest.mark.parametrize("file", [TENSORS, MANIFEST])
@pytest.mark.xdist_group("conformance-plain")
class TestDamage:
    def test_a_missing_file(self, artifact: Path, file: str) -> None:
        (artifact / file).unlink()
        refused(artifact, "bad-artifact")

    @pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
    def test_a_truncated_file(self, artifact: Path, file: str, share: float) -> None:
        whole = (artifact / file).read_bytes()
        (artifact / file).write_bytes(whole[: int(share * len(whole))])
        refused(artifact, "bad-artifact")

    def test_a_flipped_bit(self, artifact: Path, file: str) -> None:
        """Two hundred bits, spread over the file."""
        whole = (artifact / file).read_bytes()
        for bit in range(0, 8 * len(whole), max(1, len(whole) // 25)):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            (artifact / file).write_bytes(damaged)
            refused(artifact, "bad-artifact")

    @pytest.mark.parametrize("content", [b"{}", b"null", b'"peftc"', b"\xff\xfe", b"\x80\x04K\x01."])
    def test_another_file(self, artifact: Path, file: str, content: bytes) -> None:
        (artifact / file).write_bytes(content)
        refused(artifact, "bad-artifact")


@pytest.mark.parametrize("content", [b"[]", b"7", b"[" * 20_000], ids=["a list", "a number", "deep"])
@pytest.mark.xdist_group("conformance-plain")
def test_a_manifest_of_another_kind(artifact: Path, content: bytes) -> None:
    (artifact / MANIFEST).write_bytes(content)
    refused(artifact, "bad-artifact")


def reseal(folder: Path, **changes: Any) -> None:
    """Edits the manifest and makes its checksum fit again; None removes a field."""
    body = json.loads((folder / MANIFEST).read_text()) | changes
    body = {key: value for key, value in body.items() if key != "checksum" and value is not None}
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(body | {"checksum": seal}))


def with_input(shape: list[Any], dtype: str = "float64", name: str = "x") -> dict[str, Any]:
    """A change of the manifest: another recorded input."""
    return {"example": {"args": [], "kwargs": {name: [shape, dtype]}}}


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 99},
        {"tensors": "0" * 64},
        {"spec": "apply lora(r=2) to attn.k\ntrain norm"},
        {"spec": "apply dora(r=2) to attn.q, mlp.down\ntrain norm"},
        {"spec": "apply lora(r=4) to attn.q, mlp.down\ntrain norm"},
        *({field: None} for field in ("format", "spec", "model", "base", "tensors", "example")),
        *({field: 7} for field in ("spec", "model", "reference", "base", "frozen", "tensors", "example")),
        *({"example": example} for example in ({}, {"args": 7, "kwargs": {}}, {"args": [], "kwargs": [1]})),
        with_input([3, 6, 24], "no_such_type"),
        with_input([-1, 6, 24]),
        with_input(["3", 6, 24]),
        with_input([10**9, 10**9, 24]),
    ],
    ids=str,
)
@pytest.mark.xdist_group("conformance-plain")
def test_an_edited_manifest_is_refused(artifact: Path, changes: dict[str, Any]) -> None:
    reseal(artifact, **changes)
    refused(artifact, "bad-artifact")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"spec": "apply loraa to attn.q"}, "unknown-method"),
        ({"spec": "apply lora(r=2) to"}, "missing-selector"),
        (with_input([3, 6, 24], "int64"), "cannot-capture"),
        (with_input([3, 6, 7]), "cannot-capture"),
        (with_input([3, 6, 24], name="y"), "cannot-capture"),
    ],
    ids=str,
)
@pytest.mark.xdist_group("conformance-plain")
def test_a_manifest_in_order_that_makes_no_sense(artifact: Path, changes: dict[str, Any], code: str) -> None:
    """A spec or inputs that can be read, and fail as they would have when the artifact was made."""
    reseal(artifact, **changes)
    refused(artifact, code)


@pytest.mark.xdist_group("conformance-plain")
def test_a_wrong_base_is_refused(artifact: Path) -> None:
    other = copy.deepcopy(subject("plain").base)
    with torch.no_grad():
        other.get_parameter("head.bias")[0] += 1e-9
    refused(artifact, "wrong-base", other)
    refused(artifact, "wrong-base", subject("llama").base)


def with_other_norms() -> nn.Module:
    """The base model of `artifact` with other numbers where the artifact has its own."""
    other = copy.deepcopy(subject("plain").base)
    with torch.no_grad():
        for name in compiled("plain", SPEC).module.plan.trained:
            other.get_parameter(name).normal_()
    return other


@pytest.mark.xdist_group("conformance-plain")
def test_what_the_artifact_holds_may_be_anything_in_the_base(artifact: Path) -> None:
    expected, found = (peftc.load(artifact, base).eval() for base in (subject("plain").base, with_other_norms()))
    assert found.plan.trained
    for name in found.plan.trained:
        assert torch.equal(found.get_parameter(name), expected.get_parameter(name))
        assert not torch.equal(found.base.get_parameter(name), expected.base.get_parameter(name))
    x = torch.linspace(-1, 1, 3 * 6 * 24, dtype=torch.float64).view(3, 6, 24)
    assert torch.equal(found(x), expected(x))


@pytest.mark.xdist_group("conformance-plain")
def test_an_artifact_of_before_is_held_against_the_whole_base(artifact: Path) -> None:
    """Its manifest has no fingerprint of what stays frozen."""
    reseal(artifact, frozen=None)
    peftc.load(artifact, subject("plain").base)
    refused(artifact, "wrong-base", with_other_norms())


@pytest.mark.xdist_group("conformance-llama")
def test_a_base_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    """The same weights under another configuration, or with another buffer, give other outputs."""
    compiled("llama", statement("ia3")).module.save(tmp_path / "adapter")
    other = ZOO["llama"]()
    changed = type(other)(type(other.config).from_dict({**other.config.to_dict(), "hidden_act": "gelu"}))
    changed.load_state_dict(other.state_dict())
    refused(tmp_path / "adapter", "wrong-base", changed)
    other.get_buffer("model.rotary_emb.inv_freq")[0] += 1e-3
    refused(tmp_path / "adapter", "wrong-base", other)


@pytest.mark.xdist_group("conformance-llama")
def test_a_base_that_is_called_otherwise_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a model came from and what its labels are called changes no output."""
    case = compiled("llama", statement("ia3"))
    case.module.save(tmp_path / "adapter")
    config: Any = case.subject.base.config
    monkeypatch.setattr(config, "_name_or_path", "elsewhere")
    monkeypatch.setattr(config, "id2label", {0: "good", 1: "bad"})
    peftc.load(tmp_path / "adapter", case.subject.base)


@pytest.mark.xdist_group("conformance-plain")
def test_save_leaves_alone_what_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(peftc.PeftcError, match="something else"):
        compiled("plain", SPEC).module.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
