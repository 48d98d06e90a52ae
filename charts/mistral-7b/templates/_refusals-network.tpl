{{/* Refusals: network and monitoring. */}}

{{- define "mistral.refusals.network" -}}
{{- $v := .Values -}}
{{- if $v.networkPolicy.enabled }}
{{- if and (include "mistral.fetchesOverNetwork" .) (not $v.networkPolicy.egressPorts) (not $v.networkPolicy.extraEgress) }}
- networkPolicy.egressPorts is empty, so the weights could not be downloaded; allow 443, or use a pvc:// or oci+native:// storage.uri.
{{- end }}
{{- if and (eq $v.inferenceService.mode "Knative") (not (has "knative-serving" $v.networkPolicy.ingressNamespaces)) }}
- networkPolicy.ingressNamespaces does not list knative-serving, where the activator that forwards requests runs; add it.
{{- end }}
{{- end }}
{{- if and $v.logger.enabled (not $v.logger.url) }}
- logger.enabled sends requests and answers to logger.url, which is empty; set it.
{{- end }}
{{- end }}

{{- define "mistral.refusals.monitoring" -}}
{{- $v := .Values -}}
{{- if and $v.monitoring.prometheusRule.enabled (not $v.monitoring.podMonitor.enabled) }}
- monitoring.prometheusRule.enabled needs series that Prometheus does not scrape; set monitoring.podMonitor.enabled as well.
{{- end }}
{{- end }}
