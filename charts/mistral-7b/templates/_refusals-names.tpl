{{/* Refusals: names, image, labels and annotations. Each template gives one sentence a line, or nothing. */}}

{{- define "mistral.refusals.names" -}}
{{- $v := .Values -}}
{{- $name := include "mistral.fullname" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) }}
- {{ printf "%q" $name }} cannot be the name of an InferenceService, which must have lower case letters, digits and dashes only and begin with a letter; choose another release name, or set fullnameOverride.
{{- end }}
{{- if has $name (list "true" "false" "null" "yes" "no" "on" "off" "y" "n") }}
- {{ printf "%q" $name }} cannot be a name, because YAML would not read it as text; choose another release name, or set fullnameOverride.
{{- end }}
{{- if ne $v.inferenceService.mode "Knative" }}
{{- range $predictor := uniq (list "" $v.rollout.standard.predictorName $v.rollout.standard.canary.name) }}
{{- $host := printf "%s-%spredictor-%s" $name (empty $predictor | ternary "" (printf "%s-" $predictor)) $.Release.Namespace }}
{{- if gt (len $host) 63 }}
- In Standard mode KServe creates the host name {{ $host }}, which has {{ len $host }} characters, more than the maximum of 63; shorten the namespace or the release name, or set fullnameOverride.
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* A regular expression for an image without its tag: a registry's host where it has a dot, a port or a second part. */}}
{{- define "mistral.repositoryPattern" -}}
([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*(:[1-9][0-9]{0,4})?/)?[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*
{{- end }}

{{- define "mistral.refusals.images" -}}
{{- $v := .Values -}}
{{- $pattern := include "mistral.repositoryPattern" . -}}
{{- if not $v.image.repository }}
- image.repository is empty: build the image (make image), push it, and name it (--set image.repository=REGISTRY/mistral-7b-kserve --set image.digest=sha256:...).
{{- end }}
{{- range $at, $repository := dict "image.repository" $v.image.repository "rollout.standard.canary.image.repository" $v.rollout.standard.canary.image.repository }}
{{- if and $repository (not (regexMatch (printf "^%s$" $pattern) $repository)) }}
- {{ $at }} {{ printf "%q" $repository }} must be registry/path/name in lower case; set the tag and the digest in their own values.
{{- end }}
{{- end }}
{{- if not (regexMatch (printf "^%s(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?(@sha256:[0-9a-f]{64})?$" $pattern) $v.storage.initializer.image) }}
- storage.initializer.image {{ printf "%q" $v.storage.initializer.image }} must be registry/path/name:tag or registry/path/name@sha256:digest.
{{- end }}
{{- end }}

{{- define "mistral.refusals.labels" -}}
{{- $v := .Values -}}
{{- $maps := dict "commonLabels" $v.commonLabels "podLabels" $v.podLabels "inferenceService.labels" $v.inferenceService.labels
  "monitoring.podMonitor.labels" $v.monitoring.podMonitor.labels "monitoring.prometheusRule.labels" $v.monitoring.prometheusRule.labels
  "monitoring.dashboard.labels" $v.monitoring.dashboard.labels -}}
{{- $own := list "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/version" "app.kubernetes.io/managed-by" "app.kubernetes.io/component" "helm.sh/chart" "sidecar.istio.io/inject" -}}
{{- range $at, $labels := merge (dict "nodeSelector" $v.nodeSelector "storage.cache.nodeSelector" $v.storage.cache.nodeSelector) $maps }}
{{- range $key, $value := $labels }}
{{- if not (include "mistral.isLabelKey" $key) }}
- {{ $at }} has the key {{ printf "%q" $key }}; a key is name or domain/name: at most 63 letters, digits, -, _ and ., a letter or digit at both ends.
{{- end }}
{{- if not (regexMatch "^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$" $value) }}
- {{ $at }} sets {{ $key }} to {{ printf "%q" $value }}; a value is at most 63 letters, digits, -, _ and ., a letter or digit at both ends.
{{- end }}
{{- end }}
{{- end }}
{{- range $at, $labels := $maps }}
{{- range $key, $value := $labels }}
{{- $toPods := has $at (list "commonLabels" "podLabels" "inferenceService.labels") }}
{{- if and (has $key $own) (not (and $toPods (ne $at "commonLabels") (eq $key "sidecar.istio.io/inject"))) }}
- {{ $at }} sets {{ $key }}, which the chart sets itself.
{{- else if and $toPods (or (regexMatch "^(internal\\.)?serving\\.(kserve\\.io|knative\\.dev)/" $key) (has $key (list "app" "component"))) }}
- {{ $at }} sets {{ $key }}, which KServe or Knative sets itself.
{{- else if and $toPods (eq $key "networking.knative.dev/visibility") (ne $value "cluster-local") }}
- {{ $at }} sets {{ $key }} to {{ printf "%q" $value }}; Knative accepts only cluster-local.
{{- else if and (ne $at "commonLabels") (hasKey $v.commonLabels $key) }}
- {{ $at }} and commonLabels both set {{ $key }}; set it in one of them.
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "mistral.isLabelKey" -}}
{{- if regexMatch "^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$" . -}}true{{- end -}}
{{- end }}

