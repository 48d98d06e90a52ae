"""Checks whether the service's host resolves, from the machine that runs the command."""

from __future__ import annotations

from collections.abc import Iterable

from mistral_cli.preflight.checks.finding import Finding, ok, unknown
from mistral_cli.preflight.observed import Answer, External, Observed
from mistral_cli.preflight.release.manifests import Release
from mistral_cli.preflight.target import Target

NAME = "Address"


def check(release: Release, observed: Observed, external: External, target: Target) -> Iterable[Finding]:
    """Yield one finding for an installed service, or for Knative's domain before the install."""
    host = observed.host(target.namespace)
    look = target.kubectl("get", "service", "-A", "--field-selector", "spec.type=LoadBalancer")
    if host:
        answer = external.hosts.get(host, Answer())
        if answer.value:
            yield ok(NAME, f"{host} is {answer.value} from here")
        else:
            message = (
                f"{host} does not resolve from here: send requests to the gateway, with the service's host in `Host`."
            )
            yield unknown(NAME, message, look)
    elif (config := observed.configs.get("config-domain", Answer())).unknown:
        yield unknown(NAME, config.unknown, target.cluster_rights())
    elif release.knative:
        message = "Knative has no domain that is known outside the cluster (config-domain)."
        yield unknown(NAME, message, target.configure("config-domain", **{"models.example.com": ""}))
