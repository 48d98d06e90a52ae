{{/* Refusals: the server's pod. */}}

{{- define "mistral.refusals.env" -}}
{{- $v := .Values -}}
{{- $chart := dict "STORAGE_URI" "storage.uri" "HF_HUB_OFFLINE" "storage.uri or server.modelId" -}}
{{- if $v.server.modelId }}
{{- $chart = dict "STORAGE_URI" "storage.uri" "HF_HOME" "hubCacheSize" "HF_TOKEN" "hfToken" }}
{{- end }}
{{- $seen := list }}
{{- range $v.env }}
{{- if has .name $seen }}
- env sets {{ .name }} twice.
{{- end }}
{{- $seen = append $seen .name }}
{{- if hasPrefix "MISTRAL_" .name }}
- env sets {{ .name }}; set the value server.{{ .name | trimPrefix "MISTRAL_" | lower | camelcase | untitle }}.
{{- end }}
{{- if hasKey $chart .name }}
- env sets {{ .name }}, which the chart sets from {{ get $chart .name }}.
{{- end }}
{{- if eq .name "PYTHONPATH" }}
- env sets PYTHONPATH, which KServe refuses in an InferenceService.
{{- end }}
{{- if and (eq .name "PROTOCOL") (not (has (.value | default "") (list "v1" "v2"))) }}
- env sets PROTOCOL to something else than v1 or v2, which KServe refuses.
{{- end }}
{{- if or (has .name (list "PORT" "INFERENCE_SERVICE_NAME")) (hasPrefix "K_" .name) }}
- env sets {{ .name }}, which only Knative or KServe may set.
{{- end }}
{{- end }}
{{- $seen = list "STORAGE_IGNORE_PATTERNS" }}
{{- if include "mistral.hfSecretName" . }}
{{- $seen = append $seen "HF_TOKEN" }}
{{- end }}
{{- range $v.storage.initializer.env }}
{{- if has .name $seen }}
- storage.initializer.env sets {{ .name }} twice, or beside the value that sets it (ignorePatterns, hfToken).
{{- end }}
{{- $seen = append $seen .name }}
{{- end }}
{{- end }}

{{/* Sizes are bytes and cpu is CPUs: more than zero, few enough digits to be a number for Kubernetes. */}}
{{- define "mistral.refusals.quantities" -}}
{{- $v := .Values -}}
{{- $sizes := dict "shmSize" $v.shmSize "tmpSize" $v.tmpSize "hubCacheSize" $v.hubCacheSize "storage.cache.size" $v.storage.cache.size "relay.storage.size" $v.relay.storage.size -}}
{{- range $at, $resources := dict "resources" $v.resources "storage.initializer.resources" $v.storage.initializer.resources "relay.resources" $v.relay.resources }}
{{- range $half, $quantities := pick $resources "requests" "limits" }}
{{- range $name, $quantity := $quantities }}
{{- if ne $name "cpu" }}
{{- $_ := set $sizes (printf "%s.%s.%s" $at $half $name) $quantity }}
{{- else if not (regexMatch "^([0-9]{1,7}m|[0-9]{1,4}(\\.[0-9]{1,3})?)$" (include "mistral.quantityText" $quantity)) }}
- {{ $at }}.{{ $half }}.cpu {{ $quantity }} must be a number of CPUs or of thousandths of a CPU, such as 4, 0.5 or 500m.
{{- else if le (include "mistral.quantity" $quantity | float64) 0.0 }}
- {{ $at }}.{{ $half }}.cpu {{ $quantity }} must be more than zero.
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- range $at, $size := $sizes }}
{{- if not (regexMatch "^([0-9]{1,15}(\\.[0-9]{1,3})?(k|Ki)?|[0-9]{1,9}(\\.[0-9]{1,3})?(M|Mi)|[0-9]{1,6}(\\.[0-9]{1,3})?(G|Gi)|[0-9]{1,3}(\\.[0-9]{1,3})?(T|Ti))$" (include "mistral.quantityText" $size)) }}
- {{ $at }} {{ $size }} must be a size such as 512Mi, 24Gi or 1.5Ti, at most 999Ti.
{{- else if le (include "mistral.quantity" $size | float64) 0.0 }}
- {{ $at }} {{ $size }} must be more than zero.
{{- end }}
{{- end }}
{{- end }}

{{/* KServe adds cpu 1 and memory 2Gi (1Gi to the download) to every half that leaves one out. */}}
{{- define "mistral.refusals.resources" -}}
{{- $v := .Values -}}
{{- range $at, $resources := dict "resources" $v.resources "storage.initializer.resources" $v.storage.initializer.resources }}
{{- $requests := $resources.requests | default dict }}
{{- $limits := $resources.limits | default dict }}
{{- range $name := list "cpu" "memory" }}
{{- range $half, $quantities := dict "requests" $requests "limits" $limits }}
{{- if not (hasKey $quantities $name) }}
- {{ $at }}.{{ $half }}.{{ $name }} is missing: KServe would add its own default (cpu 1, memory 2Gi), and a request above that limit creates no pod; set it.
{{- end }}
{{- end }}
{{- end }}
{{- range $name, $request := $requests }}
{{- if hasKey $limits $name }}
{{- $limit := get $limits $name }}
{{- if gt (include "mistral.quantity" $request | float64) (include "mistral.quantity" $limit | float64) }}
- {{ $at }}.requests.{{ $name }} {{ $request }} is above {{ $at }}.limits.{{ $name }} {{ $limit }}: Kubernetes would refuse the pod.
{{- end }}
{{- end }}
{{- end }}
{{- if and (hasKey $limits "memory") (lt (include "mistral.quantity" $limits.memory | float64) 134217728.0) }}
- {{ $at }}.limits.memory {{ $limits.memory }} is less than 128Mi, too little to start; is its unit missing?
{{- end }}
{{- end }}
{{- end }}