{{/* Annotations of the InferenceService and of its pods end up on the revision, where Knative reads and checks its own. */}}
{{- define "mistral.refusals.annotations" -}}
{{- $v := .Values -}}
{{- $values := dict
  "serving.kserve.io/deploymentMode" "inferenceService.mode"
  "serving.kserve.io/enable-tag-routing" "rollout.tagRouting"
  "serving.kserve.io/autoscalerClass" "scaling.standard.autoscaler"
  "features.knative.dev/http-full-duplex" "no other value: the chart sets it to keep streams complete"
  "autoscaling.knative.dev/window" "scaling.windowSeconds"
  "autoscaling.knative.dev/target-utilization-percentage" "scaling.target"
  "autoscaling.knative.dev/targetUtilizationPercentage" "scaling.target"
  "autoscaling.knative.dev/target-burst-capacity" "scaling.burstCapacity"
  "autoscaling.knative.dev/targetBurstCapacity" "scaling.burstCapacity"
  "autoscaling.knative.dev/scale-down-delay" "scaling.scaleDownDelaySeconds"
  "autoscaling.knative.dev/scaleDownDelay" "scaling.scaleDownDelaySeconds"
  "autoscaling.knative.dev/scale-to-zero-pod-retention-period" "scaling.podRetentionSeconds"
  "autoscaling.knative.dev/scaleToZeroPodRetentionPeriod" "scaling.podRetentionSeconds"
  "autoscaling.knative.dev/min-scale" "scaling.minReplicas"
  "autoscaling.knative.dev/minScale" "scaling.minReplicas"
  "autoscaling.knative.dev/max-scale" "scaling.maxReplicas"
  "autoscaling.knative.dev/maxScale" "scaling.maxReplicas"
  "autoscaling.knative.dev/metric" "scaling.metric"
  "autoscaling.knative.dev/target" "scaling.target"
  "serving.knative.dev/progress-deadline" "scaling.progressDeadlineSeconds" -}}
{{- $checked := dict
  "autoscaling.knative.dev/initial-scale" (ternary "^[0-9]{1,4}$" "^[1-9][0-9]{0,3}$" $v.cluster.allowZeroInitialScale)
  "autoscaling.knative.dev/activation-scale" "^[1-9][0-9]{0,3}$"
  "autoscaling.knative.dev/panic-window-percentage" "^([1-9][0-9]?|100)(\\.[0-9]+)?$"
  "autoscaling.knative.dev/panic-threshold-percentage" "^(1[1-9][0-9]|[2-9][0-9]{2}|1000)(\\.[0-9]+)?$"
  "serving.knative.dev/rollout-duration" "^([0-9]+h)?([0-9]+m)?([0-9]+s)?$" -}}
{{- range $at, $annotations := dict "inferenceService.annotations" $v.inferenceService.annotations "podAnnotations" $v.podAnnotations "serviceAccount.annotations" $v.serviceAccount.annotations "monitoring.dashboard.annotations" $v.monitoring.dashboard.annotations }}
{{- range $key, $value := $annotations }}
{{- if not (include "mistral.isLabelKey" $key) }}
- {{ $at }} has the key {{ printf "%q" $key }}; a key is name or domain/name: at most 63 letters, digits, -, _ and ., a letter or digit at both ends.
{{- end }}
{{- end }}
{{- end }}
{{- range $at, $annotations := dict "inferenceService.annotations" $v.inferenceService.annotations "podAnnotations" $v.podAnnotations }}
{{- range $key, $value := $annotations }}
{{- if hasKey $values $key }}
- {{ $at }} sets {{ $key }}; set {{ get $values $key }} instead.
{{- else if and (hasKey $checked $key) (or (eq $key "serving.knative.dev/rollout-duration" | ternary (ne $at "inferenceService.annotations") (ne $at "podAnnotations"))) }}
- {{ $at }} sets {{ $key }}, which Knative takes from {{ eq $at "podAnnotations" | ternary "inferenceService.annotations" "podAnnotations" }} only.
{{- else if hasKey $checked $key }}
{{- if or (not (regexMatch (get $checked $key) $value)) (empty $value) }}
- {{ $at }} sets {{ $key }} to {{ printf "%q" $value }}, which Knative refuses{{ if hasSuffix "/initial-scale" $key }} (0 needs allow-zero-initial-scale in config-autoscaler and cluster.allowZeroInitialScale here){{ end }}.
{{- end }}
{{- else if regexMatch "^(autoscaling|serving|features)\\.knative\\.dev/|^internal\\.serving\\.kserve\\.io/" $key }}
- {{ $at }} sets {{ $key }}, which only Knative or KServe may set.
{{- else if and (hasPrefix "queue.sidecar.serving.knative.dev/" $key) (not (regexMatch "^[0-9]+(\\.[0-9]+)?(m|k|M|G|Ki|Mi|Gi)?$" $value)) }}
- {{ $at }} sets {{ $key }} to {{ printf "%q" $value }}, which is not a quantity.
{{- end }}
{{- end }}
{{- end }}
{{- end }}
