"""A training's state in a folder, written by any number of processes and read by any other number.

`torch.distributed.checkpoint` writes and reads the tensors: each process those parts that it has, as safetensors.

    *.safetensors   model.NAME and optimizer.NAME.KEY of all that learns
    progress.json   numbers of the optimiser, and what is in the other files; written last

No pickle is written, and none is read.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.reading import read_file
from peftc.distributed.errors import BadProgress
from peftc.driver.compiled import CompiledModule
from peftc.files.whole import write_whole

TOLD = "progress.json"
LARGEST = 16 << 20
Numbers = dict[str, Any]


def save_progress(compiled: CompiledModule, optimizer: Optimizer, folder: str | Path, **numbers: float) -> None:
    """Writes what a training goes on from: what learns, the optimiser's state, and numbers of the caller's own.

    All processes call it, with the same folder, where nothing may be yet.

    Raises:
        PeftcError: `bad-progress` where something is there.
    """
    place = Path(folder)
    if _anywhere(place.exists() and any(place.iterdir())):
        raise PeftcError(BadProgress(folder=str(folder), reason="something is there already, and is left alone"))
    names = _names(compiled)
    groups, scalars, found = [], {}, {}
    for group in optimizer.param_groups:
        members = [names[id(parameter)] for parameter in group["params"]]
        groups.append({"params": members} | {key: v for key, v in group.items() if key != "params" and _plain(v)})
    for name, parameter in compiled.trainable_parameters().items():
        found[f"model.{name}"] = _part(compiled, name, parameter.detach())
        for key, value in optimizer.state.get(parameter, {}).items():
            full = f"optimizer.{name}.{key}"
            if isinstance(value, Tensor) and value.ndim:
                found[full] = _part(compiled, name, value)
            else:
                scalars[full] = float(value)
    place.mkdir(parents=True, exist_ok=True)
    writer = HuggingFaceStorageWriter(str(place), save_distributed=True)
    with _alone():
        save(cast(Any, found), storage_writer=writer, no_dist=not dist.is_initialized())
    shapes = {name: list(tensor.shape) for name, tensor in sorted(found.items())}
    told = {"groups": groups, "scalars": scalars, "tensors": shapes, "numbers": numbers}
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_whole(place / TOLD, json.dumps(told))
    if dist.is_initialized():
        dist.barrier()


def load_progress(compiled: CompiledModule, optimizer: Optimizer, folder: str | Path) -> dict[str, float]:
    """Puts what `save_progress` wrote into a model and an optimiser of the same spec, on any number of processes.

    Returns:
        The caller's own numbers.

    Raises:
        PeftcError: `bad-progress` where the folder is not whole, or of another spec or optimiser; nothing is changed.
    """
    place = Path(folder)

    def bad(reason: str) -> PeftcError:
        return PeftcError(BadProgress(folder=str(folder), reason=reason))

    told = _told(place, bad)
    reader = HuggingFaceStorageReader(str(place))
    _check_whole(reader, told, bad)
    groups, state = _asked(compiled, optimizer, told, bad)
    parts = {f"model.{name}": _part(compiled, name, p.detach()) for name, p in compiled.trainable_parameters().items()}
    parts |= {f"optimizer.{name}.{key}": _part(compiled, name, value) for (name, key), value in state.items()}
    if odd := sorted(parts.keys() ^ told["tensors"].keys()):
        raise bad(f"{odd[0]} is in one of the two alone")
    for full, tensor in parts.items():
        if list(tensor.shape) != told["tensors"][full]:
            raise bad(f"{full} is {told['tensors'][full]} there and {list(tensor.shape)} here")
    with _alone():
        load(cast(Any, parts), storage_reader=reader, no_dist=not dist.is_initialized())
    own = compiled.trainable_parameters()
    optimizer.state.clear()
    for (name, key), value in state.items():
        optimizer.state[own[name]][key] = value
    for full, number in told["scalars"].items():
        name, _, key = full.removeprefix("optimizer.").rpartition(".")
        optimizer.state[own[name]][key] = torch.tensor(number, dtype=torch.float32)
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: tuple(v) if isinstance(v, list) else v for key, v in saved.items() if key != "params"})
    return dict(told["numbers"])


def _asked(
    compiled: CompiledModule, optimizer: Optimizer, told: Numbers, bad: Callable[[str], PeftcError]
) -> tuple[list[Numbers], dict[tuple[str, str], Tensor]]:
    """The groups as they were, and for the optimiser's tensors, by parameter and key, where to read them to."""
    names, own = _names(compiled), compiled.trainable_parameters()
    here = [[names.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]
    if here != [group["params"] for group in told["groups"]]:
        raise bad("the optimiser has other groups of parameters there")
    state = {}
    for full in told["tensors"]:
        kind, _, rest = full.partition(".")
        name, _, key = rest.rpartition(".")
        if kind == "optimizer":
            if name not in own:
                raise bad(f"{name} does not learn here")
            state[name, key] = torch.zeros_like(own[name])
    if any(full.removeprefix("optimizer.").rpartition(".")[0] not in own for full in told["scalars"]):
        raise bad("other parameters learn there")
    return told["groups"], {place: tensor.detach() for place, tensor in state.items()}


def _part(compiled: CompiledModule, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the shape of parameter `name` (or of its key in the optimiser), as the part of a whole that it is."""
    split = compiled.split
    return tensor if split is None else split.part(name, tensor)


@contextmanager
def _alone() -> Iterator[None]:
    """torch warns of one process that it is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _names(compiled: CompiledModule) -> dict[int, str]:
    return {id(parameter): name for name, parameter in compiled.trainable_parameters().items()}


def _plain(value: Any) -> bool:
    """Whether JSON holds it: a setting of an optimiser's group, such as its learning rate."""
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def _anywhere(found: bool) -> bool:
    """Whether some process says so; they go on together, or not at all."""
    if not dist.is_initialized():
        return found
    device = "cpu" if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()
    each = torch.tensor(float(found), device=device)
    dist.all_reduce(each)
    return bool(each)


def _told(place: Path, bad: Callable[[str], PeftcError]) -> Numbers:
    try:
        told = json.loads(read_file(place / TOLD, LARGEST))
    except OSError as error:
        raise bad(f"{TOLD}, which is written last: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise bad(f"{TOLD} is cut short or altered") from None
    kinds = {"groups": list, "scalars": dict, "tensors": dict, "numbers": dict}
    if not isinstance(told, dict) or any(not isinstance(told.get(key), kind) for key, kind in kinds.items()):
        raise bad(f"{TOLD} is cut short or altered")
    if any(not isinstance(group, dict) or not isinstance(group.get("params"), list) for group in told["groups"]):
        raise bad(f"{TOLD} is cut short or altered")
    if any(not isinstance(number, int | float) for part in ("scalars", "numbers") for number in told[part].values()):
        raise bad(f"{TOLD} is cut short or altered")
    return told


def _check_whole(reader: HuggingFaceStorageReader, told: Numbers, bad: Callable[[str], PeftcError]) -> None:
    """Each tensor's parts have to make the whole: where a process's file is missing, no number may stay as it is."""
    try:
        there: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise bad(str(error)) from None
    for name, shape in told["tensors"].items():
        chunks = there[name].chunks if name in there else []
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
            raise bad(f"parts of {name} are missing: a process's file is not there")
