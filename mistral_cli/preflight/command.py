"""`mistral preflight`: options in, the report and an exit code out."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mistral_cli.cluster import Cluster, ClusterError, Forbidden, Unauthenticated, only_context
from mistral_cli.objects import dig
from mistral_cli.preflight import report
from mistral_cli.preflight.checks.finding import EXIT_CODES, result
from mistral_cli.preflight.checks.run import run
from mistral_cli.preflight.collectors import external
from mistral_cli.preflight.collectors.cluster import Reader
from mistral_cli.preflight.release import render
from mistral_cli.preflight.release.manifests import Release, parse
from mistral_cli.preflight.target import Target

RETRIES = 2
MISUSE = 2


@dataclass(frozen=True)
class Source:
    """The chart or the file that the release comes from."""

    chart: Path | None
    values: tuple[Path, ...]
    sets: tuple[str, ...]
    name: str
    file: Path | None


def preflight(
    namespace: Annotated[
        str | None, typer.Option(help="The namespace; default: the file's, else the context's.")
    ] = None,
    context: Annotated[str | None, typer.Option(help="The kubeconfig's context; optional if it has only one.")] = None,
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
    """Check whether a cluster can run a release, and print commands that fix problems. Changes nothing.

    Exit codes: 0 every check passed, 1 something is missing, 2 wrong usage, or a check is unknown.
    """
    if output not in ("text", "json"):
        raise typer.BadParameter(f"--output is text or json, not {output!r}.")
    if (chart is None) == (file is None):
        raise typer.BadParameter("Pass one of --chart and --file, and not both.")
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
    context = context or only_context()
    cluster = Cluster(context, retries=RETRIES)
    _check_connection(cluster)
    release, namespace = _release(source, namespace, cluster.namespace)
    target = Target(
        context=context,
        namespace=namespace,
        chart=str(source.chart or ""),
        values=tuple(map(str, source.values)),
        sets=source.sets,
        release=source.name,
    )
    observed = Reader(cluster, namespace, release).read()
    findings = run(release, observed, external.read(release, observed, namespace), target)
    lines = [report.as_json(findings, release, target)] if output == "json" else report.table(findings, release, target)
    for line in lines:
        print(line, flush=True)
    return EXIT_CODES[result(findings)]


def _check_connection(cluster: Cluster) -> None:
    """Ask one question first: without a connection or with bad credentials, every row would repeat the same reason.

    Raises:
        ClusterError: the API server does not answer, or does not accept the credentials.
    """
    try:
        cluster.read("/version")
    except Unauthenticated:
        raise
    except Forbidden:
        return  # the row of the version says which right is missing


def _release(source: Source, namespace: str | None, default: str) -> tuple[Release, str]:
    """Return the release and its namespace."""
    if source.chart is not None:
        namespace = namespace or default
        return parse(render.helm_template(source.chart, source.values, source.sets, source.name, namespace)), namespace
    assert source.file is not None
    release = parse(render.read(source.file))
    own = str(dig(release.service, "metadata", "namespace") or "")
    if own and namespace and own != namespace:
        raise ValueError(f"The file is for namespace {own}, and --namespace is {namespace}.")
    return release, namespace or own or default
