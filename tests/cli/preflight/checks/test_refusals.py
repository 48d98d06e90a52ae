"""A refused dry run has the command that fixes it."""

from __future__ import annotations

import pytest

from mistral_cli.preflight.checks import dry_runs
from mistral_cli.preflight.checks.finding import State
from mistral_cli.preflight.observed import Answer, Observed
from tests.support.preflight_checks import TARGET, named, release

pytestmark = pytest.mark.chart


DENIED = 'admission webhook "validation.webhook.serving.knative.dev" denied the request: validation'
TRIED = f'{DENIED} callback failed: dry run failed with pods "d" is forbidden:'
REFUSALS = {
    # Sentences of Kubernetes 1.34 with Knative 1.23 and KServe 0.20, as a cluster said them.
    f"{DENIED} failed: must not set the field(s): spec.template.spec.nodeSelector": "patch configmap config-features",
    f"{DENIED} failed: expected 0 <= 3300 <= 1800: spec.template.spec.timeoutSeconds": "configmap config-defaults",
    f"{TRIED} exceeded quota: none, requested: pods=1, used: pods=0, limited: pods=0": "patch resourcequota none",
    f'{TRIED} violates PodSecurity "restricted:latest": runAsNonRoot != true': "enforce=baseline",
    f"{TRIED} maximum cpu usage per Container is 500m, but limit is 2: spec.template": "edit limitrange",
    f'{TRIED} Invalid value: "3": must be less than or equal to cpu limit of 1': "resources.limits.cpu=3",
    f"{TRIED} no PriorityClass with name nope was found: spec.template": "create priorityclass nope",
    'strict decoding error: unknown field "spec.predictor.storageContainerName"': "kserve.yaml",
    'failed calling webhook "inferenceservice.kserve-webhook-server.defaulter"': "-n kserve rollout status",
    'failed calling webhook "webhook.serving.knative.dev"': "-n knative-serving rollout status deployment/webhook",
}


@pytest.mark.parametrize(("sentence", "command"), REFUSALS.items())
def test_each_refusal_of_a_dry_run_has_the_command_that_fixes_it(sentence: str, command: str) -> None:
    observed = Observed(service_dry_run=Answer({}), pod_dry_run=Answer(refused=sentence))
    finding = named(dry_runs.check(release(), observed, TARGET), "Knative Service dry run")
    assert finding.state == State.MISSING
    assert command in finding.command


def test_two_objections_in_one_refusal_give_both_commands() -> None:
    said = f"{DENIED} failed: expected 0 <= 3300 <= 1800: timeoutSeconds must not set the field(s): nodeSelector"
    observed = Observed(service_dry_run=Answer({}), pod_dry_run=Answer(refused=said))
    command = named(dry_runs.check(release(), observed, TARGET), "Knative Service dry run").command
    assert "config-features" in command
    assert "config-defaults" in command
