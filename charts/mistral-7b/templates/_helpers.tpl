{{/* Names, labels, image and secrets. */}}

{{- define "mistral.fullname" -}}
{{- /* 40 characters: Knative appends to it and the result must stay a DNS label. */ -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | regexFind "^.*[^-]" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | regexFind "^.*[^-]" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | regexFind "^.*[^-]" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* For ever the same: nothing versioned, since these reach the pods and a change would be a new revision. */}}
{{- define "mistral.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{/* For objects that make no pods. */}}
{{- define "mistral.labels" -}}
{{ include "mistral.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- include "mistral.commonLabels" . }}
{{- end }}

{{- define "mistral.commonLabels" -}}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* How the pods of the InferenceService are found, in both modes: KServe sets it. */}}
{{- define "mistral.podSelector" -}}
serving.kserve.io/inferenceservice: {{ include "mistral.fullname" . }}
{{- end }}

{{/* A digest decides; a tag beside it is for people. */}}
{{- define "mistral.image" -}}
{{- $image := .Values.image -}}
{{- if and $image.digest $image.tag -}}
{{- printf "%s:%s@%s" $image.repository $image.tag $image.digest -}}
{{- else if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default .Chart.AppVersion $image.tag) -}}
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

{{/* The address inside the cluster; in Standard mode KServe puts the predictor's name into it. */}}
{{- define "mistral.internalHost" -}}
{{- printf "%s.%s.svc" (include "mistral.predictorName" .) .Release.Namespace -}}
{{- end }}

{{/* What KServe calls the predictor's Service and, in Standard mode, its Deployment. */}}
{{- define "mistral.predictorName" -}}
{{- list (include "mistral.fullname" .) .Values.rollout.standard.predictorName "predictor" | compact | join "-" -}}
{{- end }}

{{/* The series of this release, as the PodMonitor labels them. */}}
{{- define "mistral.series" -}}
namespace={{ .Release.Namespace | quote }},inferenceservice={{ include "mistral.fullname" . | quote }}
{{- end }}

{{/* Secrets of the service account as a list of names. */}}
{{- define "mistral.serviceAccountSecrets" -}}
{{- range compact (prepend .Values.serviceAccount.secrets (include "mistral.hfSecretName" .)) | uniq }}
- name: {{ . | quote }}
{{- end }}
{{- end }}

{{/* The pods of a Job or a test finish, and a mesh's sidecar would not: labels. */}}
{{- define "mistral.meshOptOutLabels" -}}
sidecar.istio.io/inject: "false"
{{- end }}

{{- define "mistral.meshOptOutAnnotations" -}}
sidecar.istio.io/inject: "false"
linkerd.io/inject: disabled
{{- end }}

{{- define "mistral.imagePullSecrets" -}}
{{- range .Values.image.pullSecrets }}
- name: {{ . | quote }}
{{- end }}
{{- end }}
