"""A Kubernetes API server on a loopback socket, with the rules of KServe and Knative that rollouts depend on.

`api` behaves as an API server does; `knative` and `standard` are the controllers. The rules are those of
kserve v0.20 (`ksvc_reconciler.go`, `inference_service_status.go`, `httproute_reconciler.go`) and knative/serving
v0.48 (`pkg/reconciler/configuration`, `.../route/traffic`), and what a real cluster was seen to do.
"""
