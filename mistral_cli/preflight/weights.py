"""Checks what the download of the weights needs: Secrets, storage container, a token that opens the repository."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from ..rollout.state.observed import dig
from . import hub
from .answer import Answer, Object, Outside, Seen
from .finding import Finding, missing, ok, unknown
from .release import Release, SecretUse
from .where import Where

TOKEN = "HF_TOKEN"


def check(release: Release, seen: Seen, outside: Outside, where: Where) -> Iterable[Finding]:
    """Yield a finding for each."""
    if release.created("ServiceAccount", release.account) is None:
        yield _account(release, seen, where)
    for use in release.secrets(seen.account.value):
        yield _secret(use, seen.secrets.get(use.name, Answer()), where)
    if release.storage_container and release.storage_uri:
        yield _storage_container(release, seen, where)
    for address, status in outside.repositories.items():
        yield _repository(address, status, release, seen, where)


def _account(release: Release, seen: Seen, where: Where) -> Finding:
    name = "ServiceAccount"
    if seen.account.unknown:
        return unknown(name, seen.account.unknown, where.rights())
    if seen.account.value is None:
        create = where.here("create", "serviceaccount", release.account)
        return missing(name, f"There is no ServiceAccount {release.account}: no pod would be created.", create)
    return ok(name, release.account)


def _secret(use: SecretUse, answer: Answer[Object], where: Where) -> Finding:
    name = f"Secret {use.name}"
    key = min(use.keys, default=TOKEN)
    if answer.unknown:
        return unknown(name, answer.unknown, where.rights())
    if answer.value is None:
        create = where.here("create", "secret", "docker-registry", use.name, "--docker-server=HOST") + (
            ' --docker-username="$USER" --docker-password="$PASSWORD"'
        )
        said = f"There is no Secret {use.name}: the pods would not be created, or not start."
        return missing(name, said, create if use.pulls_images else where.secret(use.name, key))
    lacking = sorted(use.keys - set(answer.value.get("data") or {}))
    if lacking:
        again = where.secret(use.name, lacking[0])
        command = f"{again} --dry-run=client -o yaml | {where.here('apply', '-f', '-')}"
        return missing(name, f"It has no key {', '.join(lacking)}.", command)
    return ok(name, f"has {', '.join(sorted(use.keys))}" if use.keys else "is there")


def _storage_container(release: Release, seen: Seen, where: Where) -> Finding:
    """Check that the storage container takes the address: KServe refuses a pod whose address it does not list."""
    name, uri = "ClusterStorageContainer", release.storage_uri
    container = release.created("ClusterStorageContainer", release.storage_container)
    if container is None:
        answer = seen.storage_container
        if answer.unknown:
            return unknown(name, answer.unknown, where.cluster_rights())
        if answer.value is None:
            said = f"There is no ClusterStorageContainer {release.storage_container}."
            return missing(name, said, where.helm("--set", "storage.initializer.create=true"))
        container = answer.value
    formats = dig(container, "spec", "supportedUriFormats") or ()
    if any(_supports(each, uri) for each in formats):
        return ok(name, f"{release.storage_container} takes {uri}")
    prefixes = ", ".join(str(each.get("prefix") or each.get("regex")) for each in formats)
    said = f"{release.storage_container} takes {prefixes or 'nothing'}, and not {uri}: KServe would refuse the pod."
    prefix = re.sub(r"(hf://[^:]+):.*", r"\1", uri)
    if release.created("ClusterStorageContainer", release.storage_container) is not None:
        return missing(name, said, where.helm("--set", f"storage.initializer.uriPrefixes={{{prefix}}}"))
    patch = json.dumps([{"op": "add", "path": "/spec/supportedUriFormats/-", "value": {"prefix": prefix}}])
    kind = "clusterstoragecontainer"
    return missing(name, said, where.kubectl("patch", kind, release.storage_container, "--type", "json", "-p", patch))


def _supports(each: Object, uri: str) -> bool:
    if each.get("prefix"):
        return uri.startswith(str(each["prefix"]))
    return bool(each.get("regex")) and re.match(str(each["regex"]), uri) is not None


def _repository(address: str, answer: Answer[int], release: Release, seen: Seen, where: Where) -> Finding:
    name = "Model repository"
    ask = f'curl -sI -H "Authorization: Bearer ${TOKEN}" {hub.url(address, release.hub_endpoint)}'
    if answer.unknown or answer.value is None:
        return unknown(name, answer.unknown or "The hub was not asked.", ask)
    if answer.value < 400:
        return ok(name, f"{address} opens")
    uses = [use for use in release.secrets(seen.account.value) if TOKEN in use.keys]
    if answer.value in (401, 403) and not all(seen.secrets.get(use.name, Answer()).value for use in uses):
        return unknown(name, f"{address} asks for a token, and the Secret with it cannot be read.", ask)
    if answer.value in (401, 403):
        secret = uses[0].name if uses else "hf-token"
        said = f"The hub answers {answer.value} for {address}: accept its terms with the token's account, or renew it."
        command = f"{where.secret(secret, TOKEN)} --dry-run=client -o yaml | {where.here('apply', '-f', '-')}"
        attach = where.helm("--set", f"hfToken.secretName={secret}")
        return missing(name, said, command if uses else f"{where.secret(secret, TOKEN)} && {attach}")
    if answer.value == 404:
        said = f"The hub has no {address}: the repository or the revision is wrong."
        return missing(name, said, where.helm("--set", "storage.uri=hf://OWNER/MODEL:REVISION"))
    return unknown(name, f"The hub answers {answer.value} for {address}.", ask)
