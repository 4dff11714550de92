"A model that was changed by hand is refused, for a converted copy would not compute the same."

import pytest

from helpers import small_model, tokenizer
from llmopt.core import LM
from llmopt.engine import EnhancedFusedLLMEngine, Recipe
from llmopt.errors import UnsupportedModelError
from llmopt.larosa import LaRoSAConfig, family


def pruned(m):
    m.model.layers = m.model.layers[:1]


def shared(m):
    m.model.layers[1] = m.model.layers[0]


def adapted(m):
    m.model.layers[0].self_attn.q_proj.forward = lambda x: x


@pytest.mark.parametrize("change", [pruned, shared, adapted])
def test_a_changed_model_is_refused(change):
    m = small_model()
    family(m)
    change(m)
    with pytest.raises(UnsupportedModelError, match="LaRoSA needs") as e:
        family(m)
    assert "\n" not in str(e.value)


def hooked(m):
    m.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out + 1)


def steered(m):
    usual = m.model.layers[0].mlp.forward
    m.model.layers[0].mlp.forward = lambda x: usual(x) + 1


@pytest.mark.parametrize("change", [hooked, steered])
def test_what_was_put_on_a_module_is_not_prepared(change):
    "Also where the model was prepared before the change: the older copy is not taken for it."
    lm = LM(small_model(), tokenizer(), "in memory")
    cfg = LaRoSAConfig(rotation="none", allocation="uniform", when="always")
    assert EnhancedFusedLLMEngine(lm, recipe=Recipe(larosa=cfg)).run("What is ice?", max_new_tokens=2).output_ids
    change(lm.model)
    with pytest.raises(UnsupportedModelError, match="of its own"):
        EnhancedFusedLLMEngine(lm, recipe=Recipe(larosa=cfg))
