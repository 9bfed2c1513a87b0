"""Loading a model without the weights that a plan packs: they stay in the checkpoint until their turn comes.

    meta model -> skeleton -> capture, plan -> read the rest -> the same plan over what was read, and where to read on

`from_pretrained` itself does all but reading the checkpoint, which its class is asked for.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PreTrainedModel

from peftc.capture.bitsandbytes import by_bitsandbytes, gathered
from peftc.capture.checkpoint import Checkpoint
from peftc.capture.ondisk import on_disk
from peftc.graph.ir import set_tensor

Leave = Callable[[PreTrainedModel], Iterable[str]]  # of a skeleton, the parameters that are not to be read


def streams(cls: type[PreTrainedModel], config: Any) -> bool:
    """Whether the weights of such a model can be read one by one.

    Not where the class loads itself in a way of its own, or another library than bitsandbytes packed the checkpoint.
    """
    usual = cls.from_pretrained.__func__ is PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    return usual and (getattr(config, "quantization_config", None) is None or by_bitsandbytes(config))


def load_leaving(
    cls: type[PreTrainedModel], source: str, config: Any, leave: Leave, **options: Any
) -> tuple[nn.Module, Checkpoint | None]:
    """`cls.from_pretrained(source, **options)`, except that the parameters that `leave` names stay on the meta device.

    `leave` is asked before a weight is read, and not at all where the checkpoint has no safetensors files. What
    bitsandbytes packed is read as the weights that it stands for, into ordinary layers.

    Raises:
        ValueError: where packed weights are in other files than safetensors.
    """
    reader = _Reader(cls, leave, by_bitsandbytes(config))
    if reader.is_packed:
        config = copy.deepcopy(config)
        del config.quantization_config
    from_pretrained = cls.from_pretrained.__func__  # type: ignore[attr-defined]
    model: nn.Module = from_pretrained(reader, source, config=config, **options)
    return model, reader.checkpoint


class _Reader:
    """Stands for a model class in `from_pretrained`, and reads the checkpoint its own way."""

    def __init__(self, cls: type[PreTrainedModel], leave: Leave, is_packed: bool) -> None:
        self.cls = cls
        self.leave = leave
        self.is_packed = is_packed
        self.checkpoint: Checkpoint | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cls, name)

    def __call__(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        return self.cls(*args, **kwargs)

    def _load_pretrained_model(
        self, model: PreTrainedModel, state_dict: dict[str, Any] | None, files: list[str] | None, config: Any
    ) -> Any:
        """transformers' step of that name, which is given less to read."""
        load = cast(Any, self.cls)._load_pretrained_model
        if state_dict is not None or not files or not all(file.endswith(".safetensors") for file in files):
            if self.is_packed:
                raise ValueError("packed weights are read from safetensors files alone")
            return load(model, state_dict, files, config)
        tensors = gathered(on_disk(files)) if self.is_packed else on_disk(files)
        self.checkpoint = checkpoint = Checkpoint(model, tensors, config.weight_mapping, config.dtype_plan)
        tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        left = {name for name in self.leave(skeleton(model, checkpoint)) if name in checkpoint} - tied
        to_read = {key: checkpoint.tensors[key] for key in checkpoint.keys_without(left)}
        placeholders = {name: _placeholder(model.get_parameter(name), checkpoint.precision(name)) for name in left}
        info, offloaded = load(model, to_read, files, config)
        for key, found, expected in sorted(info.mismatched_keys):
            raise ValueError(f"{key} is {list(found)} in the checkpoint, where the model has {list(expected)}")
        for name, placeholder in placeholders.items():
            set_tensor(model, name, placeholder)
            info.missing_keys.discard(name)
        return info, offloaded


def _placeholder(parameter: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    """A parameter on the meta device that `from_pretrained` takes for a loaded one: it gives it no memory."""
    placeholder = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
    placeholder._is_hf_initialized = True  # type: ignore[attr-defined]
    return placeholder


def skeleton(model: PreTrainedModel, checkpoint: Checkpoint) -> PreTrainedModel:
    """The model that `checkpoint` is about to become, with its ties, of parameters that have a device but no numbers.

    They are fake tensors on the CPU, so that a graph captured from them names that device. Buffers, which count
    positions and turn angles, are real: planning looks at them.
    """
    twin = copy.deepcopy(model)
    missing = {name for name in twin.state_dict() if name not in checkpoint}
    for target, source in twin.all_tied_weights_keys.items():
        both = target not in missing and source not in missing
        if both and torch.equal(checkpoint.read(target), checkpoint.read(source)):
            missing.add(target)
    twin.tie_weights(missing_keys=missing, recompute_mapping=False)
    _fill_buffers(twin, checkpoint)
    _fake_parameters(twin, checkpoint)
    return twin


def _fill_buffers(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """As `from_pretrained` does: from the checkpoint, else by the model's own initialisation, which leaves the rest."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    for name, buffer in list(model.named_buffers()):
        there = name in checkpoint
        tensor = checkpoint.read(name) if there else torch.empty_like(buffer, device="cpu")
        tensor._is_hf_initialized = there  # type: ignore[attr-defined]
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = tensor
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model.initialize_weights()


def _fake_parameters(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Replaces each by a fake one on the CPU, in the precision it is read in; a tied one by the same."""
    mode = FakeTensorMode(  # as torch.export makes its own
        shape_env=ShapeEnv(tracked_fakes=[], trace_asserts=True), allow_non_fake_inputs=True, export=True
    )
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    for parameter, group in names.items():
        dtype = next(filter(None, map(checkpoint.precision, group)), parameter.dtype)
        with mode:
            fake = torch.empty_strided(parameter.shape, parameter.stride(), dtype=dtype, device="cpu")
            tensor = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name in group:
            set_tensor(model, name, tensor)
