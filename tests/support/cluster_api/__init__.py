"""A Kubernetes API server on a loopback socket, with the rules of KServe and Knative that rollouts depend on.

`api` imitates an API server; `knative` and `standard` imitate the controllers. The rules are those of
kserve v0.20 (`ksvc_reconciler.go`, `inference_service_status.go`, `httproute_reconciler.go`) and knative/serving
v0.48 (`pkg/reconciler/configuration`, `.../route/traffic`), and the observed behaviour of a real cluster.
"""
