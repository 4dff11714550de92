"""What caches of few bits must be equal to: full precision, in which tokens are rounded when they leave the window.

Slow, and to be read. Rounding is `llmopt.kv_cache.quantize.rounded`, which knows no bytes.
"""

import itertools

import torch
import torch.nn.functional as F
import transformers as T

from llmopt.kv_cache.attention import read_packed
from llmopt.kv_cache.evicting_slab import EvictingSlab
from llmopt.kv_cache.low_bit_slab import STEPS, WINDOWS, LowBitSlab, SlabView
from llmopt.kv_cache.quantize import rounded


class RoundedLayer(T.cache_utils.DynamicLayer):
    "A stock layer that rounds its oldest tokens when a step is over."

    def __init__(self, bits, window):
        super().__init__()
        self.bits, self.window, self.coded = bits, WINDOWS[bits] if window is None else window, 0

    def update(self, key_states, value_states, *args, **kwargs):
        "All keys and values; what is too old is rounded for the next step."
        k, v = super().update(key_states, value_states)
        a = self.coded
        over = k.shape[2] - a - self.window
        b = a + max(over - over % STEPS[self.bits], 0)
        self.keys = torch.cat([k[:, :, :a], rounded(k[:, :, a:b], self.bits, keys=True), k[:, :, b:]], 2)
        self.values = torch.cat([v[:, :, :a], rounded(v[:, :, a:b], self.bits), v[:, :, b:]], 2)
        self.coded = b
        return k, v

    def crop(self, tokens_to_remove):
        "What was rounded stays so."
        super().crop(tokens_to_remove)
        self.coded = min(self.coded, self.get_seq_length())


class RoundedCache(T.DynamicCache):
    "A stock cache of `RoundedLayer`, whose keys packed attention may read: the same sums in the same order."

    def __init__(self, config, bits, window=None):
        super().__init__(config=config)
        self.layers = [RoundedLayer(bits, window) for _ in range(config.num_hidden_layers)]

    def update(self, *args, **kw):
        "Keys and values, the keys marked."
        k, v = super().update(*args, **kw)
        return read_packed(k), v


class RoundedSlab(EvictingSlab):
    "A `LowBitSlab` without bytes: an evicting slab in full precision that rounds its tokens row by row."

    def __init__(self, *args, bits, window=None, **kw):
        super().__init__(*args, **kw)
        self.bits, self.window, self.step = bits, WINDOWS[bits] if window is None else window, STEPS[bits]
        self.recent, self.groups = 0, 0  # tokens in full precision, lines of the table
        self.group = torch.zeros(*self.lengths.shape, 0, dtype=torch.long)  # of each slot that is rounded
        size = self.num_heads, self.key_rows.width, self.batch, 10, self.key_rows.dtype
        self.like = LowBitSlab(*size, value_size=self.value_rows.width, bits=bits, window=window)

    @property
    def slot_bytes(self):
        return self.like.slot_bytes

    @property
    def spare_bytes(self):
        return self.like.spare_bytes

    @property
    def full_bytes(self):
        return self.like.full_bytes

    @property
    def coded(self):  # (B, H)
        "Rounded tokens in each row."
        return self.lengths - self.recent

    @property
    def keys(self):
        "A copy, laid out as decoded keys are, so that attention adds up in the same order."
        return self.raw(self.key_rows).contiguous()

    @property
    def values(self):
        "The same of values."
        return self.raw(self.value_rows).contiguous()

    def raw(self, rows):  # (B, H, seq_len, ·)
        "What lies in `rows`, to be changed in place."
        return self._table(rows)[:, :, : self.seq_len]

    def view(self):
        "No records: there is nothing here that a kernel could read."
        none = torch.empty(*self.lengths.shape, 0, 0, dtype=torch.uint8)
        return SlabView(self.bits, none, none, self.lengths, None, None, None, None)

    def append(self, k, v):
        "New tokens are in full precision."
        super().append(k, v)
        self.group = F.pad(self.group, (0, self.seq_len - self.group.shape[-1]))
        self.recent += k.shape[2]
        return self.keys, self.values

    def encode_old(self, exactly=False):
        "Round what has left the window."
        over = self.recent - self.window
        self.encode(over if exactly else over - over % self.step)

    def encode(self, m):
        "Round the `m` oldest tokens that are not."
        if m <= 0:
            return
        for b, h in self.rows():
            n = int(self.coded[b, h])
            self.round_keys(b, h, n, n + m, self.groups)
            v = self.raw(self.value_rows)[b, h, n : n + m]
            v.copy_(rounded(v[None, None], self.bits)[0, 0])
        self.groups += -(-m // 32)
        self.recent -= m
        self.tidy()

    def rows(self):
        return itertools.product(range(self.batch), range(self.num_heads))

    def round_keys(self, b, h, start, stop, first):
        "Round the keys of these slots in groups that are numbered from `first` on."
        k = self.raw(self.key_rows)[b, h, start:stop]
        k.copy_(rounded(k[None, None], self.bits, keys=True)[0, 0])
        self.group[b, h, start:stop] = first + torch.arange(stop - start) // 32

    def tidy(self):
        "Where the table would have twice the lines that are needed, round the keys anew in groups of neighbours."
        longest = self.seq_len - self.recent
        if self.bits == 4 and self.groups > 2 * -(-longest // 32) + 2:
            for b, h in self.rows():
                self.round_keys(b, h, 0, int(self.coded[b, h]), 0)
            self.groups = -(-longest // 32)

    def drop_lines(self):
        "The table ends with the last line in use."
        used = torch.arange(self.seq_len) < self.coded[..., None]
        self.groups = min(self.groups, int(self.group[used].max()) + 1 if used.any() else 0)
        self.tidy()

    def keep(self, mask, along=()):
        "Drop others, but none of the window."
        self.encode_old(exactly=True)
        mask = (mask | (torch.arange(self.seq_len) >= self.coded[..., None])) & self.filled
        if torch.equal(mask.sum(-1), self.lengths):
            return
        super().keep(mask, [*along, self.group])
        self.group = self.group[..., : self.seq_len]
        self.drop_lines()

    def truncate(self, n):
        "Take tokens back."
        coded = self.tokens_seen - self.recent
        super().truncate(n)
        self.group, self.recent = self.group[..., : self.seq_len], max(n - coded, 0)
        if n < coded:
            self.drop_lines()

    def select(self, idx):
        "Reorder sequences."
        super().select(idx)
        self.group = self.group[idx][..., : self.seq_len]
        self.drop_lines()