{{- define "mistral.refusals.placement" -}}
{{- $v := .Values -}}
{{- if and (eq (int64 $v.gpu.count) 0) (ne $v.gpu.preset "none") }}
- gpu.count is 0, but gpu.preset {{ $v.gpu.preset }} asks for a node with an A10G; set gpu.preset to none.
{{- end }}
{{- if and (eq (int64 $v.gpu.count) 0) (eq $v.server.dtype "float16") }}
- server.dtype is float16 and gpu.count is 0: a CPU computes float16 slowly or not at all; use auto.
{{- end }}
{{- if and (gt (int64 $v.gpu.count) 0) (not (regexMatch "^nvidia.com/gpu(.shared)?$" $v.gpu.resourceName)) (ne $v.gpu.preset "none") }}
- gpu.resourceName is {{ $v.gpu.resourceName }}, which no A10G offers, but gpu.preset {{ $v.gpu.preset }} asks for one; set gpu.preset to none and name the nodes by nodeSelector.
{{- end }}
{{- range $at, $tolerations := dict "tolerations" $v.tolerations "storage.cache.tolerations" $v.storage.cache.tolerations }}
{{- range $tolerations }}
{{- if and (eq (.operator | default "Equal") "Exists") .value }}
- {{ $at }} has operator Exists with the value {{ .value }}; leave the value out, or use Equal.
{{- end }}
{{- if and (eq (.operator | default "Equal") "Equal") (not .key) }}
- {{ $at }} has operator Equal, which is the default, without a key; name it, or use Exists for every taint.
{{- end }}
{{- if and (hasKey . "tolerationSeconds") (ne (.effect | default "") "NoExecute") }}
- {{ $at }} has tolerationSeconds, which belongs to the effect NoExecute.
{{- end }}
{{- end }}
{{- end }}
{{- $seen := list }}
{{- range $v.topologySpreadConstraints }}
{{- $key := printf "%s %s" .topologyKey .whenUnsatisfiable }}
{{- if has $key $seen }}
- topologySpreadConstraints has {{ $key }} twice.
{{- end }}
{{- $seen = append $seen $key }}
{{- end }}
{{- $seen = list }}
{{- range $v.hostAliases }}
{{- if has .ip $seen }}
- hostAliases has {{ .ip }} twice.
{{- end }}
{{- $seen = append $seen .ip }}
{{- end }}
{{- end }}

{{- define "mistral.refusals.security" -}}
{{- $v := .Values -}}
{{- range $at, $context := dict "securityContext" $v.securityContext "podSecurityContext" $v.podSecurityContext }}
{{- if and $context.runAsNonRoot (hasKey $context "runAsUser") (eq (int64 $context.runAsUser) 0) }}
- {{ $at }} has runAsNonRoot and runAsUser 0: the kubelet would never start the container.
{{- end }}
{{- with $context.seccompProfile }}
{{- if ne (eq .type "Localhost") (not (empty .localhostProfile)) }}
- {{ $at }}.seccompProfile has type {{ .type }} and localhostProfile {{ .localhostProfile | default "" | quote }}: Localhost needs one, and the other types take none.
{{- end }}
{{- end }}
{{- end }}
{{- if and (has "SYS_ADMIN" (dig "capabilities" "add" (list) $v.securityContext)) (eq (toString $v.securityContext.allowPrivilegeEscalation) "false") }}
- securityContext adds SYS_ADMIN and has allowPrivilegeEscalation false: Kubernetes would refuse the pod.
{{- end }}
{{- end }}

{{- define "mistral.refusals.volumes" -}}
{{- $v := .Values -}}
{{- $taken := list "tmp" "shm" "hub" "api-keys" "kserve-provision-location" "kserve-pvc-source" "mnt-models" -}}
{{- $paths := list "/" "/dev" "/dev/log" "/tmp" "/dev/shm" "/mnt" "/mnt/models" "/mnt/hub" "/etc/mistral" -}}
{{- $mounted := list }}
{{- range $v.extraVolumeMounts }}{{ $mounted = append $mounted .name }}{{ end }}
{{- $volumes := list }}
{{- range $v.extraVolumes }}
{{- if has .name $taken }}
- extraVolumes has the name {{ .name }}, which the chart or KServe uses, or uses it twice.
{{- end }}
{{- $taken = append $taken .name }}
{{- $volumes = append $volumes .name }}
{{- if not (has .name $mounted) }}
- extraVolumes has {{ .name }}, which no entry of extraVolumeMounts mounts; Knative refuses that.
{{- end }}
{{- end }}
{{- range $v.extraVolumeMounts }}
{{- if not (has .name $volumes) }}
- extraVolumeMounts mounts {{ .name }}, which is not in extraVolumes.
{{- end }}
{{- if has (clean .mountPath) $paths }}
- extraVolumeMounts mounts {{ .name }} at {{ .mountPath }}, which is already in use.
{{- end }}
{{- $paths = append $paths (clean .mountPath) }}
{{- end }}
{{- end }}
