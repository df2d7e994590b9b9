#!/usr/bin/env bash
# A Docker engine for the tests, and Debian images to build on, on machines with and without either.
#
#   eval "$(tests/docker/engine.sh up)"     finds an engine that answers, else starts a private one (root on Debian)
#   eval "$(tests/docker/engine.sh base)"   names the images that `make image` builds on
#   tests/docker/engine.sh down             stops the private engine; what it built stays for the next time
#   tests/docker/engine.sh run COMMAND ...  does all of that around a command, one at a time on this machine
#
# The private engine has no bridge and changes no firewall rules: builds and containers use --network host.
set -euo pipefail

engine=${ENGINE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/sft-job/docker}
socket=unix://$engine/docker.sock

say() { echo "$*" >&2; }

# The client must speak BuildKit: by buildx, or as Docker's own did before buildx came.
find_client() {
  local client
  for client in docker /usr/bin/docker; do
    if command -v "$client" > /dev/null && { "$client" buildx version || [[ $("$client" --version) == *' 20.10.'* ]]; } \
      &> /dev/null; then
      echo "$client"
      return
    fi
  done
  return 1
}

answers() { DOCKER_HOST=$2 timeout 20 "$1" info &> /dev/null; }

up() {
  local client reachable
  if client=$(find_client); then
    reachable=${DOCKER_HOST:-$("$client" context inspect --format '{{.Endpoints.docker.Host}}' 2> /dev/null || true)}
    if [[ -n $reachable ]] && answers "$client" "$reachable"; then
      printf 'export DOCKER=%q DOCKER_HOST=%q\n' "$client" "$reachable"
      return
    fi
  fi
  if ! answers "${client:-false}" "$socket"; then
    start_private
    client=$(find_client)
  fi
  printf 'export DOCKER=%q DOCKER_HOST=%q DOCKER_BUILD_FLAGS="--network host"\n' "$client" "$socket"
}

start_private() {
  [[ $(id -u) == 0 ]] || { say "no Docker engine answers, and only root can start one"; exit 3; }
  [[ -f /etc/debian_version ]] || { say "no Docker engine answers, and one can be installed on Debian only"; exit 3; }
  install_if_missing dockerd docker.io
  install_if_missing runc runc
  mkdir -p "$engine"
  # Without the lock's descriptor: the engine would hold the lock for as long as it runs.
  setsid nohup dockerd --data-root "$engine/data" --exec-root "$engine/exec" --host "$socket" --pidfile "$engine/pid" \
    --iptables=false --ip6tables=false --bridge=none --storage-driver overlay2 \
    < /dev/null > "$engine/log" 2>&1 9>&- &
  for _ in {1..60}; do
    if answers /usr/bin/docker "$socket"; then return; fi
    sleep 0.5
  done
  say "dockerd did not get ready; its log ends:"
  tail -5 "$engine/log" >&2
  exit 3
}

install_if_missing() {
  if command -v "$1" > /dev/null; then return; fi
  say "installing $2"
  {
    apt-get install --yes --no-install-recommends "$2" \
      || { apt-get update && apt-get install --yes --no-install-recommends "$2"; }
  } &> "/tmp/install-$2.log" || { say "$2 can't be installed; see /tmp/install-$2.log"; exit 3; }
}

down() {
  if [[ -f $engine/pid ]]; then
    local pid
    pid=$(< "$engine/pid")
    kill "$pid"
    while [[ -d /proc/$pid ]]; do sleep 0.2; done
  fi
}

# Debian from the registry if it is there. Else as debootstrap makes it, and beside it one with what pip uses on this
# machine, for the stage that installs: wheels in local folders, and the certificates that this machine trusts.
base() {
  local environment
  environment=$(up)
  eval "$environment"
  if "$DOCKER" image inspect debian:bookworm-slim &> /dev/null || timeout 60 "$DOCKER" pull --quiet debian:bookworm-slim &> /dev/null; then
    echo "export BASE_IMAGE=debian:bookworm-slim TORCH_INDEX_URL=${TORCH_INDEX_URL-}"
    return
  fi
  "$DOCKER" image inspect sft-job-base:bookworm &> /dev/null || make_debian
  make_build_image
  echo "export BASE_IMAGE=sft-job-base:bookworm BUILD_IMAGE=sft-job-build:bookworm TORCH_INDEX_URL="
}

make_debian() (
  install_if_missing debootstrap debootstrap
  say "making a Debian base image by debootstrap"
  root=$(mktemp --directory)
  trap 'rm -rf "$root"' EXIT
  debootstrap --variant=minbase --include=ca-certificates bookworm "$root" &> "$engine/debootstrap.log"
  rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*
  tar -C "$root" -c . | "$DOCKER" import - sft-job-base:bookworm > /dev/null
)

make_build_image() (
  context=$(mktemp --directory)
  trap 'rm -rf "$context"' EXIT
  mkdir "$context/wheels"
  for folder in $(python3 -m pip config list | sed -n "s/.*find-links='\(.*\)'/\1/p"); do
    cp --update "$folder"/torch-*.whl "$context/wheels/" 2> /dev/null || true
  done
  cp /etc/ssl/certs/ca-certificates.crt "$context/"
  printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\nfind-links = /opt/wheels\n' > "$context/pip.conf"
  printf '%s\n' 'FROM sft-job-base:bookworm' 'COPY ca-certificates.crt /etc/ssl/certs/' 'COPY pip.conf /etc/' \
    'COPY wheels/ /opt/wheels/' > "$context/Dockerfile"
  DOCKER_BUILDKIT=1 "$DOCKER" build --quiet --tag sft-job-build:bookworm "$context" > /dev/null
)

run() {
  mkdir -p "$engine"
  exec 9> "$engine/lock"
  flock 9
  local environment images was_up=no status=0
  if [[ -f $engine/pid && -d /proc/$(< "$engine/pid") ]]; then was_up=yes; fi
  if ! environment=$("$0" up 9>&- 2> "$engine/reason"); then
    echo "SKIPPED: $(tail -1 "$engine/reason"), so NOTHING was done of: $*"
    return
  fi
  eval "$environment"
  images=$("$0" base 9>&-)
  eval "$images"
  "$@" 9>&- || status=$?
  if [[ $was_up == no ]]; then "$0" down; fi
  return "$status"
}

case ${1-} in
  up | down | base | run) "$@" ;;
  *) say "usage: $0 up | base | down | run COMMAND ..."; exit 2 ;;
esac
