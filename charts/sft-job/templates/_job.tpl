{{/* The spec of a Job: on its own, of a CronJob, or within a JobSet. */}}
{{- define "sft-job.jobSpec" -}}
{{- $check := eq .Values.mode "check" -}}
{{- $pods := include "sft-job.pods" . | int -}}
{{- $gang := eq (include "sft-job.kind" .) "JobSet" -}}
{{- $backoff := .Values.backoffLimit -}}
{{- if kindIs "invalid" $backoff -}}
  {{- $backoff = $check | ternary 1 (mul 3 $pods) -}}
{{- end }}
{{- if or $gang (gt $pods 1) }}
completionMode: Indexed
completions: {{ $pods }}
parallelism: {{ $pods }}
{{- end }}
backoffLimit: {{ $gang | ternary 0 $backoff | int64 }}
{{- with .Values.activeDeadlineSeconds }}
activeDeadlineSeconds: {{ int64 . }}
{{- end }}
{{- if not (or $gang (kindIs "invalid" .Values.ttlSecondsAfterFinished)) }}
ttlSecondsAfterFinished: {{ int64 .Values.ttlSecondsAfterFinished }}
{{- end }}
# The next pod starts when the last has ended: until then that holds the output's lease and the volume.
podReplacementPolicy: Failed
podFailurePolicy:
  rules:
    # The job's own verdict comes first: it would be the same in the next pod, even if this one was also being drained.
    - action: FailJob
      onExitCodes:
        containerName: sft-job
        operator: In
        values: [{{ include "sft-job.exitCodes.fail" . }}]
    # A JobSet starts all nodes again when one was stopped, and doesn't count it: see its failurePolicy.
    - action: {{ $gang | ternary "FailJob" "Ignore" }}
      onExitCodes:
        containerName: sft-job
        operator: In
        values: [{{ include "sft-job.exitCodes.retryUncounted" . }}]
    - action: {{ $gang | ternary "FailJob" "Ignore" }}
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
template:
  metadata:
    {{- include "sft-job.podMetadata" . | nindent 4 }}
  spec:
    {{- include "sft-job.podSpec" (dict "root" . "check" $check "test" false) | nindent 4 }}
{{- end -}}

{{/* The spec of a JobSet: one replicated Job with a pod for each node. */}}
{{- define "sft-job.jobSetSpec" -}}
network:
  enableDNSHostnames: true
  publishNotReadyAddresses: true
{{- with .Values.ttlSecondsAfterFinished }}
ttlSecondsAfterFinished: {{ int64 . }}
{{- end }}
failurePolicy:
  maxRestarts: {{ int64 .Values.jobSet.maxRestarts }}
  # The nodes of the last attempt are gone, and with them the output's lease, before those of the next one start.
  restartStrategy: BlockingRecreate
  rules:
    # First: a JobSet controller that knows no message patterns takes every such end for fatal, and none for endless.
    - name: fatal
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
      onJobFailureMessagePatterns: ["failed with exit code ({{ include "sft-job.exitCodes.fail" . | replace ", " "|" }}) "]
    - name: preempted
      action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons: [PodFailurePolicy]
    - name: deadline
      action: FailJobSet
      onJobFailureReasons: [DeadlineExceeded]
replicatedJobs:
  - name: node
    replicas: 1
    template:
      metadata:
        labels:
          {{- include "sft-job.selectorLabels" . | nindent 10 }}
      spec:
        {{- include "sft-job.jobSpec" . | trim | nindent 8 }}
{{- end -}}

{{/*
The name of a Job or JobSet: a hash of all that makes the run is its end, for neither can be changed once it is there.
Other settings make another one, the same settings leave the one that there is alone.
*/}}
{{- define "sft-job.runName" -}}
{{- $spec := eq (include "sft-job.kind" .) "JobSet" | ternary (include "sft-job.jobSetSpec" .) (include "sft-job.jobSpec" .) | fromYaml -}}
{{- $hash := dict "kind" (include "sft-job.kind" .) "spec" $spec "queue" .Values.kueue.queueName | toJson | sha256sum -}}
{{- printf "%s-%s" (include "sft-job.fullname" .) (trunc 8 $hash) -}}
{{- end -}}
