#!/bin/sh
# Splits a virtual environment into folders that become layers of the image: CUDA's libraries, torch, and the rest.
# The large ones change seldom, so that an update of the rest is pulled without them, and a first pull runs in parallel.
set -eu
venv=$1 layers=$2
site=$(echo "$venv"/lib/python3.*/site-packages)
mkdir -p "$layers/cuda$site" "$layers/torch$site" "$layers/rest$venv"

move() {
  layer=$1
  shift
  for name in "$@"; do
    if [ -e "$site/$name" ]; then mv "$site/$name" "$layers/$layer$site/"; fi
  done
}
move cuda nvidia triton
move torch torch functorch torchgen
mv "$venv"/* "$layers/rest$venv/"
