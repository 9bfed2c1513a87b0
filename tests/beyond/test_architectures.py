"""A fixed tenth of the types that transformers knows, and those that were once wrong, tiny, held against eager PyTorch.

All of them, under every spec: `.ci/sweep`.
"""

import pytest

from architectures import in_tenth
from sweep.judge import judge
from sweep.tiny import HEADS, types_of

ONCE_WRONG = {
    ("causal", "doge"),
    ("causal", "jetmoe"),
    ("causal", "granitemoe"),
    ("causal", "hrm_text"),
    ("causal", "minimax"),
    ("causal", "olmo_hybrid"),
    ("causal", "zaya"),
    ("masked", "flaubert"),
}
# A loop over a chunk of 64 tokens, unrolled: a minute of tracing each.
LONG = {("causal", "qwen4_exp_text")}
CASES = [
    (head, kind)
    for head in HEADS
    if head != "image-text"  # two captures each, with an image and with another
    for kind in types_of(head)
    if (in_tenth(kind) and (head, kind) not in LONG) or (head, kind) in ONCE_WRONG
]
UNDER_ANOTHER_SPEC = [
    ("causal", "apertus1p5_text", "dora"),  # the length of a row is a constant to the gradient
    ("image-text", "llava", "prompt"),  # it compares with how many places for images there are, which the data tells
]


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.captures
@pytest.mark.parametrize(("head", "kind", "spec"), [*((*case, "lora") for case in CASES), *UNDER_ANOTHER_SPEC])
def test_a_type_is_right(head: str, kind: str, spec: str) -> None:
    verdict = judge(head, kind, spec)
    if verdict.verdict == "not-built":
        pytest.skip("; ".join(verdict.reasons))
    assert verdict.verdict == "right", verdict.reasons
