"""What transformers' mixins ask of a model: classes, a small configuration, inputs; for each model that is compared.

Shapes: batch 5, 13 tokens, which is beyond the window of 4, so that all memories take part.
"""

import torch
from transformers import FalconH1Config, LlamaConfig
from transformers.models.falcon_h1 import modeling_falcon_h1 as falcon_h1
from transformers.models.llama import modeling_llama as llama

import modeling_bmojo as bmojo


SIZES = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MEMORIES = dict(window_size=4, eidetic_size=3, fading_size=2, ssm_state_size=6, ssm_chunk_size=32, memory_block_size=32)
# FalconH1's SSM has sizes of its own, which must fit each other.
HYBRID = dict(
    mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=16, mamba_d_conv=4, mamba_expand=2
)


class Tester:
    """A model under transformers' common tests."""

    is_training = True
    batch_size, seq_length = 5, 13
    num_labels = 3

    def __init__(self, parent, config_class, fields: dict, classes: dict):
        self.parent, self.config_class, self.fields = parent, config_class, fields
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            setattr(self, name, fields[name])
        self.base_model_class, self.causal_lm_class = classes["base"], classes["causal"]
        self.sequence_classification_class = classes.get("sequence")

    def get_config(self):
        return self.config_class(**self.fields)

    def prepare_config_and_inputs_for_common(self) -> tuple:
        """Return a configuration and `input_ids`, `attention_mask` `[B, T]`, the latter without pads."""
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


LLAMA = {
    "base": llama.LlamaModel,
    "causal": llama.LlamaForCausalLM,
    "sequence": llama.LlamaForSequenceClassification,
    "token": llama.LlamaForTokenClassification,
    "question": llama.LlamaForQuestionAnswering,
}
FALCON_H1 = {"base": falcon_h1.FalconH1Model, "causal": falcon_h1.FalconH1ForCausalLM}
BMOJO = {
    "base": bmojo.BMojoModel,
    "causal": bmojo.BMojoForCausalLM,
    "sequence": bmojo.BMojoForSequenceClassification,
    "token": bmojo.BMojoForTokenClassification,
    "question": bmojo.BMojoForQuestionAnswering,
}
# name -> configuration class, fields, classes
MODELS = {
    "Llama": (LlamaConfig, SIZES, LLAMA),
    "FalconH1": (FalconH1Config, SIZES | HYBRID, FALCON_H1),
    "BMojo": (bmojo.BMojoConfig, SIZES | MEMORIES, BMOJO),
    "BMojoMixed": (
        bmojo.BMojoConfig,
        SIZES | MEMORIES | dict(layer_types=["bmojo", "linear_attention"]),
        BMOJO,
    ),
    "BMojoAttention": (
        bmojo.BMojoConfig,
        SIZES | MEMORIES | dict(layer_types=["sliding_attention", "full_attention"]),
        BMOJO,
    ),
}
