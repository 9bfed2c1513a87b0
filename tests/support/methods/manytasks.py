"""What the tests of several tasks share: a small llama, specs, numbers at random, text."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import transformers as hf

import peftc

SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.randint(3, 99, (5, 7), generator=torch.Generator().manual_seed(0))
LORA = "apply lora(r=4) to attn.q, attn.v"
ADALORA = "apply adalora(r=8, target=2, warmup=2, final=2, interval=1) to attn.v"

# What all have in common, and each task's own.
SPECS: dict[str, tuple[str, dict[str, str]]] = {
    "methods": (
        "apply ia3 to mlp.down",
        {"one": LORA, "two": LORA, "other": "apply dora(r=3) to mlp.up\napply adapter(size=4) to mlp\ntrain norm"},
    ),
    "in front": ("", {"a": "apply prefix(length=4) to attn", "b": "apply prompt(length=3)", "c": LORA}),
    "taken out": ("", dict.fromkeys("ab", "apply lora(r=4, init=pissa) to attn.q") | {"c": LORA}),
    "taken out for all": ("apply lora(r=4, init=pissa) to attn.q", {"a": "apply ia3 to attn.k", "b": "train norm"}),
    "packed": ("quantize linear except head with nf4", {"a": LORA, "b": "apply lora(r=2, init=pissa) to attn.o"}),
    "one packed": ("", {"a": f"quantize mlp.* with nf4\n{LORA}", "b": LORA}),
    "with a schedule": ("", {"a": ADALORA, "b": "apply vera(r=8) to attn.q, attn.v"}),
}


@cache
def llama() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).eval()


def text_of(common: str, tasks: Mapping[str, str]) -> str:
    return "\n".join((common, *(f"task {name} {{\n{body}\n}}" for name, body in tasks.items())))


def compiled(common: str, tasks: Mapping[str, str], base: Any = None) -> Any:
    """With numbers at random in all that learns."""
    made = peftc.compile(llama() if base is None else base, text_of(common, tasks))
    with torch.no_grad():
        for parameter in made.trainable_parameters().values():
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return made


def alone(several: Any, task: str | None, text: str) -> Any:
    """One task's own spec, compiled by itself, with the tensors that it has among the others."""
    made = peftc.compile(several.base, text)
    state = several.state_dict()
    made.load_state_dict({name: state.get(f"task.{task}.{name}", state.get(name)) for name in made.state_dict()})
    return made


def gradients(module: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def written(module: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    found: torch.Tensor = module.generate(
        ids, attention_mask=options.pop("attention_mask", torch.ones_like(ids)), max_new_tokens=6, min_new_tokens=6,
        do_sample=False, **options,
    )  # fmt: skip
    return found


BY_ROW = {
    "a": "apply lora(r=4) to attn.*, mlp.* except expert",
    "b": "apply lora(r=2, alpha=8) to attn.q, mlp.down except expert\napply ia3 to attn.k",
    "c": "apply dora(r=3) to attn.v\napply adapter(size=4) to attn",
}
ROWS: Sequence[str | None] = ("b", None, "a", "c", "a")
