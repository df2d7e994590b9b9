{{/*
What the schema can't tell: values that contradict each other, or the cluster. Each refusal names the value, says why,
and what to do.
*/}}
{{- define "sft-job.refuse" -}}
{{- $settings := include "sft-job.settings" . | fromJson -}}
{{- $kind := include "sft-job.kind" . -}}
{{- $several := gt (include "sft-job.pods" . | int) 1 -}}
{{- include "sft-job.refuseSettings" (dict "settings" $settings) -}}
{{- include "sft-job.refuseDoubled" . -}}
{{- include "sft-job.refuseVolumes" (dict "values" .Values "several" $several) -}}

{{- if and (eq .Values.kind "JobSet") (eq $kind "CronJob") -}}
{{- fail "kind=JobSet: a schedule makes Jobs only; leave cron.schedule empty, or set kind=Job" -}}
{{- end -}}
{{- if eq $kind "JobSet" -}}
  {{- if not (.Capabilities.APIVersions.Has "jobset.x-k8s.io/v1alpha2") -}}
  {{- fail "kind=JobSet: this cluster has no jobset.x-k8s.io/v1alpha2; install the JobSet controller, or set kind=Job (helm template needs --api-versions jobset.x-k8s.io/v1alpha2)" -}}
  {{- end -}}
  {{- if not (kindIs "invalid" .Values.backoffLimit) -}}
  {{- fail (printf "backoffLimit=%v: a JobSet starts all nodes again when one fails; set jobSet.maxRestarts instead" .Values.backoffLimit) -}}
  {{- end -}}
{{- end -}}
{{- if and (eq $kind "CronJob") (eq .Values.mode "train") (not (contains "{run_id}" $settings.output.uri)) (not $settings.output.overwrite) -}}
{{- fail (printf "cron.schedule=%s: the second run would be refused, for the output holds the first one's adapter; put {run_id} into settings.output.uri, or set settings.output.overwrite=true" .Values.cron.schedule) -}}
{{- end -}}
{{- if and (or $several (eq $kind "JobSet")) (regexMatch "^[0-9]" (include "sft-job.fullname" .)) -}}
{{- fail (printf "fullnameOverride: %s would name a Service, and that must begin with a letter; set fullnameOverride, or choose another release name" (include "sft-job.fullname" .)) -}}
{{- end -}}
{{- if and .Values.podMonitor.enabled (not (include "sft-job.metricsPort" .)) -}}
{{- fail "podMonitor.enabled=true: the job serves no metrics; set settings.runtime.metrics_port, such as 9400" -}}
{{- end -}}
{{- if and .Values.gpu.product (not (hasPrefix "nvidia.com/" .Values.gpu.resourceName)) -}}
{{- fail (printf "gpu.product=%s: the label nvidia.com/gpu.product is for gpu.resourceName=nvidia.com/...; choose nodes by nodeSelector" .Values.gpu.product) -}}
{{- end -}}
{{- range $part, $resources := .Values.resources -}}
  {{- if and (kindIs "map" $resources) (hasKey $resources $.Values.gpu.resourceName) -}}
  {{- fail (printf "resources.%s: %s is asked for by gpu.count; leave it out here" $part $.Values.gpu.resourceName) -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{/* Settings of which one would be ignored: the job refuses them too, but only once it runs. Takes settings. */}}
{{- define "sft-job.refuseSettings" -}}
{{- if and (hasKey (.settings.data | default dict) "eval_uri") (hasKey .settings.data "eval_fraction") -}}
{{- fail "settings.data.eval_fraction: settings.data.eval_uri names the held-out rows already; set one of them" -}}
{{- end -}}
{{- if and (hasKey (.settings.train | default dict) "max_steps") (hasKey .settings.train "epochs") -}}
{{- fail "settings.train.epochs: settings.train.max_steps says how long to train already; set one of them" -}}
{{- end -}}
{{- if and (hasKey (.settings.checkpoint | default dict) "every_steps") (hasKey .settings.checkpoint "every_minutes") -}}
{{- fail "settings.checkpoint.every_minutes: settings.checkpoint.every_steps says how often already; set one of them" -}}
{{- end -}}
{{- with .settings.output -}}
{{- if and .pull_request (or (not (hasPrefix "hf://" .uri)) (contains "@" .uri)) -}}
{{- fail "settings.output.pull_request: there are pull requests on the Hub alone, into main; leave it out, or write settings.output.uri: hf://org/name" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Variables that are set twice: server-side apply refuses such a list in words that help nobody. */}}
{{- define "sft-job.refuseDoubled" -}}
{{- $names := list -}}
{{- if ne .Values.modelCache.type "none" -}}{{- $names = append $names "HF_HOME" -}}{{- end -}}
{{- range $name, $_ := .Values.env -}}
  {{- if has $name $names -}}
  {{- fail (printf "env.%s: modelCache sets it already; leave one of them out" $name) -}}
  {{- end -}}
  {{- $names = append $names $name -}}
{{- end -}}
{{- range $index, $variable := .Values.extraEnv -}}
  {{- if has $variable.name $names -}}
  {{- fail (printf "extraEnv[%d]: %s is set already, by env, modelCache or extraEnv; leave one of them out" $index $variable.name) -}}
  {{- end -}}
  {{- $names = append $names $variable.name -}}
{{- end -}}
{{- end -}}

{{/* Volumes that several nodes can't share. Takes values and several. */}}
{{- define "sft-job.refuseVolumes" -}}
{{- if and .several (eq .values.workDir.type "pvc") -}}
{{- fail "workDir.type=pvc: each of several nodes needs a work directory of its own; use ephemeral or emptyDir" -}}
{{- end -}}
{{- with .values.modelCache -}}
  {{- if and $.several (eq .type "pvc") (not .existingClaim) (ne .accessMode "ReadWriteMany") -}}
  {{- fail (printf "modelCache.accessMode=%s: several nodes can't mount such a claim; set ReadWriteMany with a storage class that has it, name an existingClaim, or use ephemeral" .accessMode) -}}
  {{- end -}}
{{- end -}}
{{- end -}}
