{{/* Written by `make docs` from job/errors.py. */}}

{{- define "sft-job.exitCodes.fail" -}}
65, 66, 71, 77, 78, 80
{{- end -}}

{{- define "sft-job.exitCodes.retryUncounted" -}}
75
{{- end -}}

{{- define "sft-job.exitCodes.table" -}}
0   Complete            ok: published and read back, or the same run was already published
65  FailJob             data: the data can't be trained on
66  FailJob             no_input: data, model or revision not found
69  retry, counted      unavailable: S3, the Hub or a peer node out of reach after retries
70  retry, counted      internal: a bug in the job
71  FailJob             resources: out of GPU memory, host memory or disk, after every smaller step was tried
75  retry, not counted  preempted: told to stop; a start with the same settings goes on from the newest checkpoint
77  FailJob             denied: credentials missing, refused or insufficient
78  FailJob             config: a setting is wrong, unknown or impossible
80  FailJob             diverged: the loss became NaN or infinite, or exploded
{{- end -}}
