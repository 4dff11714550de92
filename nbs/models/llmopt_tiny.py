"""Make `llmopt-tiny`: gather text, train the tokenizer, train the model, measure it, pack it.

    python llmopt_tiny.py data   --sources DIR --work DIR                 # text -> documents, tokenizer, token ids
    python llmopt_tiny.py train  --work DIR --phase main   --tokens 180e6 # resumes; --device cuda, or a night on a CPU
    python llmopt_tiny.py train  --work DIR --phase anneal --tokens 80e6  # learning rate to zero
    python llmopt_tiny.py eval   --sources DIR --work DIR                 # bits per byte beside unigram and 5-gram
    python llmopt_tiny.py pack   --work DIR --to ../../llmopt/assets/llmopt-tiny

`DIR` of `--sources` is a folder with `corpora/` and `wikitext2/` (see the model card for names and licences).
The notebook `llmopt_tiny.ipynb` explains each step.
"""

import argparse
import hashlib
import json
import math
import random
import re
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import reading_tasks
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
CORPUS = HERE.parents[1] / "data" / "corpus"  # the questions, answers and paragraphs we wrote ourselves
EOT, USER, ASSISTANT, END, SYSTEM, PAD = SPECIALS = [
    "<|endoftext|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|system|>",
    "<|pad|>",
]
TEMPLATE = (
    "{{ '<|endoftext|>' }}{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' + '\n' + m['content'] | trim + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' + '\n' }}{% endif %}"
)
VOCAB, CONTEXT = 4096, 1024
CONFIG = dict(
    hidden_size=256,
    num_hidden_layers=6,
    intermediate_size=704,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    vocab_size=VOCAB,
    max_position_embeddings=CONTEXT,
    tie_word_embeddings=True,
    rms_norm_eps=1e-5,
    initializer_range=0.02,
)


# ------------------------------------------------------------------------------------------------ data
def chat(turns):
    "One conversation as the chat template writes it (without the leading document mark)."
    return "".join(f"<|{t['role']}|>\n{t['content'].strip()}{END}\n" for t in turns)


def qa(question, answer):
    "One question and its answer, as a conversation."
    return chat([dict(role="user", content=question), dict(role="assistant", content=answer)])


def key(text):
    "`text` without case and punctuation, to find repeats by."
    return re.sub(r"\W+", " ", text.lower()).strip()


def held_out(text, percent=4):
    "A fixed share of the documents, chosen by hash, is never trained on."
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 < percent


def clean(text):
    "Typographic quotes and spaces to ASCII, unwrapped lines inside paragraphs, no runs of blanks."
    for a, b in {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2014": " - ",
        "\u2013": "-",
        "\u2026": "...",
        "\u00a0": " ",
        "\r": "",
    }.items():
        text = text.replace(a, b)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()


def pieces(text, size=6000):
    "Whole paragraphs packed into documents of about `size` characters."
    out, cur = [], ""
    for p in re.split(r"\n\s*\n" if "\n\n" in text[:size] else r"\n", text):
        if len(cur) + len(p) > size and cur:
            out, cur = out + [cur.strip()], ""
        cur += p + "\n\n"
    return out + [cur.strip()] if cur.strip() else out


def unwrap(text):
    "`text` without the line breaks inside of its sentences."
    return re.sub(r"(?<=[a-z,;])\n(?=[a-zA-Z])", " ", text)


def first_sentences(text, limit):
    "The leading sentences of `text` up to `limit` characters, whole sentences only."
    out = ""
    for s in re.split(r"(?<=[.!?])\s+", text):
        if out and len(out) + len(s) > limit:
            break
        out += (" " if out else "") + s
    return out


