{{/* Refusals: scaling, time and rollout, in Knative mode and in Standard mode. */}}

{{- define "mistral.refusals.scaling" -}}
{{- $v := .Values -}}
{{- if gt (int64 $v.scaling.minReplicas) (int64 $v.scaling.maxReplicas) }}
- scaling.minReplicas {{ int64 $v.scaling.minReplicas }} is above scaling.maxReplicas {{ int64 $v.scaling.maxReplicas }}.
{{- end }}
{{- if and $v.podDisruptionBudget.enabled (lt (int64 $v.scaling.minReplicas) 2) }}
- podDisruptionBudget.enabled has no effect with fewer than two replicas; set scaling.minReplicas to 2 or more, or turn it off.
{{- end }}
{{- if and $v.podDisruptionBudget.enabled (ge (int64 $v.podDisruptionBudget.maxUnavailable) (int64 $v.scaling.minReplicas)) }}
- podDisruptionBudget.maxUnavailable {{ int64 $v.podDisruptionBudget.maxUnavailable }} lets a drain evict all of the {{ int64 $v.scaling.minReplicas }} replicas of scaling.minReplicas; lower it.
{{- end }}
{{- end }}

{{- define "mistral.refusals.knative" -}}
{{- $v := .Values -}}
{{- $timeout := include "mistral.timeout" . | int64 -}}
{{- $drain := include "mistral.drainSeconds" . | int64 -}}
{{- $target := include "mistral.scaleTarget" . | int64 -}}
{{- $concurrency := include "mistral.containerConcurrency" . | int64 -}}
{{- if eq $v.inferenceService.mode "Knative" }}
{{- if not (has $v.scaling.metric (list "concurrency" "rps")) }}
- scaling.metric {{ $v.scaling.metric }} is for Standard mode with HPA; Knative scales on concurrency or rps.
{{- end }}
{{- if and (eq $v.scaling.metric "rps") (kindIs "invalid" $v.scaling.target) }}
- scaling.metric is rps and scaling.target is not set; set it to the requests per second of one replica.
{{- end }}
{{- if and (eq $v.scaling.metric "concurrency") (gt $target $concurrency) }}
- scaling.target {{ $target }} is above server.maxBatchSize + server.maxQueueSize = {{ $concurrency }}, the most requests that a replica gets, so Knative would never scale out; lower it.
{{- end }}
{{- if gt $concurrency 1000 }}
- server.maxBatchSize + server.maxQueueSize = {{ $concurrency }} is above 1000, the most that Knative lets into one replica (container-concurrency-max-limit).
{{- end }}
{{- if gt $timeout (int64 $v.cluster.maxRevisionTimeoutSeconds) }}
- server.requestTimeoutSeconds + scaling.coldStartSeconds = {{ $timeout }} is above cluster.maxRevisionTimeoutSeconds {{ int64 $v.cluster.maxRevisionTimeoutSeconds }}: Knative would refuse the revision. Lower one, or raise max-revision-timeout-seconds (kubectl apply --server-side -f manifests/cluster/config-defaults.yaml) and set cluster.maxRevisionTimeoutSeconds to the same value.
{{- end }}
{{- if gt (add $drain 35) $timeout }}
- server.drainSeconds {{ $drain }}, the 30 s that Knative waits before SIGTERM and 5 s for the last bytes are more than the {{ $timeout }} s (server.requestTimeoutSeconds + scaling.coldStartSeconds) after which Knative kills the pod.
{{- end }}
{{- range include "mistral.neededKnativeFlags" . | trim | splitList "\n" | compact }}
{{- if not (has . $v.cluster.knativeFlags) }}
- The pod needs the Knative flag {{ . }}, which cluster.knativeFlags does not list. Enable it (kubectl patch configmap config-features -n knative-serving --type merge -p '{"data":{"{{ . }}":"enabled"}}') and list it.
{{- end }}
{{- end }}
{{- if or $v.rollout.standard.predictorName $v.rollout.standard.canary.name }}
- rollout.standard is for Standard mode; with Knative use rollout.canaryTrafficPercent.
{{- end }}
{{- end }}
{{- end }}

{{- define "mistral.refusals.standard" -}}
{{- $v := .Values -}}
{{- $target := include "mistral.scaleTarget" . | int64 -}}
{{- if ne $v.inferenceService.mode "Knative" }}
{{- if eq (int64 $v.scaling.minReplicas) 0 }}
- scaling.minReplicas is 0, but Standard mode cannot scale to zero: nothing holds the request that would start a replica. Use at least 1, or inferenceService.mode Knative.
{{- end }}
{{- if not (kindIs "invalid" $v.rollout.canaryTrafficPercent) }}
- rollout.canaryTrafficPercent splits traffic between Knative revisions, which Standard mode does not have. Use rollout.standard.canary.
{{- end }}
{{- with $v.rollout.standard.canary }}
{{- if and .name (eq .name $v.rollout.standard.predictorName) }}
- rollout.standard.canary.name and rollout.standard.predictorName are both {{ .name }}; KServe needs different names.
{{- end }}
{{- if and .name (gt (int64 .minReplicas) (int64 $v.scaling.minReplicas)) }}
- rollout.standard.canary.minReplicas {{ int64 .minReplicas }} is above scaling.minReplicas {{ int64 $v.scaling.minReplicas }}, which KServe refuses.
{{- end }}
{{- if and .name (not (or .storageUri .image.repository .image.tag .image.digest)) }}
- rollout.standard.canary has neither another image nor another storageUri, so it would equal the stable predictor; set one.
{{- end }}
{{- if and .name (not $v.storage.uri) }}
- rollout.standard.canary needs storage.uri: KServe accepts a canary only for a predictor with a storage URI.
{{- end }}
{{- end }}
{{- if eq $v.scaling.standard.autoscaler "hpa" }}
{{- if ne $v.scaling.metric "cpu" }}
- scaling.metric {{ $v.scaling.metric }} is not available to an HPA; use cpu, or scaling.standard.autoscaler keda.
{{- end }}
{{- if kindIs "invalid" $v.scaling.target }}
- scaling.standard.autoscaler is hpa and scaling.target is not set; set the percentage.
{{- else if gt $target 100 }}
- scaling.target {{ $target }} is a percentage for an HPA: 1 to 100.
{{- end }}
{{- end }}
{{- if eq $v.scaling.standard.autoscaler "keda" }}
{{- if ne $v.scaling.metric "concurrency" }}
- scaling.metric {{ $v.scaling.metric }} is not available with KEDA; use concurrency, or scaling.standard.autoscaler hpa.
{{- end }}
{{- if not $v.scaling.standard.prometheusAddress }}
- scaling.standard.autoscaler is keda, which reads the queue from Prometheus; set scaling.standard.prometheusAddress.
{{- end }}
{{- if not $v.monitoring.podMonitor.enabled }}
- scaling.standard.autoscaler is keda, which needs the server's metrics; set monitoring.podMonitor.enabled.
{{- end }}
{{- end }}
{{- if and (eq $v.scaling.standard.autoscaler "none") (ne (int64 $v.scaling.minReplicas) (int64 $v.scaling.maxReplicas)) }}
- scaling.standard.autoscaler is none, so the number of replicas cannot change; set scaling.minReplicas and scaling.maxReplicas to the same number.
{{- end }}
{{- end }}
{{- end }}
