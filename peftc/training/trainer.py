"""transformers' Trainer, with the learning rates that a spec asks for; what it saves can be loaded by itself."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer

from peftc.diagnostics import debug
from peftc.diagnostics.diagnostic import PeftcError
from peftc.driver.compiled import CompiledModule
from peftc.files.folder import LAST
from peftc.files.hf_peft.card import CARD, is_ours


class SavesAdapter:
    """For a class of Trainer's kind: `class Mine(SavesAdapter, SFTTrainer)` writes whole adapters of a compiled model.

    Of a model that is none of its own classes Trainer writes the `state_dict()` alone, and asks nobody. Beside that
    each checkpoint and each `save_model` has what `peftc.load` reads and, of what HF PEFT has, what it reads.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        trainer = cast(Trainer, self)
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        folder = output_dir or trainer.args.output_dir or "."
        if trainer.args.should_save and isinstance(model, CompiledModule):
            write_adapter(model, Path(folder))


def write_adapter(model: CompiledModule, folder: Path) -> None:
    """Writes an artifact, and the files of HF PEFT where it has the method, beside what is in a folder.

    A model card that somebody else wrote there stays.

    Raises:
        PeftcError: `not-in-spec`, `cannot-write`, as `CompiledModule.save`.
    """
    with TemporaryDirectory(dir=folder, prefix=".adapter-") as made:
        model.save(Path(made) / "own")
        written = [Path(made) / "own"]
        try:
            model.save_pretrained(Path(made) / "theirs")
            written.append(Path(made) / "theirs")
        except PeftcError as error:
            debug.tell(1, [f"not in HF PEFT's format: {error}"])
        ours = is_ours(folder)
        files = (file for one in written for file in one.iterdir() if ours or file.name != CARD)
        for file in sorted(files, key=lambda file: file.name in LAST):
            file.replace(folder / file.name)


class SpecTrainer(Trainer):
    """A Trainer of a compiled model.

    Whatever optimiser the settings name, its groups have the learning rates that methods ask for (LoRA+).
    """

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's own, its groups parted by learning rate."""
        made = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        compiled: Any = self.accelerator.unwrap_model(self.model)
        rates = {id(p): group["lr"] for group in compiled.param_groups(1.0) for p in group["params"]}
        if made and len({*rates.values()}) > 1:
            before = optimizer.param_groups[:]
            optimizer.param_groups.clear()
            for group in before:
                parts: dict[float, list[nn.Parameter]] = {}
                for parameter in group["params"]:
                    parts.setdefault(rates.get(id(parameter), 1.0), []).append(parameter)
                for rate, members in parts.items():
                    optimizer.add_param_group({**group, "params": members, "lr": group["lr"] * rate})
        return optimizer

    def silence(self) -> None:
        """Nothing is printed but by the callbacks that were given."""
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)


def accuracy(prediction: Any) -> dict[str, float]:
    """The share of the held-out examples whose class is told."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}
