"Models in float64 for the tests of this folder, one of every family, and what is done to them again and again."

import torch

from helpers import exact_model
from llmopt.larosa import choose_rotations, convert, eigenbasis, second_moments, sparsify

SMALL = dict(
    vocab_size=96, num_hidden_layers=3, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
)
GPT2 = dict(vocab_size=96, n_layer=3, n_positions=64, bos_token_id=1, eos_token_id=2)
CHANGES = {  # to the small models of `helpers`: biases, tied embeddings, a sliding window, another MLP width
    "llama": SMALL | dict(attention_bias=True, mlp_bias=True),
    "smollm": SMALL,
    "mistral": SMALL | dict(head_dim=16, sliding_window=5),
    "qwen2": SMALL,
    "qwen3": SMALL | dict(head_dim=16, tie_word_embeddings=True),
    "phi3": SMALL,
    "gpt2": GPT2,
    "dialogpt": GPT2 | dict(n_inner=48),
    "phi2": SMALL,
}


def exact(family):
    "A float64 model of a family, and (3, 40) token ids."
    model = exact_model(family, **CHANGES[family])
    torch.manual_seed(1)
    return model, torch.randint(3, 96, (3, 40))


def random_heads(model):
    "Random orthogonal bases for the values of every layer: layer -> (KV heads, d, d)."
    cfg = model.config
    n = getattr(cfg, "num_key_value_heads", cfg.num_attention_heads)
    d = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads

    def basis():
        a = torch.randn(d, d, dtype=torch.float64)
        return eigenbasis(a @ a.T)

    return {i: torch.stack([basis() for _ in range(n)]) for i in range(cfg.num_hidden_layers)}


def sparsified(model, ids, rotation="layer", heads=None, **kwargs):
    "`model` rotated and sparsified, nothing dropped yet."
    return sparsify(convert(model, choose_rotations(second_moments(model, ids), rotation), heads), **kwargs)
