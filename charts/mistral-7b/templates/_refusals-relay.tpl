{{/* Refusals: the relay of asynchronous requests. */}}

{{- define "mistral.refusals.relay" -}}
{{- $v := .Values -}}
{{- if $v.relay.enabled }}
{{- if and $v.relay.webhookHosts (not $v.relay.webhookSecretName) }}
- relay.webhookHosts is set and relay.webhookSecretName is not: webhooks are signed. Make a Secret with the key webhook-secret and name it.
{{- end }}
{{- if include "mistral.apiKeyFile" . }}
{{- if not $v.relay.upstreamKeySecretName }}
- The server asks for API keys and relay.upstreamKeySecretName is not set, so it would refuse the relay. Make a Secret with the key api-key and name it.
{{- end }}
{{- if not (include "mistral.relayKeysSecretName" .) }}
- The server asks for API keys and the relay would not: it would answer everyone with the server's key. Set relay.apiKeysSecretName.
{{- end }}
{{- end }}
{{- end }}
{{- end }}
