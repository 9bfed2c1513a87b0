"""What methods want to see of data before they start: sums over calibration batches, on the frozen model.

Inputs and weights' gradients come from the captured graph before any pass; gradients of a method's own state from a
second compile in which each method is replaced by its `probe()`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from peftc.capture.assumptions import SizeCheck
from peftc.capture.checkpoints.ondisk import read_tensors
from peftc.capture.convention import LOSS_INPUTS, Convention, loss_node, without_loss
from peftc.diagnostics.diagnostic import PeftcError
from peftc.driver.compiled import CompiledModule
from peftc.driver.errors import BadCalibration, NeedsCalibration
from peftc.graph.ir import get_attribute, value
from peftc.planning.plan import Binding, Plan
from peftc.planning.planner import shared_names
from peftc.protocol.method import Data
from peftc.protocol.site import Linear
from peftc.rewrite.weights import dense_weight
from peftc.spec.resolve import Intentions

Batches = Iterable[Any]
AT_ONCE = 8  # examples of a file in a batch
MASK = "attention_mask"
PROBE_STD = 0.02  # of BERT's initialisation, which SparseAdapter's adapters start from


def read_batches(path: Path) -> list[dict[str, Tensor]]:
    """The batches of a `.safetensors` file, which holds one tensor [N, ...] for each of the model's inputs.

    Raises:
        PeftcError: `bad-calibration` if there is no such file, or it holds anything else.
    """
    try:
        tensors = read_tensors(path)
    except OSError as error:
        reason = f"'{path}' cannot be read: {error.strerror or error}"
        raise PeftcError(BadCalibration(reason=reason)) from None
    except ValueError:
        raise PeftcError(BadCalibration(reason=f"'{path}' is no .safetensors file, or was cut short")) from None
    counts = {name: len(tensor) if tensor.dim() else 0 for name, tensor in sorted(tensors.items())}
    if len(set(counts.values())) > 1:
        described = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise PeftcError(
            BadCalibration(reason=f"the tensors of '{path}' differ in how many examples they hold: {described}")
        )
    starts = range(0, next(iter(counts.values()), 0), AT_ONCE)
    return [{name: tensor[start : start + AT_ONCE] for name, tensor in tensors.items()} for start in starts]


def refuse_without_data(intentions: Intentions) -> None:
    """Raises PeftcError `needs-calibration` with the methods that start from data, where there is none."""
    every = (item for one in (intentions, *intentions.tasks.values()) for item in one.applications)
    wanting = {item.span: item for item in every if item.method.data is not None}
    if wanting:
        raise PeftcError(*(NeedsCalibration(method=item.method.name, span=item.span) for item in wanting.values()))


def observed(plan: Plan, batches: Batches) -> dict[Binding, Any]:
    """What `plan`'s methods want to see of `batches`, except for gradients of their own state.

    Args:
        plan: with its graph as it was captured.
        batches: of inputs, each as the model is called: a mapping, or the arguments of a plain module.

    Raises:
        PeftcError: `bad-calibration` if there are no batches, they do not fit, or the model returns no loss for them.
    """
    wanting: dict[Data, list[Binding]] = defaultdict(list)
    for binding in plan.bindings:
        if binding.method.data is not None:
            wanting[binding.method.data].append(binding)
    module = plan.captured.module
    module.train(False)
    found: dict[Binding, Any] = {}
    if inputs := wanting[Data.INPUTS]:
        found |= _second_moments(module, plan, inputs, batches)
    if weights := wanting[Data.WEIGHT_GRADIENTS]:
        found |= _squared_gradients(module, plan, weights, batches)
    return found


def wants_state_gradients(plan: Plan) -> bool:
    """Whether some method is to be probed."""
    return any(binding.method.data is Data.STATE_GRADIENTS for binding in plan.bindings)


def probing(plan: Plan) -> Plan:
    """`plan` with each method that wants gradients of its state replaced by its probe, and no other method."""
    kept = [binding for binding in plan.bindings if binding.method.data is Data.STATE_GRADIENTS]
    standing = {one.statement: [b.site for b in kept if b.statement == one.statement] for one in kept}
    probes = {one.statement: one.method.probe() for one in kept}
    shared: dict[tuple[int, str], dict[str, Any]] = {}
    for number, sites in standing.items():
        shares = probes[number].shares(sites)
        names = shared_names(next(_home(one) for one in kept if one.statement == number), shares)
        for site, own, full in zip(sites, shares, names, strict=True):
            shared[number, site.name] = {"shared": own, "shared_names": full}
    bindings = tuple(replace(b, method=probes[b.statement], **shared[b.statement, b.site.name]) for b in kept)
    return replace(plan, bindings=bindings, trained={})


def _home(binding: Binding) -> str:
    """The module in which what a method shares lies; "" where it shares nothing, as its probe does not either."""
    return next((full[: full.rindex(f".{name}")] for name, full in binding.shared_names.items()), "")


def probed(compiled: CompiledModule, batches: Batches) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """w and ∂L/∂w summed over `batches`, by state name, for each binding of a `probing` plan that was built.

    What starts at zero is given small random numbers first: a zero has no gradient to pass on.
    """
    with torch.no_grad():
        for parameter in compiled.trainable_parameters().values():
            if not parameter.any():
                parameter.normal_(std=PROBE_STD)
    compiled.eval()
    plan = compiled.plan
    _has_loss(compiled.history["capture"], plan)
    for given in _given(plan, compiled.history["capture"], batches):
        compiled(**given).loss.backward()
    return [
        {
            name: _with_gradient(get_attribute(compiled, full))
            for name, full in binding.names.items()
            if binding.tensors[full].trainable
        }
        for binding in plan.bindings
    ]


def _with_gradient(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """A parameter and its gradient: zeros where the loss does not depend on it."""
    gradient = parameter.grad
    return parameter.detach(), torch.zeros_like(parameter) if gradient is None else gradient


def _second_moments(
    module: fx.GraphModule, plan: Plan, bindings: list[Binding], batches: Batches
) -> dict[Binding, Tensor]:
    """xᵀx over all tokens that the attention mask keeps, in double precision.

    Labels are not needed, unless the model makes its decoder's inputs of them.
    """
    watched: dict[str, list[Binding]] = defaultdict(list)
    tokens: dict[str, bool] = {}  # whether the mask is about these inputs
    main = next(iter(plan.input_values))
    for binding in bindings:
        assert isinstance(binding.site, Linear)
        for use in binding.site.uses:
            watched[use.x.name].append(binding)
            tokens[use.x.name] = MASK in plan.captured.inputs and _are_tokens(value(use.x), main)
    sums: dict[str, Tensor] = {}

    class Watch(fx.Interpreter):
        mask: Tensor

        def run_node(self, n: fx.Node) -> Any:
            x = super().run_node(n)
            if n.name in watched:
                rows = x.flatten(0, -2).double()
                kept = rows[self.mask] if tokens[n.name] else rows
                sums[n.name] = sums.get(n.name, 0) + kept.T @ kept
            return x

    unlabelled = without_loss(module.graph, plan.captured.result)
    watch = Watch(module, graph=unlabelled)
    with torch.no_grad():
        for given in _given(plan, module.graph, batches, labels=unlabelled is None):
            if MASK in given:
                watch.mask = given[MASK].bool().flatten()
            watch.run(*(tensor for name, tensor in given.items() if unlabelled is None or name not in LOSS_INPUTS))
    found: dict[Binding, Tensor] = {}
    for name, members in watched.items():
        for binding in members:
            found[binding] = found[binding] + sums[name] if binding in found else sums[name]
    return found


def _are_tokens(x: Tensor, main: Tensor) -> bool:
    """Whether rows of x [B, S, n] or [B S, n] are the tokens of the main input [B, S], which the mask is about.

    By symbols: a decoder's length has one of its own, and may be the same number.
    """
    leading = x.shape[:-1]
    flat = len(leading) == 1 and str(leading[0]) == str(main.shape[0] * main.shape[1])
    return flat or str(leading) == str(main.shape[:2])


def _squared_gradients(
    module: fx.GraphModule, plan: Plan, bindings: list[Binding], batches: Batches
) -> dict[Binding, Tensor]:
    """Σ over examples of (∂L/∂W)², the diagonal of the empirical Fisher information, one example at a time."""
    names = {binding.site.parameters[0] for binding in bindings}
    weights: dict[str, Tensor] = {name: get_attribute(module, name) for name in names}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    _has_loss(module.graph, plan)
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for given in _given(plan, module.graph, batches):
            for example in _examples(given):
                for name, gradient in zip(weights, _gradients(module, example, [*weights.values()]), strict=True):
                    sums[name] += gradient.float().square()
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    return {
        binding: dense_weight(sums[binding.site.parameters[0]], binding.site)
        for binding in bindings
        if isinstance(binding.site, Linear)
    }


def _gradients(module: fx.GraphModule, example: dict[str, Tensor], weights: list[Tensor]) -> tuple[Tensor, ...]:
    """∂L/∂W of one example; zero for a weight that the loss does not depend on."""
    with torch.enable_grad():
        loss = module(*example.values())[0]
        if not loss.isfinite():
            reason = f"the loss of an example is {loss.item()}, as where every label is -100"
            raise PeftcError(BadCalibration(reason=reason))
        return torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)


def _examples(given: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    size = len(next(iter(given.values())))
    for row in range(size):
        yield {name: tensor[row : row + 1] for name, tensor in given.items()}


def _has_loss(graph: fx.Graph, plan: Plan) -> None:
    if loss_node(graph, plan.captured.result) is None:
        raise PeftcError(BadCalibration(reason=f"{plan.sites.model} returns no loss to take gradients of"))


def _given(plan: Plan, captured: fx.Graph, batches: Batches, *, labels: bool = True) -> Iterator[dict[str, Tensor]]:
    """Each batch as the inputs of the `captured` graph, by name and in order. `labels`: whether they must be there."""
    convention = Convention(plan.captured.inputs, plan.captured.result)
    device = next(plan.captured.module.parameters()).device
    expected = dict(zip(convention.inputs, plan.input_values, strict=True))
    sizes = SizeCheck(plan.captured.assumptions, captured, {})
    empty = True
    for batch in batches:
        empty = False
        args = () if isinstance(batch, Mapping) else tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        kwargs = dict(batch) if isinstance(batch, Mapping) else {}
        for name, item in (*zip(convention.inputs, args, strict=False), *kwargs.items()):
            _is_tensor(name, item)
        try:
            given = convention.bind(args, kwargs)
        except TypeError as error:
            raise PeftcError(BadCalibration(reason=str(error))) from None
        missing = [name for name in convention.inputs if name not in given]
        if missing and (labels or set(missing) - set(LOSS_INPUTS)):
            raise PeftcError(BadCalibration(reason=f"a batch has no {', '.join(missing)}"))
        for name, tensor in given.items():
            _fits(name, tensor, expected[name])
        if (refusal := sizes.refusal(given)) is not None:
            raise refusal
        yield {name: tensor.to(device) for name, tensor in given.items()}
    if empty:
        raise PeftcError(BadCalibration(reason="there are no batches"))


def _is_tensor(name: str, given: Any) -> None:
    if not isinstance(given, Tensor):
        reason = f"{name} is a {type(given).__name__}, and the model takes a tensor"
        raise PeftcError(BadCalibration(reason=reason))


def _fits(name: str, given: Tensor, expected: Tensor) -> None:
    """Refuses a tensor of another kind than the model was captured with."""
    if given.dim() != expected.dim() or given.is_floating_point() != expected.is_floating_point():
        described = (
            f"{str(tensor.dtype).removeprefix('torch.')} of {tensor.dim()} dimensions" for tensor in (given, expected)
        )
        raise PeftcError(BadCalibration(reason="{} is {}, and the model takes {}".format(name, *described)))
    if not len(given):
        raise PeftcError(BadCalibration(reason=f"{name} is empty"))
