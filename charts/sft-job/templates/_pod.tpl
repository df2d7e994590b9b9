{{- define "sft-job.podLabels" -}}
{{ include "sft-job.selectorLabels" . }}
app.kubernetes.io/component: run
{{- end -}}

{{- define "sft-job.podMetadata" -}}
labels:
  {{- include "sft-job.podLabels" . | nindent 2 }}
  {{- with .Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .Values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/*
The pod of a run, or of `helm test`. Takes root; check: it checks instead of training; test: it keeps to an emptyDir,
because the run itself may be using its volumes.
*/}}
{{- define "sft-job.podSpec" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $check := .check -}}
{{- $usesGpu := and (not $check) (gt (int $values.gpu.count) 0) -}}
{{- $several := and (not $check) (gt (include "sft-job.nodes" $root | int) 1) -}}
restartPolicy: Never
terminationGracePeriodSeconds: {{ int64 $values.terminationGracePeriodSeconds }}
serviceAccountName: {{ include "sft-job.serviceAccountName" $root | quote }}
automountServiceAccountToken: false
# A Service named sft-... would become variables SFT_..., which the job refuses as settings that it doesn't know.
enableServiceLinks: false
{{- if and $several (eq (include "sft-job.kind" $root) "Job" "CronJob") }}
subdomain: {{ include "sft-job.fullname" $root | quote }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with $values.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with $values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $selector := deepCopy $values.nodeSelector -}}
{{- if and $usesGpu $values.gpu.product -}}
  {{- $_ := set $selector "nvidia.com/gpu.product" $values.gpu.product -}}
{{- end }}
{{- with $selector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $tolerates := and (gt (int $values.gpu.count) 0) $values.gpu.toleration -}}
{{- if or $tolerates $values.tolerations }}
tolerations:
  {{- if $tolerates }}
  - key: {{ $values.gpu.resourceName | quote }}
    operator: Exists
    effect: NoSchedule
  {{- end }}
  {{- with $values.tolerations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- with $values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if or $values.initContainers $values.sidecars }}
initContainers:
  {{- with $values.initContainers }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- range $values.sidecars }}
  - {{- merge (dict "restartPolicy" "Always") . | toYaml | nindent 4 }}
  {{- end }}
{{- end }}
containers:
  - name: sft-job
    image: {{ include "sft-job.image" $root | quote }}
    imagePullPolicy: {{ $values.image.pullPolicy }}
    {{- if $check }}
    # It runs without a GPU, and judges what is to run with them.
    args: [check, --gpus, "{{ int64 $values.gpu.count }}x{{ int64 $values.gpu.memoryGiB }}"]
    {{- end }}
    env:
      {{- include "sft-job.env" . | trim | nindent 6 }}
    {{- if or $values.existingSecret $values.extraEnvFrom }}
    envFrom:
      {{- with $values.existingSecret }}
      - secretRef:
          name: {{ . | quote }}
      {{- end }}
      {{- with $values.extraEnvFrom }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- end }}
    {{- if not $check }}
    {{- include "sft-job.ports" $root | nindent 4 }}
    {{- end }}
    {{- $resources := deepCopy ($check | ternary $values.checkResources $values.resources) -}}
    {{- if $usesGpu -}}
      {{- $limits := merge (dict $values.gpu.resourceName (int64 $values.gpu.count)) ($resources.limits | default dict) -}}
      {{- $_ := set $resources "limits" $limits -}}
    {{- end }}
    {{- with $resources }}
    resources:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $values.securityContext }}
    securityContext:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    # Without a message of the job's own (out of memory, killed), the end of the log.
    terminationMessagePolicy: FallbackToLogsOnError
    volumeMounts:
      - name: work
        mountPath: /workdir
      - name: shm
        mountPath: /dev/shm
      {{- if and (ne $values.modelCache.type "none") (not .test) }}
      - name: model-cache
        mountPath: /cache
      {{- end }}
      {{- with $values.extraVolumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
volumes:
  - name: work
    {{- if .test }}
    emptyDir:
      sizeLimit: {{ $values.workDir.size | quote }}
    {{- else }}
    {{- include "sft-job.volume" (dict "volume" $values.workDir "claim" (printf "%s-work" (include "sft-job.fullname" $root))) | nindent 4 }}
    {{- end }}
  - name: shm
    emptyDir:
      medium: Memory
      sizeLimit: {{ $values.shm.size | quote }}
  {{- if and (ne $values.modelCache.type "none") (not .test) }}
  - name: model-cache
    {{- include "sft-job.volume" (dict "volume" $values.modelCache "claim" (printf "%s-models" (include "sft-job.fullname" $root))) | nindent 4 }}
  {{- end }}
  {{- with $values.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* The port at which nodes meet, and that of the metrics. */}}
{{- define "sft-job.ports" -}}
{{- $several := gt (include "sft-job.nodes" . | int) 1 -}}
{{- $metrics := include "sft-job.metricsPort" . -}}
{{- if or $several $metrics -}}
ports:
  {{- if $several }}
  - name: nodes
    containerPort: {{ dig "parallel" "port" 29400 (include "sft-job.settings" . | fromJson) | int64 }}
  {{- end }}
  {{- with $metrics }}
  - name: metrics
    containerPort: {{ . }}
  {{- end }}
{{- end -}}
{{- end -}}

{{/* The source of a volume. Takes volume (workDir or modelCache) and claim, the name of a claim that the chart makes. */}}
{{- define "sft-job.volume" -}}
{{- if eq .volume.type "emptyDir" -}}
emptyDir:
  sizeLimit: {{ .volume.size | quote }}
{{- else if eq .volume.type "ephemeral" -}}
ephemeral:
  volumeClaimTemplate:
    spec:
      {{- include "sft-job.claimSpec" .volume | nindent 6 }}
{{- else -}}
persistentVolumeClaim:
  claimName: {{ .volume.existingClaim | default .claim | quote }}
{{- end -}}
{{- end -}}

{{- define "sft-job.claimSpec" -}}
accessModes: [{{ .accessMode | default "ReadWriteOnce" }}]
{{- with .storageClassName }}
storageClassName: {{ . | quote }}
{{- end }}
resources:
  requests:
    storage: {{ .size | quote }}
{{- end -}}
