{{/* Refusals: the relay of asynchronous requests. */}}

{{- define "mistral.refusals.relay" -}}
{{- $v := .Values -}}
{{- if $v.relay.enabled }}
{{- if and $v.relay.webhookHosts (not $v.relay.webhookSecretName) }}
- relay.webhookHosts is set and relay.webhookSecretName is not, but the relay must sign webhooks. Create a Secret with the key webhook-secret and set relay.webhookSecretName.
{{- end }}
{{- if include "mistral.apiKeyFile" . }}
{{- if not $v.relay.upstreamKeySecretName }}
- The server needs API keys and relay.upstreamKeySecretName is not set, so the server would refuse the relay. Create a Secret with the key api-key and set relay.upstreamKeySecretName.
{{- end }}
{{- if not (include "mistral.relayKeysSecretName" .) }}
- The server needs API keys, but the relay would accept requests without a key. Set relay.apiKeysSecretName.
{{- end }}
{{- end }}
{{- end }}
{{- end }}
