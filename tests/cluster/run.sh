#!/usr/bin/env bash
# make test-cluster: runs tests/cluster on the cluster that KUBECONFIG names, or on one that CLUSTER makes for it; what
# these and SFT_TEST_IMAGE, SFT_TEST_HOST are stands at the top of conftest.py. What it starts, it stops.
#
#   tests/cluster/run.sh PYTHON [PYTEST-ARGUMENT ...]
set -euo pipefail

python=$1
shift
scratch=$(mktemp --directory)
tidy_up() { rm -r "$scratch"; }
trap tidy_up EXIT

skip() { echo "SKIPPED: $*, so NOTHING was run on a cluster"; exit 0; }

# With the image built here, by whatever engine there is, and handed to the cluster's nodes.
load_image() {
  # shellcheck disable=SC2016 # the engine's variables are there only inside
  IMAGE_FILE=$scratch/image.tar tests/docker/engine.sh run bash -euo pipefail -c '
    make image VARIANT=cpu >&2
    "$DOCKER" save "sft-job:$1" > "$IMAGE_FILE"' _ "$version-cpu" >&2
  if [[ -s $scratch/image.tar ]]; then
    "$CLUSTER" load "$scratch/image.tar" >&2
    export SFT_TEST_IMAGE=sft-job:$version-cpu
  fi
  rm -f "$scratch/image.tar"
}

if [[ -z ${CLUSTER-} ]]; then
  [[ -n ${KUBECONFIG-} ]] || skip "there is no cluster: KUBECONFIG is not set, nor CLUSTER"
  [[ -n ${SFT_TEST_IMAGE-} && -n ${SFT_TEST_HOST-} ]] || skip "KUBECONFIG needs SFT_TEST_IMAGE and SFT_TEST_HOST beside it"
else
  if [[ -z ${KUBECONFIG-} ]]; then
    [[ $(id -u) == 0 ]] || skip "only root can start a cluster by $CLUSTER"
    tidy_up() { "$CLUSTER" down; rm -r "$scratch"; }
    environment=$("$CLUSTER" up) || skip "$CLUSTER could not start a cluster"
    eval "$environment"
  fi
  for controller in kueue jobset; do
    "$CLUSTER" add "$controller" && continue
    echo "WITHOUT $controller: its tests are SKIPPED, for it did not start"
    export SFT_TEST_WITHOUT="${SFT_TEST_WITHOUT-} $controller"
  done
  version=$("$python" -c 'import job; print(job.__version__)')
  [[ -n ${SFT_TEST_IMAGE-} ]] || load_image
  [[ -n ${SFT_TEST_IMAGE-} ]] || skip "no image could be built"
  SFT_TEST_HOST=${SFT_TEST_HOST-$("$CLUSTER" addr)}
  export SFT_TEST_HOST
fi
"$python" -m pytest tests/cluster "$@"
