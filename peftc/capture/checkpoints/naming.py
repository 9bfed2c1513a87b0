"""Model references: what the command line and an artifact name a model by, told apart without torch.

A Hugging Face folder or hub id, a `.gguf` file, a bare `config.json`, or `path/to/file.py:factory`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftc.capture.checkpoints.errors import BadReference
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.lazy import Lazy

if TYPE_CHECKING:
    import huggingface_hub as hub
else:
    hub = Lazy("huggingface_hub")

SECONDS_TO_ANSWER = 5.0  # that the hub has, before it is said to be out of reach
# What a model may be for, as the hub calls it, and transformers' class for each.
TASKS = {
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
    "feature-extraction": "AutoModel",
}


@dataclass(frozen=True)
class Reference:
    """One parsed reference; `kind` is folder, gguf, config or factory.

    `trusted`: Python code in the folder may run. By the user's own word alone, never by what a file says. `task`, of
    `TASKS`, and `labels` say which head the model gets, in place of what its config says; so does `model_class`, a name
    of transformers'.
    """

    text: str
    kind: str
    path: Path | None = None
    factory: str = ""
    trusted: bool = False
    task: str = ""
    labels: int | None = None
    model_class: str = ""

    @property
    def runs_code(self) -> bool:
        """Whether building the model executes a file that the reference names."""
        return self.kind == "factory"


def parse_reference(text: str | Path | Reference, *, trust_remote_code: bool = False) -> Reference:
    """Tells the kinds of reference apart by their spelling and by what is on disk.

    Args:
        text: the reference; one that was told apart before stays as it is.
        trust_remote_code: Python code in a Hugging Face folder may run.

    Raises:
        PeftcError: `bad-reference`.
    """
    if isinstance(text, Reference):
        return text
    try:
        return _parsed(str(text), trust_remote_code)
    except (OSError, ValueError) as error:  # no path that any system could have
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise PeftcError(BadReference(reference=str(text), reason=reason)) from None


def _parsed(text: str, trusted: bool) -> Reference:
    file, colon, factory = text.rpartition(":")
    if colon and file.endswith(".py"):
        if not Path(file).is_file():
            raise PeftcError(BadReference(reference=text, reason=f"there is no file {file}"))
        return Reference(text, "factory", Path(file), factory)
    path = Path(text)
    if text.endswith(".py"):
        reason = "name a function in it"
        raise PeftcError(BadReference(reference=text, reason=reason, hint=f"{text}:make_model"))
    if path.suffix in (".gguf", ".json"):
        if not path.is_file():
            raise PeftcError(BadReference(reference=text, reason="there is no such file"))
        return Reference(text, "gguf" if path.suffix == ".gguf" else "config", path, trusted=trusted)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise PeftcError(BadReference(reference=text, reason="the folder has no config.json"))
        return Reference(text, "folder", path, trusted=trusted)
    if text.startswith((".", "/", "~")) or text.endswith("/") or text.count("/") > 1:
        raise PeftcError(BadReference(reference=text, reason="there is no such folder"))
    return Reference(text, "folder", trusted=trusted)


def answering(reference: Reference) -> None:
    """Nothing, for a folder, a file, and a hub id that is in the cache or that the hub can be asked for.

    huggingface_hub asks six times within half a minute where nobody answers: one question comes before.

    Raises:
        PeftcError: `bad-reference`.
    """
    if reference.kind != "folder" or reference.path is not None:
        return
    name, missing = reference.text, "there is no such folder"
    try:
        if isinstance(hub.try_to_load_from_cache(name, "config.json"), str):
            return
        if not hub.is_offline_mode():
            hub.get_session().head(hub.hf_hub_url(name, "config.json"), timeout=SECONDS_TO_ANSWER)
            return
        reason = f"{missing}, and HF_HUB_OFFLINE keeps from asking the hub for it"
    except ValueError as error:
        reason = f"{missing}, and it is no hub id: {error}"
    except Exception as error:  # of whichever library it asks by
        reason = f"{missing}, and the hub cannot be asked for it: {error}"
    raise PeftcError(BadReference(reference=name, reason=reason))
