{{/* Generated from model_server/settings.py by `python -m charts.render_server`. */}}
{{- define "mistral.serverFlags" -}}
modelDir
modelId
modelRevision
dtype
maxModelLen
fixChatTemplate
maxBatchSize
maxQueueSize
prefixCaching
maxRequestBytes
apiKeyFile
maxRequestsPerKey
drainSeconds
requestTimeoutSeconds
stallSeconds
watchdogSeconds
clientStallSeconds
corsOrigins
playground
logFormat
{{- end }}
