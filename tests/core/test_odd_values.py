"Names, devices, number types and files that cannot be: one line that says what was wrong."

import json

import pytest
import torch

from helpers import save_model, small_model, tiny, tokenizer
from llmopt.core import LM, load
from llmopt.core.model import pick_device
from llmopt.errors import ConfigError, ModelError


def one_line(call, says, kind):
    "`call()` raises `kind` in one line that can be printed and matches `says`."
    with pytest.raises(kind, match=says) as error:
        call()
    assert "\n" not in str(error.value) and str(error.value).encode()


@pytest.mark.parametrize("name", ["\ud800", "a\ud800.gguf", None, b"x", 5])
def test_names_that_no_file_can_have(name):
    "A lone surrogate cannot be written in UTF-8."
    one_line(lambda: load(name), "no name of a model|named by text", ModelError)


@pytest.mark.parametrize("device", ["cpu:99", "cuda:99", "", b"x", [1], 10**30, "\ud800", torch.ones(2)])
def test_devices_that_are_not_there(device):
    "A number beyond the last device, or no device at all."
    one_line(lambda: pick_device(device), "no device|no cuda device|unknown device", ConfigError)


def test_none_is_the_automatic_device():
    "As `auto`; the first processor may be named by its number."
    assert pick_device(None) == pick_device("auto")
    assert pick_device("cpu:0").type == "cpu"


@pytest.mark.parametrize("dtype", [None, 5, b"x", "torch.", "\ud800", "int8", "float8_e4m3fn", torch.float8_e5m2])
def test_number_types_that_no_layer_computes_in(dtype):
    "A type of 8 bits exists, so it is not called unknown."
    says = "is for storage" if "float8" in str(dtype) else "unknown dtype"
    one_line(lambda: load("llmopt-tiny", "cpu", dtype), says, ConfigError)


@pytest.mark.parametrize("dtype", ["torch.bfloat16", torch.bfloat16, "bfloat16"])
def test_number_types_by_any_of_their_names(dtype):
    "As torch prints it, as torch has it, or short."
    assert load("llmopt-tiny", "cpu", dtype).model.dtype == torch.bfloat16


@pytest.mark.parametrize("text", ["", "null", "[]", "{", '"x"'])
def test_a_generation_config_that_is_no_object(tmp_path, text):
    "transformers would go on with its defaults for some of them, so that an answer never ends."
    folder = save_model(tmp_path / "m", small_model())
    (tmp_path / "m" / "generation_config.json").write_text(text)
    one_line(lambda: load(folder, "cpu"), "generation_config.json' holds no JSON object", ModelError)
    (tmp_path / "m" / "generation_config.json").write_text("{}")
    assert load(folder, "cpu").stop_ids


def test_a_model_without_positions(tmp_path):
    "Zero positions are no context without end."
    folder = save_model(tmp_path / "m", small_model())
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | dict(max_position_embeddings=0)))
    one_line(lambda: load(folder, "cpu"), "0 positions", ModelError)


@pytest.mark.parametrize("end", [True, [3, False], "x"])
def test_an_end_of_answers_that_is_no_token(end):
    "True would be token 1."
    lm = LM(small_model(), tokenizer(), "small")
    assert lm.stop_ids and tiny().stop_ids
    lm.model.generation_config.eos_token_id = end
    one_line(lambda: lm.stop_ids, "eos_token_id that is none", ModelError)
