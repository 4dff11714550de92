"Models that cannot, break, or ask for something: a row with the reason, never a traceback, never a perfect score."

import json
import types

import pytest
import torch
import transformers as T
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

from helpers import save_model, small_model, tokenizer
from llmopt.adaptivocab import PhraseReader, SimpleAdaptiVocab, save_rows
from llmopt.core import LM, load
from llmopt.engine import comprehensive
from llmopt.errors import ConfigError, LlmoptError
from llmopt.evaluation import compare, summary_text
from llmopt.evaluation import comparison as C
from llmopt.evaluation.results import Method, Query, Run
from llmopt.evaluation.setup import described

pytestmark = pytest.mark.filterwarnings("ignore")


def quick(lm, queries=("What is rain?",), methods=("baseline",), tokens=4):
    "A comparison of a few tokens on a model in memory."
    return compare(list(queries), list(methods), lm, rounds=1, max_new_tokens=tokens, memory=False, progress=False)


def small(**changes):
    "A small random model with the bundled tokenizer."
    return LM(small_model(**changes), tokenizer(), "small")


def test_a_token_without_embedding_ends_the_rows_of_its_query():
    "Somebody added a token and forgot `resize_token_embeddings`."
    lm = small()
    lm.tokenizer.add_tokens(["<tool>"])
    df = quick(lm, ["What is rain?", "use <tool> now"]).frame
    assert df[df["query"] == "q1"].error.isna().all()
    assert df[df["query"] == "q2"].error.str.contains("<tool>").all()


def test_a_method_that_does_not_know_the_model_has_error_rows():
    "Bloom keeps its keys and positions in its own way: what cannot be set up says so, the others are measured."
    tok = tokenizer()
    config = T.BloomConfig(vocab_size=len(tok), hidden_size=32, n_layer=1, n_head=2, eos_token_id=3)
    res = quick(LM(T.BloomForCausalLM(config).eval(), tok, "bloom"), methods=["simple_adaptivocab", "word_removal"])
    df = res.frame
    assert df[df.method == "simple_adaptivocab"].error.notna().all()
    assert df[df.method.isin(["baseline", "word_removal"])].error.isna().all()
    assert "failed: simple_adaptivocab, quality and speed, query q1:" in summary_text(res)


def test_any_exception_at_setting_up_is_that_methods_rows(monkeypatch):
    "Even one that no one foresaw; what the user got wrong ends the comparison at its start."
    made = comprehensive.EnhancedFusedLLMEngine

    def odd(lm, recipe):
        if recipe.on:
            raise ZeroDivisionError("nobody foresaw this")
        return made(lm, recipe=recipe)

    monkeypatch.setattr(comprehensive, "EnhancedFusedLLMEngine", odd)
    df = quick(small(), methods=["kv"]).frame
    assert df[df.method == "kv"].error.str.contains("ZeroDivisionError: nobody foresaw this").all()
    monkeypatch.undo()
    with pytest.raises(LlmoptError, match="none"):
        quick(small(), methods=["larosa:artifact=none"])


def broken(value=float("nan"), dtype=torch.float32):
    "A small model of which one weight is no number, or overflows."
    lm = small()
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[7, 3] = value
    lm.model.to(dtype)
    return lm


@pytest.mark.parametrize(
    "lm", [broken(), broken(float("inf")), broken(1e30, torch.float16)], ids=["nan", "inf", "half"]
)
def test_a_broken_model_is_no_perfect_one(lm):
    "Weights that are NaN, infinite, or overflow in float16: error rows that say what to do, no KL, no agreement."
    res = quick(lm)
    assert all(r.error and "not numbers" in r.error and "float32" in r.error for r in res.runs)
    assert all(r.kl_mean is None and r.top1_agree is None for r in res.runs)
    assert "failed" in summary_text(res).split("\n\n")[0]


def test_what_the_checkpoint_asks_for_is_named():
    "A repetition penalty is not obeyed, and the settings and a warning say so; answers are those without it."
    lm, plain = small(), quick(small())
    lm.model.generation_config.repetition_penalty = 1.3
    res = quick(lm)
    assert res.config["checkpoint_decoding"] == {"repetition_penalty": "1.3"}
    assert any("repetition_penalty=1.3" in w for w in res.warnings)
    assert [r.output_text for r in res.runs] == [r.output_text for r in plain.runs]


def test_a_template_that_fails_is_rows():
    "The query cannot be written as a prompt: its rows say so."
    lm = small()
    lm.tokenizer.chat_template = "{{ raise_exception('no messages today') }}"
    assert all("no messages today" in r.error for r in quick(lm).runs)


def test_a_prompt_of_one_token_and_an_answer_of_one_token(tmp_path):
    "The quality arm may end after one token: its divergence is a number, its rates are not asked for."
    lm = small()
    lm.tokenizer.chat_template = "{{ messages[0].content }}"
    lm.model.generation_config.eos_token_id = list(range(4096))  # whatever comes ends the answer
    rows = [r for r in quick(lm, ["a"]).runs if r.arm == "quality"]
    assert all(r.completion_tokens == 1 and r.kl_mean == pytest.approx(0, abs=1e-6) and r.top1_agree == 1 for r in rows)


def test_resident_bytes_that_the_system_does_not_count(monkeypatch):
    "Without them a paged cache is measured all the same, and the results say what is missing."
    c = C.Comparison([Query(id="q1", text="?")], ["kv"], small(), memory=False)
    c.results.methods = [Method(id="kv", factors=dict(cache=1))]
    c.results.runs = [Run(arm="speed", query="q1", method="kv", kv_bytes_live=8)]
    c.finish()
    assert any("kv_bytes_resident is null" in w for w in c.results.warnings)


