"""The specs that every type is tried with: statements by role."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch


@dataclass(frozen=True)
class Spec:
    """A statement and the roles that it is for, those of them that a model has; `instead` where it has none.

    One without roles is about the whole model.
    """

    statement: str
    roles: tuple[str, ...]
    instead: str | None = None

    def on(self, offered: Collection[str]) -> str | None:
        """As a spec for a model with these roles, None where there is nothing for it."""
        present = [role for role in self.roles if any(fnmatch(one, role) for one in offered)]
        what = ", ".join(present) or self.instead
        return None if what is None else self.statement.format(what)


SPECS = {
    "lora": Spec("apply lora(r=4) to {}", ("attn.q", "attn.v", "attn.o", "mlp.*"), "linear"),
    "linear": Spec("apply lora(r=4) to {}", ("linear",)),
    "prefix": Spec("apply prefix(length=4) to {}", ("attn",)),
    "adapter": Spec("apply adapter(size=8) to {}", ("attn", "mlp")),
    "ia3": Spec("apply ia3 to {}", ("attn.k", "attn.v", "mlp.down"), "linear"),
    "dora": Spec("apply dora(r=4) to {}", ("attn.q", "attn.v", "mlp.down"), "linear"),
    "prompt": Spec("apply prompt(length=4)", ()),
    "norm": Spec("train {}", ("norm",)),
    "nf4": Spec("quantize linear except head with nf4\napply lora(r=4) to {} except head", ("linear",)),
}
