"""Bindings -> nodes: traces each method's rewrite once for each shape it meets and splices it at every site."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from peftc.diagnostics.diagnostic import PeftcError
from peftc.graph.ir import Provenance, attribute_node, get_attribute, redirect, set_tensor, splice, trace, value
from peftc.graph.normalise import training_tensor
from peftc.planning.plan import Binding, Plan
from peftc.protocol.method import State
from peftc.protocol.site import Block, Module, Projection, Use
from peftc.rewrite.blocks import onto_block
from peftc.rewrite.errors import CannotStart
from peftc.rewrite.grouped import product_like
from peftc.rewrite.packed import frozen_weight, is_packed, pack, pack_as_found
from peftc.rewrite.start_files import load_start

HALF = (torch.float16, torch.bfloat16)
# Operands that are no state: the rows of a slice that is no range, the ends of groups, whether the model is training.
ROWS = "rows"
OFFSETS = "offsets"
TRAINING = "training"


def dense_weight(stored: Tensor, site: Projection, index: Tensor | None = None) -> Tensor:
    """The site's weight as [*batch, n_out, n_in], whatever way it is stored; a view where it can be one."""
    return take(canonical(stored, site), site, -2, index)


def canonical(stored: Tensor, site: Projection) -> Tensor:
    """A view of the whole stored weight whose rows are output features."""
    return stored.transpose(-2, -1) if site.transposed else stored


def replace_rows(stored: Tensor, site: Projection, part: Tensor) -> None:
    """Writes the site's rows of a stored weight, in place."""
    rows = slice(None) if site.rows is None else list(site.rows)
    canonical(stored, site)[..., rows, :] = part


def take(whole: Tensor, site: Projection, dim: int, index: Tensor | None = None) -> Tensor:
    """The site's rows of a fused tensor along `dim`. `index` holds them where they are no range."""
    if site.rows is None:
        return whole
    if site.slice is not None:
        return whole.narrow(dim, site.slice[0], len(site.rows))
    return whole.index_select(dim, torch.tensor(site.rows, device=whole.device) if index is None else index)


def _put(whole: Tensor, part: Tensor, site: Projection, index: Tensor | None) -> Tensor:
    """`whole` with the site's rows (its last dimension) replaced."""
    if site.rows is None:
        return part
    if index is None:
        assert site.slice is not None
        return torch.slice_scatter(whole, part, -1, *site.slice)
    return whole.index_copy(-1, index, part)


def materialise(
    module: fx.GraphModule,
    plan: Plan,
    state: dict[str, Tensor] | None = None,
    data: Mapping[Binding, Any] | None = None,
) -> None:
    """Gives `module` every tensor that `plan` promises: the methods' state and trained copies of parameters.

    `state` (full name -> tensor) is loaded instead of being initialised, where given. Random starts are drawn from
    torch's default generator, so `torch.manual_seed` decides them. `data` is what calibration saw.
    """
    for name in plan.trained:
        given = state[name] if state else get_attribute(module, name).detach().clone()
        set_tensor(module, name, torch.nn.Parameter(given.clone()))
    made: dict[str, Tensor] = {}
    with torch.no_grad():
        # A method that takes something out of a weight takes it out of the base's; the others start from what is kept.
        before = [b for b in plan.bindings if _prepares(b) and b.site.parameters[0] in plan.stored]
        for binding in before:
            _begin(module, plan, binding, made, state, data)
        for weight, item in plan.stored.items():
            if not is_packed(module, item):
                _pack(module, plan, weight)
        for binding in plan.bindings:
            if binding not in before:
                _begin(module, plan, binding, made, state, data)
        _prepare(module, plan, [weight for weight in rewritten(plan) if weight not in plan.stored])


def _pack(module: nn.Module, plan: Plan, weight: str) -> None:
    """Packs a weight with what methods change of it; one that none changes lies as its checkpoint has it, if packed."""
    base = _base(module, plan, weight)
    prepared = _prepared(module, plan, weight, base)
    if prepared is not base or not pack_as_found(module, plan, plan.stored[weight]):
        pack(module, plan.stored[weight], prepared)


