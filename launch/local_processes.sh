#!/usr/bin/env bash
# Starts N processes of one run on this machine, to try out what a pod or cluster does.
#
#   launch/local_processes.sh 2 --config=configs/gaussians25.py --workdir=runs/two
#
# DEVICES=2 gives each process two virtual CPU devices (default 1); PORT is the
# coordinator's (default 9876). The command ends when all processes have ended; if one
# fails, the others are stopped, and its status is returned. Run the same command again
# to resume the run.
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

# Stop what still runs, and wait for it. The signal is repeated: one that arrives while a
# process starts is lost.
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
