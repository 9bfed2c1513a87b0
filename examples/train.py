"""Trains SmolLM2-135M with Hugging Face's Trainer on Python's own help texts, by a spec.

    python examples/train.py --spec examples/recipes/lora.peft --steps 50 --output build/lora
    python examples/train.py --spec examples/recipes/lora.peft --steps 100 --output build/lora --resume

Prints a completion of one prompt before and after. `--output` gets Trainer's checkpoints, which hold only what learns,
and the artifact, which `peftc.load` and `peftc merge` read. Needs no network once the model is in the cache.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

import peftc
from models import smollm2, smollm2_dir

PROMPT = 'The "with" statement is used to'
BLOCK = 128  # tokens in an example


def main() -> None:
    args = arguments()
    set_seed(args.seed)  # adapters start random
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir())
    model = peftc.compile(smollm2(), args.spec)
    print(model.report())
    before = completion(model, tokenizer)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            lr_scheduler_type="constant",  # so that --resume with more --steps goes on as if it had never stopped
            logging_steps=5,
            logging_first_step=True,
            save_steps=25,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=args.seed,
        ),
        train_dataset=blocks(tokenizer),
        # A method may want its own learning rate for some tensors, as LoRA+ does: hence the model's groups.
        optimizers=(torch.optim.AdamW(model.param_groups(args.lr), weight_decay=0.0), None),
    )
    trainer.train(resume_from_checkpoint=args.resume)
    model.save(args.output / "artifact")

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("loss:  ", " ".join(f"{loss:.3f}" for loss in losses))
    print("before:", before)
    print("after: ", completion(model, tokenizer))
    print("saved: ", args.output / "artifact")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains SmolLM2-135M on Python's help texts, by a spec.")
    parser.add_argument("--spec", type=Path, default=Path(__file__).parent / "recipes" / "lora.peft")
    parser.add_argument("--steps", type=int, default=50, help="in all, those before --resume included")
    parser.add_argument("--batch", type=int, default=4, help=f"blocks of {BLOCK} tokens in a step")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build/train"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    return parser.parse_args()


def blocks(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """The help texts as one stream of tokens, cut into examples; the model shifts the labels itself."""
    ends = tokenizer.eos_token
    tokens = tokenizer(f"{ends}".join(topics.values()), verbose=False)["input_ids"]  # longer than the model reads
    cuts = range(0, len(tokens) - BLOCK + 1, BLOCK)
    return [{"input_ids": tokens[cut : cut + BLOCK], "labels": tokens[cut : cut + BLOCK]} for cut in cuts]


def completion(model: peftc.CompiledModule, tokenizer: PreTrainedTokenizerBase) -> str:
    prompt = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    tokens = model.generate(**prompt, max_new_tokens=30, do_sample=False)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