def _begin(
    module: fx.GraphModule,
    plan: Plan,
    binding: Binding,
    made: dict[str, Tensor],
    state: dict[str, Tensor] | None,
    data: Mapping[Binding, Any] | None,
) -> None:
    """Fills the binding's tensors and puts them in place; `made`, by full name, are those of the bindings before."""
    method, site = binding.method, binding.site
    takes = site.parameters[0] in plan.stored and _prepares(binding)
    frozen = _base(module, plan, site.parameters[0]) if takes else frozen_weight(module, plan, site.parameters[0])
    fresh = {full: spec for full, spec in binding.tensors.items() if full not in made}
    made |= {full: _start(spec, frozen) for full, spec in fresh.items()}
    own = {name: made[full] for name, full in binding.names.items()}
    if state:
        for full in fresh:
            made[full].copy_(state[full])
    else:
        weight = dense_weight(frozen, site) if isinstance(site, Projection) else frozen
        if reason := method.missing(site):
            raise PeftcError(CannotStart(method=method.name, reason=reason, span=binding.span))
        method.initialise(site, weight, own)
        load_start(binding, own)
        if data is not None and binding in data:
            method.calibrate(site, weight, data[binding], own)
    for full, spec in fresh.items():
        set_tensor(module, full, torch.nn.Parameter(made[full]) if spec.trainable else made[full])


def prepare(module: nn.Module, plan: Plan) -> None:
    """Writes the frozen weights that methods take a part out of, or add one to, into copies of the base's tensors.

    From the base's own tensors and the state as it is now: whatever changes the state calls it again.
    """
    _prepare(module, plan, rewritten(plan))


def _prepare(module: nn.Module, plan: Plan, weights: Iterable[str]) -> None:
    for weight in weights:
        base = _base(module, plan, weight)
        prepared = _prepared(module, plan, weight, base)
        if weight in plan.stored:
            pack(module, plan.stored[weight], prepared)
            continue
        now = get_attribute(module, weight)
        if now.data_ptr() != prepared.data_ptr() and not torch.equal(now, prepared):
            own = prepared.clone() if prepared.data_ptr() == base.data_ptr() else prepared
            set_tensor(module, weight, nn.Parameter(own, requires_grad=False))


def rewritten(plan: Plan) -> list[str]:
    """The weights that `prepare` writes."""
    return list(dict.fromkeys(binding.site.parameters[0] for binding in plan.bindings if _prepares(binding)))


def _prepares(binding: Binding) -> bool:
    return isinstance(binding.site, Projection) and binding.method.prepares


def _base(module: nn.Module, plan: Plan, weight: str) -> Tensor:
    """The base model's tensor, where the compiled model computes."""
    item = plan.stored.get(weight)
    device = get_attribute(module, weight if item is None or not is_packed(module, item) else item.first).device
    return plan.captured.frozen(weight).to(device)


def _prepared(module: nn.Module, plan: Plan, weight: str, base: Tensor) -> Tensor:
    """The base's weight less what methods take out of it, or with what they add; itself, if none does."""
    whole = base
    for binding in plan.bindings:
        site = binding.site
        if not _prepares(binding) or not isinstance(site, Projection) or site.weight != weight:
            continue
        state = {name: get_attribute(module, full).detach() for name, full in binding.names.items()}
        part = dense_weight(whole, site)
        prepared = binding.method.prepare(site, part, state)
        if prepared is part:
            continue
        whole = whole.clone() if whole is base else whole
        replace_rows(whole, site, prepared)
    return whole


def _start(spec: State, reference: Tensor) -> Tensor:
    """State learns in fp32 where the base is in half precision, as in HF PEFT."""
    dtype = spec.dtype or (torch.float32 if reference.dtype in HALF else reference.dtype)
    return spec.init(torch.empty(spec.shape, dtype=dtype, device=reference.device))


