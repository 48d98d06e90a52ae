{{/* The download, the same in the pod (ClusterStorageContainer) and onto the cache volume (Job). */}}
{{- define "mistral.initializer" -}}
image: {{ .Values.storage.initializer.image | quote }}
env:
  {{- with .Values.storage.initializer.ignorePatterns }}
  - name: STORAGE_IGNORE_PATTERNS
    value: {{ toJson . | quote }}
  {{- end }}
resources:
  {{- toYaml .Values.storage.initializer.resources | nindent 2 }}
securityContext:
  allowPrivilegeEscalation: false
  runAsNonRoot: true
  runAsUser: 1000
  capabilities:
    drop: [ALL]
  seccompProfile:
    type: RuntimeDefault
{{- end }}
