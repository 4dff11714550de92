"The whole comparison runs on every supported family, on tiny models with random weights that are made here."

import pytest
import torch

from helpers import FAMILIES, NO_TEMPLATE, save_model, small_model, tokenizer
from llmopt.core import load
from llmopt.engine import EnhancedFusedLLMEngine, known_methods
from llmopt.evaluation import compare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A function that makes the model folder of a family; a chat template only where chat models have one."

    def make(name):
        tok = tokenizer()
        if name in NO_TEMPLATE:
            tok.chat_template = None
        return save_model(tmp_path_factory.mktemp(name), small_model(name), tok)

    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_comparison_runs(name, folder):
    "Every method has its rows on a model of this family, and word removal shortens its prompts."
    res = compare(
        ["What is a river and where does it go?"],
        model=folder(name),
        quick=True,
        max_new_tokens=4,
        memory=False,
        progress=False,
    )
    df = res.frame
    assert df.error.isna().all() and set(df.method) == {*known_methods(), "baseline*"}
    assert (df[df.arm == "speed"].completion_tokens == 4).all() and (df.kv_bytes_live > 0).all()
    words = df[df.method == "word_removal"]
    assert (words.prompt_tokens < words.prompt_tokens_base).all()
    assert any("no chat template" in w for w in res.warnings) == (name in NO_TEMPLATE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi2", "mistral"])
def test_engine_equals_generate(name, folder):
    "Our loop around a model is the model's own greedy `generate`."
    lm = load(folder(name), "cpu")
    engine = EnhancedFusedLLMEngine(lm)
    ids = lm.encode_chat([dict(role="user", content="Where do birds go in winter?")])
    x = torch.tensor([ids])
    want = lm.model.generate(
        x, attention_mask=torch.ones_like(x), max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=5
    )[0, len(ids) :].tolist()
    assert engine.run("Where do birds go in winter?", max_new_tokens=20, fixed=True).output_ids == want


@pytest.mark.hub
@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM2-135M-Instruct", "openai-community/gpt2"])
def test_hub_models(name):
    "With network: real checkpoints load and answer."
    assert EnhancedFusedLLMEngine(name).run("What is the capital of France?", max_new_tokens=8).output_text
