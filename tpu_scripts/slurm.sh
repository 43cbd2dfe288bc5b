#!/usr/bin/env bash
# SLURM: one process for each node or for each GPU, in a virtual environment or a container.
# shellcheck source-path=SCRIPTDIR source=lib.sh disable=SC2154  # read_options sets opt_...
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'END'
slurm.sh VERB --name NAME [OPTION ...] [-- CONFIG key=value ...]

  launch   submit the training; it asks to be queued again when it is preempted, runs out of time or loses a process
  watch    say how it goes until it has left the queue
  resume   submit it again: it goes on from its newest checkpoint
  logs     the logs of all processes, each line with its number
  delete   cancel it

  --nodes N            (launch, resume)
  --gpus N             GPUs of a node; 0 = CPU only (launch, resume)
  --per node | gpu     one process for each [gpu; node without GPUs]
  --time HH:MM:SS      limit; 5 minutes before it the training saves and is queued again
  --partition P --account A --cpus N     of sbatch; cpus of a process
  --venv FOLDER        a virtual environment with rmft in it
  --container IMAGE    or a container: an image of pyxis, or a .sif file of apptainer
  --mounts A:B,...     folders for the container
  --interface NAME     network interface of NCCL and of the start (NCCL_SOCKET_IFNAME)
  --hca NAMES          InfiniBand adapters of NCCL (NCCL_IB_HCA)
  --logs FOLDER        [logs/NAME]
  --attempts N         how often it is queued again at most [100]
  --every SECONDS      (watch) between two looks [60]
  --jaxlib VERSION     whose XLA flags (xla_flags.tsv) [the tested version]
  --no-xla-flags       none
  --dry-run            print what would be done, do nothing
Each value may stand in the environment instead: RMFT_PARTITION for --partition.
END
}

settings_are_good() {
  need nodes gpus
  not_both venv container
  [[ -n $opt_venv$opt_container ]] || die "--venv or --container is missing: say where rmft is installed"
  [[ -z $opt_mounts || -n $opt_container ]] || die "--mounts is of containers: give --container too, or leave it out"
  per=${opt_per:-$([[ $opt_gpus == 0 ]] && echo node || echo gpu)}
  [[ $per != gpu || $opt_gpus != 0 ]] || die "--per gpu needs GPUs: set --gpus, or --per node"
  tasks=1
  [[ $per == node ]] || tasks=$opt_gpus
  training_is_good
  ((opt_nodes == 1)) || [[ -n $(setting out) ]] || die "out= is missing: set it to a path that all nodes mount, or gs://..."
}

# The lines of the job. After 75, 143 (rmft), 134 (JAX) and 137 (killed) the same command goes on from a checkpoint. The
# processes that are left name the one that is lost, so srun gives them the time to.
job() {
  local -a head=(--job-name="$opt_name" --nodes="$opt_nodes" --ntasks-per-node="$tasks" --output="$logs/slurm-%j.out"
    --open-mode=append --requeue --signal=TERM@300)
  [[ $opt_gpus == 0 ]] || head+=(--gpus-per-node="$opt_gpus")
  [[ -z $opt_time ]] || head+=(--time="$opt_time")
  [[ -z $opt_partition ]] || head+=(--partition="$opt_partition")
  [[ -z $opt_account ]] || head+=(--account="$opt_account")
  [[ -z $opt_cpus ]] || head+=(--cpus-per-task="$opt_cpus")
  local word flags=''
  echo '#!/bin/bash'
  for word in "${head[@]}"; do echo "#SBATCH $word"; done
  echo 'set -uo pipefail'
  [[ $opt_gpus == 0 ]] || flags=$(xla_flags gpu)
  [[ -z $flags ]] || echo "export $(quoted "$flags")"
  echo "export PYTHONUNBUFFERED=1 NCCL_DEBUG=\${NCCL_DEBUG:-WARN}"
  [[ -z $opt_interface ]] || echo "export $(quoted NCCL_SOCKET_IFNAME="$opt_interface")"
  [[ -z $opt_hca ]] || echo "export $(quoted NCCL_IB_HCA="$opt_hca")"
  local -a step=(srun --kill-on-bad-exit=0 --wait=300 --output="$logs/%t.log" --open-mode=append) start=()
  case $opt_container in
    '') echo "source $(quoted "$opt_venv/bin/activate")" ;;
    *.sif)
      start=(apptainer exec)
      [[ $opt_gpus == 0 ]] || start+=(--nv)
      [[ -z $opt_mounts ]] || start+=(--bind "$opt_mounts")
      start+=("$opt_container")
      ;;
    *)
      step+=(--container-image="$opt_container")
      [[ -z $opt_mounts ]] || step+=(--container-mounts="$opt_mounts")
      ;;
  esac
  cat <<END
step=
trap '[ -z "\$step" ] || kill -TERM \$step' TERM
$(quoted "${step[@]}" ${start[@]+"${start[@]}"} rmft train "${REST[@]}") & step=\$!
wait \$step; code=\$?
while kill -0 \$step 2> /dev/null; do wait \$step; code=\$?; done
echo "training ended with exit code \$code"
case \$code in 75|134|137|143) [ "\${SLURM_RESTART_COUNT:-0}" -ge ${opt_attempts:-100} ] || scontrol requeue "\$SLURM_JOB_ID" ;; esac
exit \$code
END
}

launch() {
  local text
  text=$(job)
  run mkdir -p "$logs"
  run_with "$text" sbatch --parsable
}

watch() {
  local now
  while true; do
    if [[ $opt_dry_run ]]; then
      run squeue --me --noheader --name="$opt_name" --format=%T
      run sacct --noheader --allocations --parsable2 --name="$opt_name" --format=State
      return
    fi
    now=$(squeue --me --noheader --name="$opt_name" --format=%T | head -n 1)
    if [[ -z $now ]]; then
      now=$(sacct --noheader --allocations --parsable2 --name="$opt_name" --format=State | tail -n 1)
      say "$opt_name: ${now:-is in no queue}"
      [[ $now == COMPLETED* ]]
      return
    fi
    say "$opt_name: $now"
    sleep "${opt_every:-60}"
  done
}

logs() { run bash -c "cd $(quoted "$logs") && for file in *.log; do sed \"s/^/\${file%.log}: /\" \"\$file\"; done"; }

delete() { run scancel --me --name="$opt_name"; }

VERB=${1:-}
case $VERB in
  --help | -h | '') usage; exit 0 ;;
  launch | watch | resume | logs | delete) shift ;;
  *) die "$VERB is no verb: launch, watch, resume, logs or delete" ;;
esac
read_options "name nodes gpus per time partition account cpus venv container mounts interface hca logs attempts every jaxlib" \
  "no-xla-flags" "$@"
name_is_good
for number in nodes cpus; do matches "$number" '[1-9][0-9]*' 'a number from 1 on'; done
for number in gpus attempts every; do matches "$number" '[0-9]+' 'a number'; done
matches per 'node|gpu' 'node or gpu'
matches time '([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}' 'a time of sbatch, such as 12:00:00'
logs=${opt_logs:-logs/$opt_name}
case $VERB in launch | resume) settings_are_good; VERB=launch ;; esac
"$VERB"
