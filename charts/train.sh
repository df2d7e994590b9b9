#!/usr/bin/env bash
# Trains from CI, or from any shell: checks a values file, installs the chart beside this script as a release, follows
# the run, writes a summary, and ends as the run ended.
#
#   charts/train.sh RELEASE VALUES.yaml [helm's arguments: --namespace, --kube-context, --set, --values ...]
#
# It needs bash, helm, kubectl and jq, and a namespace that is there. In order:
#   1. `helm lint`: a typo or an impossible value ends here, before the cluster is asked for anything;
#   2. the preflight, as a release RELEASE-check of its own that needs no GPU and is uninstalled afterwards;
#   3. `helm upgrade --install`. A release whose values are as they were keeps the run it has, so that a script that was
#      cut off can be started again. A run that has failed is started again, and goes on from its last checkpoint;
#   4. the log of node 0, over restarts, until the run is complete or has failed;
#   5. a summary in Markdown, to the file $GITHUB_STEP_SUMMARY or else to stdout.
#
# It exits with the job's own code (the README has the table); with 78 for values that helm refuses; with the
# container's code where the job could say nothing (137: killed, as by OOMKilled); with 1 for all else: a run that did
# not start within $TRAIN_START_MINUTES (60), that somebody deleted, a cluster out of reach.
#
# A run that has ended stays as a release, for its log and outcome to be read. One that can't start is uninstalled. So
# is one that goes on when the script is told to stop (Ctrl-C, SIGTERM, a cancelled CI job): nobody looks after its GPUs
# any more, the job leaves a checkpoint, and the next start goes on from there.
set -euo pipefail

POLL_S=5
STUCK_S=300       # for an image that can't be pulled or a Secret that isn't there: either may be about to come
UNREACHABLE_S=300 # for an API server that doesn't answer

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

say() { printf 'train.sh: %s\n' "$*" >&2; }

die() { # MESSAGE [CODE]
  say "$1"
  exit "${2:-1}"
}

read_arguments() { # RELEASE VALUES [HELM ARGUMENTS]
  [ $# -ge 2 ] || die 'usage: train.sh RELEASE VALUES.yaml [arguments of helm]' 2
  release=$1 values=$2
  shift 2
  helm_arguments=("$@") where=() kube=() # where: those that say where the release is; kube: the same for kubectl
  [ ${#release} -le 47 ] || die "$release: the name may have 47 characters, for $release-check is a release, too" 2
  [ -f "$values" ] || die "$values: there is no such file" 2
  [ -z "${HELM_NAMESPACE:-}" ] || kube=(--namespace "$HELM_NAMESPACE")
  while [ $# -gt 0 ]; do
    case $1 in
      -n | --namespace) where+=(--namespace "${2:-}") kube+=(--namespace "${2:-}") ;;
      --namespace=*) where+=("$1") kube+=("$1") ;;
      --kube-context) where+=("$1" "${2:-}") kube+=(--context "${2:-}") ;;
      --kube-context=*) where+=("$1") kube+=("--context=${1#*=}") ;;
    esac
    shift
  done
  for program in helm kubectl jq; do
    command -v "$program" >/dev/null || die "$program is needed, and is not on the PATH"
  done
}

read_json() { # JQ-ARGUMENTS... PROGRAM, which may use train.jq
  jq -L "$here" "${@:1:$#-1}" "include \"train\"; ${!#}"
}

# --- what the cluster says -------------------------------------------------------------------------------------------

find_run() { # RELEASE -> kind, name and has_failed of what it runs; all empty where there is no release
  local manifest objects
  kind='' name='' has_failed=''
  manifest=$(helm get manifest "$1" "${where[@]}" 2>/dev/null) || return 0
  objects=$(kubectl "${kube[@]}" get --ignore-not-found --filename - --output json <<<"$manifest")
  [ -z "$objects" ] || read -r kind name has_failed < <(read_json -r find_run <<<"$objects") || true
}

read_cluster() { # -> cluster: the run and its pods; `gone` where the run was deleted
  local label=batch.kubernetes.io/job-name run pods
  [ "$kind" != JobSet ] || label=jobset.sigs.k8s.io/jobset-name
  run=$(kubectl "${kube[@]}" get "$kind" "$name" --ignore-not-found --output json) || return 1
  pods=$(kubectl "${kube[@]}" get pods --selector "$label=$name" --output json) || return 1
  cluster=gone
  [ -z "$run" ] || cluster=$run$pods
}

# --- a run, from its first pod to its end ----------------------------------------------------------------------------

pause() { # [SECONDS], as `sleep`, but for a signal to be acted upon at once
  sleep "${1:-$POLL_S}" &
  wait $! || true
}

show_messages() { # of a log: JSON lines as text, all others as they are
  jq --raw-input --raw-output --unbuffered -L "$here" 'include "train"; show_line'
}

follow_log() { # POD: print its log as it grows, in the background; after a broken connection from where that broke
  [ "$1" != "$followed" ] || return 0
  finish_log
  say "the log of $1:"
  followed=$1
  (
    exec > >(show_messages)
    since=() child='' shower=$!
    trap 'kill "$child" 2>/dev/null; exit' TERM
    while true; do
      kubectl "${kube[@]}" logs --follow --container sft-job "${since[@]}" "$1" &
      child=$!
      wait "$child" && break
      since=(--since-time "$(date -u +%FT%TZ)")
      pause
    done
    exec >&- # all that was said is shown before this ends
    wait "$shower"
  ) &
  follower=$!
}

finish_log() { # the log of an ended pod ends by itself, unless the pod is gone or the connection hangs
  local tries=150
  while [ -n "$follower" ] && kill -0 "$follower" 2>/dev/null && [ "$tries" -gt 0 ]; do
    tries=$((tries - 1))
    pause 0.1
  done
  stop_following
}

stop_following() {
  [ -z "$follower" ] || kill "$follower" 2>/dev/null || true
  follower=''
}

watch_run() { # RELEASE: follow what it runs to its end -> verdict, cluster
  local waited_s=0 stuck_s=0 unreachable_s=0 pod state is_stuck waits_for told=''
  followed=''
  say "$1 runs as $kind $name"
  while true; do
    if ! read_cluster; then
      unreachable_s=$((unreachable_s + POLL_S))
      [ "$unreachable_s" -lt "$UNREACHABLE_S" ] || die 'the cluster is out of reach; what runs there is left as it is'
      pause
      continue
    fi
    unreachable_s=0
    [ "$cluster" != gone ] || die "$kind $name was deleted while it was followed"
    { read -r verdict && read -r pod && read -r state && read -r is_stuck && read -r waits_for; } \
      < <(read_json -rs read_state <<<"$cluster")
    [ "$state" = - ] || follow_log "$pod"
    [ "$verdict" = - ] || break
    if [ "$state" = - ]; then
      [ "$waits_for" = "$told" ] || say "waiting: $waits_for"
      told=$waits_for waited_s=$((waited_s + POLL_S))
      if $is_stuck; then stuck_s=$((stuck_s + POLL_S)); else stuck_s=0; fi
      [ "$stuck_s" -lt "$STUCK_S" ] || give_up "$1" "could not start: $waits_for"
      [ "$waited_s" -lt "$start_s" ] || give_up "$1" "did not start within $((start_s / 60)) minutes: $waits_for"
    else
      waited_s=0 stuck_s=0
    fi
    pause
  done
  finish_log
}

give_up() { # RELEASE REASON
  kubectl "${kube[@]}" get events --sort-by .lastTimestamp --no-headers \
    --output custom-columns=OBJECT:.involvedObject.name,REASON:.reason,MESSAGE:.message | grep "^$name" | tail -5 >&2 || true
  uninstall "$1"
  summarize "$1" "$(jq -n --arg message "$2" '{code: 1, name: "not started", message: $message}')"
  die "$1 $2"
}

