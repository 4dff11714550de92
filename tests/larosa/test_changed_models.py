"A model that was changed by hand is refused, for a converted copy would not compute the same."

import pytest

from helpers import small_model
from llmopt.errors import UnsupportedModelError
from llmopt.larosa import family


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
