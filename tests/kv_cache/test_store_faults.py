"A folder that is damaged, full, locked or gone costs the stored chunks and nothing else; it is said once."

import errno
import os
import random
import shutil
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch

from helpers import small_model, tiny
from llmopt.errors import ConfigError, CorruptChunkError, LlmoptError
from llmopt.kv_cache import EvictingCache, EvictionConfig, PrefixStore, SlabCache
from llmopt.kv_cache.attention import packed
from llmopt.kv_cache.prefix_key import chunk_names, model_key
from llmopt.kv_cache.store import ChunkStore, pack_chunk, unpack_chunk

CHUNK = 16


@pytest.fixture(scope="module")
def model():
    return small_model()


def prompt(n, seed=1):
    return torch.randint(10, 250, (1, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def prefill(store, model, ids=None):
    "The report of a prefill that gave the keys and values of one without a store, bit by bit."
    from transformers import DynamicCache

    ids = prompt(CHUNK * 6 + 1) if ids is None else ids
    cache, want = SlabCache(model.config), DynamicCache(config=model.config)
    report, n = store.prefill(model, cache, ids), (ids.shape[1] - 1) // store.chunk * store.chunk
    for i in range(0, n, store.chunk):
        model(ids[:, i : i + store.chunk], past_key_values=want)
    assert cache.get_seq_length() == n
    for a, b in zip(cache.layers, want.layers if n else ()):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
    return report


def said_by(function):
    "The warnings that `function` gave."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        function()
    return [str(w.message) for w in said]


def temporary(folder):
    return [p for p in Path(folder).rglob("*") if p.name.endswith(".tmp")]


# chunks


def test_every_flipped_bit_is_noticed_or_harmless():
    "Flipped bits, cut and appended bytes: an error or the same tensors, and hardly ever the latter."
    torch.manual_seed(0)
    kv = [(torch.randn(1, 2, 4, 8).to(d), torch.randn(1, 2, 4, 6).to(d)) for d in (torch.float32, torch.bfloat16)]
    data = pack_chunk("name", kv)
    head = 8 + int.from_bytes(data[:8], "little")
    at = [*range(0, head, 3), *range(head, len(data), 41)]
    bad = [data[:i] + bytes([data[i] ^ bit]) + data[i + 1 :] for i in at for bit in (1, 64)]
    bad += [data[:n] for n in (0, 5, head, len(data) - 1)] + [data + b"x", os.urandom(500)]
    read = 0
    for b in bad:
        try:
            out = unpack_chunk("name", b)
        except CorruptChunkError:
            continue
        read += 1  # a blank of the header was changed
        assert all(torch.equal(x, y) for p, q in zip(kv, out) for x, y in zip(p, q))
    assert read < len(bad) / 10
    with pytest.raises(CorruptChunkError):
        unpack_chunk("other", data)


def test_a_sound_chunk_of_another_shape_is_computed_anew(model, tmp_path):
    "Its sum is right, for somebody wrote it under this name; but it does not fit."
    store, ids = PrefixStore(tmp_path, chunk=CHUNK), prompt(CHUNK * 6 + 1)
    prefill(store, model)
    name = chunk_names(model_key(model, CHUNK, attention="packed"), ids[0], CHUNK)[4]
    shorter = [torch.ones(1, 2, 3, 8) for _ in range(4)]
    finer = [torch.ones(1, 2, 16, 8).double() for _ in range(4)]
    for kv in [(shorter[:2], shorter[2:]), (finer[:2], finer[2:]), []]:
        store.path(name).write_bytes(pack_chunk(name, kv))
        store.meet_at = 0
        report = prefill(store, model)
        assert (report.damaged, report.loaded, report.loader_error) == (1, 5, None)


@pytest.mark.parametrize("how", ["cut", "half", "empty", "flipped", "other"])
def test_damage_is_replaced(model, tmp_path, how):
    "Five kinds of damage to one of six chunks: it is computed again, and its file has the old bytes."
    store = PrefixStore(tmp_path, chunk=CHUNK)
    prefill(store, model)
    names = chunk_names(model_key(model, CHUNK, attention="packed"), prompt(CHUNK * 6 + 1)[0], CHUNK)
    good = [store.path(n).read_bytes() for n in names]
    bad = dict(
        cut=good[3][:700],
        half=good[3][: len(good[3]) // 2] + bytes(len(good[3]) // 2),
        empty=b"",
        flipped=good[3][:-9] + bytes([good[3][-9] ^ 4]) + good[3][-8:],
        other=good[2],
    )
    store.path(names[3]).write_bytes(bad[how])
    store.meet_at = 0
    report = prefill(store, model)
    assert (report.damaged, report.computed, report.loaded) == (1, 1, 5)
    assert store.path(names[3]).read_bytes() == good[3]


def test_all_damaged_and_vanishing_files(model, tmp_path):
    "With every file damaged all is computed and stored again; files that vanish as they are read are computed, too."
    store = PrefixStore(tmp_path, chunk=CHUNK)
    prefill(store, model)
    for p in tmp_path.iterdir():
        p.write_bytes(b"nothing")
    store.meet_at = 0
    assert prefill(store, model).damaged == 6 and prefill(store, model).computed == 0

    class Vanishing(PrefixStore):
        def read_chunk(self, name):
            self.path(name).unlink()
            return super().read_chunk(name)

    vanishing = Vanishing(tmp_path, chunk=CHUNK)
    vanishing.meet_at = 2
    assert prefill(vanishing, model).computed == 6


def test_layers_that_are_not_there_are_damage():
    "The sum is right, the names are others."
    from llmopt.kv_cache.store import _digest  # private: nobody else can write such a file

    for tensors in dict(a=torch.ones(2), b=torch.ones(2)), dict(k0=torch.ones(2)), dict(k1=torch.ones(2)):
        data = safetensors.torch.save(tensors | dict(sha256=_digest("name", tensors)))
        with pytest.raises(CorruptChunkError, match="does not hold layers"):
            unpack_chunk("name", data)


@pytest.mark.parametrize("what", ["folder", "pipe", "device", "loop", "huge"])
def test_what_stands_under_the_name_of_a_chunk_and_is_none_is_not_opened(model, tmp_path, what):
    "The chunk is computed, the others are loaded, and storing goes on."
    store = PrefixStore(tmp_path, chunk=CHUNK)
    prefill(store, model)
    name = chunk_names(model_key(model, CHUNK, attention="packed"), prompt(CHUNK * 6 + 1)[0], CHUNK)[3]
    path = store.path(name)
    if what == "huge":
        os.truncate(path, 2**31)  # sparse
    else:
        path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("this system has no pipes in folders")
        os.mkfifo(path)
    elif what != "huge":
        path.symlink_to("/dev/zero" if what == "device" else path)
    store.meet_at = 0
    report = prefill(store, model)
    assert (report.hits, report.computed, report.loader_error) == (5, 1, None) and store.writable
    assert path.is_file() != (what == "folder") and path.is_symlink() is False
    assert prefill(store, model).hits == (5 if what == "folder" else 6)
    full = PrefixStore(tmp_path, chunk=CHUNK, max_bytes=30_000)
    assert prefill(full, model, prompt(99, seed=2)).bytes_written > 0 and full.writable


def test_files_from_a_time_that_has_not_come_are_the_oldest(model, tmp_path):
    "A clock was wrong once: its files would never be deleted, and a full store take nothing any more."
    store = PrefixStore(tmp_path, chunk=CHUNK, max_bytes=30_000)
    prefill(store, model)
    for p in tmp_path.iterdir():
        os.utime(p, (time.time() + 10**8,) * 2)
    again = PrefixStore(tmp_path, chunk=CHUNK, max_bytes=30_000)
    assert [prefill(again, model, prompt(CHUNK * 6 + 1, seed=2)).hits for _ in range(2)] == [0, 6]


def test_a_store_that_is_smaller_than_a_chunk_says_so(model, tmp_path):
    "In one warning for all prefills, and nothing is left in the folder."
    store = PrefixStore(tmp_path, chunk=CHUNK, max_bytes=321)
    said = said_by(lambda: [prefill(store, model) for _ in range(2)])
    assert len(said) == 1 and "max_bytes=321" in said[0] and not [*tmp_path.iterdir()]


def test_costs_of_a_few_models_are_remembered(tmp_path):
    "A model that is trained has another key at every prefill."
    m, store = small_model(), PrefixStore(tmp_path, chunk=CHUNK)
    for _ in range(20):
        m.lm_head.weight.data[0, 0] += 1
        prefill(store, m, prompt(CHUNK + 1))
    assert 0 < len(store.costs) <= 16


def test_threads_share_a_store(model, tmp_path):
    "Sixty prefills of five prompts by eight threads: the keys are always the same."
    store, found = PrefixStore(tmp_path, chunk=CHUNK), {}

    def keys(i):
        cache = SlabCache(model.config)
        store.prefill(model, cache, prompt(CHUNK * 4 + 1, seed=i % 5))
        return i % 5, torch.cat([s.keys.flatten() for s in cache.slabs])

    with ThreadPoolExecutor(8) as pool:
        for i, k in pool.map(keys, range(60)):
            assert torch.equal(found.setdefault(i, k), k)
    assert store.stats()["hits"] > 100 and store.writable


# the loader


def test_loaders_of_no_steady_speed_give_the_same_bits(model, tmp_path):
    "Random delays move the place where loading and computing meet, and nothing else."
    rng, meets = random.Random(0), set()
    prefill(PrefixStore(tmp_path, chunk=CHUNK), model)

    class Uneven(PrefixStore):
        def read_chunk(self, name):
            time.sleep(rng.random() * self.slowest)
            return super().read_chunk(name)

    for slowest in (0, 0.002, 0.01, 0.05):
        store = Uneven(tmp_path, chunk=CHUNK)
        store.slowest = slowest
        for _ in range(3):
            report = prefill(store, model)
            assert (report.hits, report.computed + report.loaded) == (6, 6)
            meets.add(report.meet)
    assert len(meets) > 1


@pytest.mark.parametrize("error", [SystemExit("killed"), RuntimeError("broken"), MemoryError()], ids=repr)
def test_a_loader_that_dies_is_made_up_for(model, tmp_path, error):
    "After two chunks, whatever kills it: the other four are computed, and one warning says so."
    prefill(PrefixStore(tmp_path, chunk=CHUNK), model)

    class Dying(PrefixStore):
        reads = 0

        def read_chunk(self, name):
            self.reads += 1
            if self.reads > 2:
                raise error
            return super().read_chunk(name)

    store, reports = Dying(tmp_path, chunk=CHUNK), []
    store.meet_at = 0
    said = said_by(lambda: reports.append(prefill(store, model)))
    assert (reports[0].loaded, reports[0].computed) == (2, 4)
    assert len(said) == 1 and "loader stopped" in said[0]


def test_hanging_loaders_cost_time_and_no_more_than_four_threads(model, tmp_path):
    "After four that did not come back the store stops asking, says so, and serves again when they have."
    prefill(PrefixStore(tmp_path, chunk=CHUNK), model)
    gate = threading.Event()

    class Hanging(PrefixStore):
        def read_chunk(self, name):
            gate.wait()
            return super().read_chunk(name)

    store = Hanging(tmp_path, chunk=CHUNK)
    for _ in range(4):
        report = prefill(store, model)
        assert (report.computed, report.wasted) == (6, 1)
    with pytest.warns(UserWarning, match="not come back"):
        prefill(store, model)
    gate.set()
    for t in store.loaders:
        t.join()
    store.meet_at = 0
    assert prefill(store, model).loaded == 6


# the folder


def test_a_folder_that_cannot_be_made(model, tmp_path):
    "The store goes on without storing, and says so once."
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file" / "store", tmp_path / ("x" * 300), "/proc/nothing/here"):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            store = PrefixStore(folder, chunk=CHUNK)
            for _ in range(2):
                prefill(store, model)
        assert len(said) == 1 and "going on without storing" in str(said[0].message)
        assert store.stats()["files"] == 0 and not store.stats()["writable"]


def test_a_folder_that_vanishes(model, tmp_path):
    "Removed behind the back of an open store: prefills go on, with one warning."
    store = PrefixStore(tmp_path / "gone", chunk=CHUNK)
    shutil.rmtree(tmp_path / "gone")
    said = said_by(lambda: [prefill(store, model) for _ in range(2)])
    assert len(said) == 1 and "cannot be used" in said[0]


def test_a_folder_without_access(model, tmp_path, monkeypatch):
    "No file can be looked at, and none made: as a folder of somebody else answers (also to a root user, here)."
    store, real = (
        PrefixStore(tmp_path / "locked", chunk=CHUNK),
        {n: getattr(os, n) for n in ("stat", "lstat", "open", "scandir")},
    )

    def deny(name):
        def call(path, *args, **kw):
            if "locked" in str(path):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real[name](path, *args, **kw)

        return call

    for name in real:
        monkeypatch.setattr(os, name, deny(name))
    said = said_by(lambda: [prefill(store, model) for _ in range(2)] + [store.stats()])
    assert len(said) == 1 and "Permission denied" in said[0]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do everything")
def test_a_folder_with_no_permissions(model, tmp_path):
    "One warning, and the prefill is computed."
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0)
    try:
        said = said_by(lambda: [prefill(PrefixStore(folder, chunk=CHUNK), model)])
    finally:
        folder.chmod(0o700)
    assert len(said) == 1


def test_a_folder_that_can_only_be_read_still_serves(model, tmp_path, monkeypatch):
    "All six chunks are loaded although no time stamp can be set; new ones are given up with one warning."
    prefill(PrefixStore(tmp_path, chunk=CHUNK), model)
    store = PrefixStore(tmp_path, chunk=CHUNK)

    def refuse(*args, **kw):
        raise PermissionError(errno.EROFS, "Read-only file system")

    for name in ("utime", "replace", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr("tempfile.mkstemp", refuse)
    store.meet_at = 0
    assert prefill(store, model).loaded == 6
    assert len(said_by(lambda: [prefill(store, model, prompt(99, seed=2)) for _ in range(2)])) == 1


def test_a_full_disk_leaves_no_temporary_file(model, tmp_path, monkeypatch):
    "The first failure ends the writing: one warning, one attempt, an empty folder."
    store, replaced = PrefixStore(tmp_path, chunk=CHUNK), []

    def full(source, target):
        replaced.append(source)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    said = said_by(lambda: [prefill(store, model) for _ in range(2)])
    assert len(said) == 1 and "No space" in said[0] and len(replaced) == 1
    assert not [*tmp_path.iterdir()]


def test_a_file_larger_than_the_system_allows(model, tmp_path):
    "A limit of the system on the size of files is a disk that is full in the middle of a write."
    resource = pytest.importorskip("resource", reason="this system has no limits on files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = PrefixStore(tmp_path, chunk=CHUNK)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        said = said_by(lambda: [prefill(store, model) for _ in range(2)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(said) == 1 and not [*tmp_path.iterdir()]


def test_an_interrupt_in_the_middle_of_a_write(model, tmp_path, monkeypatch):
    "The cache is empty again, no temporary file stays, and the store goes on."
    store, cache, real = PrefixStore(tmp_path, chunk=CHUNK), SlabCache(model.config), os.replace

    def interrupt(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.prefill(model, cache, prompt(40))
    assert not temporary(tmp_path) and cache.get_seq_length() == 0
    monkeypatch.setattr(os, "replace", real)
    assert prefill(store, model).bytes_written > 0


def test_old_temporary_files_are_swept(tmp_path):
    "Those of two hours ago; one of ten seconds may belong to a writer that is alive."
    store = ChunkStore(tmp_path)
    for name, age in ("old", 7200), ("young", 10):
        p = tmp_path / f"{name}.safetensors.tmp"
        p.write_bytes(b"half")
        os.utime(p, (time.time() - age,) * 2)
    store.sweep()
    assert [p.name for p in temporary(tmp_path)] == ["young.safetensors.tmp"]


def test_what_no_store_can_be_made_of(tmp_path):
    "Sizes, salts and folders of the wrong kind; numpy's integers are fine."
    for kw in dict(max_bytes=0), dict(chunk=-1), dict(chunk=2.0), dict(chunk="128"), dict(salt=None):
        with pytest.raises(ConfigError):
            PrefixStore(tmp_path, **kw)
    for folder in ("a\0b", "", 7, None):
        with pytest.raises(ConfigError, match="folder must be a path"):
            PrefixStore(folder)
    import numpy as np

    assert PrefixStore(tmp_path, chunk=np.int64(16)).chunk == 16


# refusals


def test_what_cannot_be_restored_exactly_is_refused(model, tmp_path):
    "Batches, odd tokens, caches that are in use, closed, too short or cannot hold all tokens, and models in training."
    from transformers import DynamicCache

    store, x = PrefixStore(tmp_path, chunk=CHUNK), prompt(40)

    def new(**kw):
        return SlabCache(model.config, **kw)

    used, mixed = new(), small_model("qwen3", sliding_window=8, use_sliding_window=True, max_window_layers=1)
    with torch.no_grad():
        model(x[:, :5], past_key_values=used)
    for what, args in [
        ("one sequence", (model, new(), x.repeat(2, 1))),
        ("at least one token", (model, new(), [])),
        ("not all tokens", (model, new(), [-1, 5])),
        ("not all tokens", (model, new(), [4096])),
        ("not all tokens", (model, new(), [0.5])),
        ("not all tokens", (model, new(), [True, False])),
        ("must be token ids", (model, new(), [None, 3])),
        ("must be token ids", (model, new(), "text")),
        ("already holds 5", (model, used, x)),
        ("full-attention", (mixed, SlabCache(mixed.config), x)),
        ("full-attention", (model, DynamicCache(config=model.config), x)),
        ("reserve more", (model, new(max_seq_len=39), x)),
        ("model.eval", (small_model().train(), new(), x)),
        ("all tokens", (model, EvictingCache(model.config, EvictionConfig(64, "h2o")), x)),
    ]:
        with pytest.raises(ConfigError, match=what):
            store.prefill(*args)
    for what in None, "llmopt-tiny", tiny():
        with pytest.raises(ConfigError, match="model must be a transformers model"):
            store.prefill(what, new(), x)
    assert store.prefill(model, new(), x.to(torch.uint8)).tokens == 32  # a small type of numbers is none of these
    dropping = small_model()
    dropping.model.layers[0].self_attn.attention_dropout = 0.5
    dropping.model.layers[0].self_attn.train()
    with pytest.raises(ConfigError, match="part of it"):
        store.prefill(dropping, new(), x)
    with pytest.raises(LlmoptError):
        cache = new()
        cache.close()
        store.prefill(model, cache, x)


def test_an_error_on_the_way_leaves_the_cache_empty_and_usable(tmp_path):
    "A layer that raises ends the prefill; the same cache can be filled when it is mended."
    m = small_model()
    hook = m.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    cache = SlabCache(m.config)
    with pytest.raises(ZeroDivisionError):
        PrefixStore(tmp_path, chunk=CHUNK, salt="a hook that fails").prefill(m, cache, prompt(40))
    hook.remove()
    assert cache.get_seq_length() == 0
    assert PrefixStore(tmp_path, chunk=CHUNK).prefill(m, cache, prompt(40)).tokens == 32


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 32, 33])
def test_lengths_at_the_edges_of_chunks(model, tmp_path, n):
    "The last token is never stored: its logits are what the prompt is read for."
    store = PrefixStore(tmp_path, chunk=CHUNK)
    for hits in (0, (n - 1) // CHUNK):
        report = prefill(store, model, prompt(n))
        assert (report.chunks, report.hits) == ((n - 1) // CHUNK, hits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "phi2"])
def test_same_bits_for_every_family_at_the_ends_and_in_the_middle(family, dtype, tmp_path):
    "All loaded, half loaded and all computed, in float32 and in bfloat16."
    m, store = small_model(family).to(dtype), PrefixStore(tmp_path, chunk=CHUNK)
    prefill(store, m)
    for store.meet_at in (0, 3, 6):
        report = prefill(store, m)
        assert (report.hits, report.computed, report.damaged) == (6, store.meet_at, 0)


def test_a_large_budget_changes_nothing_after_a_restore(model, tmp_path):
    "A restored cache under a budget that holds everything gives the logits of one without a budget."
    store, ids = PrefixStore(tmp_path, chunk=CHUNK), prompt(CHUNK * 6 + 5)
    logits = []
    for cache in EvictingCache(model.config, EvictionConfig(999)), SlabCache(model.config):
        with packed(model), torch.no_grad():
            store.prefill(model, cache, ids)
            logits.append(model(ids[:, cache.get_seq_length() :], past_key_values=cache).logits)
    assert torch.equal(*logits)


# processes and growth


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_can_use_the_store(model, tmp_path):
    "The lock was held by another thread when the process forked."
    store = PrefixStore(tmp_path, chunk=CHUNK)
    prefill(store, model)
    held, done = threading.Event(), threading.Event()

    def hold():
        with store.lock:
            held.set()
            done.wait(20)

    holder = threading.Thread(target=hold, daemon=True)
    holder.start()
    held.wait(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking with threads is what this is about
        child = os.fork()
    if not child:
        code = 1
        try:
            store.write("0" * 64, b"x", 10**9, 0)
            code = 0 if store.has("0" * 64) else 2
        finally:
            os._exit(code)
    for _ in range(100):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    done.set()
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_full_store_is_not_listed_for_every_chunk(tmp_path, monkeypatch):
    "Twice the chunks in a store that is full take twice the looks at files, and not four times."
    real, listed = ChunkStore.files, []

    def files(self):
        found = real(self)
        listed.append(len(found))
        return found

    monkeypatch.setattr(ChunkStore, "files", files)

    def work(n):
        folder = tmp_path / str(n)
        store = ChunkStore(folder, max_bytes=100 * n)
        for i in range(n):
            store.write(f"{0:03}{i:05}", bytes(100), 10**9 + i, 0)
        listed.clear()
        for i in range(n):  # a new prompt takes the place of the old one
            store.write(f"{1:03}{i:05}", bytes(100), 10**10 - i, 10**10 - 10**6)
        assert len([*folder.iterdir()]) == n and store.counts["evicted"] == n
        for i in range(n):  # and a third finds no room that it may take
            assert not store.write(f"{2:03}{i:05}", bytes(100), 10**9 - i, 10**9 - 10**6)
        return sum(listed)

    small, large = work(100), work(200)
    assert 0 < large <= 2.3 * small


def test_twice_the_chunks_take_twice_the_steps(monkeypatch):
    "The table and the cost model: counted in lines of Python that run."
    import sys

    from llmopt.kv_cache import two_fronts

    def lines(function):
        count = 0

        def trace(frame, event, arg):
            nonlocal count
            if frame.f_code.co_filename != two_fronts.__file__:
                return None
            count += event == "line"
            return trace

        sys.settrace(trace)
        try:
            function()
        finally:
            sys.settrace(None)
        return count

    def both_fronts(n):
        table = two_fronts.ChunkTable([True] * n)
        for i in range(n // 2):
            table.deliver(table.take_last(), lambda: None)
            assert table.is_mine(i, 0.0, 1.0)
        two_fronts.meeting_point([1.0] * n, 0.5, [True] * n)

    assert lines(lambda: both_fronts(400)) <= 2.3 * lines(lambda: both_fronts(200))
