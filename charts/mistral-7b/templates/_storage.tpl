{{/* Where the weights come from, and how they get into the pod or onto the cache volume. */}}

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

{{/* "true" when a ClusterStorageContainer is what fetches a uri: a volume is mounted, and KServe pulls all kinds of oci
with its own settings, oci+fetch:// included, though that one runs the storage initializer too. */}}
{{- define "mistral.isDownload" -}}
{{- if and . (not (regexMatch "^(pvc|oci)" .)) -}}true{{- end -}}
{{- end }}

{{/* "true" when this release's pods download: not when the cache holds the weights. */}}
{{- define "mistral.downloads" -}}
{{- include "mistral.isDownload" (include "mistral.storageUri" .) -}}
{{- end }}

{{/* "true" when the pod needs the network for its weights, whichever part of KServe fetches them. */}}
{{- define "mistral.fetchesOverNetwork" -}}
{{- if or (include "mistral.downloads" .) (hasPrefix "oci+fetch://" .Values.storage.uri) .Values.server.modelId -}}true{{- end -}}
{{- end }}

{{/* What the addresses of all revisions of a model begin with: hf://owner/model of hf://owner/model:commit, the directory
s3://bucket/models/ of s3://bucket/models/v2. */}}
{{- define "mistral.uriPrefix" -}}
{{- if regexMatch "^(hf|modelscope)://" . -}}
{{- regexReplaceAll ":[^:/]*$" . "" -}}
{{- else -}}
{{- regexReplaceAll "^([a-z0-9]+://[^/]+/.+/)[^/]+/?$" . "${1}" -}}
{{- end -}}
{{- end }}

{{/* The addresses that the ClusterStorageContainer accepts, one a line: those of this revision, of the canary, and those
that older revisions of the InferenceService may still start with. */}}
{{- define "mistral.uriPrefixes" -}}
{{- range compact (list .Values.storage.uri .Values.rollout.standard.canary.storageUri) -}}
{{- if include "mistral.isDownload" . }}
{{ include "mistral.uriPrefix" . }}
{{- end }}
{{- end }}
{{- range .Values.storage.initializer.uriPrefixes }}
{{ . }}
{{- end }}
{{- end }}

{{/* The name ends in a hash of the accepted addresses. Another model brings a ClusterStorageContainer of its own, and the
pods of the revision before still start with theirs; one that an uninstalled release left behind is never taken for it. */}}
{{- define "mistral.storageContainerName" -}}
{{- if .Values.storage.initializer.name -}}
{{- .Values.storage.initializer.name -}}
{{- else if .Values.storage.initializer.create -}}
{{- $prefixes := include "mistral.uriPrefixes" . | trim | splitList "\n" | compact | uniq | join "\n" -}}
{{- printf "%s-%s-%s" .Release.Namespace (include "mistral.fullname" .) ($prefixes | sha256sum | trunc 8) -}}
{{- end -}}
{{- end }}

{{/* The download, the same in the pod (ClusterStorageContainer) and onto the cache volume (Job); .env is added to it. */}}
{{- define "mistral.initializer" -}}
{{- $initializer := .Values.storage.initializer -}}
{{- $env := $initializer.env -}}
{{- with $initializer.ignorePatterns -}}
{{- $env = prepend $env (dict "name" "STORAGE_IGNORE_PATTERNS" "value" (toJson .)) -}}
{{- end -}}
image: {{ $initializer.image | quote }}
{{- with $initializer.envFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
resources:
  {{- toYaml $initializer.resources | nindent 2 }}
securityContext:
  allowPrivilegeEscalation: false
  runAsNonRoot: true
  runAsUser: 1000
  capabilities:
    drop: [ALL]
  seccompProfile:
    type: RuntimeDefault
{{- with concat $env (.extraEnv | default list) }}
env:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
