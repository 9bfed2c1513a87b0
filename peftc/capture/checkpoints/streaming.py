"""A checkpoint opened before it is read, so that the weights that a plan packs stay in it until their turn comes.

    open -> skeleton -> capture, plan -> load what is not packed -> the same plan over what was read

`from_pretrained` does all as far as reading the checkpoint; there it is stopped, and goes on by its own steps later.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PreTrainedModel

from peftc.capture.checkpoints.bitsandbytes import by_bitsandbytes, gathered
from peftc.capture.checkpoints.checkpoint import Checkpoint
from peftc.capture.checkpoints.differences import Differences
from peftc.capture.checkpoints.ondisk import on_disk
from peftc.graph.ir import set_tensor


def streams(cls: type[PreTrainedModel], config: Any) -> bool:
    """Whether the weights of such a model can be read one by one.

    Not where the class loads itself in a way of its own, or another library than bitsandbytes packed the checkpoint.
    """
    is_plain = getattr(config, "quantization_config", None) is None
    return _loader(cls) is _loader(PreTrainedModel) and (is_plain or by_bitsandbytes(config))


def _loader(cls: type[PreTrainedModel]) -> Any:
    """`from_pretrained` as a function that takes what stands for the class."""
    return cls.from_pretrained.__func__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class OpenCheckpoint:
    """A model on the meta device, and the checkpoint that it is about to be read from.

    `source` is the folder or hub id, `files` its safetensors files, `settings` what transformers loads them by,
    `labels` how many the user asks for.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    source: str
    files: list[str]
    settings: Any
    labels: int | None = None

    def skeleton(self) -> PreTrainedModel:
        """The model that this is about to become, with its ties, of parameters that have a device but no numbers."""
        return skeleton(self.model, self.checkpoint)

    def load(self, without: Iterable[str] = ()) -> tuple[PreTrainedModel, Differences]:
        """The model, except that the parameters `without` stay in the checkpoint, and on the meta device here.

        Those that the checkpoint does not have, and of tied ones those that it has apart, are loaded all the same.

        Raises:
            PeftcError: where the checkpoint does not fit the model, as `Differences.between`.
        """
        model, checkpoint, cls = self.model, self.checkpoint, cast(Any, type(self.model))
        tied = {name for pair in model.all_tied_weights_keys.items() if pair[0] in checkpoint for name in pair}
        left = {name for name in without if name in checkpoint} - tied
        to_read = {key: checkpoint.tensors[key] for key in checkpoint.keys_without(left)}
        placeholders = {name: _placeholder(model.get_parameter(name), checkpoint.precision(name)) for name in left}
        info, _ = cls._load_pretrained_model(model, to_read, self.files, self.settings)
        _refuse_unmade(info)
        for name, placeholder in placeholders.items():
            set_tensor(model, name, placeholder)
            info.missing_keys.discard(name)
        cls._finalize_model_loading(model, self.settings, info)
        odd = {*info.mismatched_keys, *checkpoint.misshapen(left)}
        differences = Differences.between(model, self.source, info.missing_keys, info.unexpected_keys, odd, self.labels)
        model.eval()
        if model.can_generate() and (adjust := getattr(model, "adjust_generation_fn", None)) is not None:
            adjust(None, None, None, self.source, **self.settings.download_kwargs, trust_remote_code=False)
        return model, differences


def open_checkpoint(
    cls: type[PreTrainedModel], source: str, config: Any, *, labels: int | None = None, **options: Any
) -> OpenCheckpoint | None:
    """Does what `cls.from_pretrained(source, **options)` does before it reads a weight.

    What bitsandbytes packed is there as the weights that it stands for, for ordinary layers. None where the checkpoint
    has no safetensors files.

    Raises:
        ValueError: where packed weights are in other files than safetensors.
    """
    is_packed = by_bitsandbytes(config)
    if is_packed:
        config = copy.deepcopy(config)
        del config.quantization_config
    try:
        _loader(cls)(_Stopping(cls), source, config=config, ignore_mismatched_sizes=True, **options)
    except _Opened as opened:
        model, state, files, settings = opened.args
    if state is not None or not files or not all(file.endswith(".safetensors") for file in files):
        if is_packed:
            raise ValueError("packed weights are read from safetensors files alone")
        return None
    tensors = gathered(on_disk(files)) if is_packed else on_disk(files)
    checkpoint = Checkpoint(model, tensors, settings.weight_mapping, settings.dtype_plan)
    return OpenCheckpoint(model, checkpoint, source, files, settings, labels)


def read_as_a_whole(
    cls: type[PreTrainedModel], source: str, *, called: str, labels: int | None = None, **options: Any
) -> tuple[PreTrainedModel, Differences]:
    """What `cls.from_pretrained(source, **options)` makes, if the checkpoint, `called` so by the user, is this model's.

    Raises:
        ValueError: as of `from_pretrained`, and where a tensor cannot be made of what the checkpoint has for it.
        PeftcError: where the checkpoint does not fit the model, as `Differences.between`.
    """
    standing = _Checking(cls) if _loader(cls) is _loader(PreTrainedModel) else cls
    if labels is not None:
        options["num_labels"] = labels
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # all that is wrong, and not the first alone
    model, info = _loader(cls)(standing, source, **told, **options)
    missing, unexpected, odd = (info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    return model, Differences.between(model, called, missing, unexpected, odd, labels)


def _refuse_unmade(info: Any) -> None:
    for name, reason in sorted(info.conversion_errors.items()):
        raise ValueError(f"{name} cannot be made of what is there: {reason.strip().splitlines()[-1]}")


class _Opened(Exception):
    """What `from_pretrained` has made when it is about to read: model, state dict, files, settings."""


class _Standing:
    """Stands for a model class in `from_pretrained`."""

    def __init__(self, cls: type[PreTrainedModel]) -> None:
        self.cls = cls

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cls, name)

    def __call__(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        return self.cls(*args, **kwargs)


class _Checking(_Standing):
    """Says which tensor could not be made, before transformers says that some could not."""

    def _finalize_model_loading(self, model: Any, settings: Any, info: Any) -> Any:
        _refuse_unmade(info)
        return cast(Any, self.cls)._finalize_model_loading(model, settings, info)


class _Stopping(_Standing):
    """Stops it where it begins to read."""

    def _load_pretrained_model(self, *made: Any) -> NoReturn:
        raise _Opened(*made)


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


def weightless(model: PreTrainedModel, checkpoint: Checkpoint) -> PreTrainedModel:
    """The skeleton again of a model whose weights are read but for those that `checkpoint` still has."""
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
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
