{{/* Figures of time and number that more than one object uses. */}}

{{/* Knative's cut, and KServe's: the server's own limit and the time a request may wait for a replica. */}}
{{- define "mistral.timeout" -}}
{{- add (int64 .Values.server.requestTimeoutSeconds) (int64 .Values.scaling.coldStartSeconds) -}}
{{- end }}

{{- define "mistral.drainSeconds" -}}
{{- if kindIs "invalid" .Values.server.drainSeconds -}}
{{- int64 .Values.server.requestTimeoutSeconds -}}
{{- else -}}
{{- int64 .Values.server.drainSeconds -}}
{{- end -}}
{{- end }}

{{/* As many requests as the server has places for: running and waiting. */}}
{{- define "mistral.containerConcurrency" -}}
{{- add (int64 .Values.server.maxBatchSize) (int64 .Values.server.maxQueueSize) -}}
{{- end }}

{{- define "mistral.scaleTarget" -}}
{{- if kindIs "invalid" .Values.scaling.target -}}
{{- int64 .Values.server.maxBatchSize -}}
{{- else -}}
{{- int64 .Values.scaling.target -}}
{{- end -}}
{{- end }}