def medquad(root):
    """Two lists of documents. The first holds each question with the first sentences of its answer that are new, that
    is, in no earlier answer. The second holds the rest of those answers as plain text, unless the pair is held out."""
    seen, docs, rest = set(), [], []
    for row in map(json.loads, open(root / "medquad" / "medquad.jsonl")):
        q = (
            re.sub(r"\s+", " ", row["question"])
            .replace("What is (are)", random.Random(row["question"]).choice(["What is", "What is", "What are"]))
            .replace(" ?", "?")
        )
        ans = re.sub(r"^Key Points.*?\n", "", clean(row["answer"]), flags=re.S)
        fresh = []
        for s in re.split(r"(?<=[.!?])\s+|\n+", ans):
            k = key(s)
            if len(k) < 12 or k in seen or not re.match(r"[A-Z0-9]", s) or not s.endswith((".", "!", "?")):
                continue
            seen.add(k)
            fresh.append(s)
        a = first_sentences(" ".join(fresh), 500)
        if len(a) <= 60:
            continue
        docs.append(qa(q, a))
        more = " ".join(fresh)[len(a) :].strip()
        if len(more) > 200 and not held_out(docs[-1]):
            rest += pieces("\n\n".join(textwrap.wrap(more, 1500, break_long_words=False)))
    return docs, rest


def instructions(root):
    "Pairs of a source and a document: instructions with what was answered."
    docs = []
    for name, out in (
        ("instruction-data", "output"),
        ("roleplay-simple-deduped-roleplay-instruct", "response"),
        ("codegen-instruct", "response"),
    ):
        for r in json.load(open(root / "instructions" / f"{name}.json")):
            q = r["instruction"] + ("\n\n" + r["input"] if r.get("input") else "")
            docs.append((name, qa(clean(q), clean(r[out]))))
    return docs


def own(path=CORPUS):
    "Our own corpus: questions and answers, summaries, conversations (`chat`), explanatory paragraphs (`text`)."
    chats, texts = [], []
    for f in sorted(path.glob("*.jsonl")):
        for r in map(json.loads, open(f)):
            if r["kind"] == "paragraph":
                texts.append(f"{r['title']}\n\n{r['text']}")
            elif r["kind"] == "chat":
                chats.append(chat(r["turns"]))
            else:
                chats.append(qa(r["question"], r["answer"]))
    return chats, texts


def wikitext(path):
    "Articles of a WikiText file, as they are."
    arts, cur = [], ""
    for line in open(path):
        if re.fullmatch(r" = [^=].*[^=] = \n", line) and cur.strip():
            arts, cur = arts + [cur.strip()], ""
        cur += line
    return arts + [cur.strip()]


def gather(src):
    "Documents by source: `{name: [text]}`."
    root, d = Path(src) / "corpora", {}
    d["medquad"], d["medtext"] = medquad(root)
    d["books"] = [
        p
        for r in map(json.loads, open(root / "books" / "tiny_open_domain_books.jsonl"))
        for p in pieces(unwrap(clean(r["text"])))
    ]
    d["shakespeare"] = pieces(clean((root / "books" / "tinyshakespeare.txt").read_text()))
    d["speeches"] = [
        p
        for n in ("inaugural", "state_union")
        for p in pieces(clean(re.sub(r"\n ?\n", "\n\n", (root / "speeches" / f"{n}.txt").read_text())))
    ]
    d["web"] = [clean(json.loads(l)["text"]) for l in open(root / "web" / "c4_sample.jsonl")]
    d["wikipedia"] = [
        f"{r['title']}\n\n{clean(r['text'])}" for r in map(json.loads, open(root / "wikipedia" / "nq_passages.jsonl"))
    ]
    d["wikitext"] = wikitext(Path(src) / "wikitext2" / "valid.raw")
    for name, doc in instructions(root):
        d.setdefault({"codegen-instruct": "code", "instruction-data": "tasks"}.get(name, "roleplay"), []).append(doc)
    d["own_qa"], d["own_text"] = own()
    d = {k: list(dict.fromkeys(x for x in v if len(x) > 20)) for k, v in d.items()}
    return {k: v for k, v in d.items() if v}


def reading(docs, **kw):
    "Documents of `reading_tasks`, made from `docs`; make those to train on and those to test on from their own parts."
    texts = [x for k in ("wikipedia", "web", "own_text", "medtext", "books", "speeches") for x in docs[k]]
    pairs = [
        m.groups()
        for k in ("medquad", "own_qa", "tasks")
        for x in docs[k]
        for m in [re.fullmatch(r"<\|user\|>\n(.*)<\|end\|>\n<\|assistant\|>\n(.*)<\|end\|>\n", x, flags=re.S)]
        if m and "<|" not in m[1] + m[2]
    ]
    made = reading_tasks.tasks(texts, pairs, **kw)
    return {k: ["".join(qa(q, a) for q, a in doc) for doc in docs] for k, docs in made.items()}


