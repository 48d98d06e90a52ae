{{/* Refusals: where the weights come from, their cache, and the secrets. */}}

{{- define "mistral.refusals.weights" -}}
{{- $v := .Values -}}
{{- $uri := $v.storage.uri -}}
{{- $image := "[a-z0-9][a-z0-9.-]*(:[0-9]+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+(:[A-Za-z0-9_][A-Za-z0-9._-]*)?(@sha256:[0-9a-f]{64})?" -}}
{{- if and $uri (or $v.server.modelId $v.server.modelDir) }}
- storage.uri and server.modelId or server.modelDir both name weights to serve; empty one of them (storage.uri: "").
{{- end }}
{{- if not (or $uri $v.server.modelId $v.server.modelDir) }}
- No value names the weights to serve: set storage.uri, or server.modelId, or server.modelDir.
{{- end }}
{{- if and $v.server.modelRevision (not $v.server.modelId) }}
- server.modelRevision belongs to server.modelId, which is not set; the revision of storage.uri is its last part (hf://owner/model:revision).
{{- end }}
{{- range $at, $uri := dict "storage.uri" $uri "rollout.standard.canary.storageUri" $v.rollout.standard.canary.storageUri }}
{{- if and (hasPrefix "hf://" $uri) (not (regexMatch "^hf://[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(:[A-Za-z0-9][A-Za-z0-9._-]*)?$" $uri)) }}
- {{ $at }} {{ printf "%q" $uri }} must be hf://owner/model or hf://owner/model:revision.
{{- end }}
{{- if and (hasPrefix "pvc://" $uri) (not (regexMatch "^pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[^/]+)*/?$" $uri)) }}
- {{ $at }} {{ printf "%q" $uri }} must be pvc://claim or pvc://claim/path.
{{- end }}
{{- if and (hasPrefix "oci" $uri) (not (regexMatch (printf "^oci(\\+native|\\+fetch)?://%s$" $image) $uri)) }}
- {{ $at }} {{ printf "%q" $uri }} must name an image after its ://, registry included.
{{- end }}
{{- if and (regexMatch "^(s3|gs|hdfs|webhdfs|modelscope|https?)://" $uri) (not (regexMatch "^[a-z0-9]+://[A-Za-z0-9][^/]*/[^/]" $uri)) }}
- {{ $at }} {{ printf "%q" $uri }} names no file or directory after the host or bucket.
{{- end }}
{{- if regexMatch "/\\.\\.?(/|$)" $uri }}
- {{ $at }} {{ printf "%q" $uri }} must not have . or .. in its path.
{{- end }}
{{- end }}
{{- $ownDownload := $v.server.modelId | default "" }}
{{- range $at, $uri := dict "storage.uri" $uri "rollout.standard.canary.storageUri" $v.rollout.standard.canary.storageUri "server.modelId" $ownDownload }}
{{- if and (regexMatch "^(hf://)?mistralai/" $uri) $v.hfToken.required (not (include "mistral.hfSecretName" $)) }}
- {{ $at }} {{ $uri }} is gated and no token is set: accept its terms on its page, make a Secret (kubectl create secret generic hf-token -n {{ $.Release.Namespace }} --from-literal=HF_TOKEN=...) and set hfToken.secretName, or set hfToken.required to false if a mirror needs no token.
{{- end }}
{{- end }}
{{- with $v.storage.initializer }}
{{- if and .create (eq .name "default") }}
- storage.initializer.name is default, the name of KServe's own ClusterStorageContainer; choose another name, or set storage.initializer.create to false.
{{- end }}
{{- if and (not .create) (not $v.storage.cache.enabled) (or .env .envFrom .uriPrefixes) }}
- storage.initializer.create is false, so another ClusterStorageContainer downloads, and env, envFrom and uriPrefixes have no effect; empty them, or set create to true.
{{- end }}
{{- end }}
{{- end }}

{{- define "mistral.refusals.cache" -}}
{{- $v := .Values -}}
{{- if $v.storage.cache.enabled }}
{{- if not (include "mistral.isDownload" $v.storage.uri) }}
- storage.cache.enabled keeps the download of storage.uri, but storage.uri needs no download; use hf://, s3://, gs:// or https://, or turn the cache off.
{{- end }}
{{- if and (has "ReadWriteOnce" $v.storage.cache.accessModes) (gt (int64 $v.scaling.maxReplicas) 1) }}
- storage.cache.accessModes has ReadWriteOnce, a volume for one node, but scaling.maxReplicas is above 1; use ReadWriteMany, or one replica.
{{- end }}
{{- if $v.serviceAccount.secrets }}
- storage.cache.enabled downloads in a Job, where KServe does not read serviceAccount.secrets; set the keys in storage.initializer.envFrom, or a cloud role in serviceAccount.annotations.
{{- end }}
{{- if $v.rollout.standard.canary.storageUri }}
- rollout.standard.canary.storageUri is another model, and storage.cache holds one model at a time; turn the cache off, or use the same model.
{{- end }}
{{- end }}
{{- end }}

{{- define "mistral.refusals.secrets" -}}
{{- $v := .Values -}}
{{- if and $v.hfToken.secretName $v.hfToken.token }}
- hfToken.secretName and hfToken.token both set the token; set only one of them.
{{- end }}
{{- if and $v.apiKeys.secretName $v.apiKeys.keys }}
- apiKeys.secretName and apiKeys.keys both set the API keys; set only one of them.
{{- end }}
{{- if and $v.server.apiKeyFile (include "mistral.apiKeysSecretName" .) }}
- server.apiKeyFile and apiKeys both set the file of the API keys; set only one of them.
{{- end }}
{{- if and $v.server.maxRequestsPerKey (not (include "mistral.apiKeyFile" .)) }}
- server.maxRequestsPerKey limits the requests of an API key, but the server needs no keys; set apiKeys.secretName.
{{- end }}
{{- if not $v.serviceAccount.create }}
{{- if not $v.serviceAccount.name }}
- serviceAccount.create is false and serviceAccount.name is empty; name the account to use.
{{- end }}
{{- if and (or (include "mistral.hfSecretName" .) $v.serviceAccount.secrets) (include "mistral.downloads" .) }}
- serviceAccount.create is false, so the chart cannot attach download credentials to it; list them in that account's own secrets, leave hfToken and serviceAccount.secrets empty, and set hfToken.required to false.
{{- end }}
{{- end }}
{{- end }}
