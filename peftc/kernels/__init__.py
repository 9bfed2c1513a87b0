"""What a fusion computes in one piece: custom operations, each in a file with its definition, CPU path and gradient.

They are `torch.ops.peftc.*` once this package is imported, on the CPU by ATen and on CUDA by Triton, which is imported
when the first of them meets a CUDA tensor. Auxiliary outputs (rstd, the low-rank hidden states) have no gradient.

- `rms_norm(x, weight?, eps, cast_first) -> (y, rstd)`
- `gated_activation(gate, up, activation) -> y`, activation in silu, gelu, gelu_tanh, relu
- `lora_linear(x, weights[], biases?[], a[], b[], scales[], transposed, seed?, p, salt) -> [y_1 … y_n, S]`
- `seeded_dropout(x, seed, p, salt) -> y`; p is resolved to 1/65536; p = 0 drops nothing, so `p * training` is fine
- `cross_entropy(hidden, weight, bias?, labels, ignore_index, chunk) -> (loss_sum, count)`: is
  `cross_entropy_with_gradient -> (loss_sum, count, dhidden)` where hidden needs a gradient, `cross_entropy_alone`
  elsewhere. Tokens with ignored labels cost nothing
"""

from peftc.kernels import cross_entropy, gated_activation, lora_linear, rms_norm, seeded_dropout

__all__ = ["cross_entropy", "gated_activation", "lora_linear", "rms_norm", "seeded_dropout"]
