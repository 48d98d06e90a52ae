"""Where the release would be installed, and the commands for it: complete, and quoted for a shell."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

KSERVE = "https://github.com/kserve/kserve/releases/download/v0.20.0"
KNATIVE = "https://github.com/knative/serving/releases/download/knative-v1.21.0"
KNATIVE_NAMESPACE = "knative-serving"


@dataclass(frozen=True)
class Target:
    """The cluster, the namespace and the source of the release."""

    context: str
    namespace: str
    chart: str = ""
    """Empty: the release came as a rendered file."""
    values: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    release: str = "mistral-7b"

    def kubectl(self, *words: str) -> str:
        return shlex.join(["kubectl", "--context", self.context, *words])

    def namespaced(self, *words: str) -> str:
        """Return a command of kubectl in the release's namespace."""
        return self.kubectl("-n", self.namespace, *words)

    def configure(self, config: str, **data: str) -> str:
        """Return the command that sets keys of one of Knative's ConfigMaps."""
        patch = json.dumps({"data": data})
        return self.kubectl("-n", KNATIVE_NAMESPACE, "patch", "configmap", config, "--type", "merge", "-p", patch)

    def helm(self, *options: str) -> str:
        """Return the command that changes the release's values."""
        if self.chart:
            install = ["helm", "upgrade", "--install", self.release, self.chart, "--kube-context", self.context]
            given = [word for file in self.values for word in ("-f", file)]
            given += [word for each in self.sets for word in ("--set", each)]
            return shlex.join([*install, "-n", self.namespace, *given, *options])
        chart = ["helm", "template", self.release, "charts/mistral-7b", "-n", self.namespace]
        return f"{shlex.join([*chart, '-f', 'VALUES.yaml', *options])} > RENDERED.yaml"

    def secret(self, name: str, key: str) -> str:
        """Return the command that creates a Secret from a variable of the shell, which it never prints."""
        variable = key.upper().replace("-", "_").replace(".", "_")
        return f'{self.namespaced("create", "secret", "generic", name)} --from-literal={key}="${variable}"'

    def replace_secret(self, name: str, key: str) -> str:
        """Return the command that replaces an existing Secret."""
        return f"{self.secret(name, key)} --dry-run=client -o yaml | {self.namespaced('apply', '-f', '-')}"

    def rights(self) -> str:
        """Return the command that gives the account of CI the rights of preflight in the namespace."""
        return self.namespaced("apply", "-f", "manifests/ci/preflight.yaml")

    def cluster_rights(self) -> str:
        """Return the command that gives the account of CI the rights of preflight in the whole cluster."""
        return self.kubectl("apply", "-f", "manifests/ci/preflight-cluster.yaml")

    def install(self, group: str) -> str:
        """Return the command that installs the owner of an API group."""
        if group == "serving.kserve.io":
            return self.kubectl("apply", "--server-side", "-f", f"{KSERVE}/kserve.yaml")
        if group == "serving.knative.dev":
            files = [f"{KNATIVE}/serving-crds.yaml", "-f", f"{KNATIVE}/serving-core.yaml"]
            return self.kubectl("apply", "--server-side", "-f", *files)
        if group == "monitoring.coreos.com":
            return self.helm("--set", "monitoring.podMonitor.enabled=false,monitoring.prometheusRule.enabled=false")
        if group == "keda.sh":
            helm = f"helm upgrade --install keda kedacore/keda -n keda --create-namespace --kube-context {self.context}"
            restart = self.kubectl("-n", "kserve", "rollout", "restart", "deployment/kserve-controller-manager")
            return f"{helm} && {restart}"
        return self.kubectl("api-resources", f"--api-group={group}")
