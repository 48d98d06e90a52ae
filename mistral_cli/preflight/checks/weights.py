"""Checks the needs of the weights' download: Secrets, a storage container, a token for the repository."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from mistral_cli.objects import Object, dig
from mistral_cli.preflight.checks.finding import Finding, missing, ok, unknown
from mistral_cli.preflight.observed import Answer, External, Observed
from mistral_cli.preflight.release.artifacts import HUB_TOKEN, hub_url
from mistral_cli.preflight.release.manifests import Release, SecretUse
from mistral_cli.preflight.target import Target


def check(release: Release, observed: Observed, external: External, target: Target) -> Iterable[Finding]:
    """Yield a finding for each."""
    if release.created("ServiceAccount", release.account) is None:
        yield _account(release, observed, target)
    for use in release.secrets(observed.account.value):
        yield _secret(use, observed.secrets.get(use.name, Answer()), target)
    if release.storage_container and release.storage_uri:
        yield _storage_container(release, observed, target)
    for address, status in external.repositories.items():
        yield _repository(address, status, release, observed, target)


def _account(release: Release, observed: Observed, target: Target) -> Finding:
    name = "ServiceAccount"
    if observed.account.unknown:
        return unknown(name, observed.account.unknown, target.rights())
    if observed.account.value is None:
        create = target.namespaced("create", "serviceaccount", release.account)
        return missing(name, f"There is no ServiceAccount {release.account}: no pod would be created.", create)
    return ok(name, release.account)


def _secret(use: SecretUse, answer: Answer[Object], target: Target) -> Finding:
    name = f"Secret {use.name}"
    key = min(use.keys, default=HUB_TOKEN)
    if answer.unknown:
        return unknown(name, answer.unknown, target.rights())
    if answer.value is None:
        create = target.namespaced("create", "secret", "docker-registry", use.name, "--docker-server=HOST") + (
            ' --docker-username="$USER" --docker-password="$PASSWORD"'
        )
        message = f"There is no Secret {use.name}: the pods would not be created, or not start."
        return missing(name, message, create if use.pulls_images else target.secret(use.name, key))
    lacking = sorted(use.keys - set(answer.value.get("data") or {}))
    if lacking:
        return missing(name, f"It has no key {', '.join(lacking)}.", target.replace_secret(use.name, lacking[0]))
    return ok(name, f"has {', '.join(sorted(use.keys))}" if use.keys else "exists")


def _storage_container(release: Release, observed: Observed, target: Target) -> Finding:
    """Check that the storage container takes the address: KServe refuses a pod whose address it does not list."""
    name, uri = "ClusterStorageContainer", release.storage_uri
    container = release.created("ClusterStorageContainer", release.storage_container)
    if container is None:
        answer = observed.storage_container
        if answer.unknown:
            return unknown(name, answer.unknown, target.cluster_rights())
        if answer.value is None:
            message = f"There is no ClusterStorageContainer {release.storage_container}."
            return missing(name, message, target.helm("--set", "storage.initializer.create=true"))
        container = answer.value
    formats = dig(container, "spec", "supportedUriFormats") or ()
    if any(_supports(each, uri) for each in formats):
        return ok(name, f"{release.storage_container} takes {uri}")
    prefixes = ", ".join(str(each.get("prefix") or each.get("regex")) for each in formats)
    message = f"{release.storage_container} takes {prefixes or 'nothing'}, and not {uri}: KServe would refuse the pod."
    prefix = re.sub(r"(hf://[^:]+):.*", r"\1", uri)
    if release.created("ClusterStorageContainer", release.storage_container) is not None:
        return missing(name, message, target.helm("--set", f"storage.initializer.uriPrefixes={{{prefix}}}"))
    patch = json.dumps([{"op": "add", "path": "/spec/supportedUriFormats/-", "value": {"prefix": prefix}}])
    existing = ("clusterstoragecontainer", release.storage_container)
    return missing(name, message, target.kubectl("patch", *existing, "--type", "json", "-p", patch))


def _supports(each: Object, uri: str) -> bool:
    if each.get("prefix"):
        return uri.startswith(str(each["prefix"]))
    return bool(each.get("regex")) and re.match(str(each["regex"]), uri) is not None


def _repository(address: str, answer: Answer[int], release: Release, observed: Observed, target: Target) -> Finding:
    name = "Model repository"
    ask = f'curl -sI -H "Authorization: Bearer ${HUB_TOKEN}" {hub_url(address, release.hub_endpoint)}'
    if answer.unknown or answer.value is None:
        return unknown(name, answer.unknown or "The command did not query the hub.", ask)
    if answer.value < 400:
        return ok(name, f"{address} opens")
    uses = [use for use in release.secrets(observed.account.value) if HUB_TOKEN in use.keys]
    if answer.value in (401, 403) and not all(observed.secrets.get(use.name, Answer()).value for use in uses):
        return unknown(name, f"{address} needs a token, and the Secret with the token cannot be read.", ask)
    if answer.value in (401, 403):
        secret = uses[0].name if uses else "hf-token"
        message = f"The hub answers {answer.value} for {address}: "
        message += "accept its terms with the token's account, or renew it."
        if uses:
            return missing(name, message, target.replace_secret(secret, HUB_TOKEN))
        attach = target.helm("--set", f"hfToken.secretName={secret}")
        return missing(name, message, f"{target.secret(secret, HUB_TOKEN)} && {attach}")
    if answer.value == 404:
        message = f"The hub has no {address}: the repository or the revision is wrong."
        return missing(name, message, target.helm("--set", "storage.uri=hf://OWNER/MODEL:REVISION"))
    return unknown(name, f"The hub answers {answer.value} for {address}.", ask)
