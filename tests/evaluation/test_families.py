"The whole comparison runs on every supported family, on tiny models with random weights that are made here."

import pytest
import torch
import transformers as T

from llmopt.core import ASSETS, load
from llmopt.engine import EnhancedFusedLLMEngine, known_methods
from llmopt.evaluation.comparison import compare

SMALL = dict(
    vocab_size=4096,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=3,
    pad_token_id=5,
)
GPT2 = dict(vocab_size=4096, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=3)
FAMILIES = {
    "llama": lambda: T.LlamaConfig(**SMALL),
    "smollm": lambda: T.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "mistral": lambda: T.MistralConfig(**SMALL, sliding_window=16, head_dim=8),
    "qwen2": lambda: T.Qwen2Config(**SMALL),
    "qwen3": lambda: T.Qwen3Config(**SMALL, head_dim=8),
    "phi3": lambda: T.Phi3Config(**SMALL),
    "gpt2": lambda: T.GPT2Config(**GPT2),
    "dialogpt": lambda: T.GPT2Config(**GPT2),
    "phi2": lambda: T.PhiConfig(**{**SMALL, "num_key_value_heads": 4}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A function that makes the model folder of a family: random weights, the bundled tokenizer, a template only where chat models have one."

    def make(name):
        path = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        T.AutoModelForCausalLM.from_config(FAMILIES[name]()).save_pretrained(path)
        tok = T.AutoTokenizer.from_pretrained(ASSETS / "llmopt-tiny")
        if name in ("gpt2", "phi2", "dialogpt"):
            tok.chat_template = None
        tok.save_pretrained(path)
        return path

    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_comparison_runs(name, folder):
    res = compare(
        ["Why is the sky blue in the day?", "What is a river and where does it go?"],
        model=str(folder(name)),
        rounds=1,
        max_new_tokens=6,
        memory=False,
        progress=False,
    )
    df = res.frame
    assert df.error.isna().all() and set(df.method) == {*known_methods(), "baseline*"}
    assert (df[df.arm == "speed"].completion_tokens == 6).all() and (df.kv_bytes_live > 0).all()
    words = df[(df.method == "word_removal")]
    assert (words.prompt_tokens < words.prompt_tokens_base).all()
    assert any("no chat template" in w for w in res.warnings) == (name in ("gpt2", "phi2", "dialogpt"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi2", "mistral"])
def test_engine_equals_generate(name, folder):
    "Our loop around a model is the model's own greedy `generate`."
    lm = load(str(folder(name)), "cpu")
    e, ids = EnhancedFusedLLMEngine(lm), lm.encode_chat([dict(role="user", content="Where do birds go in winter?")])
    x = torch.tensor([ids])
    want = lm.model.generate(
        x, attention_mask=torch.ones_like(x), max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=5
    )[0, len(ids) :].tolist()
    assert e.run("Where do birds go in winter?", max_new_tokens=20, fixed=True).output_ids == want


@pytest.mark.hub
@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM2-135M-Instruct", "openai-community/gpt2"])
def test_hub_models(name):
    "With network: real checkpoints load and answer."
    assert EnhancedFusedLLMEngine(name).run("What is the capital of France?", max_new_tokens=8).output_text
