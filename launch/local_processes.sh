#!/usr/bin/env bash
# Starts N processes of one run on this machine: to try what a pod or a cluster does.
#
#   launch/local_processes.sh 2 --config=configs/gaussians25.py --workdir=runs/two
#
# DEVICES=2 gives each of them that many virtual CPU devices (default 1); PORT is the
# coordinator's (default 9876). Ends when all have ended, with the status of the first
# one that failed; the others are then stopped. Run it again with the same arguments,
# and the run goes on.
set -euo pipefail

usage() {
  sed -n '2,9s/^# \{0,1\}//p' "$0"
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  usage
  exit
fi
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  usage >&2
  exit 2
fi
processes=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}"

# Ends what still runs, and waits for it. It is told again and again: a signal that comes
# while a process is being started gets lost.
stop() {
  local times
  for ((times = 0; ; times++)); do
    if ((times % 25)); then
      kill -0 "${pids[@]}" 2>/dev/null || return 0
    else
      kill "${pids[@]}" 2>/dev/null || return 0
    fi
    sleep 0.2
  done
}

pids=()
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
for ((process = 0; process < processes; process++)); do
  "${PYTHON:-python}" "$root/launch/main.py" "$@" --distributed \
    --coordinator="localhost:${PORT:-9876}" \
    --num_processes="$processes" --process_id="$process" \
    > >(sed "s/^/[$process] /") 2> >(sed "s/^/[$process] /" >&2) &
  pids+=($!)
done
while ((${#pids[@]})); do
  wait -n -p ended "${pids[@]}"
  for i in "${!pids[@]}"; do
    [[ ${pids[i]} != "$ended" ]] || unset "pids[i]"
  done
done
