"""Words that people bring: what LoraConfig, other libraries and papers call something, and what it is here.

Diagnostics look here for what somebody may mean.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    """One word of others.

    `here` is what a spec, or a call of Python, has for it; `why` says what there is to know, and is all where a spec
    needs nothing. `parameters` are what methods call it, the first that a method has.
    """

    here: str
    why: str = ""
    parameters: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """In a few words, for a caret."""
        return f"write: {self.here}" if self.here else "leave it out"


def meant(word: str) -> Word | None:
    """What somebody means by a word that is none here, or None; a hyphen and an underline are alike, and so is case."""
    return BROUGHT.get(word.casefold().replace("-", "_").replace("+", "_plus"))


def parameter(word: str, of: tuple[str, ...]) -> str | None:
    """What a method with parameters `of` calls one that others call `word`, or None."""
    found = meant(word)
    return next((name for name in found.parameters if name in of), None) if found else None


_TARGETS = "apply lora(r=8) to attn.q, attn.v"
_SAVED = "train head"

LORA_CONFIG = {
    "r": Word("lora(r=8)"),
    "lora_alpha": Word("lora(alpha=16)", "16 by default, where LoraConfig has 8", ("alpha",)),
    "lora_dropout": Word("lora(dropout=0.1)", parameters=("dropout",)),
    "target_modules": Word(
        _TARGETS, 'a statement says where its method goes: by role, attn.q, or by name, "**.q_proj"'
    ),
    "target_parameters": Word("apply lora(r=8) to expert", "stacked expert weights are places like any other"),
    "exclude_modules": Word("apply lora(r=8) to linear except head"),
    "layers_to_transform": Word("apply lora(r=8) to attn.q in layers[8:]", "slices are Python's"),
    "layers_pattern": Word("apply lora(r=8) to attn.q in layers[8:]", "the blocks are found by data flow"),
    "rank_pattern": Word('apply lora(r=4) to "**.{k,v}_proj"', "a statement for each rank"),
    "alpha_pattern": Word('apply lora(r=8, alpha=32) to "**.{k,v}_proj"', "a statement for each alpha"),
    "bias": Word("train bias", 'or of some layers: train "**.q_proj.bias"'),
    "modules_to_save": Word(_SAVED, "what trains as a whole is named by a statement of its own; a copy is trained"),
    "trainable_token_indices": Word('apply tokens(ids="5, 17") to vocabulary', "a statement of its own"),
    "task_type": Word(
        "", "the model says what its task is; on the command line, --task gives a model without a head one"
    ),
    "inference_mode": Word("", "a compiled model follows train() and eval()"),
    "fan_in_fan_out": Word("", "how a weight is stored is seen in the graph"),
    "init_lora_weights": Word(
        "lora(init=pissa)", "kaiming (True), gaussian, eva, pissa, olora, loftq or mica", ("init",)
    ),
    "use_rslora": Word("lora(rslora=true)", parameters=("rslora",)),
    "use_dora": Word("apply dora(r=8) to attn.q, attn.v", "a method of its own"),
    "use_qalora": Word("apply qalora(r=8) to attn.q, attn.v", "a method of its own"),
    "qalora_group_size": Word("qalora(group=32)", parameters=("group",)),
    "loftq_config": Word("lora(init=loftq, loftq_iterations=5)", parameters=("init",)),
    "eva_config": Word("lora(init=eva)", "with --calibration FILE, or calibration=batches", ("init",)),
    "lora_bias": Word("lora(bias=true)", parameters=("bias",)),
    "layer_replication": Word("", "there is no such thing here: build the model with the layers that it is to have"),
    "ensure_weight_tying": Word("", "of tied weights all train or none: train embed, head"),
    **dict.fromkeys(
        [
            *("alora_invocation_tokens", "arrow_config", "corda_config", "kasa_config", "lora_ga_config"),
            *("megatron_config", "megatron_core", "monteclora_config", "use_bdlora", "velora_config"),
        ],
        Word("", "this kind of LoRA is not here; `peftc methods` lists what is"),
    ),
    "base_model_name_or_path": Word("", "the model is given beside the spec: peftc compile SPEC MODEL"),
    "revision": Word("", "fetch the revision, and give its folder as MODEL"),
}

METHODS = {
    "qlora": Word("quantize linear except head with nf4(double=true)", "and then: apply lora(r=16) to attn.*, mlp.*"),
    "load_in_4bit": Word("quantize linear except head with nf4(double=true)"),
    "load_in_8bit": Word("quantize linear except head with int8"),
    "bnb_4bit": Word("quantize linear except head with nf4(double=true)"),
    "4bit": Word("quantize linear except head with nf4(double=true)"),
    "8bit": Word("quantize linear except head with int8"),
    "bitfit": Word("train bias"),
    "pissa": Word("lora(init=pissa)"),
    "olora": Word("lora(init=olora)"),
    "eva": Word("lora(init=eva)"),
    "loftq": Word("lora(init=loftq)"),
    "rslora": Word("lora(rslora=true)"),
    "lora_plus": Word("lora(lr_ratio=16)"),
    "loraplus": Word("lora(lr_ratio=16)"),
    "houlsby": Word("apply adapter(size=64) to attn, mlp", "and: train norm"),
    "pfeiffer": Word("apply adapter(reduction=16) to mlp"),
    "bottleneck": Word("apply adapter(size=64) to attn, mlp"),
    "parallel_adapter": Word("adapter(size=64, at=parallel)"),
    "compacter": Word("adapter(size=24, weight=phm(n=4, rank=1, shared=true))"),
    "sparse_adapter": Word("sparse(adapter(size=64), density=0.2)"),
    "adamix": Word("mixture(adapter(size=16), n=4)"),
    "unipelt": Word("gated(lora(r=8))", "and gated(prefix(length=10)), gated(adapter(size=48))"),
    "prefix_tuning": Word("apply prefix(length=20) to attn"),
    "prompt_tuning": Word("apply prompt(length=20)"),
    "p_tuning": Word("apply ptuning(length=20)"),
    "ptuning_v2": Word("apply prefix(length=20) to attn"),
    "soft_prompt": Word("apply prompt(length=20)"),
    "ladder_side_tuning": Word("apply ladder(reduction=8) to block"),
    "lst": Word("apply ladder(reduction=8) to block"),
    "intrinsic_said": Word("apply said to attn.q"),
    "diffpruning": Word("apply diff_pruning to attn.q"),
    "ln_tuning": Word("train norm"),
    "layernorm": Word("train norm", "a role; norm is every one, whatever computes it"),
    "full": Word('train "**"', "fine-tuning of all that there is"),
}

SELECTORS = {
    "all_linear": Word("linear except head", "head and its weight are left out, as HF PEFT leaves them out"),
    "all": Word("linear", 'or, of every module, "**"'),
    "lm_head": Word("head"),
    "classifier": Word("head"),
    "embeddings": Word("embed"),
    "attention": Word("attn"),
    "self_attn": Word("attn", "self and cross say which, where a model has both"),
    "ffn": Word("mlp"),
    "feed_forward": Word("mlp"),
    "query": Word("attn.q"),
    "key": Word("attn.k"),
    "value": Word("attn.v"),
    **{
        name: Word(role, f'a role; modules of this name alone: "**.{name}"')
        for name, role in (
            ("q_proj", "attn.q"),
            ("k_proj", "attn.k"),
            ("v_proj", "attn.v"),
            ("o_proj", "attn.o"),
            ("gate_proj", "mlp.gate"),
            ("up_proj", "mlp.up"),
            ("down_proj", "mlp.down"),
        )
    },
    "layers": Word("block", "a part of a selector: attn.q in layers[-4:]"),
}

OTHERS = {
    "num_virtual_tokens": Word("prompt(length=20)", parameters=("length",)),
    "encoder_hidden_size": Word("ptuning(hidden=256)", parameters=("hidden", "reparam")),
    "prefix_projection": Word("prefix(reparam=512)", parameters=("reparam",)),
    "reduction_factor": Word("adapter(reduction=16)", parameters=("reduction",)),
    "non_linearity": Word("adapter(activation=relu)", parameters=("activation",)),
    "lora_rank": Word("lora(r=8)", parameters=("r",)),
    "lora_r": Word("lora(r=8)", parameters=("r",)),
    "feedforward_modules": Word("apply ia3 to attn.k, attn.v, mlp.down"),
    "gradient_checkpointing": Word("checkpoint block"),
    "lora_target_modules": Word(_TARGETS, 'by role, attn.q, or by name, "**.q_proj"'),
    "lora_target_linear": Word("apply lora(r=8) to linear except head"),
    "lora_modules_to_save": Word(_SAVED),
    "peft_type": Word(_TARGETS, "the statement names the method"),
    "adapter": Word("apply adapter(size=64) to attn, mlp", "or the method that is meant: apply lora(r=8) to attn.q"),
}

BROUGHT = {**OTHERS, **SELECTORS, **METHODS, **LORA_CONFIG}
