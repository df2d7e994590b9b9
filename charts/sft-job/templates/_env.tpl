{{/*
The environment of a run: one JSON variable for each group of settings. Helm has read numbers as float64, which toJson
writes whole. Takes root, and check for what checks instead of training.
*/}}
{{- define "sft-job.env" -}}
{{- $root := .root -}}
{{- $settings := include "sft-job.settings" $root | fromJson -}}
{{- if .check -}}
  {{- $settings = include "sft-job.checkSettings" $root | fromJson -}}
{{- end -}}
{{- range $group, $value := $settings }}
- name: {{ printf "SFT_%s" (upper $group) }}
  value: {{ include "sft-job.literal" $value }}
{{- end }}
- name: SFT_RUNTIME__GRACE_SECONDS
  value: {{ $root.Values.terminationGracePeriodSeconds | int64 | quote }}
{{- if and (ne $root.Values.modelCache.type "none") (not .test) }}
- name: HF_HOME
  value: /cache/huggingface
{{- end }}
{{- range $name, $value := $root.Values.env }}
- name: {{ $name | quote }}
  value: {{ include "sft-job.literal" $value }}
{{- end }}
{{- with $root.Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* A check is one pod, which stands for the first of all nodes. That decides nothing that is learned. */}}
{{- define "sft-job.checkSettings" -}}
{{- $settings := include "sft-job.settings" . | fromJson -}}
{{- if gt (include "sft-job.nodes" . | int) 1 -}}
  {{- $_ := set $settings "parallel" (set $settings.parallel "node_rank" 0) -}}
{{- end -}}
{{- toJson $settings -}}
{{- end -}}
