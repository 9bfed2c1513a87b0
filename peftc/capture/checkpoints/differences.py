"""How a checkpoint differs from the model that it is read into: by transformers' own account of what it loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from peftc.capture.checkpoints.errors import MissingWeights, OtherShape
from peftc.diagnostics.diagnostic import Diagnostic, PeftcError


@dataclass(frozen=True)
class Differences:
    """What a checkpoint does without, and what the model does without; both by name, in order.

    `fresh`: of the model, a head that was drawn anew. `unread`: of the checkpoint, tensors with no place in the model.
    """

    fresh: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @classmethod
    def between(
        cls,
        model: PreTrainedModel,
        reference: str,
        missing: Iterable[str],
        unexpected: Iterable[str],
        mismatched: Iterable[tuple[str, Any, Any]],
        labels: int | None = None,
    ) -> Differences:
        """Those that may be.

        Args:
            model: as it was loaded.
            reference: what the user calls the checkpoint.
            missing: names of the model that it has no tensor for.
            unexpected: names of tensors that have no place in the model.
            mismatched: names, with the shape there and the shape in the model.
            labels: how many the user asks for. A head of another number is drawn anew then.

        Raises:
            PeftcError: `missing-weights` where a tensor is missing that no such model is without; `other-shape`.
        """
        lacking = sorted(name for name in missing if _has_numbers(model, name))
        fresh = [name for name in lacking if _in_new_head(model, name)]
        others = []
        for name, found, expected in mismatched:
            if labels is not None and _of_labels(found, expected, labels) and _in_new_head(model, name):
                fresh.append(name)
            else:
                others.append((name, found, expected))
        unread = tuple(sorted(unexpected))
        problems: list[Diagnostic] = [
            OtherShape(reference=reference, weight=name, found=list(found), expected=list(expected))
            for name, found, expected in sorted(others)
        ]
        if lost := tuple(name for name in lacking if name not in fresh):
            problems.append(
                MissingWeights(reference=reference, model=type(model).__name__, weights=lost, unread=unread)
            )
        if problems:
            raise PeftcError(*problems)
        return cls(tuple(sorted({*fresh})), unread)


NO_DIFFERENCES = Differences()  # of what was read from no checkpoint, too


def _has_numbers(model: PreTrainedModel, name: str) -> bool:
    """Whether it is learned: whole numbers are what the code computes, places and counts."""
    return bool(model.state_dict()[name].is_floating_point())


def _of_labels(found: Any, expected: Any, labels: int) -> bool:
    """Whether two shapes are those of one layer, for other numbers of labels."""
    there, here = list(found), list(expected)
    return len(there) == len(here) > 0 and here[0] == labels != there[0] and here[1:] == there[1:]


def _in_new_head(model: PreTrainedModel, name: str) -> bool:
    """Whether it is of a head that a checkpoint of the base model alone has not: what stands behind that.

    A head that predicts the tokens that went in was trained with the model, so that one is lost where it is not there.
    """
    if model.base_model is model or model.get_output_embeddings() is not None:
        return False
    return not name.startswith(f"{model.base_model_prefix}.")