class Inserter:
    """Splices bindings into one graph, over all passes.

    Remembers what each original value has become, and which inserted nodes read a site's input beside its own.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.graph = module.graph
        self.current: dict[fx.Node, fx.Node] = {}
        self.readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        self.templates: dict[Hashable, fx.Graph] = {}
        self.carries: dict[tuple[int, str], fx.Node] = {}
        self.dense: dict[str, fx.Node] = {}  # what unpacks each stored weight, by its name

    def insert(self, binding: Binding, pass_name: str) -> None:
        """The binding's nodes, at every use of its site."""
        stamp = Provenance(pass_name, binding.site.name, binding.span)
        match binding.site:
            case Projection(uses=uses) if binding.method.rewrites_input(binding.site):
                for use in uses:
                    self._into_input(binding, use, stamp)
            case Projection(uses=uses):
                for use in uses:
                    self._onto(binding, use.y, use.x, use, stamp)
            case Module(entry=Use() as entry, h=fx.Node() as h):
                self._onto(binding, h, entry.x, entry, stamp)
            case Block():
                state = self._operands(binding, binding.method.asks(binding.names))
                onto_block(self, binding, state, stamp)

    def _onto(self, binding: Binding, y: fx.Node, x: fx.Node, use: Use, stamp: Provenance) -> None:
        """Replaces the output `y` by the method's."""
        now = self.current.get(y, y)
        names = binding.method.asks(binding.names)
        extra = self._operands(binding, names)
        if use.offsets is not None:
            extra[OFFSETS] = use.offsets
        function = self._output_function(binding, use, names, tuple(extra))
        template = self._template(binding, use, function, [x, now, *extra.values()], tuple(extra))
        result, made = splice(self.graph, template, [x, now, *extra.values()], now, stamp)
        redirect(now, result, keep=made)
        self.current[y] = result
        self.readers[use.op] += made

    def _into_input(self, binding: Binding, use: Use, stamp: Provenance) -> None:
        """Replaces what the site reads, for the base operation and all that stands beside it."""
        x = use.x
        names = binding.method.asks_input(binding.names)
        extra = self._operands(binding, names)
        extra.pop(ROWS, None)

        def function(x: Tensor, *given: Tensor) -> Tensor:
            return binding.method.rewrite_input(binding.site, x, **dict(zip(extra, given, strict=True)))

        template = self._template(binding, use, function, [x, *extra.values()], tuple(extra))
        computed = [node for node in (x, *extra.values()) if node.op != "get_attr"]
        result, _ = splice(self.graph, template, [x, *extra.values()], max(computed), stamp, inside=use.op)
        for reader in (use.op, *self.readers[use.op]):
            reader.replace_input_with(x, result)

    def _operands(self, binding: Binding, names: tuple[str, ...]) -> dict[str, fx.Node]:
        """The nodes of the state, weight and bias that a rewrite asks for; optional state may be absent."""
        site = binding.site
        paths = {name: binding.names[name] for name in names if name in binding.names}
        if isinstance(site, Projection):
            paths |= {"weight": site.weight} if "weight" in names else {}
            paths |= {"bias": site.bias} if "bias" in names and site.bias else {}
        ordered = {name: paths[name] for name in names if name in paths}
        if isinstance(site, Projection) and site.rows is not None and site.slice is None:
            ordered[ROWS] = f"{binding.path}.{ROWS}"
            set_tensor(
                self.module,
                ordered[ROWS],
                torch.tensor(site.rows, device=value(self.operand(site.weight)).device),
            )
        nodes = {name: self.operand(path) for name, path in ordered.items()}
        return nodes | ({TRAINING: training_tensor(self.graph)} if TRAINING in names else {})

    def operand(self, path: str) -> fx.Node:
        """The node of a tensor of the module; of a stored weight, what unpacks it."""
        return self.dense.get(path) or attribute_node(self.graph, self.module, path)

    def _output_function(
        self, binding: Binding, use: Use, names: tuple[str, ...], present: tuple[str, ...]
    ) -> Callable[..., Tensor]:
        """The method's rewrite on plain tensors: fused weights are narrowed to the site's rows and put back."""
        method, site = binding.method, binding.site

        def function(x: Tensor, y: Tensor, *given: Tensor) -> Tensor:
            values: dict[str, Any] = dict(zip(present, given, strict=True))
            index = values.get(ROWS)
            if isinstance(site, Projection):
                if "weight" in values:
                    values["weight"] = dense_weight(values["weight"], site, index)
                if "bias" in values:
                    values["bias"] = take(values["bias"], site, -1, index)
                part = take(y, site, -1, index)
                here = replace(site, product=product_like(use.op, values.get(OFFSETS)))
                result = method.rewrite(here, x, part, **{name: values.get(name) for name in names})
                return _put(y, result, site, index)
            whole: Tensor = method.rewrite(site, x, y, **{name: values.get(name) for name in names})
            return whole

        return function

    def _template(
        self, binding: Binding, use: Use, function: Callable[..., Tensor], args: list[fx.Node], names: tuple[str, ...]
    ) -> fx.Graph:
        """Traced once for each method, kind of site and shape: equal blocks share it."""
        fakes = [value(node) for node in args]
        site = binding.site
        rows = site.rows if isinstance(site, Projection) else None
        key = (
            type(binding.method), repr(binding.method), tuple(site.facts().items()), rows, names,
            getattr(site, "transposed", None), binding.method.rewrites_input(site), use.op.target,
            tuple((str(tuple(fake.shape)), fake.dtype, str(fake.device)) for fake in fakes),
        )  # fmt: skip
        if key not in self.templates:
            self.templates[key] = trace(function, *fakes)
        return self.templates[key]
