"""Models to train, rows to train on, a Trainer that keeps its losses, and HF PEFT's state carried over."""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Trainer, TrainingArguments

import models
import peftc
from peftc.graph.ir import get_attribute
from zoo import VOCABULARY, ZOO

LORA = "apply lora(r=4, alpha=8) to attn.*, mlp.*"
LEAVES = {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "m", "ia3_l": "l"}
Examples = list[dict[str, Any]]


def compiled(name: str, spec: str = LORA, *, seed: int = 0) -> peftc.CompiledModule:
    """A zoo model with the spec's adapters, drawn with `seed`."""
    torch.manual_seed(seed)
    return peftc.compile(ZOO[name](), spec)


def randomise(model: nn.Module, *, seed: int = 0) -> None:
    """Makes what learns non-trivial: a zero B or an m of the base's own lengths would hide mistakes."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)


def rows(length: int, count: int) -> Examples:
    """Examples of random tokens for the tiny models."""
    random = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, VOCABULARY, (count, length), generator=random).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


class Recorder(Trainer):
    """Keeps the loss of every step at full precision; the log rounds it. In an evaluation outputs come with it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if isinstance(loss, Tensor):
            self.losses.append(loss.item())
        return loss


def trainer(
    model: nn.Module,
    folder: Path,
    data: Examples,
    *,
    steps: int,
    lr: float,
    kind: Any = Recorder,
    **settings: Any,
) -> Recorder:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=lr,
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **{"save_strategy": "no", "logging_strategy": "no", **settings},
    )
    evaluated = data if "eval_strategy" in settings else None
    made: Recorder = kind(model=model, args=arguments, train_dataset=data, eval_dataset=evaluated)
    return made


def topic_blocks(length: int, count: int) -> Examples:
    """The first tokens of Python's help texts, in blocks."""
    tokenizer = AutoTokenizer.from_pretrained(models.smollm2_dir())
    tokens = tokenizer("\n".join(topics.values())[: 8 * length * count], verbose=False)["input_ids"]
    cut = [tokens[start : start + length] for start in range(0, length * count, length)]
    return [{"input_ids": row, "labels": row} for row in cut]


# ---- One spec, five models ------------------------------------------------------------------------------------------


def their_tensors(theirs: nn.Module, ours: peftc.CompiledModule) -> dict[str, nn.Parameter]:
    """HF PEFT's trainable tensors by the names they have in the compiled model."""
    found = {}
    for name, parameter in theirs.named_parameters():
        parts = name.removeprefix("base_model.model.").split(".")
        at = next((index for index, part in enumerate(parts) if part in LEAVES), None)
        if at is None:
            continue
        module, leaf = ".".join(parts[:at]), LEAVES[parts[at]]
        (own,) = (
            name for name in ours.trainable_parameters() if name.startswith(f"{module}.") and name.endswith(f".{leaf}")
        )
        found[own] = parameter
    assert found.keys() == ours.trainable_parameters().keys()
    return found


def copy_state(theirs: nn.Module, ours: peftc.CompiledModule) -> None:
    """Gives the compiled model HF PEFT's state."""
    with torch.no_grad():
        for name, parameter in their_tensors(theirs, ours).items():
            own = ours.get_parameter(name)
            own.copy_(parameter.reshape(own.shape))


def gradients_by_their_names(compiled: peftc.CompiledModule) -> dict[str, Tensor]:
    """The gradients of a compiled model under the names that HF PEFT has for the tensors."""
    found: dict[str, Tensor] = {}
    for binding in compiled.plan.bindings:
        state = {name: get_attribute(compiled, full) for name, full in binding.names.items()}
        own = {name: tensor if tensor.grad is None else tensor.grad for name, tensor in state.items()}
        renamed = binding.method.to_peft(binding.site, own)[1]
        found |= {f"{binding.site.name}.{name}": tensor for name, tensor in renamed.items()}
    return found
