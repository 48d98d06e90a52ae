{{/* What the predictor and, in Standard mode, its canary have in common: the pod and how KServe treats it. */}}

{{- define "mistral.predictor" -}}
{{- $knative := eq .Values.inferenceService.mode "Knative" -}}
{{- with .Values.podLabels -}}
labels:
  {{- toYaml . | nindent 2 }}
{{ end -}}
{{- if or $knative .Values.podAnnotations -}}
annotations:
  {{- if $knative }}
  # Without it, queue-proxy closes the request body when the response begins, and cuts one stream in a thousand.
  features.knative.dev/http-full-duplex: Enabled
  autoscaling.knative.dev/window: {{ int64 .Values.scaling.windowSeconds }}s
  autoscaling.knative.dev/target-utilization-percentage: "100"
  autoscaling.knative.dev/target-burst-capacity: {{ int64 .Values.scaling.burstCapacity | quote }}
  autoscaling.knative.dev/scale-down-delay: {{ int64 .Values.scaling.scaleDownDelaySeconds }}s
  autoscaling.knative.dev/scale-to-zero-pod-retention-period: {{ int64 .Values.scaling.podRetentionSeconds }}s
  serving.knative.dev/progress-deadline: {{ int64 .Values.scaling.progressDeadlineSeconds }}s
  {{- end }}
  {{- with .Values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{ end -}}
serviceAccountName: {{ include "mistral.serviceAccountName" . | quote }}
automountServiceAccountToken: false
# Otherwise, a Service called mistral-7b would add MISTRAL_7B_PORT and similar variables to the server's settings.
enableServiceLinks: false
{{- if include "mistral.downloads" . }}
{{- with include "mistral.storageContainerName" . }}
storageContainerName: {{ . | quote }}
{{- end }}
{{- end }}
{{- if not $knative }}
deploymentStrategy:
  type: RollingUpdate
  rollingUpdate:
    # The old replica ends before the new one starts: a rollout needs no spare GPU, but a single replica has downtime.
    maxSurge: 0
    maxUnavailable: 1
terminationGracePeriodSeconds: {{ add (include "mistral.drainSeconds" . | int64) 15 }}
{{- end }}
timeout: {{ include "mistral.timeout" . }}
{{- with .Values.logger }}
{{- if .enabled }}
logger:
  mode: {{ .mode }}
  url: {{ .url | quote }}
  {{- with .metadataHeaders }}
  metadataHeaders:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- end }}
{{- with include "mistral.imagePullSecrets" . }}
imagePullSecrets:
  {{- . | nindent 2 }}
{{- end }}
{{- with include "mistral.nodeSelector" . }}
nodeSelector:
  {{- . | nindent 2 }}
{{- end }}
{{- with include "mistral.tolerations" . }}
tolerations:
  {{- . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with include "mistral.topologySpreadConstraints" . }}
topologySpreadConstraints:
  {{- . | nindent 2 }}
{{- end }}
{{- with .Values.hostAliases }}
hostAliases:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .Values.podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
containers:
  - {{ include "mistral.container" . | nindent 4 | trim }}
volumes:
  {{- include "mistral.volumes" . | nindent 2 }}
{{- end }}

{{/* The values as the canary of Standard mode has them: another image, another model, everything else the same. */}}
{{- define "mistral.canaryContext" -}}
{{- $values := deepCopy .Values -}}
{{- $canary := .Values.rollout.standard.canary -}}
{{- if or $canary.image.repository $canary.image.tag $canary.image.digest -}}
{{- $image := merge (dict) $canary.image (pick .Values.image "repository" "pullPolicy" "pullSecrets") -}}
{{- $_ := set $values "image" $image -}}
{{- end -}}
{{- with $canary.storageUri -}}
{{- $_ := set $values.storage "uri" . -}}
{{- end -}}
{{- $chart := dict "Name" .Chart.Name "Version" .Chart.Version "AppVersion" .Chart.AppVersion -}}
{{- dict "Values" $values "Release" .Release "Chart" $chart | toJson -}}
{{- end }}
