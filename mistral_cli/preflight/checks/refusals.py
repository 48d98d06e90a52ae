"""The command that fixes a refusal: KServe, Knative and Kubernetes say in a sentence why they refuse an object."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from mistral_cli.objects import dig, quantity
from mistral_cli.preflight.checks.knative import needed_flags
from mistral_cli.preflight.release.manifests import Release
from mistral_cli.preflight.target import KNATIVE_NAMESPACE, Target

Fix = Callable[[re.Match[str], Release, Target], str]


def fix(sentence: str, release: Release, target: Target) -> str:
    """Return the commands for everything that the sentence names: a webhook lists several objections at once."""
    fixes = [make(found, release, target) for pattern, make in FIXES if (found := re.search(pattern, sentence))]
    return " && ".join(dict.fromkeys(fixes)) or target.namespaced("apply", "--dry-run=server", "-f", "RENDERED.yaml")


def _flags(found: re.Match[str], release: Release, target: Target) -> str:
    return target.configure("config-features", **dict.fromkeys(needed_flags(release.predictor), "enabled"))


def _timeout(found: re.Match[str], release: Release, target: Target) -> str:
    return target.configure("config-defaults", **{"max-revision-timeout-seconds": found[1]})


def _quota(found: re.Match[str], release: Release, target: Target) -> str:
    """Raise every key that the refusal names to what is used and two more of what was asked."""
    asked, used = _amounts(found[2]), _amounts(found[3])
    hard = {key: f"{quantity(used.get(key, '0')) + 3 * quantity(value):f}" for key, value in asked.items()}
    patch = json.dumps({"spec": {"hard": hard}})
    return target.namespaced("patch", "resourcequota", found[1], "--type", "merge", "-p", patch)


def _amounts(listed: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in listed.split(",") if "=" in part)


def _webhook(found: re.Match[str], release: Release, target: Target) -> str:
    kserve = "kserve" in found[1]
    namespace, deployment = ("kserve", "kserve-controller-manager") if kserve else (KNATIVE_NAMESPACE, "webhook")
    return target.kubectl("-n", namespace, "rollout", "status", f"deployment/{deployment}")


FIXES: tuple[tuple[str, Fix], ...] = (
    (r"failed calling webhook \"([^\"]+)\"", _webhook),
    (r"exceeded quota: (\S+), requested: (\S+), used: (\S+), limited", _quota),
    (r"must not set the field|is disabled|feature is disabled", _flags),
    (r"expected 0 <= (\d+) <= \d+", _timeout),
    (r"strict decoding error|unknown field", lambda found, release, target: target.install("serving.kserve.io")),
    (r"initial-scale|initialScale",
     lambda found, release, target: target.configure("config-autoscaler", **{"allow-zero-initial-scale": "true"})),
    (r"violates PodSecurity",
     lambda found, release, target: target.kubectl("label", "namespace", target.namespace, "--overwrite",
                                                 "pod-security.kubernetes.io/enforce=baseline")),
    (r"(?:maximum|minimum) (\w+) usage per", lambda found, release, target: target.namespaced("edit", "limitrange")),
    (r"no PriorityClass with name (\S+)",
     lambda found, release, target: target.kubectl("create", "priorityclass", found[1], "--value", "1000")),
    (r"must be less than or equal to (cpu|memory) limit",
     lambda found, release, target: target.helm("--set", f"resources.limits.{found[1]}={_request(release, found[1])}")),
    (r"deploymentMode",
     lambda found, release, target: target.namespaced("delete", "inferenceservice", release.name)),
)  # fmt: skip


def _request(release: Release, resource: str) -> str:
    return str(dig(release.container, "resources", "requests", resource))
