"""The server against requests made from its own schema, right and wrong ones: never an error of ours.

A few examples each; more with `LLMOPT_FUZZ=200 python -m pytest tests/server/test_fuzz.py`.
"""

import os

import pytest

from server.fakes import fake_app

schemathesis = pytest.importorskip("schemathesis", reason='needs the development tools: pip install -e ".[dev]"')
from hypothesis import HealthCheck, Phase, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402

EXAMPLES = int(os.environ.get("LLMOPT_FUZZ", "4"))
schema = schemathesis.openapi.from_asgi("/openapi.json", fake_app(), headers={"Host": "localhost"})
schema.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_request_is_an_error_of_the_server(case):
    "Whatever is not answered is refused in the envelope of errors."
    reply = case.call(headers={"Host": "localhost"})
    case.validate_response(reply, checks=[not_a_server_error])
    if reply.status_code >= 400 and case.method != "HEAD":
        assert reply.json()["error"]["message"]
