"""`mistral preflight`: options in, the report and an exit code out."""

from __future__ import annotations

import base64
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..cluster import Cluster, ClusterError, only_context
from ..rollout.planning.preconditions import RESOLVED_BY_NAME
from ..rollout.state.observed import dig
from . import address, checks, hub, registry, render, report, resolver
from .answer import Answer, Manifest, Object, Outside, Seen
from .finding import EXIT_CODES, result
from .reader import Reader
from .release import Release, parse
from .weights import TOKEN
from .where import Where

RETRIES = 2
MISUSE = 2


@dataclass(frozen=True)
class Source:
    """Where the release comes from."""

    chart: Path | None
    values: tuple[Path, ...]
    sets: tuple[str, ...]
    name: str
    file: Path | None


def preflight(
    namespace: Annotated[str | None, typer.Option(help="Default: the file's, else the context's own.")] = None,
    context: Annotated[
        str | None, typer.Option(help="The kubeconfig's context; may be left out where there is only one.")
    ] = None,
    chart: Annotated[Path | None, typer.Option(metavar="DIR", help="The chart, rendered with Helm.")] = None,
    values: Annotated[
        list[Path] | None, typer.Option("--values", metavar="FILE", help="Values of the chart; repeatable.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One value of the chart; repeatable.")
    ] = None,
    release: Annotated[str, typer.Option(metavar="NAME", help="The name of Helm's release.")] = "mistral-7b",
    file: Annotated[Path | None, typer.Option(metavar="RENDERED", help="Rendered manifests; - is stdin.")] = None,
    output: Annotated[str, typer.Option(metavar="text|json", help="json: one object on stdout.")] = "text",
) -> None:
    """List what a cluster lacks for a release, with the command that fixes it. Changes nothing.

    Exit codes: 0 nothing stands in the way, 1 something certainly does, 2 misuse, or something cannot be known.
    """
    if output not in ("text", "json"):
        raise typer.BadParameter(f"--output is text or json, not {output!r}.")
    if (chart is None) == (file is None):
        raise typer.BadParameter("Give one of --chart and --file.")
    if file is not None and (values or sets):
        raise typer.BadParameter("--values and --set go with --chart.")
    source = Source(chart, tuple(values or ()), tuple(sets or ()), release, file)
    try:
        code = _run(source, namespace, context, output)
    except (ClusterError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        raise typer.Exit(MISUSE) from error
    raise typer.Exit(code)


def _run(source: Source, namespace: str | None, context: str | None, output: str) -> int:
    cluster = Cluster(context or only_context(), retries=RETRIES)
    asked, space = _release(source, namespace, cluster.namespace)
    where = Where(
        context=context or only_context(),
        namespace=space,
        chart=str(source.chart or ""),
        values=tuple(map(str, source.values)),
        sets=source.sets,
        release=source.name,
    )
    seen = Reader(cluster, space, asked).read()
    found = checks.findings(asked, seen, _outside(asked, seen, space), where)
    lines = [report.as_json(found, asked, where)] if output == "json" else report.table(found, asked, where)
    for line in lines:
        print(line, flush=True)
    return EXIT_CODES[result(found)]


def _release(source: Source, namespace: str | None, default: str) -> tuple[Release, str]:
    """Return what would be installed, and the namespace that it would be in."""
    if source.chart is not None:
        space = namespace or default
        return parse(render.helm_template(source.chart, source.values, source.sets, source.name, space)), space
    assert source.file is not None
    release = parse(render.read(source.file))
    own = str(dig(release.service, "metadata", "namespace") or "")
    if own and namespace and own != namespace:
        raise ValueError(f"The file is for namespace {own}, and --namespace is {namespace}.")
    return release, namespace or own or default


def _outside(release: Release, seen: Seen, namespace: str) -> Outside:
    """Ask the registry, the hub and the resolver."""
    uses = release.secrets(seen.account.value)
    secrets = {use.name: seen.secrets.get(use.name, Answer()).value for use in uses}
    pulls = [secret for use in uses if use.pulls_images and (secret := secrets[use.name])]
    tokens = [found for use in uses if TOKEN in use.keys and (found := _token(secrets[use.name]))]
    token = tokens[0] if tokens else ""
    host = address.host(seen) or address.wildcard(seen, namespace)
    endpoint = release.hub_endpoint or os.environ.get("HF_ENDPOINT", "")
    return Outside(
        image=_image(release.image, pulls),
        repositories={each: hub.look(each, token, endpoint) for each in release.hub_addresses},
        hosts={host: resolver.look(host)} if host else {},
    )


def _image(image: str, secrets: list[Object]) -> Answer[Manifest]:
    if image.startswith(RESOLVED_BY_NAME) or not registry.parse(image).host:
        return Answer()
    return registry.look(image, secrets)


def _token(secret: Object | None) -> str:
    """Return the token of a Secret; it is sent to the hub and shown nowhere."""
    try:
        return base64.b64decode((dig(secret, "data") or {}).get(TOKEN, "")).decode().strip()
    except ValueError:
        return ""
