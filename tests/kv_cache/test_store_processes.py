"A prefix store that three real processes share: one dies in the middle of a write, two write and delete at once."

import pytest
import torch
import transformers as T
from forked import Process

from helpers import small_model
from llmopt.kv_cache.cache import SlabCache
from llmopt.kv_cache.prefix_key import chunk_names, model_key
from llmopt.kv_cache.restore import PrefixStore
from llmopt.kv_cache.store import unpack_chunk

CHUNK, LIMIT = 16, 70_000  # bytes: room for about 15 of the 30 chunks


def prompt(seed, n=16 * 6 + 3):
    return torch.randint(256, (1, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def check(model, ids, cache):
    "The cache is bit-identical with that of a prefill without store."
    want = T.DynamicCache(config=model.config)
    for i in range(0, cache.get_seq_length(), CHUNK):
        model(ids[:, i : i + CHUNK], past_key_values=want)
    for a, b in zip(cache.layers, want.layers):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def work(folder, rounds=30):
    "Prefill a few prompts over and over; together they take more room than there is."
    model, store = small_model(), PrefixStore(folder, LIMIT, CHUNK)
    for i in range(rounds):
        ids, cache = prompt(i % 5), SlabCache(model.config)
        store.meet_at = i % 3
        store.prefill(model, cache, ids)
        check(model, ids, cache)
    assert store.writable, "stopped writing"
    assert store.stats()["evicted"], store.stats()


def die(folder):
    "Leave in the middle of writing the third chunk: the temporary file is there, and half full."
    import os
    from pathlib import Path

    renames, rename = [], os.replace

    def replace(tmp, path):
        renames.append(path)
        if len(renames) == 3:
            os.truncate(tmp, Path(tmp).stat().st_size // 2)
            os._exit(9)
        rename(tmp, path)

    os.replace = replace
    model = small_model()
    PrefixStore(folder, LIMIT, CHUNK).prefill(model, SlabCache(model.config), prompt(99))


def begin(what, folder, threads):
    "Do `what`, in a process of its own."
    torch.set_num_threads(threads)
    what(folder)


def start(what, folder):
    "A process that does `what` with as many threads as this one has: their number is part of a chunk's name."
    process = Process(target=begin, args=(what, str(folder), torch.get_num_threads()))
    process.start()
    return process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder in which one process died, and that two others then used at the same time."
    path = tmp_path_factory.mktemp("shared") / "store"
    for together, exits in (
        ([die], [9]),
        ([work, work], [0, 0]),
    ):  # beside writers, it may find no room for three chunks
        processes = [start(what, path) for what in together]
        for p in processes:
            p.join()
        assert [p.exitcode for p in processes] == exits
    return path


def test_writers_leave_nothing_damaged(folder):
    "Every file that three processes left can be read, and together they keep the limit."
    files = [*folder.glob("*.safetensors")]
    assert files and sum(p.stat().st_size for p in files) <= LIMIT
    for p in files:
        unpack_chunk(p.stem, p.read_bytes())


def test_half_a_file_is_never_a_chunk(folder):
    "The process that died left a temporary file and no chunk; a sweep removes it, and a prefill fills the gap."
    assert len([*folder.glob("*.tmp")]) == 1
    PrefixStore(folder).sweep(age=0)
    assert not [*folder.glob("*.tmp")]
    model, ids = small_model(), prompt(99)
    store = PrefixStore(folder, LIMIT, CHUNK)
    names = chunk_names(model_key(model, CHUNK, attention="packed"), ids[0], CHUNK)
    assert not store.path(names[2]).exists()
    cache = SlabCache(model.config)
    store.meet_at = 0  # load all that is there
    report = store.prefill(model, cache, ids)
    check(model, ids, cache)
    assert report.damaged == 0 and report.computed >= 4 and store.path(names[2]).exists()


def test_what_one_process_wrote_another_loads(folder):
    "Whatever tests have done in this process before: the names of chunks are those of a fresh one."
    model, hits = small_model(), 0
    for seed in range(5):
        cache, store = SlabCache(model.config), PrefixStore(folder, 10 * LIMIT, CHUNK)
        store.meet_at = 0
        hits += store.prefill(model, cache, prompt(seed)).loaded
        check(model, prompt(seed), cache)
    assert hits
