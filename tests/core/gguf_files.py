"""GGUF files for tests: small models with random weights, written as llama.cpp's converter writes them.

Names come from the table of the gguf library and values from llama.cpp's rules, so nothing here knows how llmopt reads.
"""

import gguf
import torch
import transformers as T
from transformers.convert_slow_tokenizer import bytes_to_unicode

from helpers import SMALL, small_config

LETTERS = [*bytes_to_unicode().values()]
MERGES = ["Ġ Ġ", "t h", "th e", "Ġ a", "i n"]
SPECIAL = ["<|pad|>", "<|start|>", "<|end|>"]
TOKENS = [*LETTERS, *(m.replace(" ", "") for m in MERGES), *SPECIAL]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
GEMMA = SMALL | dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=16)
CONFIGS = {
    "gemma2": lambda **kw: T.Gemma2Config(**GEMMA | dict(tie_word_embeddings=True) | kw),
    "gemma3": lambda **kw: T.Gemma3TextConfig(**GEMMA | dict(tie_word_embeddings=True, num_hidden_layers=7) | kw),
}
ARCHITECTURE = {"smollm": "llama", "mistral": "llama"}  # families that are stored as another one


def random_model(family="llama", **changes):
    "A small model of a family, with a vocabulary of `TOKENS` and norms that are not 1."
    ids = dict(bos_token_id=0, pad_token_id=TOKENS.index("<|pad|>"), eos_token_id=TOKENS.index("<|end|>"))
    changes = dict(vocab_size=len(TOKENS), **ids) | changes
    torch.manual_seed(0)
    config = CONFIGS[family](**changes) if family in CONFIGS else small_config(family, **changes)
    model = T.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def _entries(w, model, arch):
    "The architecture's own entries of the header."
    c = model.config
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    w.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    w.add_rope_dimension_count(head_dim(c))
    if arch != "phi3":
        w.add_key_length(head_dim(c))
    if getattr(c, "sliding_window", None):
        w.add_sliding_window(c.sliding_window)
    if arch == "gemma2":
        w.add_attn_logit_softcapping(c.attn_logit_softcapping)
        w.add_final_logit_softcapping(c.final_logit_softcapping)


def head_dim(config):
    "The width of a head."
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _tokenizer(w):
    "The entries of the tokenizer."
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(TOKENS)
    w.add_token_types([3 if t in SPECIAL else 1 for t in TOKENS])
    w.add_token_merges(MERGES)
    w.add_eos_token_id(TOKENS.index("<|end|>"))
    w.add_pad_token_id(TOKENS.index("<|pad|>"))
    w.add_chat_template(TEMPLATE)
    w.add_add_bos_token(False)


def _as_llama_cpp(name, data, config, arch):
    "The values of a weight as llama.cpp stores them."
    if arch == "llama" and ("attn_q." in name or "attn_k." in name):
        heads = config.num_attention_heads if "attn_q." in name else config.num_key_value_heads
        return data.reshape(heads, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
    return data + 1 if arch.startswith("gemma") and "norm" in name else data


def write_gguf(path, model=None, format="F32", arch=None, leave_out=(), entries=None, tensors=None, tokenizer=True):
    """Write `model` (a small Llama if None) to `path` with its matrices in `format`; the model.

    `leave_out` names tensors, `tensors` adds some, and `entries` adds to the header.
    """
    model = model or random_model()
    family = model.config.model_type.removesuffix("_text")
    arch = arch or ARCHITECTURE.get(family, family)
    w, kind = gguf.GGUFWriter(path, arch), gguf.GGMLQuantizationType[format]
    _entries(w, model, arch)
    if tokenizer:
        _tokenizer(w)
    for key, value in (entries or {}).items():
        {str: w.add_string, float: w.add_float32, int: w.add_uint32}[type(value)](key, value)
    known = gguf.MODEL_ARCH.__members__.get(arch.upper(), gguf.MODEL_ARCH.LLAMA)
    names = gguf.get_tensor_name_map(known, model.config.num_hidden_layers)
    weights = {n: p.detach().float().numpy() for n, p in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    stored = {}
    for n, data in weights.items():
        name, _, suffix = n.rpartition(".")
        name = f"{names.get_name(name)}.{suffix}"
        stored[name] = _as_llama_cpp(name, data, model.config, arch)
    for name, data in (stored | (tensors or {})).items():
        if name in leave_out:
            continue
        if data.ndim == 2 and format != "F32":
            w.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            w.add_tensor(name, data.astype("float32"))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return model
