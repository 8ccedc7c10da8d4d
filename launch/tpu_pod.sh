#!/usr/bin/env bash
# Trains on a TPU pod slice: makes it, installs on all workers, runs, and starts again
# after preemption.
#
#   launch/tpu_pod.sh create
#   launch/tpu_pod.sh install
#   launch/tpu_pod.sh run --config=configs/cifar10.py --workdir=/mnt/shared/run
#   launch/tpu_pod.sh delete
#
# Settings, from the environment: TPU_NAME, ZONE, ACCELERATOR (v4-32, v5litepod-64, …) and
# VERSION (the TPU software version, tpu-ubuntu2204-base); SPOT=1 asks for a spot slice.
# `run` makes and installs a slice that is not there, starts the same command on every
# worker, and does so again when the slice was preempted; the run then goes on from its
# newest checkpoint. The run directory must lie where all workers see it: on a Filestore
# share, or a bucket that gcsfuse mounts on each of them (not gs://). Needs gcloud.
set -euo pipefail

usage() {
  sed -n '2,16s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

name=${TPU_NAME:-ddaebm}
zone=${ZONE:?set ZONE, for example us-central2-b}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tpu=(gcloud compute tpus tpu-vm)

state() {
  "${tpu[@]}" describe "$name" --zone="$zone" --format='value(state)' 2>/dev/null || true
}

on_all_workers() {
  "${tpu[@]}" ssh "$name" --zone="$zone" --worker=all --command="$1"
}

create() {
  local spot=()
  [[ ${SPOT:-0} == 1 ]] && spot=(--spot)
  "${tpu[@]}" create "$name" --zone="$zone" "${spot[@]}" \
    --accelerator-type="${ACCELERATOR:?set ACCELERATOR, for example v4-32}" \
    --version="${VERSION:-tpu-ubuntu2204-base}"
}

install() {
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  git -C "$root" archive --format=tar.gz --output="$archive" HEAD
  "${tpu[@]}" scp "$archive" "$name:ddaebm_jax.tar.gz" --zone="$zone" --worker=all
  rm -f "$archive"
  on_all_workers 'mkdir -p ddaebm_jax && tar -xzf ddaebm_jax.tar.gz -C ddaebm_jax &&
    cd ddaebm_jax && python3 -m venv .venv && . .venv/bin/activate &&
    pip install -q -U pip && pip install -q -e . "jax[tpu]"'
}

run() {
  local command
  command=$(printf '%q ' python launch/main.py "$@" --distributed)
  while true; do
    case $(state) in
      READY)
        if on_all_workers "cd ddaebm_jax && . .venv/bin/activate && $command"; then
          return
        fi
        sleep 30 # A preemption takes a moment to show.
        if [[ $(state) == READY ]]; then
          echo "error: the command failed on a slice that is still there" >&2
          exit 1
        fi
        ;;
      '')
        create && install
        ;;
      CREATING | STARTING | RESTARTING | REPAIRING)
        sleep 30
        ;;
      *)
        "${tpu[@]}" delete "$name" --zone="$zone" --quiet
        ;;
    esac
  done
}

action=${1:-}
[[ -n $action ]] && shift
case $action in
  create | install) "$action" ;;
  run)
    case " $* " in
      *" --workdir="*) run "$@" ;;
      *) usage ;;
    esac
    ;;
  delete) "${tpu[@]}" delete "$name" --zone="$zone" ;;
  *) usage ;;
esac
