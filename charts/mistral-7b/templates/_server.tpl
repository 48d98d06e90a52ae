{{/* The server's container: how the values become flags, environment, probes and mounts. */}}

{{/*
One MISTRAL_<NAME> for each of `server` that differs from the server's own default, in its order. A server refuses a
setting that it does not know: an older image starts with this chart as long as no value is set that is newer than it.
*/}}
{{- define "mistral.serverEnv" -}}
{{- $server := .Values.server -}}
{{- $derived := dict
  "apiKeyFile" (include "mistral.apiKeyFile" .)
  "drainSeconds" (include "mistral.drainSeconds" .)
  "corsOrigins" (join "," $server.corsOrigins) -}}
{{- range splitList "\n" (include "mistral.serverDefaults" . | trim) }}
{{- $name := splitList "=" . | first }}
{{- $default := trimPrefix (printf "%s=" $name) . }}
{{- $value := ternary (get $derived $name) (get $server $name) (hasKey $derived $name) -}}
{{- if kindIs "float64" $value }}{{ $value = int64 $value }}{{ end -}}
{{- if not (or (kindIs "invalid" $value) (eq (toString $value) $default)) }}
- name: MISTRAL_{{ snakecase $name | upper }}
  value: {{ toString $value | quote }}
{{- end }}
{{- end }}
{{- end }}

{{- define "mistral.container" -}}
{{- $knative := eq .Values.inferenceService.mode "Knative" -}}
{{- $ready := dict "path" (printf "/v1/models/%s" .Values.modelName) "port" 8080 -}}
{{- $startupPeriod := int64 .Values.probes.startup.periodSeconds -}}
name: kserve-container
image: {{ include "mistral.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args:
  - --model_name={{ .Values.modelName }}
ports:
  - name: http1
    containerPort: 8080
    protocol: TCP
env:
  {{- with include "mistral.storageUri" . }}
  - name: STORAGE_URI
    value: {{ quote . }}
  {{- end }}
  {{- include "mistral.serverEnv" . | trim | nindent 2 }}
  {{- if .Values.server.modelId }}
  - name: HF_HOME
    value: /mnt/hub
  {{- with include "mistral.hfSecretName" . }}
  - name: HF_TOKEN
    valueFrom:
      secretKeyRef:
        name: {{ . | quote }}
        key: HF_TOKEN
  {{- end }}
  {{- else }}
  # The weights are local, so the server must not contact the hub.
  - name: HF_HUB_OFFLINE
    value: "1"
  {{- end }}
  {{- with .Values.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
resources:
  {{- $resources := deepCopy .Values.resources }}
  {{- if .Values.gpu.count }}
  {{- $gpu := dict .Values.gpu.resourceName (.Values.gpu.count | toString) }}
  {{- $resources = mustMergeOverwrite $resources (dict "requests" $gpu) (dict "limits" (deepCopy $gpu)) }}
  {{- end }}
  {{- toYaml $resources | nindent 2 }}
startupProbe:
  httpGet: {{ toJson $ready }}
  periodSeconds: {{ $startupPeriod }}
  timeoutSeconds: {{ .Values.probes.startup.timeoutSeconds }}
  failureThreshold: {{ div (add (int64 .Values.scaling.progressDeadlineSeconds) $startupPeriod -1) $startupPeriod }}
readinessProbe:
  httpGet: {{ toJson $ready }}
  {{- toYaml .Values.probes.readiness | nindent 2 }}
livenessProbe:
  httpGet: {{ toJson (dict "path" "/v2/health/live" "port" 8080) }}
  {{- toYaml .Values.probes.liveness | nindent 2 }}
{{- if not $knative }}
  # A server that no longer answers has nothing to drain. Knative does not support this field.
  terminationGracePeriodSeconds: 10
lifecycle:
  preStop:
    sleep:
      # Waits until every proxy has removed the pod. Knative waits by itself and refuses a lifecycle.
      seconds: 5
{{- end }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
volumeMounts:
  - name: tmp
    mountPath: /tmp
  - name: shm
    mountPath: /dev/shm
  {{- if .Values.server.modelId }}
  - name: hub
    mountPath: /mnt/hub
  {{- end }}
  {{- if include "mistral.apiKeysSecretName" . }}
  # Mounts the directory, not the file: a subPath mount would never see changed keys.
  - name: api-keys
    mountPath: /etc/mistral
    readOnly: true
  {{- end }}
  {{- $writable := list }}
  {{- range .Values.extraVolumes }}
  {{- if hasKey . "emptyDir" }}{{ $writable = append $writable .name }}{{ end }}
  {{- end }}
  {{- range .Values.extraVolumeMounts }}
  {{- /* Knative wants every mount of a Secret, a ConfigMap or a projection read-only. */}}
  - {{ merge (dict) . (dict "readOnly" (not (has .name $writable))) | toYaml | nindent 4 | trim }}
  {{- end }}
{{- end }}

{{- define "mistral.volumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ include "mistral.quantityText" .Values.tmpSize | quote }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ include "mistral.quantityText" .Values.shmSize | quote }}
{{- if .Values.server.modelId }}
- name: hub
  emptyDir:
    sizeLimit: {{ include "mistral.quantityText" .Values.hubCacheSize | quote }}
{{- end }}
{{- with include "mistral.apiKeysSecretName" . }}
- name: api-keys
  secret:
    secretName: {{ . | quote }}
    items:
      - key: api-keys
        path: api-keys
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}
