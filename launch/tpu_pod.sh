#!/usr/bin/env bash
# Trains on a TPU pod slice: creates it, installs on all workers, runs, and restarts after
# preemption.
#
#   launch/tpu_pod.sh create
#   launch/tpu_pod.sh install
#   launch/tpu_pod.sh run --config=configs/cifar10.py --workdir=/mnt/shared/run
#   launch/tpu_pod.sh delete
#
# Settings, from the environment: TPU_NAME, ZONE, ACCELERATOR (v4-32, v5litepod-64, …) and
# VERSION (the TPU software version, tpu-ubuntu2204-base); SPOT=1 asks for a spot slice.
# `run` creates a missing slice and installs on it, starts the same command on every
# worker, and does so again after a preemption; the run then resumes from its newest
# checkpoint. What fails meanwhile, for lack of free TPUs for example, is retried after
# PAUSE seconds (60), at most TRIES times (60) until a command runs. The run directory
# must lie where all workers see it: on a Filestore share, or in a bucket that gcsfuse
# mounts on each of them (not gs://). gcsfuse has no locks between hosts, so start a run
# from one place only. Needs gcloud.
set -euo pipefail

usage() {
  sed -n '2,19s/^# \{0,1\}//p' "$0"
}

fail() {
  echo "error: $1" >&2
  exit 1
}

action=${1:-}
case $action in
  create | install | run | delete) shift ;;
  -h | --help | help)
    usage
    exit
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac
if [[ $action == run && " $* " != *" --workdir="* ]]; then
  usage >&2
  echo "error: run needs --workdir=, a directory that all workers see" >&2
  exit 2
fi

name=${TPU_NAME:-ddaebm}
zone=${ZONE:?set ZONE, for example us-central2-b}
tries=${TRIES:-60}
pause=${PAUSE:-60}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tpu=(gcloud compute tpus tpu-vm)
command -v gcloud >/dev/null || fail "there is no gcloud on PATH; install Google's CLI"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Print the slice's state; ABSENT if there is none, UNKNOWN if the query fails.
state() {
  if ! "${tpu[@]}" describe "$name" --zone="$zone" --format='value(state)' \
    2>"$scratch/problem"; then
    if grep -q NOT_FOUND "$scratch/problem"; then
      echo ABSENT
    else
      cat "$scratch/problem" >&2
      echo UNKNOWN
    fi
  fi
}

on_all_workers() {
  "${tpu[@]}" ssh "$name" --zone="$zone" --worker=all --command="$1"
}

create() {
  local spot=()
  [[ ${SPOT:-0} != 1 ]] || spot=(--spot)
  "${tpu[@]}" create "$name" --zone="$zone" "${spot[@]}" \
    --accelerator-type="${ACCELERATOR:?set ACCELERATOR, for example v4-32}" \
    --version="${VERSION:-tpu-ubuntu2204-base}"
}

# Joined by &&: bash ignores errexit in a function whose status is tested.
install() {
  local archive=$scratch/ddaebm_jax.tar.gz
  git -C "$root" archive --format=tar.gz --output="$archive" HEAD &&
    "${tpu[@]}" scp "$archive" "$name:ddaebm_jax.tar.gz" --zone="$zone" --worker=all &&
    on_all_workers 'mkdir -p ddaebm_jax && tar -xzf ddaebm_jax.tar.gz -C ddaebm_jax &&
      cd ddaebm_jax && python3 -m venv .venv && . .venv/bin/activate &&
      pip install -q -U pip && pip install -q -e . "jax[tpu]"'
}

# Report an obstacle and wait; give up after TRIES of them.
hold() {
  held=$((held + 1))
  ((held < tries)) || fail "$1; given up after $tries times"
  echo "$1; again in $pause s ($held of at most $tries times)" >&2
  sleep "$pause"
}

run() {
  local command found status new=0 held=0
  command=$(printf '%q ' python launch/main.py "$@" --distributed)
  while true; do
    found=$(state)
    case $found in
      READY)
        if ((new)) && ! install; then
          hold "the slice $name cannot be installed on"
          continue
        fi
        new=0 held=0
        status=0
        on_all_workers "cd ddaebm_jax && . .venv/bin/activate && $command" || status=$?
        # A preemption takes a moment to show; a run that saves in time ends with 0,
        # like a finished one.
        sleep "$pause"
        [[ $(state) == READY ]] || continue
        ((status)) || return 0
        fail "the command failed on a slice that is still \
there; see its output above, or install again if there is no ddaebm_jax"
        ;;
      ABSENT)
        new=1
        create || hold "the slice $name cannot be made"
        ;;
      PREEMPTED | TERMINATED)
        "${tpu[@]}" delete "$name" --zone="$zone" --quiet ||
          hold "the slice $name cannot be deleted"
        ;;
      UNKNOWN | CREATING | STARTING | RESTARTING | REPAIRING | STOPPING | DELETING)
        hold "the slice $name is $found"
        ;;
      *) fail "the slice $name is '$found'; start or delete it, then run again" ;;
    esac
  done
}

case $action in
  delete) "${tpu[@]}" delete "$name" --zone="$zone" ;;
  *) "$action" "$@" ;;
esac
