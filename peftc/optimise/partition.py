"""What `torch.compile` keeps of a block between the two passes of a training step.

Its own minimum cut (`torch._functorch.partitioners`) takes every operation that it has never heard of for a dear one:
it would keep each unpacked weight, 4 bytes a number that lies in half a byte, each norm and each activation. So an
operation says here whether it is to be computed again, by the rule of `peftc.graph.cut`: a product, attention and
what is random are kept where the backward pass needs them, all else is computed again, which compiled code does in the
loops that read it. What is said is a selective checkpoint's policy, which a compiler takes for the tags of its graph:
no block is run twice. torch logs once that such a region must write nothing in place; no block that does is given here.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from peftc.graph import cut
from peftc.graph.cut import dear, repeatable

Policy = Callable[..., CheckpointPolicy]


def partitioned(run: Callable[..., Any], recompute_all: bool, *given: Any) -> Any:
    """`run(*given)`, while Dynamo traces it, each operation with its tag.

    Args:
        run: a block's graph as a function. It writes nothing in place.
        recompute_all: whether products, too, are computed again (a checkpoint): only the inputs are kept.
        given: what it takes.
    """
    contexts = _RANDOM_IS_KEPT if recompute_all else _DEAR_IS_KEPT
    return checkpoint(run, *given, use_reentrant=False, context_fn=contexts)


def _dear_is_kept(_context: Any, operation: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return _tag(not repeatable(operation) or dear(operation, args))


def _random_is_kept(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return _tag(not repeatable(operation))


def _tag(kept: bool) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_SAVE if kept else CheckpointPolicy.MUST_RECOMPUTE


def _contexts(policy: Policy) -> Any:
    """What a checkpoint takes for `policy`: Dynamo knows a partial of torch's function, and no closure.

    The hash is by what code that was compiled under the policy is found again in torch's cache: it says the rule.
    """
    made = partial(create_selective_checkpoint_contexts, policy)
    rule = f"{policy.__name__}\n{inspect.getsource(cut)}"
    setattr(made, "cache_hash", hashlib.sha256(rule.encode()).hexdigest())  # noqa: B010, a partial declares no such name
    return made


_DEAR_IS_KEPT, _RANDOM_IS_KEPT = _contexts(_dear_is_kept), _contexts(_random_is_kept)
