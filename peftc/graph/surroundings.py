"""What is around a call: what its caller may have switched on, which must not matter, and the machine's memory."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Tensors that have numbers and gradients are made here, also in `torch.inference_mode` or on the meta device."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type == "meta":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the collector of circular garbage, which would walk all of a growing graph again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def physical_memory() -> int:
    """Bytes of the machine's memory, or a number that nothing reaches where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize
