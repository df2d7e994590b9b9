# What train.sh reads in the objects of a cluster. Each function takes what `kubectl get --output json` gave.

# The objects of a release -> "KIND NAME HAS-FAILED" of that which runs the job's container.
def find_run:
  (.items? // [.])[]
  | select([.. | objects | .containers? // empty | .[].name] | index("sft-job"))
  | "\(.kind) \(.metadata.name) \(any(.status.conditions[]?; .type == "Failed" and .status == "True"))";

def starts_by_itself: IN("ContainerCreating", "PodInitializing");

def waiting_containers:
  [.[].status | (.initContainerStatuses // []) + (.containerStatuses // []) | .[].state.waiting // empty
    | select(.reason | starts_by_itself | not)];

def unscheduled: [.[].status.conditions[]? | select(.type == "PodScheduled" and .status == "False")];

def describe_waiting($run; $waiting):
  if $waiting != [] then $waiting[0] | "\(.reason): \(.message // "")" | gsub("\\s+"; " ")
  elif $run.spec.suspend then "suspended, as long as its queue says"
  else "starting" end;

# [a Job or JobSet, its pods] -> five lines: complete, failed or -; the newest pod of node 0, or -; running, ended or -,
# as the job in that pod; whether a container can't be started; what is waited for.
def read_state:
  .[0] as $run | .[1].items as $pods
  | [$run.status.conditions[]? | select(.status == "True") | .type] as $are
  | ($pods | map(select((.metadata.labels["batch.kubernetes.io/job-completion-index"] // "0") == "0"))
      | sort_by(.metadata.creationTimestamp) | last) as $pod
  | [$pod.status.containerStatuses[]? | select(.name == "sft-job") | .state] as $states
  | ($pods | waiting_containers) as $stuck
  | if $are | any(IN("Complete", "Completed")) then "complete" elif $are | any(. == "Failed") then "failed" else "-" end,
    ($pod.metadata.name // "-"),
    if $states | any(has("terminated")) then "ended" elif $states | any(has("running")) then "running" else "-" end,
    $stuck != [],
    describe_waiting($run; $stuck + ($pods | unscheduled));

# Of the ends of all pods, in their order: that which decided how the run ended. The others of a failed run were told to
# stop (75) on its account.
def pick_deciding($failed; $fatal):
  if $failed == null then map(select(.exitCode == 0))
  elif any(.[]; .exitCode | IN($fatal[])) then map(select(.exitCode | IN($fatal[])))
  elif any(.[]; .exitCode | IN(0, 75) | not) then map(select(.exitCode | IN(0, 75) | not))
  else . end | last;

def kubernetes_hint:
  if index("OOMKilled") then "the container needs more memory than resources.limits.memory; "
  elif index("DeadlineExceeded") then "it took longer than activeDeadlineSeconds; a new start goes on from its checkpoint; "
  else "" end;

# [a Job or JobSet, its pods] -> how it ended: the job's own outcome, where it could write one, and what Kubernetes says.
def read_outcome:
  .[0] as $run | .[1].items as $pods
  | ($run.status.conditions // [] | map(select(.type == "Failed" and .status == "True")) | first) as $failed
  | [$run | .. | objects | .podFailurePolicy? // empty | .rules[] | select(.action == "FailJob")
      | .onExitCodes.values[]? | select(. != 75)] as $fatal # within a JobSet, 75 ends a Job, too
  | [$pods[] | .metadata.name as $pod | .status.containerStatuses[]? | select(.name == "sft-job")
      | .state.terminated // empty | . + {pod: $pod}]
  | (sort_by(.finishedAt) | pick_deciding($failed; $fatal)) as $last
  | (($last.message // "" | fromjson? | objects | select(.code == $last.exitCode)) // {}) as $said
  | [$failed.reason, $last.reason | values | select(IN("Completed", "Error") | not)] as $reasons
  | ([$said.message, $last.message, $failed.message | values | select(. != "")] | first // "") as $message
  | ($last.exitCode // 0 | if $failed != null and . == 0 then 1 else . end) as $code
  | $said + {
      code: $code,
      name: ($said.name // $reasons[-1] // if $code == 0 then "ok" else "killed" end),
      message: $message,
      hint: (($reasons | kubernetes_hint) + ($said.hint // "")),
      pod: $last.pod,
      kubernetes: ($reasons | unique | join(", "))
    };

def as_cell: tostring | gsub("\\s+"; " ") | gsub("(?<mark>[|<`\\\\])"; "\\\(.mark)");

def as_quote: gsub("<"; "&lt;") | split("\n") | map("> " + .) | join("\n") + "\n";

# An outcome -> its summary in Markdown.
def format_summary($title):
  "### \($title): \(if .code == 0 then "done" else "failed, \(.name) (\(.code))" end)\n",
  (.message, .hint | values | select(. != "") | as_quote),
  "| | |\n|---|---|",
  ([
      ["adapter", if .code == 0 then .output else null end],
      ["run", .run_id],
      ["steps", if .step then "\(.step) of \(.total_steps)" else null end],
      ["pod", .pod],
      ["Kubernetes says", .kubernetes]
    ][] | select(.[1] // "" | . != "") | "| \(.[0]) | \(.[1] | as_cell) |");

# A line of the log -> what people read of it: of JSON the time, a level that is none of everyday, and the message.
def show_message:
  try (fromjson | objects | select(.message and .time)) catch empty
  | [.time[11:19], if .level == "info" then empty else "\(.level):" end, .message] + [.traceback | values | "\n" + .]
  | join(" ");

def show_line: [show_message] as $shown | if $shown == [] then . else $shown[] end;
