"""What a fusion computes in one piece: custom operations, each in a file with its definition, CPU path and gradient.

`dequantize` alone stands apart: it has no gradient, and its operations come with the storages that unpack by them.
The others are `torch.ops.peftc.*` once this package is imported, on the CPU by ATen and on CUDA by Triton, which is
imported when the first of them meets a CUDA tensor. Auxiliary outputs (rstd, S, z) have no gradient. [] is a list, ? is
None or a tensor.

- `rms_norm(x, weight?, eps, cast_first) -> (y, rstd)`
- `gated_activation(gate, up, activation) -> y`; activations are silu, gelu, gelu_tanh, relu, tanh, identity
- `lora_linear(x, weights[], biases?[], a[], b[], scales[], transposed, seed?, p, salt) -> [y_1 … y_n, S]`; biases may
  be empty. Gradients of everything; of biases where each weight of the group has one
- `dora_linear(x, weights[], biases?[], a[], b[], lengths[], scales[], transposed, seed?, p, salt) -> [y_1 … y_n, S]`:
  y_i = length_i * (W_i x + s_i B_i S_i) + bias_i with gradients of x, a, b and lengths; keeps x, S and the y_i
- `scaled_linear(x, weight, bias?, length, transposed) -> y`: y = length * (W x + bias) with gradients of x, bias and
  length; keeps y alone. Lengths nearer to 0 than 2^-63 (fp16: 2^-11) are as far from it as that
- `rotary(xs[], cos, sin) -> ys[]`: x cos + [-x₂, x₁] sin of each x; keeps cos and sin alone, which get no gradient
- `seeded_dropout(x, seed, p, salt) -> y`; p is resolved to 1/65536; p = 0 drops nothing, so `p * training` is fine
- `cross_entropy(hidden, weight, bias?, labels, ignore_index, chunk) -> (loss_sum, count)`: is
  `cross_entropy_with_gradient -> (loss_sum, count, dhidden)` where hidden needs a gradient, `cross_entropy_alone`
  elsewhere. Tokens with ignored labels cost nothing; 128 to 256 tokens a chunk are as fast as all at once
- `adapter(x, residual?, down, down_bias?, up, up_bias?, scale, activation) -> (y, z)`: y = h + s (U act(z) + c) with
  z = D x + b, h = residual or x
- `row_lengths(weight, a, b, scale, least) -> lengths`: |W + scale B A| of each row, no square less than `least`
- `rows_of_batch(rows, batch) -> which` and `row_scales(which, owners[], ranks[], scales[]) -> [batch, ranks]`: of which
  task each row is, and so which columns of all tasks' low-rank branches are its own
- `expert_linear(x, weight, ends) -> y`: as transformers' `grouped_mm_fallback`, but a frozen weight gets no gradient
  and its x is not kept; weight [E, n_in, n_out], also as a transposed view
- `text_bounds(positions) -> (bounds, counts)` and `varlen_attention(q, k, v, bounds, counts, scale, causal, window?) ->
  (y, lse)`: attention of each text of a row to itself; q [batch, heads, tokens, width], k and v with as many heads or
  fewer that are shared; keeps q, k, v, y and lse
- `stands_alone` is in a capture where a module is that cannot be traced; an `Island` takes its place in the graph
- `expert_lora(x, weight, ends, a, b, scale) -> (y, S)`: the same with a branch: a [E, r, n_in], b [E, n_out, r]
"""

import peftc.kernels.adapter as adapter
import peftc.kernels.cross_entropy as cross_entropy
import peftc.kernels.dora_linear as dora_linear
import peftc.kernels.expert_linear as expert_linear
import peftc.kernels.expert_lora as expert_lora
import peftc.kernels.gated_activation as gated_activation
import peftc.kernels.lora_linear as lora_linear
import peftc.kernels.rms_norm as rms_norm
import peftc.kernels.rotary as rotary
import peftc.kernels.row_lengths as row_lengths
import peftc.kernels.rows_of_batch as rows_of_batch
import peftc.kernels.scaled_linear as scaled_linear
import peftc.kernels.seeded_dropout as seeded_dropout
import peftc.kernels.varlen_attention as varlen_attention

__all__ = [
    "adapter", "cross_entropy", "dora_linear", "expert_linear", "expert_lora", "gated_activation", "lora_linear",
    "rms_norm", "rotary", "row_lengths", "rows_of_batch", "scaled_linear", "seeded_dropout", "varlen_attention",
]  # fmt: skip
