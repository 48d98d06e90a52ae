{{/* Names, labels, and every figure that more than one object uses. */}}

{{- define "mistral.fullname" -}}
{{- /* 40 characters: Knative appends to it and the result must stay a DNS label. */ -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* For ever the same: nothing versioned, since these reach the pods and a change would be a new revision. */}}
{{- define "mistral.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* For objects that make no pods. */}}
{{- define "mistral.labels" -}}
{{ include "mistral.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* How the pods of the InferenceService are found, in both modes: KServe sets it. */}}
{{- define "mistral.podSelector" -}}
serving.kserve.io/inferenceservice: {{ include "mistral.fullname" . }}
{{- end }}

{{- define "mistral.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end }}

{{- define "mistral.serviceAccountName" -}}
{{- default (include "mistral.fullname" .) .Values.serviceAccount.name -}}
{{- end }}

{{- define "mistral.hfSecretName" -}}
{{- if .Values.hfToken.token -}}
{{- printf "%s-hf-token" (include "mistral.fullname" .) -}}
{{- else -}}
{{- .Values.hfToken.secretName -}}
{{- end -}}
{{- end }}

{{- define "mistral.apiKeysSecretName" -}}
{{- if .Values.apiKeys.keys -}}
{{- printf "%s-api-keys" (include "mistral.fullname" .) -}}
{{- else -}}
{{- .Values.apiKeys.secretName -}}
{{- end -}}
{{- end }}

{{- define "mistral.apiKeyFile" -}}
{{- if include "mistral.apiKeysSecretName" . -}}/etc/mistral/api-keys{{- else -}}{{ default "" .Values.server.apiKeyFile }}{{- end -}}
{{- end }}

{{/* The cached weights have their own directory for each uri: a new revision of the model never meets the old files. */}}
{{- define "mistral.cacheDirectory" -}}
{{- .Values.storage.uri | sha256sum | trunc 12 -}}
{{- end }}

{{- define "mistral.cacheClaim" -}}
{{- printf "%s-weights" (include "mistral.fullname" .) -}}
{{- end }}

{{/* What KServe mounts at /mnt/models: the volume that the Job fills, or the place itself. */}}
{{- define "mistral.storageUri" -}}
{{- if .Values.storage.cache.enabled -}}
{{- printf "pvc://%s/%s" (include "mistral.cacheClaim" .) (include "mistral.cacheDirectory" .) -}}
{{- else -}}
{{- .Values.storage.uri -}}
{{- end -}}
{{- end }}

{{/* "true" when KServe's storage initializer downloads in the pod: not from a volume, not from an image. */}}
{{- define "mistral.downloads" -}}
{{- if and .Values.storage.uri (not (regexMatch "^(pvc|oci)" (include "mistral.storageUri" .))) -}}true{{- end -}}
{{- end }}

{{- define "mistral.storageContainerName" -}}
{{- if .Values.storage.initializer.name -}}
{{- .Values.storage.initializer.name -}}
{{- else if .Values.storage.initializer.create -}}
{{- printf "%s-%s" .Release.Namespace (include "mistral.fullname" .) -}}
{{- end -}}
{{- end }}

{{/* Knative's cut, and KServe's: the server's own limit and the time a request may wait for a replica. */}}
{{- define "mistral.timeout" -}}
{{- add (int64 .Values.server.requestTimeoutSeconds) (int64 .Values.scaling.coldStartSeconds) -}}
{{- end }}

{{- define "mistral.drainSeconds" -}}
{{- if kindIs "invalid" .Values.server.drainSeconds -}}
{{- int64 .Values.server.requestTimeoutSeconds -}}
{{- else -}}
{{- int64 .Values.server.drainSeconds -}}
{{- end -}}
{{- end }}

{{/* As many requests as the server has places for: running and waiting. */}}
{{- define "mistral.containerConcurrency" -}}
{{- add (int64 .Values.server.maxBatchSize) (int64 .Values.server.maxQueueSize) -}}
{{- end }}

{{- define "mistral.scaleTarget" -}}
{{- if kindIs "invalid" .Values.scaling.target -}}
{{- int64 .Values.server.maxBatchSize -}}
{{- else -}}
{{- int64 .Values.scaling.target -}}
{{- end -}}
{{- end }}

{{- define "mistral.nodeSelector" -}}
{{- $presets := dict
  "gfd" (dict "nvidia.com/gpu.product" "NVIDIA-A10G")
  "eks" (dict "node.kubernetes.io/instance-type" "g5.2xlarge")
  "karpenter" (dict "karpenter.k8s.aws/instance-gpu-name" "a10g")
  "eks-auto" (dict "eks.amazonaws.com/instance-gpu-name" "a10g")
  "none" (dict) -}}
{{- $selector := merge (deepCopy .Values.nodeSelector) (get $presets .Values.gpu.preset) -}}
{{- with $selector }}{{ toYaml . }}{{ end -}}
{{- end }}

{{- define "mistral.tolerations" -}}
{{- $tolerations := .Values.tolerations -}}
{{- if .Values.gpu.count -}}
{{- $tolerations = prepend $tolerations (dict "key" "nvidia.com/gpu" "operator" "Exists" "effect" "NoSchedule") -}}
{{- end -}}
{{- with $tolerations }}{{ toYaml . }}{{ end -}}
{{- end }}

{{/* The Knative flags without which Knative refuses this pod, one a line. */}}
{{- define "mistral.neededKnativeFlags" -}}
{{- if include "mistral.nodeSelector" . }}
kubernetes.podspec-nodeselector
{{- end }}
{{- if include "mistral.tolerations" . }}
kubernetes.podspec-tolerations
{{- end }}
{{- if .Values.affinity }}
kubernetes.podspec-affinity
{{- end }}
{{- if .Values.runtimeClassName }}
kubernetes.podspec-runtimeclassname
{{- end }}
{{- if .Values.priorityClassName }}
kubernetes.podspec-priorityclassname
{{- end }}
{{- if .Values.topologySpreadConstraints }}
kubernetes.podspec-topologyspreadconstraints
{{- end }}
{{- if .Values.podSecurityContext }}
kubernetes.podspec-securitycontext
{{- end }}
{{- end }}

{{/* The address inside the cluster. */}}
{{- define "mistral.internalHost" -}}
{{- printf "%s-predictor.%s.svc" (include "mistral.fullname" .) .Release.Namespace -}}
{{- end }}

{{/* The series of this release, as the PodMonitor labels them. */}}
{{- define "mistral.series" -}}
namespace={{ .Release.Namespace | quote }},inferenceservice={{ include "mistral.fullname" . | quote }}
{{- end }}

{{/* Secrets of the service account as a list of names. */}}
{{- define "mistral.serviceAccountSecrets" -}}
{{- range compact (prepend .Values.serviceAccount.secrets (include "mistral.hfSecretName" .)) }}
- name: {{ . }}
{{- end }}
{{- end }}

{{/* A Kubernetes quantity as a number, so that two of them can be compared: "500m" is 0.5, "16Gi" is 17179869184. */}}
{{- define "mistral.quantity" -}}
{{- $text := toString . -}}
{{- $number := regexFind "^[0-9.]+" $text -}}
{{- $factors := dict "" 1 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15
  "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 -}}
{{- printf "%f" (mulf $number (get $factors (trimPrefix $number $text))) -}}
{{- end }}