end_as_it_ended() { # RELEASE: say how; return only where that was well
  local outcome code
  outcome=$(read_json -s read_outcome <<<"$cluster")
  summarize "$1" "$outcome"
  code=$(jq .code <<<"$outcome")
  [ "$code" = 0 ] || die "$1 failed, $(jq -r '"\(.name) (\(.code)): \(.message)\n\(.hint)"' <<<"$outcome")" "$code"
  say "$1 is done: $(jq -r '[.message, .output | values] | join(" ")' <<<"$outcome")"
}

summarize() { # RELEASE OUTCOME
  local text
  text=$(read_json -r --arg title "sft-job $1" "format_summary(\$title)" <<<"$2")
  if [ -n "${GITHUB_STEP_SUMMARY:-}" ]; then printf '%s\n' "$text" >>"$GITHUB_STEP_SUMMARY"; else printf '%s\n' "$text"; fi
}

# --- releases --------------------------------------------------------------------------------------------------------

run_helm_upgrade() { # RELEASE [MORE ARGUMENTS]
  local problems
  # Its stdout would be the chart's notes, on how to do by hand what this script does.
  problems=$(helm upgrade --install "$1" "$here/sft-job" --values "$values" "${helm_arguments[@]}" "${@:2}" \
    2>&1 >/dev/null) && return
  printf '%s\n' "$problems" >&2
  case $problems in
    *'execution error at'* | *"don't meet the specifications"*) die "helm refuses $values" 78 ;;
    *) die "helm could not install $1" ;;
  esac
}

install() { # RELEASE [MORE ARGUMENTS] -> kind, name
  installed=$1
  run_helm_upgrade "$@"
  find_run "$1"
  [ -n "$kind" ] || die "$1 runs nothing"
}

uninstall() { # RELEASE
  installed=''
  say "uninstalling $1"
  helm uninstall "$1" "${where[@]}" >/dev/null || say "$1 could not be uninstalled"
}

preflight() {
  say "the preflight of $values"
  run_helm_upgrade "$release" --dry-run=server # what the chart refuses only together with this cluster
  install "$release-check" --set mode=check,kind=Job,cron.schedule=
  watch_run "$release-check"
  uninstall "$release-check"
  [ "$verdict" = complete ] || end_as_it_ended "$release-check"
}

train() {
  find_run "$release"
  if [ "$has_failed" = true ]; then
    say "$kind $name failed earlier, and is started again"
    kubectl "${kube[@]}" delete "$kind" "$name" --cascade=foreground >/dev/null
  fi
  install "$release"
  if [ "$kind" = CronJob ]; then
    installed=''
    say "$release is scheduled: its runs begin by themselves"
    return
  fi
  watch_run "$release"
  installed=''
  end_as_it_ended "$release"
}

leave() { # however the work ends
  stop_following
  # A preflight is nothing that anybody comes back to; a run that goes on is, unless somebody stopped this script.
  if [ -n "$installed" ] && { $is_told_to_stop || [ "$installed" != "$release" ]; }; then uninstall "$installed"; fi
  [ -z "$resume_commands" ] || printf '::%s::\n' "$resume_commands"
}

work() { # as a process of its own, which only SIGTERM stops: a terminal's Ctrl-C reaches it and its commands, too
  trap '' INT
  installed='' is_told_to_stop=false follower='' resume_commands=''
  trap leave EXIT
  trap 'is_told_to_stop=true; exit 143' TERM
  if [ -n "${GITHUB_ACTIONS:-}" ]; then # the log shows rows of the data: none may be taken for a command to the runner
    resume_commands=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    printf '::stop-commands::%s\n' "$resume_commands"
  fi
  helm lint --strict --quiet "$here/sft-job" --values "$values" "${helm_arguments[@]}" || die "helm refuses $values" 78
  preflight
  train
}

stop() { # CODE
  trap '' INT TERM
  kill "${!:-}" 2>/dev/null || true # there is nothing to stop yet, or no more
  wait || true
  exit "$1"
}

read_arguments "$@"
start_s=$((${TRAIN_START_MINUTES:-60} * 60))
# A shell can lose a SIGINT that comes while one of its commands runs, for it leaves that to the command. It loses none
# while it only waits, and no SIGTERM: so one process does the work, and this one waits.
trap 'stop 130' INT
trap 'stop 143' TERM
work <&0 &
wait $!
