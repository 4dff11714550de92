"""Small models, tokenizers and texts for tests: made here once, so that no test builds its own.

Everything is seeded and takes milliseconds. `tiny()` is the bundled model, loaded once in a process: do not change it;
ask for `load()` where a test does.
"""

import shutil
import types
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as T

from llmopt.core import ASSETS, load

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
SMALL = dict(
    vocab_size=4096,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=3,
    pad_token_id=5,
)
SCREENS = dict(  # what a page is looked at with
    desktop=dict(viewport=dict(width=1280, height=900)),
    phone=dict(viewport=dict(width=360, height=740), is_mobile=True, has_touch=True),
    dark=dict(viewport=dict(width=360, height=740), color_scheme="dark"),
)
CHROMIUM_FLAGS = (  # it asks nobody for anything but the page
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
# the least contrast between a text and what is behind it, among the elements of a CSS selector
CONTRAST = """(selector) => [...document.querySelectorAll(selector)].filter(
  (e) => e.checkVisibility()).map((e) => {
    const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
    const light = (c) => rgb(c).slice(0, 3).map((v) => v / 255).map(
      (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce(
      (sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    let box = e;
    while (box.parentElement && rgb(getComputedStyle(box).backgroundColor)[3] === 0) box = box.parentElement;
    const [a, b] = [getComputedStyle(e).color, getComputedStyle(box).backgroundColor].map(light).sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  }).reduce((x, y) => Math.min(x, y))"""
GPT2 = dict(vocab_size=4096, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=3)
FAMILIES = {  # name -> a function that makes the configuration of a small model of that family
    "llama": lambda **kw: T.LlamaConfig(**SMALL | kw),
    "smollm": lambda **kw: T.LlamaConfig(**SMALL | dict(tie_word_embeddings=True) | kw),
    "mistral": lambda **kw: T.MistralConfig(**SMALL | dict(sliding_window=16, head_dim=8) | kw),
    "qwen2": lambda **kw: T.Qwen2Config(**SMALL | kw),
    "qwen3": lambda **kw: T.Qwen3Config(**SMALL | dict(head_dim=8) | kw),
    "phi3": lambda **kw: T.Phi3Config(**SMALL | kw),
    "gpt2": lambda **kw: T.GPT2Config(**GPT2 | kw),
    "dialogpt": lambda **kw: T.GPT2Config(**GPT2 | kw),
    "phi2": lambda **kw: T.PhiConfig(**SMALL | dict(num_key_value_heads=4) | kw),
}
NO_TEMPLATE = {"gpt2", "phi2", "dialogpt"}  # families whose tokenizers have no chat template

ODD_TEXTS = {  # what texts of the world hold and tests forget
    "Tibetan": "བོད་ཀྱི་སྐད་ཡིག་ནི་ཤིན་ཏུ་སྙན་པོ་ཡིན། ང་ཚོས་བོད་ཡིག་སློབ་ཀྱི་ཡོད།",
    "Khmer": "ខ្ញុំចូលចិត្តញ៉ាំបាយ។ ទឹកពុះនៅសីតុណ្ហភាពមួយរយអង្សាសេ។",
    "Hangul Jamo": "\u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165 \u1102\u1161\u1105\u1161",
    "Hangul compat jamo": "ㄱㄴㄷ ㅏㅑㅓ",
    "Javanese": "ꦲꦏ꧀ꦱꦫꦗꦮꦱꦩꦶꦱꦏ",
    "Balinese": "ᬅᬓ᭄ᬱᬭᬩᬮᬶ",
    "Tai Le": "ᥖᥭᥰᥖᥬᥳᥑᥨᥒᥰ",
    "Yi": "ꆈꌠꉙꋊꂷꀋꄯꈓ",
    "Egyptian": "𓀀𓀁𓀂𓀃𓁐𓂀",
    "Cuneiform": "𒀀𒁀𒂊𒃲𒄀𒅀𒆠",
    "Ethiopic": "ሰላም፡ዓለም፡እንዴት፡ነህ። ደህና፡ነኝ።",
    "Bopomofo": "ㄅㄆㄇㄈ ㄉㄊㄋㄌ",
    "halfwidth kana": "ﾆﾎﾝｺﾞｶﾞｽｷﾃﾞｽ。ﾎﾝﾄｳﾃﾞｽ。",
    "fullwidth": "Ｔｈｅ\u3000ｑｕｉｃｋ\u3000ｂｒｏｗｎ\u3000ｆｏｘ．\u3000Ａｎｄ\u3000１２３．",
    "flags and families": "🇯🇵🇺🇸🇩🇪 🏳️\u200d🌈 🏴\u200d☠️ 👨🏽\u200d🚀 1️⃣2️⃣ ©️™️",
    "Persian with joiners": "می\u200cخواهم کتاب\u200cهایم را بخوانم. آیا می\u200cتوانی؟",
    "Khmer with spaces without width": "ខ្ញុំ\u200bចូលចិត្ត\u200bញ៉ាំ\u200bបាយ\u200bនៅ\u200bផ្ទះ",
    "word joiner": "one\u2060two three\u2060four",
    "tabs": "a\tb\tc\nd\te\tf\n\t\tg",
    "only punctuation": "!!! ??? ... --- ((( )))",
    "code": "def f(x):\n    if x > 0:  # positive\n        return x ** 2\n    return -x\n\nclass A:\n    pass\n",
    "table": "| a | b |\n|---|---|\n| 1 | 2 |\n| three | four |\n",
    "html": "<p>One <b>two</b> three.</p><script>alert('x')</script> &amp; &lt;four&gt;",
    "urls": "https://a.b/c?d=e&f=g#h see http://x.y and mailto:me@site.org or ftp://z/ok",
    "long url": "https://example.org/" + "a/b-c_d.e%20" * 100,
    "NUL": "one\x00two \x00 three\x00 four",
    "controls": "a\x01 b\x02c \x7f d \x9b e",
    "rtl marks": "\u200fשלום\u200f (\u202babc\u202c) \u2066123\u2069 עולם.",
    "bidi mixed": "He said שלום to מרחבא and مرحبا 123, ok?",
    "combining run": "Z" + "\u0301" * 300 + " algo w\u0336i\u0336l\u0336d\u0336 text here",
    "leading marks": "\u0301\u0302 abc ⃝ def",
    "noncharacters": "\ufffe\uffff abc \U0001ffff def",
    "variation": "葛\U000e0100飾区 と 辻\U000e0101 ☃︎ ☃️",
    "ideographic desc": "⿰氵青 ⿱艹化 〆切 〇一二 々",
    "soft hyphen": "in\xadter\xadna\xadtion\xadal\xadi\xadza\xadtion is hy\xadphen\xadat\xaded",
    "nbsp": "10\xa0000\xa0km and 5\u202f% of\u2003it\u2009all",
    "math alnum": "𝐇𝐞𝐥𝐥𝐨 𝑤𝑜𝑟𝑙𝑑 𝔣𝔯𝔞𝔨𝔱𝔲𝔯",
    "turkish": "İstanbul'da IŞIK ıslak DİYARBAKIR",
    "german": "STRASSE Straße ẞ ß Fußgängerübergänge Donaudampfschifffahrtsgesellschaft",
    "ligatures": "ﬁne ﬂow ﬃ ĳ Ǆ ŉ",
    "dashes": "a-b—c–d‒e−f‐g‑h",
    "apostrophes": "don't don’t donʼt rock'n'roll 'tis l'eau",
    "line ends": "a\r\nb\rc\nd\u2028e\u2029f\x85g",
    "lone surrogates": "a\ud83d b \ude00 c",
    "one letter": "x" * 5000,
    "one word": "a " * 2000,
    "Mongolian": "ᠮᠣᠩᠭᠣᠯ ᠬᠡᠯᠡ ᠪᠢᠴᠢᠭ᠌",
    "template": "{{ user }} {% if x %}<|end|>{% endif %} [INST] hi [/INST]",
    "mixed": "The 東京 tower は333m で, and 서울 tower is 236m กรุงเทพ end.",
    "emoji run": "\U0001f600" * 300,
}


def small_config(family="llama", **changes):
    "The configuration of a small model: 2 layers, width 32, 4 query and 2 KV heads; `changes` replace entries."
    return FAMILIES[family](**changes)


def small_model(family="llama", seed=0, **changes):
    "A small model with random weights, in eval mode; the same for the same arguments."
    torch.manual_seed(seed)
    return T.AutoModelForCausalLM.from_config(small_config(family, **changes)).eval()


def tokenizer():
    "The bundled tokenizer: 4,096 tokens and a chat template."
    return T.AutoTokenizer.from_pretrained(ASSETS / "llmopt-tiny")


@cache
def tiny():
    "The bundled model on the CPU, one for the process: not to be changed."
    return load("llmopt-tiny", "cpu")


def save_model(folder, model, tok=None):
    "Write `model` and a tokenizer (the bundled one if None) into `folder`; the folder as text."
    model.save_pretrained(folder)
    (tok or tokenizer()).save_pretrained(folder)
    return str(folder)


def random_ids(n, vocabulary=4096, seed=0):
    "(1, n) random token ids."
    return torch.randint(vocabulary, (1, n), generator=torch.Generator().manual_seed(seed))


def in_float64(model):
    "`model` in float64 throughout: transformers' RMSNorm computes in float32 whatever the model is, so it is replaced."

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    for m in model.double().eval().modules():
        if hasattr(m, "variance_epsilon"):
            m.forward = types.MethodType(norm, m)
    return model


def exact_model(family="llama", seed=0, **changes):
    "A small float64 model whose parameters are all away from 0 and 1, so that nothing drops out of a formula."
    model = in_float64(small_model(family, seed, **changes))
    torch.manual_seed(seed)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


@torch.inference_mode()
def logits(model, ids):
    "(n, length, V) logits of `ids` (n, length), without a cache."
    return model(ids, use_cache=False).logits


@torch.inference_mode()
def cached_logits(model, ids, prompt=7):
    "The same with a KV cache: the first `prompt` tokens in one pass, the others one by one."
    cache, out = T.DynamicCache(config=model.config), []
    for a, b in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
        out.append(model(ids[:, a:b], past_key_values=cache, use_cache=True).logits)
    return torch.cat(out, 1)


@contextmanager
def chromium():
    "A headless Chromium of the system; tests are skipped where it or Playwright is missing."
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@contextmanager
def visits(browser):
    """A function that opens a page: `opened(url, **screen)`, where a screen is one of `SCREENS`.

    At the end, no script may have failed, and nothing may have been asked for that is not under `url`."""
    wrong, contexts = [], []

    def opened(url, **screen):
        contexts.append(browser.new_context(**screen))
        page = contexts[-1].new_page()
        page.set_default_timeout(5000)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith((url, "data:")) else wrong.append(r.url))
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []
