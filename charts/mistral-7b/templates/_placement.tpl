{{/* Where the pod goes, and what it takes there. */}}

{{- define "mistral.nodeSelector" -}}
{{- $presets := dict
  "gfd" (dict "nvidia.com/gpu.product" "NVIDIA-A10G")
  "eks" (dict "node.kubernetes.io/instance-type" "g5.2xlarge")
  "karpenter" (dict "karpenter.k8s.aws/instance-gpu-name" "a10g")
  "eks-auto" (dict "eks.amazonaws.com/instance-gpu-name" "a10g")
  "none" (dict) -}}
{{- $selector := merge (deepCopy .Values.nodeSelector) (get $presets .Values.gpu.preset) -}}
{{- with $selector }}{{ toYaml . }}{{ end -}}
{{- end }}

{{/* The taint bears the name of the whole GPU, also where a share or a MIG slice of it is asked for. */}}
{{- define "mistral.tolerations" -}}
{{- $vendor := dir .Values.gpu.resourceName -}}
{{- $tolerations := .Values.tolerations -}}
{{- if .Values.gpu.count -}}
{{- $tolerations = prepend $tolerations (dict "key" (printf "%s/gpu" $vendor) "operator" "Exists" "effect" "NoSchedule") -}}
{{- end -}}
{{- with $tolerations }}{{ toYaml . }}{{ end -}}
{{- end }}

{{/* The Knative flags without which Knative refuses this pod, one a line. */}}
{{- define "mistral.neededKnativeFlags" -}}
{{- if include "mistral.nodeSelector" . }}
kubernetes.podspec-nodeselector
{{- end }}
{{- if include "mistral.tolerations" . }}
kubernetes.podspec-tolerations
{{- end }}
{{- if .Values.affinity }}
kubernetes.podspec-affinity
{{- end }}
{{- if .Values.runtimeClassName }}
kubernetes.podspec-runtimeclassname
{{- end }}
{{- if .Values.priorityClassName }}
kubernetes.podspec-priorityclassname
{{- end }}
{{- if .Values.topologySpreadConstraints }}
kubernetes.podspec-topologyspreadconstraints
{{- end }}
{{- if .Values.podSecurityContext }}
kubernetes.podspec-securitycontext
{{- end }}
{{- if .Values.hostAliases }}
kubernetes.podspec-hostaliases
{{- end }}
{{- if dig "capabilities" "add" (list) .Values.securityContext }}
kubernetes.containerspec-addcapabilities
{{- end }}
{{- end }}

{{/* Without a selector of the user's, the spread counts this InferenceService's own pods. */}}
{{- define "mistral.topologySpreadConstraints" -}}
{{- $selector := dict "labelSelector" (dict "matchLabels" (include "mistral.podSelector" . | fromYaml)) -}}
{{- $constraints := list -}}
{{- range .Values.topologySpreadConstraints -}}
{{- $constraints = append $constraints (merge (dict) . (deepCopy $selector)) -}}
{{- end -}}
{{- with $constraints }}{{ toYaml . }}{{ end -}}
{{- end }}

{{/* A number from a values file is a float64, which prints 1e+10. */}}
{{- define "mistral.quantityText" -}}
{{- ternary (. | int64 | toString) (toString .) (kindIs "float64" .) -}}
{{- end }}

{{/* A Kubernetes quantity as a number, so that two of them can be compared: "500m" is 0.5, "16Gi" is 17179869184. */}}
{{- define "mistral.quantity" -}}
{{- $text := include "mistral.quantityText" . -}}
{{- $number := regexFind "^[0-9.]+" $text -}}
{{- $factors := dict "" 1 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15
  "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 -}}
{{- printf "%f" (mulf $number (get $factors (trimPrefix $number $text))) -}}
{{- end }}
