"""QLoRA beside LoRA: SmolLM2-135M in bf16, its layers packed in four bits or as they are, on the same batches.

    python examples/qlora.py --steps 60

Prints both loss curves, what the frozen weights take, and the seconds of a step. Everything else is the same: the
adapters and their start, data, order, optimiser. Needs no network once the model is in the cache.
"""

import argparse
import time
from itertools import cycle, islice

import torch
from transformers import AutoTokenizer

import peftc
from models import smollm2, smollm2_dir
from train import blocks

LORA = "apply lora(r=16, alpha=16) to attn.*, mlp.*"
SPECS = {"LoRA, bf16": LORA, "QLoRA, nf4(double)": f"quantize attn.*, mlp.* with nf4(double=true)\n{LORA}"}
EVERY = 5  # steps in a row of the table


def main() -> None:
    args = arguments()
    examples = blocks(AutoTokenizer.from_pretrained(smollm2_dir()))
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(args.seed)).tolist()
    stream = islice(cycle(order), args.steps * args.batch)
    batches = torch.tensor([examples[place]["input_ids"] for place in stream]).view(args.steps, args.batch, -1)
    results = {name: trained(spec, batches, args) for name, spec in SPECS.items()}

    print(f"{'steps':<14}" + "".join(f"{name:>22}" for name in results))
    for start in range(0, args.steps, EVERY):
        end = min(start + EVERY, args.steps)
        means = [sum(losses[start:end]) / (end - start) for losses, _, _ in results.values()]
        print(f"{f'{start + 1} to {end}':<14}" + "".join(f"{mean:>22.3f}" for mean in means))
    print(f"{'frozen weights':<14}" + "".join(f"{size / 1e6:>19.1f} MB" for _, size, _ in results.values()))
    print(f"{'a step':<14}" + "".join(f"{seconds:>20.2f} s" for _, _, seconds in results.values()))


def trained(spec: str, batches: torch.Tensor, args: argparse.Namespace) -> tuple[list[float], int, float]:
    """The loss of each step, the bytes of what is frozen, and the seconds of a median step."""
    torch.manual_seed(args.seed)  # adapters start random
    model = peftc.compile(smollm2().bfloat16(), spec)
    frozen = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
    optimizer = torch.optim.AdamW(model.param_groups(args.lr), weight_decay=0.0)
    losses, seconds = [], []
    for batch in batches:
        start = time.perf_counter()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - start)
    return losses, sum(tensor.nbytes for tensor in frozen), sorted(seconds)[len(seconds) // 2]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains SmolLM2-135M with LoRA and with QLoRA, and compares.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4, help="blocks of 128 tokens in a step")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
