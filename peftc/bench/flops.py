"""Floating-point operations of products: torch's counter, with the formulas that it lacks.

Only products count, two operations for each multiplication and addition. peftc's own operations bring their formulas
with them (`torch.utils.flop_counter.register_flop_formula`, beside each kernel).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Shape = tuple[int, ...]
CUDA_KINDS = ("flash", "efficient", "cudnn")


def count_flops(step: Callable[[], object]) -> int:
    """Operations of `step`; compiled code does not show its products, and counts as what it calls."""
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        step()
    return int(counter.get_total_flops())


def formulas() -> dict[Any, Callable[..., Any]]:
    """By operation: a function of its arguments, and of what it returned as `out_val`."""
    return FlopCounterMode(display=False, custom_mapping=_formulas()).flop_registry


def _formulas() -> dict[Any, Callable[..., int]]:
    """By operation, for those that exist here: some belong to libraries that may not be loaded."""
    known: dict[str, Callable[..., int]] = {
        **{f"aten::_scaled_dot_product_{kind}_attention": _attention for kind in CUDA_KINDS},
        **{f"aten::_scaled_dot_product_{kind}_attention_backward": _attention_backward for kind in CUDA_KINDS},
        "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
        "aten::addmm_": _added,
        "aten::_grouped_mm": _grouped,
        "transformers::grouped_mm_fallback": _grouped,
        "transformers::grouped_mm_fallback_backward": _grouped_backward,
        "bitsandbytes::int8_linear_matmul": _by_rows,
        "mkldnn::_linear_pointwise": _by_rows,
    }
    found = {_operation(name): formula for name, formula in known.items()}
    return {operation: formula for operation, formula in found.items() if operation is not None}


def _operation(name: str) -> Any:
    namespace, _, operation = name.partition("::")
    return getattr(getattr(torch.ops, namespace), operation, None)


def _attention(q: Shape, k: Shape, v: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """q kᵀ and its product with v; half of the keys being hidden saves nothing here, as on every other backend."""
    return int(sdpa_flop_count(q, _of_each_head(k, q), _of_each_head(v, q)))


def _attention_backward(grad: Shape, q: Shape, k: Shape, v: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, q, _of_each_head(k, q), _of_each_head(v, q)))


def _of_each_head(kept: Shape, q: Shape) -> Shape:
    """The shape of keys or values with as many heads as q, which torch 2.11 counts alone."""
    return (kept[0], q[1], *kept[2:])


def _grouped(x: Shape, weight: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """x [tokens, n_in], weight [experts, n_in, n_out]: each token meets the weight of one expert."""
    return 2 * x[-2] * weight[-2] * weight[-1]


def _grouped_backward(x: Shape, weight: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """The gradients of both operands, whether or not they are wanted."""
    return 2 * _grouped(x, weight)


def _by_rows(x: Shape, weight: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """x [..., n_in], weight [n_out, n_in]."""
    return 2 * int(torch.Size(x).numel()) * weight[0]


def _added(total: Shape, left: Shape, right: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """left [m, k] times right [k, n], added to what is there."""
    return 2 * left[0] * left[1] * right[1]
