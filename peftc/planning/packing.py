"""`quantize SELECTOR with STORAGE` -> which weights lie packed, and everything that can be wrong with that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from peftc.capture.capture import Captured
from peftc.diagnostics.diagnostic import Diagnostic
from peftc.diagnostics.source import Span
from peftc.graph.ir import get_attribute
from peftc.planning import errors as say
from peftc.planning.packed_weight import PackedWeight
from peftc.protocol.site import Projection, Site
from peftc.protocol.storage import Storage
from peftc.spec.resolve import Packing


def packed_weights(
    captured: Captured, statements: Iterable[tuple[Packing, list[Site]]], trained: dict[str, Span]
) -> tuple[dict[str, PackedWeight], list[Diagnostic]]:
    """Weight's name in the graph -> how it is packed, and what is wrong.

    Args:
        captured: the model, of any device.
        statements: each with the sites that its selector means; a part of a fused weight means the whole of it.
        trained: existing parameters that learn, and which statement says so.
    """
    packed: dict[str, PackedWeight] = {}
    problems: list[Diagnostic] = []
    taken = {name for name, _ in captured.module.named_parameters(remove_duplicate=False)}
    for number, (statement, sites) in enumerate(statements):
        refused, clashes = defaultdict(list), defaultdict(list)
        for site in sites:
            if reason := _obstacle(site) or (isinstance(site, Projection) and _refuses(captured, statement, site)):
                refused[reason].append(site)
                continue
            assert isinstance(site, Projection)
            if site.weight not in packed:
                packed[site.weight] = _stored(captured, number, statement, site, taken)
            earlier = packed[site.weight]
            other = earlier.span if earlier.statement != number else trained.get(site.weight)
            if other is not None:
                clashes[other, earlier.statement != number].append(site)
        problems += [
            say.CannotStore(
                storage=statement.storage.name, site=found[0].name, reason=reason, others=len(found) - 1,
                span=statement.target.span,
            )
            for reason, found in refused.items()
        ]  # fmt: skip
        problems += [
            (say.StoredTwice if twice else say.StoredAndTrained)(
                weight=found[0].parameters[0], others=len(found) - 1, first=other, span=statement.span
            )
            for (other, twice), found in clashes.items()
        ]
    return packed, problems


def _obstacle(site: Site) -> str | None:
    """Why no storage packs what the site holds."""
    if not isinstance(site, Projection) or not site.features_last:
        return "a storage is for the weights of linear layers and stacked experts"
    if site.tied:
        return "its weight is tied to an embedding's, which looks up single rows"
    return None


def _refuses(captured: Captured, statement: Packing, site: Projection) -> str | None:
    return statement.storage.refuses(_shape(captured, site))


def _shape(captured: Captured, site: Projection) -> tuple[int, ...]:
    """The whole weight's, [*batch, n_out, n_in]."""
    held = tuple(get_attribute(captured.module, site.weight).shape)
    return (*held[:-2], held[-1], held[-2]) if site.transposed else held


def _stored(captured: Captured, number: int, statement: Packing, site: Projection, taken: set[str]) -> PackedWeight:
    tensor = get_attribute(captured.module, site.weight)
    return PackedWeight(
        statement=number, storage=statement.storage, weight=site.weight, path=_path(taken, statement.storage, site),
        held=tuple(tensor.shape), dtype=tensor.dtype, transposed=site.transposed, span=statement.span,
    )  # fmt: skip


def _path(taken: set[str], storage: Storage, site: Projection) -> str:
    """A module name for the buffers that is not `taken` in the base model: beside the weight."""
    owner, _, leaf = site.weight.rpartition(".")
    path = ".".join(filter(None, (owner, storage.name if leaf == "weight" else f"{storage.name}_{leaf}")))
    while any(name == path or name.startswith(f"{path}.") for name in taken):
        path += "_"
    return path
