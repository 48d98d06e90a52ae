"""Which paths there are, what they say of the server, and what is not there."""

import pytest

from tests.support.scripted_model import PREDICT, ScriptedModel, ask, over_a_socket


@pytest.fixture
def model() -> ScriptedModel:
    return ScriptedModel()


@pytest.mark.parametrize("path", ["/", "/v2/health/live"])
def test_liveness_ends_with_the_engine(model, path):
    assert ask(model, "GET", path).status_code == 200
    model.dead = "CUDA error"
    answer = ask(model, "GET", path)
    assert (answer.status_code, answer.json()["code"]) == (503, "engine_dead")
    assert "CUDA" not in answer.text


@pytest.mark.parametrize("path", ["/v2/health/ready", "/v1/models/tiny", "/v2/models/tiny/ready"])
def test_readiness_is_whether_new_requests_are_taken(model, path):
    answer = ask(model, "GET", path)
    assert (answer.status_code, answer.json()["ready"]) == (200, True)
    model.accepting = False
    answer = ask(model, "GET", path)
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
    assert "retry-after" in answer.headers


def test_readiness_names_what_a_gpu_runs_without(model):
    """A server without CUDA graphs is ready and several times slower."""
    assert ask(model, "GET", "/v2/health/ready").json() == {"ready": True}
    model.degraded = ["cuda_graphs"]
    assert ask(model, "GET", "/v2/health/ready").json() == {"ready": True, "degraded": ["cuda_graphs"]}


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/models/huge:predict"), ("GET", "/v1/models/huge")])
def test_other_models_are_not_here(model, method, path):
    answer = ask(model, method, path, json={})
    assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")
    assert "'huge'" in answer.json()["error"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/repository/models/tiny/unload"),
        ("POST", "/v2/repository/models/tiny/load"),
        ("POST", "/v1/models/tiny:explain"),
        ("POST", "/v2/models/tiny/infer"),
        ("GET", "/docs"),
        ("GET", "/v1/models/"),
        ("GET", "//v1/models"),
        ("GET", "/%2e%2e/etc/passwd"),
    ],
)
def test_what_is_not_ours_does_not_exist(model, method, path):
    answer = ask(model, method, path)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


@pytest.mark.parametrize(("method", "path", "allowed"), [("GET", PREDICT, "POST"), ("DELETE", "/metrics", "GET")])
def test_wrong_method_is_told_the_right_one(model, method, path, allowed):
    answer = ask(model, method, path)
    assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == allowed


def test_docs_are_there_on_demand(model):
    assert ask(model, "GET", "/docs", docs=True).status_code == 200


def test_kserve_client_understands_us(model):
    from kserve import InferenceRESTClient, RESTConfig

    async def use(client):
        kserve_client = InferenceRESTClient(RESTConfig(protocol="v1", timeout=10))
        base_url = str(client.base_url)
        answer = await kserve_client.infer(base_url, {"instances": ["a"]}, model_name="tiny")
        ready = await kserve_client.is_model_ready(base_url, "tiny")
        live = await kserve_client.is_server_live(base_url)
        await kserve_client.close()
        return answer, ready, live

    assert over_a_socket(model, use) == ({"predictions": [{"instances": ["a"]}]}, True, True)