TASKS = "facts", "recall", "extract", "choose"
# How often the main phase goes through each source, relative to the others, and how the annealing phase leans.
EPOCHS = dict(
    medquad=8,
    medtext=8,
    books=10,
    shakespeare=14,
    speeches=8,
    web=10,
    wikipedia=8,
    wikitext=14,
    code=12,
    tasks=10,
    roleplay=10,
    own_qa=8,
    own_text=8,
    facts=3,
    recall=2,
    extract=4,
    choose=3.5,
)  # what `extract` and `choose` are made of is read there several times more
ANNEAL = dict(own_qa=2, own_text=1.5, tasks=1.5, wikitext=1.3, recall=0.7)


def train_tokenizer(docs):
    "Byte-level BPE; each source gives at most 3 MB, so that no single one decides the merges."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()

    def text():
        for name, ds in docs.items():
            n = 0
            for x in ds * (3 if name.startswith("own") else 1):
                if n > 3e6:
                    break
                n += len(x)
                yield re.sub("|".join(map(re.escape, SPECIALS)), "", x)

    tok.train_from_iterator(
        text(),
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token=EOT,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def make_data(src, work):
    "Documents, split by hash into training and held-out, as one array of token ids a source."
    from transformers import AutoTokenizer

    work = Path(work)
    work.mkdir(parents=True, exist_ok=True)
    docs = gather(src)
    train = {k: [x for x in v if not held_out(x)] for k, v in docs.items()}
    test = {k: [x for x in v if held_out(x)] for k, v in docs.items()}
    test |= reading(test, n=(300,) * 4, seed=1)
    train |= {k: [x for x in v if not held_out(x)] for k, v in reading(train).items()}
    if not (work / "tokenizer").exists():
        found = train_tokenizer({k: v for k, v in train.items() if k not in TASKS})  # an existing tokenizer is kept
        found.save_pretrained(work / "tokenizer")
    tok = AutoTokenizer.from_pretrained(work / "tokenizer")
    stats, arrays = {}, {}
    for k, texts in train.items():
        encoded = tok(texts, add_special_tokens=False)["input_ids"] if texts else []
        ids = [np.array([0] + e, dtype=np.uint16) for e in encoded]
        arrays[k] = np.concatenate(ids)
        arrays[k + "_starts"] = np.cumsum([0] + [len(i) for i in ids[:-1]])
        json.dump(test[k], open(work / f"heldout_{k}.json", "w"))
        size = sum(len(x.encode()) for x in texts)
        stats[k] = dict(documents=len(texts), bytes=size, tokens=len(arrays[k]), held_out=len(test[k]))
        print(k, stats[k], flush=True)
    np.savez_compressed(work / "tokens.npz", **arrays)
    json.dump(stats, open(work / "data.json", "w"), indent=1)


# ------------------------------------------------------------------------------------------------ training
class Stream:
    "Endless batches: shuffled documents of each source, drawn by weight, packed into rows of `row_tokens + 1` tokens."

    def __init__(self, path, weights, seed=0):
        z = np.load(path)
        self.rng = np.random.default_rng(seed)
        self.sources = [k for k in weights if k in z.files and weights[k] > 0]
        self.tokens = {k: z[k] for k in self.sources}
        self.starts = {k: z[k + "_starts"] for k in self.sources}
        mean = {k: len(self.tokens[k]) / len(self.starts[k]) for k in self.sources}
        p = np.array([weights[k] / mean[k] for k in self.sources])
        self.p = p / p.sum()  # documents drawn so that tokens follow the weights
        self.order, self.drawn, self.left = {k: [] for k in self.sources}, [], np.zeros(0, np.uint16)

    def document(self):
        "The token ids of the next document."
        if not self.drawn:
            self.drawn = self.rng.choice(len(self.sources), 4096, p=self.p).tolist()
        k = self.sources[self.drawn.pop()]
        if not len(self.order[k]):
            self.order[k] = list(self.rng.permutation(len(self.starts[k])))
        i = self.order[k].pop()
        starts = self.starts[k]
        return self.tokens[k][starts[i] : starts[i + 1] if i + 1 < len(starts) else None]

    def batch(self, rows, row_tokens):
        "The next (rows, row_tokens + 1) token ids."
        need, parts, n = rows * (row_tokens + 1), [self.left], len(self.left)
        while n < need:
            parts.append(self.document())
            n += len(parts[-1])
        flat = np.concatenate(parts)
        self.left = flat[need:]
        return torch.from_numpy(flat[:need].astype(np.int64)).view(rows, row_tokens + 1)


def prefetched(data, rows, row_tokens):
    "The batches of a `Stream`, each made while the one before it is used."
    pool = ThreadPoolExecutor(1)
    ahead = pool.submit(data.batch, rows, row_tokens)
    while True:
        batch, ahead = ahead.result(), pool.submit(data.batch, rows, row_tokens)
        yield batch


def new_model():
    "The model with random weights, always the same."
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    m = LlamaForCausalLM(LlamaConfig(**CONFIG, bos_token_id=0, eos_token_id=3, pad_token_id=5))
    for n, p in m.named_parameters():  # residual outputs start small (GPT-2)
        if n.endswith(("o_proj.weight", "down_proj.weight")):
            p.data.mul_(1 / math.sqrt(2 * CONFIG["num_hidden_layers"]))
    return m


def optimizers(m, lr, lr_emb):
    "Muon for the matrices of the layers, AdamW for embeddings and gains."
    mats = [p for n, p in m.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    rest = [p for n, p in m.named_parameters() if not any(p is q for q in mats)]
    return [
        torch.optim.Muon(mats, lr=lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr_emb, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def add_dropout(model, rate):
    "Dropout behind every block: what is read many times is learned by heart later with it."
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, y: F.dropout(y, rate, model.training))
        layer.self_attn.register_forward_hook(lambda _, args, y: (F.dropout(y[0], rate, model.training), *y[1:]))


def next_token_loss(model, device):
    "A function: rows of token ids -> mean loss in nats per token, computed in bfloat16."

    def loss(x):
        with torch.autocast(device, torch.bfloat16):
            logits = model(x[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten())

    return loss


def load_checkpoint(start, file, model, opts, device):
    "The state in `start`, weights and moments loaded, or a new one. A start from another phase's file begins a phase."
    if not start.exists():
        return dict(step=0, tokens=0, phase_tokens=0, seconds=0.0, log=[])
    found = torch.load(start, map_location=device)
    model.load_state_dict(found["model"])
    for opt, moments in zip(opts, found["opts"]):
        opt.load_state_dict(moments)
    state = found["state"]
    if start != file:
        state["phase_tokens"] = 0
    print("from", start.name, {k: v for k, v in state.items() if k != "log"}, flush=True)
    return state


def save_checkpoint(file, model, opts, state):
    "Write `file`, whole or not at all."
    tmp = file.with_suffix(".tmp")
    torch.save(dict(model=model.state_dict(), opts=[o.state_dict() for o in opts], state=state), tmp)
    tmp.replace(file)


class Budget:
    "What a run may take, in `minutes` or `tokens`, and how much of it is spent."

    def __init__(self, state, minutes, tokens):
        self.state, self.minutes, self.tokens = state, minutes, tokens
        self.start, self.seconds, self.first = time.time(), state["seconds"], state["phase_tokens"]

    def spent(self):
        "The share that is spent, of what ends first."
        minutes = (time.time() - self.start) / 60 / self.minutes if self.minutes else 0
        return max(minutes, (self.state["phase_tokens"] - self.first) / self.tokens if self.tokens else 0)

    def count(self, tokens):
        "Account for one step over `tokens`."
        for k, n in dict(step=1, tokens=tokens, phase_tokens=tokens).items():
            self.state[k] += n
        self.state["seconds"] = self.seconds + time.time() - self.start


def take_step(model, opts, loss_of, x, part_rows, rates):
    "One step on the rows `x`, `part_rows` at a time; their mean loss before it."
    for opt, rate in zip(opts, rates):
        for group in opt.param_groups:
            group["lr"] = rate
    loss = 0.0
    for part in x.split(part_rows):  # small parts: their logits stay in the processor's cache
        share = loss_of(part) * (len(part) / len(x))
        share.backward()
        loss = loss + share.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for opt in opts:
        opt.step()
        opt.zero_grad(set_to_none=True)
    return loss


@torch.no_grad()
def heldout_losses(model, loss_of, rows, device):
    "Loss on the fixed rows of each source, without dropout."
    model.eval()
    losses = {k: round(loss_of(torch.tensor(x).to(device)).item(), 4) for k, x in rows.items()}
    model.train()
    return losses


def mixture_of(weights, state, phase, **settings):
    "The mixture for the log: it may change from one run to the next, so each is written down."
    total = sum(weights.values())
    share = {k: round(w / total, 4) for k, w in weights.items()}
    return dict(phase=phase, from_tokens=state["tokens"], **settings, share=share)


def train(
    work,
    phase,
    minutes=None,
    tokens=None,
    lr=2e-3,
    lr_emb=3e-3,
    rows=None,
    row_tokens=CONTEXT,
    device="cpu",
    threads=2,
    every=100,
    init=None,
    dropout=0.05,
):
    """Train for `minutes` or `tokens` more, whichever ends first, and save `work/{phase}.pt`. `main` keeps the
    learning rate after warm-up; `anneal` starts from `main` (or `init`) and takes the rate linearly to zero over
    its budget. A stopped run resumes from its file."""
    work = Path(work)
    torch.set_num_threads(threads)
    stats, cpu = json.load(open(work / "data.json")), device == "cpu"
    rows = rows or (8 if cpu else 64)
    lean = {} if phase == "main" else ANNEAL
    weights = {k: EPOCHS[k] * stats[k]["tokens"] * lean.get(k, 1) for k in stats}
    model = new_model().to(device)
    add_dropout(model, dropout)
    opts, file = optimizers(model, lr, lr_emb), work / f"{phase}.pt"
    start = file if file.exists() else Path(init) if init else work / "main.pt"
    state = load_checkpoint(start, file, model, opts, device)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{threads} cores"
    mixture = mixture_of(weights, state, phase, lr=lr, rows=f"{rows} x {row_tokens}", device=where)
    state.setdefault("mixtures", []).append(mixture)
    data = Stream(work / "tokens.npz", weights, seed=1000 * state["step"] + (0 if phase == "main" else 1))
    run_steps(model, opts, data, state, Budget(state, minutes, tokens), file, (lr, lr_emb), rows, row_tokens, every)


def run_steps(model, opts, data, state, budget, file, rates, rows, row_tokens, every):
    "Step, log and save until the budget is spent."
    device, phase = model.device.type, file.stem
    loss_of = next_token_loss(model, device)
    cpu = device == "cpu"  # on a GPU the compiler would take longer than it saves
    compiled = torch.compile(loss_of, dynamic=False) if cpu else loss_of
    part_rows = max(1, 2048 // row_tokens) if cpu else rows
    batches, heldout = prefetched(data, rows, row_tokens), heldout_rows(file.parent, row_tokens)
    saved, mean = time.time(), None
    model.train()
    stop = False
    while not stop:
        spent = budget.spent()
        stop = spent >= 1
        scale = min(1, (state["step"] + 1) / 150) if phase == "main" else max(0.0, 1 - spent)
        if not stop:
            x = next(batches).to(device)
            loss = take_step(model, opts, compiled, x, part_rows, [r * scale for r in rates])
            mean = loss if mean is None else 0.97 * mean + 0.03 * loss
            budget.count(rows * row_tokens)
        if state["step"] % every == 0 or stop:
            counts = dict(step=state["step"], tokens=state["tokens"], seconds=round(state["seconds"]))
            row = dict(**counts, phase=phase, lr=scale * rates[0], train=round(float(mean or 0), 4))
            if state["step"] % (5 * every) == 0 or stop:
                row["val"] = heldout_losses(model, loss_of, heldout, device)
            state["log"].append(row)
            print(json.dumps(row), flush=True)
        if time.time() - saved > 240 or stop:  # on a fast machine once, at the end
            save_checkpoint(file, model, opts, state)
            saved = time.time()


def heldout_rows(work, row_tokens, rows=12):
    "A few fixed rows of held-out tokens of each source, for the curve during training."
    from transformers import AutoTokenizer

    tok, out = AutoTokenizer.from_pretrained(Path(work) / "tokenizer"), {}
    for k in ("wikitext", "wikipedia", "web", "books", "medquad", "own_qa", "facts", "recall", "extract", "choose"):
        docs = json.load(open(Path(work) / f"heldout_{k}.json"))
        ids = [t for d in docs for t in [0] + tok(d, add_special_tokens=False)["input_ids"]]
        n = len(ids[: rows * (row_tokens + 1)]) // (row_tokens + 1)
        if n:
            out[k] = np.array(ids[: n * (row_tokens + 1)]).reshape(n, row_tokens + 1)
    return out


# ---------------------------------------------------------------------------------------- yardsticks and measurement
class KneserNey:
    """Interpolated Kneser-Ney n-gram model (Chen & Goodman 1998, one discount per order) over token ids below 4,096.
    N-grams are sorted arrays of packed keys. The highest order uses counts, the lower ones continuation counts; the
    unigram is smoothed with a uniform distribution."""

    def __init__(self, ids, order=5, bits=12):
        self.order, self.bits, self.V, self.levels = order, bits, 1 << bits, {}
        ids = np.asarray(ids, dtype=np.int64)
        keys, counts = np.unique(self._grams(ids, order), return_counts=True)
        for n in range(order, 0, -1):
            self.levels[n] = self._level(keys, counts)
            if n > 1:  # distinct left neighbours
                keys, counts = np.unique(keys & ((1 << bits * (n - 1)) - 1), return_counts=True)

    def _level(self, keys, counts):
        "What the probabilities of one order need: keys, counts, discount, and totals by context."
        ones, twos = (counts == 1).sum(), (counts == 2).sum()
        ctx, start = np.unique(keys >> self.bits, return_index=True)
        discount = ones / (ones + 2 * twos) if ones else 0.5
        total, types = np.add.reduceat(counts, start), np.diff(np.append(start, len(keys)))
        return dict(keys=keys, counts=counts, D=discount, ctx=ctx, total=total, types=types)

    def _grams(self, ids, n):
        "The n-grams of `ids` as packed keys, by position."
        return sum(ids[i : len(ids) - n + 1 + i] << self.bits * (n - 1 - i) for i in range(n))

    @staticmethod
    def _find(table, q):
        "Where each of `q` stands in the sorted `table`, and whether it does."
        i = np.searchsorted(table, q).clip(max=len(table) - 1)
        return i, table[i] == q

    def log_probs(self, ids, max_order=None):
        "Natural-log probability of each id after the first, given those before it."
        ids = np.asarray(ids, dtype=np.int64)
        p = np.full(len(ids) - 1, 1 / VOCAB)
        for n in range(1, (max_order or self.order) + 1):
            grams = self._grams(ids, n)[(1 if n == 1 else 0) :]  # those that end at positions max(1, n-1)..
            begin = len(p) - len(grams)
            p = np.concatenate([p[:begin], self._mixed(self.levels[n], grams, p[begin:])])
        return np.log(p)

    def _mixed(self, level, grams, lower):
        "Probabilities of one order for `grams`, with those of the `lower` order mixed in."
        k, hit = self._find(level["keys"], grams)
        c, seen = self._find(level["ctx"], grams >> self.bits)
        top = np.where(hit, np.maximum(level["counts"][k] - level["D"], 0), 0)
        mixed = (top + level["D"] * level["types"][c] * lower) / np.where(seen, level["total"][c], 1)
        return np.where(seen, mixed, lower)


@torch.inference_mode()
def model_nll(m, ids, context=CONTEXT, stride=512):
    "Nats of `ids[1:]`, in windows of `context` tokens: each token once, with `context - stride` or more before it."
    total, prev = 0.0, 1
    for end in range(min(context, len(ids)), len(ids) + stride, stride):
        end = min(end, len(ids))
        begin = max(0, end - context)
        if end <= prev:
            break
        x = torch.tensor([ids[begin:end]], device=m.device)
        lp = m(x, use_cache=False).logits[0, :-1].float().log_softmax(-1).gather(1, x[0, 1:, None])[:, 0]
        total -= lp[prev - begin - 1 :].double().sum().item()
        prev = end
    return total


def load_for_measuring(model_dir):
    "Tokenizer and float32 model of a folder."
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    return AutoTokenizer.from_pretrained(model_dir), model


def evaluated(name, docs, tok, model, ngrams):
    "Bits per byte of `docs` by the model, a unigram and a 5-gram, of which the best of `ngrams` counts."
    n_bytes = sum(len(d.encode()) for d in docs)
    ids = [[0] + tok(d, add_special_tokens=False, verbose=False)["input_ids"] for d in docs]

    def bits(nats):
        return nats / math.log(2) / n_bytes

    row = dict(text=name, documents=len(docs), bytes=n_bytes, tokens=sum(map(len, ids)) - len(ids))
    row["model"] = bits(sum(model_nll(model, i) for i in ids))
    for kind, order in (("unigram", 1), ("fivegram", 5)):
        row[kind] = min(bits(-sum(kn.log_probs(i, order).sum() for i in ids)) for kn in ngrams)
    return dict(row, ratio=row["model"] / row["fivegram"])


def evaluate(src, work, model_dir, out, threads=2, most=300):
    "Write bits per byte on WikiText-2 test and on `most` held-out documents of each source to `out`."
    torch.set_num_threads(threads)
    work, (tok, model) = Path(work), load_for_measuring(model_dir)
    z = np.load(work / "tokens.npz")
    names = [k for k in z.files if not k.endswith("_starts")]
    counted = names, [k for k in names if k not in TASKS]  # with the reading tasks and without
    ngrams = [KneserNey(np.concatenate([z[k] for k in some])) for some in counted]
    sets = {"WikiText-2 test": [(Path(src) / "wikitext2" / "test.raw").read_text()]}
    sets |= {k.stem[len("heldout_") :]: json.load(open(k))[:most] for k in sorted(work.glob("heldout_*.json"))}
    rows = []
    for name, docs in sets.items():
        if docs:
            start = time.time()
            rows.append(evaluated(name, docs, tok, model, ngrams))
            print(json.dumps(rows[-1]), f"{time.time() - start:.0f} s", flush=True)
    json.dump(rows, open(out, "w"), indent=1)


def pack(work, to, phase):
    "Write weights (bfloat16), tokenizer and configuration as a `from_pretrained` folder."
    from transformers import AutoTokenizer, GenerationConfig

    ck, m = torch.load(Path(work) / f"{phase}.pt", map_location="cpu"), new_model()
    m.load_state_dict(ck["model"])
    m = m.to(torch.bfloat16)
    m.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[3, 0], pad_token_id=5, do_sample=False)
    m.save_pretrained(to)
    AutoTokenizer.from_pretrained(Path(work) / "tokenizer").save_pretrained(to)
    file = Path(to) / "tokenizer_config.json"
    config = json.loads(file.read_text())
    for k in ("is_local", "local_files_only"):  # they tell how it was loaded here, not what it is
        config.pop(k, None)
    file.write_text(json.dumps(config, indent=2) + "\n")
    log = dict(config=CONFIG, phase=phase, data=json.load(open(Path(work) / "data.json")), **ck["state"])
    json.dump(log, open(HERE.parents[1] / "data" / "llmopt_tiny_training.json", "w"), indent=1)
    return ck["state"]


def main():
    "The command line."
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("what", choices=["data", "train", "eval", "pack"])
    a.add_argument("--sources", default="../../../shared/data")
    a.add_argument("--work", required=True)
    a.add_argument("--to", default=str(HERE.parents[1] / "llmopt" / "assets" / "llmopt-tiny"))
    a.add_argument("--out", default=str(HERE.parents[1] / "data" / "llmopt_tiny_eval.json"))
    a.add_argument("--phase", default="main")
    a.add_argument("--minutes", type=float)
    a.add_argument("--tokens", type=float)
    a.add_argument("--lr", type=float, default=2e-3)
    a.add_argument("--lr_emb", type=float, default=3e-3)
    a.add_argument("--init")
    a.add_argument("--batch", type=int)
    a.add_argument("--device", default="cpu")
    a.add_argument("--threads", type=int, default=2)
    a = a.parse_args()
    if a.what == "data":
        make_data(a.sources, a.work)
    elif a.what == "train":
        train(
            a.work,
            a.phase,
            a.minutes,
            a.tokens,
            a.lr,
            a.lr_emb,
            rows=a.batch,
            device=a.device,
            threads=a.threads,
            init=a.init,
        )
    elif a.what == "pack":
        print({k: v for k, v in pack(a.work, a.to, a.phase).items() if k != "log"})
    elif a.what == "eval":
        evaluate(a.sources, a.work, a.to, a.out, a.threads)


if __name__ == "__main__":
    main()
