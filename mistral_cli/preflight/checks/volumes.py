"""Checks the volumes: the claim exists, or a StorageClass can create its volume with its access mode."""

from __future__ import annotations

from collections.abc import Iterable

from mistral_cli.objects import Object, dig
from mistral_cli.preflight.checks.finding import Finding, missing, ok, unknown
from mistral_cli.preflight.observed import Answer, Observed
from mistral_cli.preflight.release.manifests import Release
from mistral_cli.preflight.target import Target

DEFAULT = "storageclass.kubernetes.io/is-default-class"
MANY_NODES = frozenset({"ReadWriteMany", "ReadOnlyMany"})
ONE_NODE = frozenset(
    {
        "ebs.csi.aws.com", "kubernetes.io/aws-ebs", "disk.csi.azure.com", "pd.csi.storage.gke.io",
        "kubernetes.io/gce-pd", "rancher.io/local-path", "kubernetes.io/no-provisioner", "cinder.csi.openstack.org",
    }
)  # fmt: skip
"""Provisioners of disks, which one node at a time can write to."""
SHARED = frozenset(
    {
        "efs.csi.aws.com", "fsx.csi.aws.com", "file.csi.azure.com", "filestore.csi.storage.gke.io", "nfs.csi.k8s.io",
        "cephfs.csi.ceph.com", "rook-ceph.cephfs.csi.ceph.com", "driver.longhorn.io",
    }
)  # fmt: skip


def check(release: Release, observed: Observed, target: Target) -> Iterable[Finding]:
    """Yield a finding for each claim."""
    for name in release.claims():
        answer = observed.claims.get(name, Answer())
        created = release.created("PersistentVolumeClaim", name)
        title = f"Volume {name}"
        if answer.unknown:
            yield unknown(title, answer.unknown, target.rights())
        elif answer.value is not None:
            yield _existing(title, answer.value, target)
        elif created is None:
            message = f"There is no PersistentVolumeClaim {name}, and the release creates none."
            yield missing(title, message, target.helm("--set", "storage.cache.enabled=true"))
        else:
            yield _new(title, created, observed, target)


def _existing(title: str, claim: Object, target: Target) -> Finding:
    phase = str(dig(claim, "status", "phase"))
    if phase == "Lost":
        name = str(claim["metadata"]["name"])
        return missing(title, "Its volume is lost.", target.namespaced("delete", "persistentvolumeclaim", name))
    return ok(title, f"{phase}, {', '.join(dig(claim, 'spec', 'accessModes') or ())}")


def _new(title: str, claim: Object, observed: Observed, target: Target) -> Finding:
    if observed.storage_classes.unknown:
        return unknown(title, observed.storage_classes.unknown, target.cluster_rights())
    classes = observed.storage_classes.value or ()
    wanted = dig(claim, "spec", "storageClassName")
    modes = ", ".join(dig(claim, "spec", "accessModes") or ())
    choice = [c for c in classes if (c["metadata"]["name"] == wanted if wanted else _is_default(c))]
    names = ", ".join(str(c["metadata"]["name"]) for c in classes) or "none"
    shared = [c for c in classes if c.get("provisioner") in SHARED]
    suggestion = str(shared[0]["metadata"]["name"]) if shared else "CLASS"
    if wanted == "":
        return unknown(title, "The claim needs an existing volume.", target.kubectl("get", "persistentvolumes"))
    if not choice:
        message = f"There is no StorageClass {wanted}" if wanted else "There is no default StorageClass"
        command = target.helm("--set", f"storage.cache.storageClassName={suggestion}")
        return missing(title, f"{message} (there: {names}): the claim would stay Pending.", command)
    name, provisioner = str(choice[0]["metadata"]["name"]), str(choice[0].get("provisioner"))
    if not MANY_NODES & set(dig(claim, "spec", "accessModes") or ()) or provisioner in SHARED:
        return ok(title, f"StorageClass {name} ({provisioner}), {modes}")
    if provisioner in ONE_NODE:
        message = f"StorageClass {name} ({provisioner}) creates disks for one node, but the claim needs {modes}."
        one = "storage.cache.accessModes={ReadWriteOnce}"
        return missing(
            title, message, target.helm("--set", f"storage.cache.storageClassName={suggestion}" if shared else one)
        )
    message = f"StorageClass {name} ({provisioner}) does not state whether it supports {modes}."
    return unknown(title, message, target.kubectl("describe", "storageclass", name))


def _is_default(storage_class: Object) -> bool:
    return (storage_class["metadata"].get("annotations") or {}).get(DEFAULT) == "true"
