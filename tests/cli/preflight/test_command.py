"""The command as a whole: exit codes, forms of output, misuse, rights, and that it changes nothing."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from charts.render_manifests import helm_template
from tests.support.artifact_server import DIGEST
from tests.support.cluster_api.admission import NODE, SECRET, SERVICE
from tests.support.cluster_api.api import Fault
from tests.support.preflight_runs import Site, of_state, site

pytestmark = pytest.mark.chart


def rendered(at: Site, folder: Path, *values: str) -> Path:
    """Render the `gfd` scenario to a file."""
    image = f"image.repository={at.artifacts.image},image.digest={DIGEST}"
    sets = [word for each in (image, *values) for word in ("--set", each)]
    file = folder / "rendered.yaml"
    file.write_text(helm_template("--values", "charts/mistral-7b/ci/gfd-values.yaml", *sets))
    return file


def test_a_cluster_that_lacks_nothing_is_exit_code_0_and_stays_as_it_is(tmp_path: Path) -> None:
    with site(tmp_path) as at:
        before = copy.deepcopy(at.store.objects)
        code, found = at.findings()
        assert {finding["state"] for finding in found} == {"ok"}
        assert code == 0
        assert at.store.objects == before


def test_what_cannot_be_known_is_exit_code_2(tmp_path: Path) -> None:
    with site(tmp_path) as at:
        del at.store.objects[NODE]["metadata"]["labels"]["nvidia.com/cuda.driver-version.major"]
        code, found = at.findings()
    assert list(of_state(found, "cannot know")) == ["GPU driver"]
    assert code == 2


def test_a_certain_failure_outweighs_what_cannot_be_known(tmp_path: Path) -> None:
    with site(tmp_path) as at:
        del at.store.objects[SECRET]
        del at.store.objects[NODE]["metadata"]["labels"]["nvidia.com/cuda.driver-version.major"]
        code, _ = at.findings()
    assert code == 1


def test_a_missing_right_is_named_in_its_row(tmp_path: Path) -> None:
    said = 'nodes is forbidden: User "ci" cannot list resource "nodes" in API group "" at the cluster scope'
    with site(tmp_path) as at:
        at.store.faults.append(Fault("GET", "/nodes", 403, said))
        code, found = at.findings()
    row = of_state(found, "cannot know")["Nodes"]
    assert said in row["what"]
    assert "manifests/ci/preflight-cluster.yaml" in row["command"]
    assert code == 2


def test_the_table_has_a_line_for_each_check_and_its_command_below(tmp_path: Path) -> None:
    with site(tmp_path) as at:
        del at.store.objects[SECRET]
        lines = at.run(*at.chart()).stdout.splitlines()
    at_secret = next(number for number, line in enumerate(lines) if line.startswith("missing"))
    assert "Secret hf-token" in lines[at_secret]
    assert lines[at_secret + 1].strip().startswith("$ kubectl --context double -n mistral create secret")
    assert lines[-1].endswith(" ok, 1 missing, 0 cannot know")


def test_rendered_manifests_are_checked_like_the_chart(tmp_path: Path) -> None:
    with site(tmp_path) as at:
        result = at.run("--file", str(rendered(at, tmp_path)), "--output", "json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["result"], said["namespace"], said["inferenceservice"]) == ("ok", "mistral", "mistral-7b")


def test_a_request_above_the_limit_that_kserve_adds_is_found(tmp_path: Path) -> None:
    with site(tmp_path) as at:
        file = rendered(at, tmp_path)
        documents = list(yaml.safe_load_all(file.read_text()))
        service = next(each for each in documents if each and each["kind"] == "InferenceService")
        del service["spec"]["predictor"]["containers"][0]["resources"]["limits"]["cpu"]
        file.write_text(yaml.safe_dump_all(documents))
        result = at.run("--file", str(file), "--output", "json")
    lacking = of_state(json.loads(result.stdout)["findings"], "missing")
    assert set(lacking) == {"Requests and limits", "Knative Service dry run"}
    assert "the request 3 is above the limit 1" in lacking["Requests and limits"]["what"]
    assert "resources.limits.cpu=3" in lacking["Requests and limits"]["command"]


def test_a_host_that_does_not_resolve_here_cannot_be_judged(tmp_path: Path) -> None:
    with site(tmp_path) as at:
        at.store.objects[SERVICE]["status"]["url"] = "http://mistral.invalid"
        _, found = at.findings()
    assert "mistral.invalid does not resolve from here" in of_state(found, "cannot know")["Address"]["what"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Pass one of --chart and --file, and not both."),
        (["--chart", "charts/mistral-7b", "--file", "x.yaml"], "Pass one of --chart and --file, and not both."),
        (["--file", "x.yaml", "--set", "a=b"], "--values and --set go with --chart."),
        (["--file", "absent.yaml"], "--file absent.yaml cannot be read"),
        (["--chart", "charts/mistral-7b"], "Helm refuses: execution error"),
        (["--file", "mistral.yaml", "--namespace", "other"], "The file is for namespace mistral"),
        (["--file", "x.yaml", "--output", "xml"], "--output is text or json"),
    ],
)
def test_misuse_is_exit_code_2_and_one_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    with site(tmp_path) as at:
        file = rendered(at, tmp_path)
        given = [str(file) if each == "mistral.yaml" else each for each in arguments]
        result = at.run(*given)
    assert result.exit_code == 2
    assert sentence in " ".join(result.stderr.replace("│", " ").split())


def test_the_only_context_is_taken_and_of_several_none(tmp_path: Path) -> None:
    with site(tmp_path) as at:
        assert at.run(*at.chart(), context="").exit_code == 0
        config = yaml.safe_load(at.kubeconfig.read_text())
        config["contexts"].append({"name": "production", "context": config["contexts"][0]["context"]})
        at.kubeconfig.write_text(yaml.safe_dump(config))
        result = at.run(*at.chart(), context="")
    assert result.exit_code == 2
    assert "The kubeconfig has 2 contexts (double, production): name one with --context." in result.stderr


def test_an_api_server_that_does_not_answer_is_reported_once_and_briefly(tmp_path: Path) -> None:
    with site(tmp_path) as at:
        config = yaml.safe_load(at.kubeconfig.read_text())
        config["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:9"
        at.kubeconfig.write_text(yaml.safe_dump(config))
        result = at.run(*at.chart())
    assert result.exit_code == 2
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("Error: The cluster http://127.0.0.1:9 does not answer: ")
    assert "Connection refused" in line
    assert "Max retries" not in line


def test_credentials_that_the_api_server_does_not_accept_are_reported_once(tmp_path: Path) -> None:
    with site(tmp_path) as at:
        at.store.faults.append(Fault("GET", "/", 401, "Unauthorized", times=1000))
        result = at.run(*at.chart())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "does not accept the credentials of the kubeconfig's context" in result.stderr


def test_the_token_and_the_passwords_are_never_printed(tmp_path: Path) -> None:
    with site(tmp_path) as at:
        result = at.run(*at.chart(), "--output", "json")
        assert at.artifacts.tokens == ["Bearer token"]
    assert "dG9rZW4=" not in result.output
    assert "Bearer token" not in result.output


def test_the_kubernetes_client_is_imported_only_when_it_runs() -> None:
    code = "import sys, mistral_cli.app; sys.exit('kubernetes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
