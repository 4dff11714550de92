"Short sequences lie in ordinary memory: the border to pages, and what can go wrong there."

import copy

import pytest
import torch

from helpers import small_model
from llmopt.errors import ConfigError, LlmoptError
from llmopt.kv_cache import KVCacheConfig, SimpleVAttention


def tokens(n, heads=2, width=8):
    "Keys of `n` tokens that can be told apart."
    return torch.arange(float(heads * n * width)).view(1, heads, n, width)


@pytest.mark.parametrize("steps", [(3, 1, 1, 1, 1, 1, 1), (20,), (8, 1), (7, 9)])
def test_across_the_border(steps):
    "Whatever the steps are that lead across it, all keys are there."
    s, want = SimpleVAttention(2, 8, 1, 100, page_after=8), tokens(sum(steps))
    for k in want.split(steps, 2):
        s.append(k, k)
    assert torch.equal(s.keys, want) and torch.equal(s.values, want)


def test_pages_of_many_tokens_are_not_taken_in_ordinary_memory():
    "`page_tokens` is about pages: in front of the border there is room for what is there, and for nothing else."
    s = SimpleVAttention(2, 8, 1, 10_000, page_tokens=4096, page_after=128)
    for k in tokens(20).split(1, 2):
        s.append(k, k)
    assert s.reserved == 20 * s.token_bytes and torch.equal(s.keys, tokens(20))


def test_what_was_filled_in_inference_mode_can_be_changed_outside():
    "Reordered in place, cut, and grown; and a copy goes its own way."
    s, k = SimpleVAttention(2, 8, 2, 100, page_after=16), tokens(8, heads=4).view(2, 2, 8, 8)
    with torch.inference_mode():
        s.append(k[:, :, :5], k[:, :, :5])
        s.append(k[:, :, 5:6], k[:, :, 5:6])
    other = copy.deepcopy(s)
    s.select(torch.tensor([1, 1]))
    s.truncate(3)
    s.append(k[:, :, 6:], k[:, :, 6:])
    want = torch.cat([k[[1, 1], :, :3], k[:, :, 6:]], 2)
    assert torch.equal(s.keys, want) and torch.equal(other.values, k[:, :, :6])


def test_addresses_that_cannot_be_had_are_refused_again():
    "The border is not forgotten after an error."
    cache = KVCacheConfig(max_seq_len=2**45, page_after=10, attention="stock").make_cache(small_model("llama"))
    cache.update(tokens(8), tokens(8), 0)
    for _ in range(2):
        with pytest.raises(ConfigError, match="max_seq_len"):
            cache.update(tokens(4), tokens(4), 0)
    assert cache.get_seq_length() == 8


def test_closed_is_closed():
    "Slots beyond the border do not bring a closed slab back."
    s = SimpleVAttention(2, 8, 1, 64, page_after=12)
    s.append(tokens(3), tokens(3))
    s.close()
    with pytest.raises(LlmoptError, match="closed"):
        s.reserve_slots(50)


def test_begun_in_inference_mode():
    "An empty layer that was made in inference mode can be reordered outside of it."
    cache = KVCacheConfig(page_after=10, attention="stock").make_cache(small_model("llama"))
    empty = torch.randn(2, 2, 0, 8)
    with torch.inference_mode():
        cache.layers[0].lazy_initialization(empty, empty)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.get_seq_length() == 0
