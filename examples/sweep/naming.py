"""What the names of linear layers say of their roles, where these are obvious, against what was found by data flow."""

from __future__ import annotations

import re
from typing import Any

import torch

from peftc.protocol.site import Projection

OBVIOUS = {
    "attn.q": r"(attn|attention)\w*\.(\w+\.)?(q_proj|query|q_lin|wq|to_q)$",
    "attn.k": r"(attn|attention)\w*\.(\w+\.)?(k_proj|key|k_lin|wk|to_k)$",
    "attn.v": r"(attn|attention)\w*\.(\w+\.)?(v_proj|value|v_lin|wv|to_v)$",
    "attn.o": r"(attn|attention)\w*\.(\w+\.)?(o_proj|out_proj|out_lin|wo|to_out)$",
    "mlp.gate": r"(mlp|ffn|feed_forward)\.(\w+\.)?(gate_proj|wi_0|w1_gate)$",
    "mlp.up": r"(mlp|ffn|feed_forward)\.(\w+\.)?(up_proj|fc1|dense_h_to_4h|c_fc|wi_1)$",
    "mlp.down": r"(mlp|ffn|feed_forward)\.(\w+\.)?(down_proj|fc2|dense_4h_to_h|wo)$",
}  # fmt: skip
NONE_OF_THESE = re.compile(r"(router|gate)$|(router|gate)\.(weight|proj|layer|classifier)$")


_ONLY_SIZES = re.compile(r"(?<!with_)sizes?\b|_like|new_")


def _is_read(node: torch.fx.Node) -> bool:
    """Whether anything that a model returns depends on a value's numbers: without its kernels MRA has those of none."""
    queue, seen = [node], {node}
    for one in queue:
        if one.op == "output":
            return True
        more = [user for user in one.users if user not in seen and not _ONLY_SIZES.search(str(user.target))]
        seen.update(more)
        queue += more
    return False


def wrong_roles(compiled: Any) -> list[str]:
    """Sites whose role and obvious name disagree."""
    problems = []
    for site in compiled.plan.sites:
        if not isinstance(site, Projection) or site.within or re.search(r"norm\w*\.mlp|indexer|gate\.", site.name):
            continue
        if not any(_is_read(use.y) for use in site.uses):
            continue
        named = {role for role, pattern in OBVIOUS.items() if re.search(pattern, site.name)}
        has = {role for role in site.roles if role.startswith(("attn.", "mlp."))}
        if named and not named & has:
            problems.append(f"{site.name} has the roles {sorted(has) or 'none'}, not {sorted(named)}")
        if NONE_OF_THESE.search(site.name) and has & {"attn.q", "attn.k", "attn.v", "attn.o"}:
            problems.append(f"{site.name} has the roles {sorted(has)}")
    return problems[:4]
