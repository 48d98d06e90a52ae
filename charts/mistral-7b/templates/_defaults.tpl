{{/* Generated from model_server/settings.py by `python -m charts.render_server`. */}}
{{- define "mistral.serverDefaults" -}}
modelDir=
modelId=
modelRevision=
dtype=auto
maxModelLen=4096
fixChatTemplate=true
maxBatchSize=32
maxQueueSize=128
maxPrefillTokens=0
prefixCaching=true
maxRequestBytes=1048576
apiKeyFile=
maxRequestsPerKey=0
drainSeconds=30
requestTimeoutSeconds=600
stallSeconds=120
watchdogSeconds=50
clientStallSeconds=30
corsOrigins=
playground=true
logFormat=text
{{- end }}
