{{/*
Names. The longest that is made of a fullname is the host name of a JobSet's pod,
<fullname>-<8 of the hash>-node-0-<index up to 1023>, and a label has 63 characters: 40 remain.
*/}}
{{- define "sft-job.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "sft-job.fullname" -}}
{{- $name := .Values.fullnameOverride -}}
{{- if not $name -}}
  {{- $chart := include "sft-job.name" . -}}
  {{- $name = contains $chart .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $chart) -}}
{{- end -}}
{{- $name = $name | replace "." "-" -}}
{{- if gt (len $name) 40 -}}
  {{- $name = printf "%s-%s" ($name | trunc 31 | trimSuffix "-") ($name | sha256sum | trunc 8) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{- define "sft-job.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (.Values.serviceAccount.create | ternary (include "sft-job.fullname" .) "default") -}}
{{- end -}}

{{- define "sft-job.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* What pods are chosen by. They hold nothing that an upgrade of the chart alone would change. The pod of `helm test`
is another component, so that nothing takes it for one of the run's nodes. */}}
{{- define "sft-job.selectorLabels" -}}
app.kubernetes.io/name: {{ include "sft-job.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "sft-job.labels" -}}
{{ include "sft-job.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Labels and annotations of the Job, JobSet or CronJob's Jobs: the chart's, the queue and the user's. */}}
{{- define "sft-job.runMetadata" -}}
labels:
  {{- include "sft-job.labels" . | nindent 2 }}
  {{- with .Values.kueue.queueName }}
  kueue.x-k8s.io/queue-name: {{ . | quote }}
  {{- end }}
  {{- with .Values.labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .Values.annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What kind of run this is: CronJob, JobSet or Job. A check is one pod, which JobSet has nothing to add to. */}}
{{- define "sft-job.kind" -}}
{{- if .Values.cron.schedule -}}
CronJob
{{- else if and (eq .Values.kind "JobSet") (eq .Values.mode "train") -}}
JobSet
{{- else -}}
Job
{{- end -}}
{{- end -}}

{{/* The settings that were given, as JSON: nulls, which mean "not set", and what is empty without them left out. */}}
{{- define "sft-job.settings" -}}
{{- $settings := dict -}}
{{- range $group, $fields := .Values.settings -}}
  {{- if kindIs "map" $fields -}}
    {{- $given := dict -}}
    {{- range $field, $value := $fields -}}
      {{- if not (kindIs "invalid" $value) -}}{{- $_ := set $given $field $value -}}{{- end -}}
    {{- end -}}
    {{- if $given -}}{{- $_ := set $settings $group $given -}}{{- end -}}
  {{- else if not (kindIs "invalid" $fields) -}}
    {{- $_ := set $settings $group $fields -}}
  {{- end -}}
{{- end -}}
{{- toJson $settings -}}
{{- end -}}

{{/* The nodes that the settings name. */}}
{{- define "sft-job.nodes" -}}
{{- dig "parallel" "nodes" 1 (include "sft-job.settings" . | fromJson) | int64 -}}
{{- end -}}

{{/* The pods of the run: one for each node, one for a check. */}}
{{- define "sft-job.pods" -}}
{{- eq .Values.mode "check" | ternary "1" (include "sft-job.nodes" .) -}}
{{- end -}}

{{/* The port that metrics are served at, if there is one. */}}
{{- define "sft-job.metricsPort" -}}
{{- with dig "runtime" "metrics_port" 0 (include "sft-job.settings" . | fromJson) }}{{ int64 . }}{{ end -}}
{{- end -}}

{{/* A literal as the value of an environment variable: Kubernetes would read $(NAME) in it, and $$ as $. */}}
{{- define "sft-job.literal" -}}
{{- (kindIs "string" . | ternary . (toJson .)) | replace "$" "$$" | quote -}}
{{- end -}}
