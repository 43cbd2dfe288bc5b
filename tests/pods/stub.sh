#!/usr/bin/env bash
# Stands in for gcloud, kubectl, xpk, sbatch, srun, squeue, sacct, scancel, scontrol and ssh, under whose names the tests put it
# on the PATH. It notes every call in $STUB/calls and plays the machines: a worker is a folder with what runs in it.
set -euo pipefail
name=$(basename "$0")
words=$(printf ' %q' "$@")
printf '%s%s\n' "$name" "$words" >> "$STUB/calls"

# value OPTION WORD...: of --option=value among the words
value() {
  local wanted=$1 word
  shift
  for word; do [[ $word != "$wanted="* ]] || { printf '%s' "${word#*=}"; return; }; done
}

# at FOLDER COMMAND: what a shell on that worker does; python3 -m venv gives it an environment with $STUB_RMFT as rmft.
at() {
  mkdir -p "$1"
  (cd "$1" && HOME=$1 PATH=$STUB/machine:$PATH exec bash -c "$2")
}

end_all() {
  local file
  for file in "$STUB"/workers/*/rmft/*.pid; do
    [[ -e $file ]] || continue
    kill -KILL -- "-$(cat "$file")" 2> /dev/null || true
  done
}

object() { printf '%s/objects/%s' "$STUB" "${1#gs://}"; }

case "$name $*" in
  'gcloud compute tpus queued-resources create '*) echo ACTIVE > "$STUB/state" ;;
  'gcloud compute tpus queued-resources describe '*) cat "$STUB/state" 2> /dev/null || { echo NOT_FOUND >&2; exit 1; } ;;
  'gcloud compute tpus queued-resources delete '*) end_all; rm -rf "$STUB/state" "$STUB/workers" ;;
  'gcloud compute tpus tpu-vm ssh '*)
    [[ $(cat "$STUB/state") == ACTIVE ]]
    for ((worker = 0; worker < ${STUB_WORKERS:-1}; worker++)); do
      at "$STUB/workers/$5-$worker" "$(value --command "$@")"
    done
    ;;
  'gcloud storage cp - '*) mkdir -p "$(dirname "$(object "$4")")" && cat > "$(object "$4")" ;;
  'gcloud storage cp gs://'*) cp "$(object "$3")" "$4" ;;
  'gcloud storage rsync '*) mkdir -p "$5" && cp -r "$(object "$4")/." "$5" ;;
  'kubectl apply -f -') cat > "$STUB/jobset" && echo Running > "$STUB/state" ;;
  'kubectl get jobset '*)
    [[ -e $STUB/state ]] || exit 0
    echo "is $(cat "$STUB/state") $(cat "$STUB/restarts" 2> /dev/null || true)"
    ;;
  'kubectl delete jobset '*) rm -f "$STUB/state" "$STUB/jobset" ;;
  'sbatch '*)
    cat > "$STUB/job"
    echo RUNNING > "$STUB/state"
    SLURM_JOB_ID=4711 setsid bash "$STUB/job" > "$STUB/job.log" 2>&1 < /dev/null &
    echo $! > "$STUB/job.pid"
    echo 4711
    ;;
  'srun '*)
    # four tasks on one node, as SLURM would tell them; the exit code is the highest, as srun's is
    logs=$(value --output "$@")
    while [[ $1 == --* ]]; do shift; done
    processes=() code=0
    for task in 0 1 2 3; do
      SLURM_STEP_NODELIST=127.0.0.1 SLURM_NTASKS=4 SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_NUM_NODES=1 \
        SLURM_STEP_TASKS_PER_NODE=4 "$@" >> "${logs//%t/$task}" 2>&1 &
      processes+=($!)
      echo $! > "$STUB/task$task.pid"
    done
    for process in "${processes[@]}"; do
      one=0
      wait "$process" || one=$?
      ((one <= code)) || code=$one
    done
    exit "$code"
    ;;
  'scontrol requeue '*) echo "$2" >> "$STUB/requeued" ;;
  'squeue '*) if [[ -e $STUB/job.pid ]] && kill -0 "$(cat "$STUB/job.pid")" 2> /dev/null; then echo RUNNING; fi ;;
  'sacct '*) grep -q 'exit code 0$' "$STUB/job.log" && echo COMPLETED || echo FAILED ;;
  'scancel '*) kill -KILL -- "-$(cat "$STUB/job.pid")" 2> /dev/null || true ;;
  'ssh '*)
    while [[ $1 == -o ]]; do shift 2; done
    [[ ! -e $STUB/down-$1 ]]
    at "$STUB/workers/$1" "mkdir -p rmft; $2"
    ;;
esac
