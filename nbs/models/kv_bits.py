"""Measure the tables of `kv:bits=auto` that come with llmopt: python nbs/models/kv_bits.py [llmopt-tiny] [smollm2]

Texts are of the kinds that the maps of `policy=foreseen` are fitted to (`kv_maps.py`), drawn with another seed. None of
them is among the texts that `llmopt benchmark kv` asks about. A table takes some five minutes on one core, because the
model is read in float32: small losses drown in the rounding of bfloat16.
"""

import sys

from kv_maps import texts

from llmopt.core import ASSETS, load
from llmopt.kv_cache.bit_table import save_table
from llmopt.kv_cache.fit_bits import measure_table

SEED, READ = 1, 4  # texts; those behind are for checks

if __name__ == "__main__":
    for name in sys.argv[1:] or ("llmopt-tiny", "smollm2"):
        table = measure_table(load(name, "cpu", "float32"), texts(SEED)[:READ], keep=False)
        path = save_table(table, ASSETS / f"{name}-kv-map" / "bits.json")
        print(f"{path}: {table.info['read']} texts of {table.info['tokens']} tokens or more")
