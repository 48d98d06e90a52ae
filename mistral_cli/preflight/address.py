"""Checks whether the service's host resolves, from the machine that runs the command."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from ..rollout.state.observed import dig
from .answer import Answer, Outside, Seen
from .finding import Finding, ok, unknown
from .release import Release
from .where import Where

NAME = "Address"
IN_CLUSTER = "svc.cluster.local"


def host(seen: Seen) -> str:
    """Return the host of an installed service; empty before the install, when only the cluster could name it."""
    return urlsplit(str(dig(seen.service.value, "status", "url") or "")).hostname or ""


def domain(seen: Seen) -> str:
    """Return Knative's domain for services without a selector of their own."""
    config = seen.configs.get("config-domain", Answer())
    names = [key for key, value in (dig(config.value, "data") or {}).items() if not key.startswith("_") and not value]
    return str(names[0]) if names else ""


def wildcard(seen: Seen, namespace: str) -> str:
    """Return a host below Knative's domain: its DNS record is a wildcard, so that any name stands for the service's."""
    found = domain(seen)
    return f"preflight.{namespace}.{found}" if found and found != IN_CLUSTER else ""


def check(release: Release, seen: Seen, outside: Outside, where: Where) -> Iterable[Finding]:
    """Yield one finding for an installed service, or for Knative's domain before the install."""
    asked = host(seen) or wildcard(seen, where.namespace)
    look = where.kubectl("get", "service", "-A", "--field-selector", "spec.type=LoadBalancer")
    if asked:
        answer = outside.hosts.get(asked, Answer())
        if answer.value:
            yield ok(NAME, f"{asked} is {answer.value} from here")
        else:
            said = (
                f"{asked} does not resolve from here: send requests to the gateway, with the service's host in `Host`."
            )
            yield unknown(NAME, said, look)
    elif (config := seen.configs.get("config-domain", Answer())).unknown:
        yield unknown(NAME, config.unknown, where.cluster_rights())
    elif release.knative:
        said = "Knative has no domain that is known outside the cluster (config-domain)."
        yield unknown(NAME, said, where.configure("config-domain", **{"models.example.com": ""}))