def test_other_weights_and_other_phrases_are_another_experiment(tmp_path):
    "A folder that was trained further, and a file of phrases that was mined again: resuming refuses."
    lm, phrases, folder = load("llmopt-tiny", "cpu"), tmp_path / "p.json", tmp_path / "m"
    save_model(folder, lm.model, lm.tokenizer)
    SimpleAdaptiVocab(lm.tokenizer, [" is a"]).save(phrases)

    def run(resume):
        method, settings = f"vocab:phrases={phrases}", dict(rounds=1, max_new_tokens=4, memory=False, progress=False)
        return compare(["Why?"], [method], str(folder), output=tmp_path / "r.json", resume=resume, **settings)

    first = run(False)
    assert run(True).runs == first.runs
    SimpleAdaptiVocab(lm.tokenizer, [" of a"]).save(phrases)
    with pytest.raises(LlmoptError, match="other files_sha"):
        run(True)
    SimpleAdaptiVocab(lm.tokenizer, [" is a"]).save(phrases)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight.add_(0.01)
    save_model(folder, lm.model, lm.tokenizer)
    with pytest.raises(LlmoptError, match="other weights_sha256"):
        run(True)


@pytest.mark.parametrize("change", ["rotary base", "end of an answer", "vectors of phrases"])
def test_whatever_changes_answers_is_another_experiment(tmp_path, change):
    "Other settings, other ends of an answer, other trained vectors, under the same names: resuming refuses."
    lm, vocab, folder = small(), SimpleAdaptiVocab(tokenizer(), [" is a"]), tmp_path / "m"
    save_model(folder, lm.model, lm.tokenizer)
    vocab.save(tmp_path / "p.json")
    reader = PhraseReader(lm.model, vocab)
    rows = torch.zeros(len(vocab.table), lm.model.config.hidden_size)
    save_rows(rows, reader, tmp_path / "rows")

    def run(resume=False):
        method = f"vocab:phrases={tmp_path / 'p.json'},rows={tmp_path / 'rows'}" if "vectors" in change else "baseline"
        settings = dict(rounds=1, max_new_tokens=2, memory=False, progress=False)
        return compare(["Why?"], [method], str(folder), output=tmp_path / "r.json", resume=resume, **settings)

    first = run()
    assert run(resume=True).runs == first.runs
    if change == "rotary base":
        lm.model.config.rope_parameters["rope_theta"] = 500.0
    elif change == "end of an answer":
        lm.model.generation_config.eos_token_id = [3, 77]
    else:
        save_rows(rows + 1, reader, tmp_path / "rows")
    save_model(folder, lm.model, lm.tokenizer)
    with pytest.raises(LlmoptError, match="cannot resume .* other (model_config_sha|stop_ids|files_sha)"):
        run(resume=True)


def scaled(lm):
    lm.model.model.layers[0].self_attn.scaling = 0.01


def hooked(lm):
    lm.model.model.layers[0].register_forward_hook(lambda module, args, out: out * 1.5)


def other_forward(lm):
    mlp = lm.model.model.layers[0].mlp
    usual = type(mlp).forward
    mlp.forward = types.MethodType(lambda self, x: usual(self, x) * 1.5, mlp)


def lower_case(lm):
    lm.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def letters_apart(lm):
    parts = [pre_tokenizers.Split("a", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    lm.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)


def other_decoder(lm):
    lm.tokenizer.backend_tokenizer.decoder = decoders.Fuse()


def fewer_merges(lm):
    parts = json.loads(lm.tokenizer.backend_tokenizer.to_str())
    parts["model"]["merges"] = parts["model"]["merges"][:500]
    lm.tokenizer = T.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)), eos_token="<|end|>", chat_template="x"
    )
    lm.tokenizer.chat_template = tokenizer().chat_template


CHANGES = [scaled, hooked, other_forward, lower_case, letters_apart, other_decoder, fewer_merges]


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_changes_of_a_model_in_memory_are_another_experiment(change):
    "Plain values, hooks and methods of modules, and every part of the tokenizer; the same model once more is the same."
    other = small()
    if change:
        change(other)
    old, new = (described(lm, True, []) for lm in (small(), other))
    found = {k for k in new if old[k] != new[k]}
    named = {"model_state_sha"} if change in CHANGES[:3] else {"tokenizer_sha"}
    assert found & named == (named if change else set()) and (change or not found)


def test_a_changed_model_in_memory_is_not_resumed(tmp_path):
    "The second half of a comparison would be of another model; an answer in between changes nothing."
    lm = small()
    settings = dict(rounds=1, max_new_tokens=2, memory=False, progress=False, output=tmp_path / "r.json")
    first = compare(["Why?"], ["baseline"], lm, **settings)
    assert compare(["Why?"], ["baseline"], lm, resume=True, **settings).runs == first.runs
    scaled(lm)
    with pytest.raises(LlmoptError, match="other model_state_sha"):
        compare(["Why?"], ["baseline"], lm, resume=True, **settings)


@pytest.mark.parametrize("setting", ["rounds", "max_new_tokens"])
def test_settings_that_no_file_can_hold(setting):
    "A number of thirty digits is refused in one line."
    with pytest.raises(ConfigError, match=f"{setting} must be a whole number"):
        compare(["?"], ["baseline"], small(), memory=False, progress=False, **{setting: 10**30})
