"""Sizes of the tiny models of several test files: all different, so that no mix-up of axes goes unnoticed."""

VOCAB, WINDOW, SLOTS = 61, 5, 3
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    window_size=WINDOW,
    eidetic_size=SLOTS,
    fading_size=2,
    ssm_state_size=6,
    ssm_chunk_size=8,
    memory_block_size=8,
)
MIXED_LAYERS = dict(
    num_hidden_layers=4, layer_types=["bmojo", "sliding_attention", "full_attention", "linear_attention"]
)
# The SSM reads the layer's input itself; in a layer with attention and in one without.
UNPROJECTED = dict(layer_types=["bmojo", "linear_attention"], ssm_projected=False, ssm_num_heads=8, ssm_head_dim=2)
