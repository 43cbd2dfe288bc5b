#!/usr/bin/env bash
# Cloud TPU: one VM, a pod slice, or several slices, by queued resources.
# shellcheck source-path=SCRIPTDIR source=lib.sh disable=SC2154  # read_options sets opt_...
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'END'
tpu.sh VERB --name NAME --zone ZONE [OPTION ...] [-- CONFIG key=value ...]

  create   ask for the machines and wait until they are there
  setup    put this checkout and its environment on every worker
  launch   start `rmft train CONFIG key=value ...` on every worker, out of reach of the connection
  watch    say how it goes until the training has ended; with --resume, after a preemption or a lost process,
           create, set up and launch again: the training goes on from its newest checkpoint
  resume   the part of `watch --resume` that begins again, by hand
  logs     the logs of all workers, each line with slice and worker
  sync     copy what the run has written from --bucket to the folder --to
  delete   give the machines back; the bucket stays

  --type TYPE          accelerator, such as v5litepod-16, v5p-128, v6e-256 (create, launch, watch, resume)
  --slices N           so many slices of that type [1]
  --runtime VERSION    TPU software [by the type]
  --spot | --reserved  kind of capacity [on demand]
  --bucket gs://...    code goes there, and the run: out=BUCKET/NAME unless `out=` is given
  --project PROJECT    [gcloud's own]
  --resume             (watch) begin again after preemptions
  --attempts N         (watch) how often at most [100]
  --every SECONDS      (create, watch) between two looks [60]
  --to FOLDER          (sync) [runs/NAME]
  --jaxlib VERSION     whose XLA flags (xla_flags.tsv) [the tested version]
  --no-xla-flags       none
  --dry-run            print what would be done, do nothing
Each value may stand in the environment instead: RMFT_ZONE for --zone.
END
}

TPU=(gcloud compute tpus)

# Sets what follows from the type: the generation, its usual runtime.
type_is_good() {
  need type
  matches type 'v5litepod-[0-9]+|v5p-[0-9]+|v6e-[0-9]+' 'v5litepod-N, v5p-N or v6e-N (see gcloud compute tpus accelerator-types list)'
  case $opt_type in
    v5litepod-*) generation=v5e runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) generation=v5p runtime=v2-alpha-tpuv5 ;;
    v6e-*) generation=v6e runtime=v2-alpha-tpuv6e ;;
  esac
  runtime=${opt_runtime:-$runtime}
}

# The training, with out= in the bucket and the run's name.
settings_are_good() {
  training_is_good
  [[ -n $(setting out) || -z $opt_bucket ]] || REST+=("out=$opt_bucket/$opt_name")
  shared_out
}

nodes() {
  local slice
  if ((slices == 1)); then printf '%s\n' "$opt_name"; return; fi
  for ((slice = 0; slice < slices; slice++)); do printf '%s-%d\n' "$opt_name" "$slice"; done
}

# on_workers COMMAND: on all workers of all slices, at the same time; fails if one of them does.
on_workers() {
  local node failed=0 process
  local -a processes=()
  for node in $(nodes); do
    if [[ $opt_dry_run ]]; then
      run "${TPU[@]}" tpu-vm ssh "$node" "${place[@]}" --worker=all --command="$1"
    else
      "${TPU[@]}" tpu-vm ssh "$node" "${place[@]}" --worker=all --command="$1" &
      processes+=($!)
    fi
  done
  for process in ${processes[@]+"${processes[@]}"}; do wait "$process" || failed=1; done
  return "$failed"
}

# state: of the request; GONE where there is none, UNKNOWN where nobody answers.
state() {
  local said
  if said=$("${TPU[@]}" queued-resources describe "$opt_name" "${place[@]}" --format='value(state.state)' 2>&1); then
    tail -n 1 <<<"$said"
  elif [[ $said == *NOT_FOUND* ]]; then
    echo GONE
  else
    echo UNKNOWN
  fi
}

create() {
  local -a many=(--node-id="$opt_name") kind=()
  ((slices == 1)) || many=(--node-count="$slices" --node-prefix="$opt_name")
  [[ -z $opt_spot ]] || kind=(--spot)
  [[ -z $opt_reserved ]] || kind=(--reserved)
  run "${TPU[@]}" queued-resources create "$opt_name" "${place[@]}" --accelerator-type="$opt_type" \
    --runtime-version="$runtime" "${many[@]}" ${kind[@]+"${kind[@]}"} --async
  [[ -z $opt_dry_run ]] || return 0
  local now
  while now=$(state); [[ $now != ACTIVE ]]; do
    case $now in FAILED | SUSPEND* | GONE) say "the request of $opt_name has ended as $now"; return 1 ;; esac
    say "$opt_name: $now"
    sleep "$every"
  done
  say "$opt_name is there"
}

setup() {
  git -C "$HERE/.." diff --quiet HEAD || say "what is not committed is left out"
  local archive="$opt_bucket/code/$opt_name.tar.gz"
  run bash -c "git -C $(quoted "$HERE/..") archive --format=tar.gz HEAD | gcloud storage cp - $(quoted "$archive")"
  on_workers "$(cat <<END
set -e
mkdir -p ~/rmft && cd ~/rmft
gcloud storage cp $(quoted "$archive") code.tar.gz
tar xzf code.tar.gz
test -x venv/bin/python || python3 -m venv venv
venv/bin/pip install --quiet --constraint constraints.txt '.[tpu,gcs]'
END
)"
}

# The exit code of the training is the last line of its log: the connection need not live that long.
launch() {
  local flags
  flags=$(xla_flags "$generation")
  on_workers "$(cat <<END
set -e
cd ~/rmft
cat > run.sh <<'RUN'
export PATH=\$HOME/rmft/venv/bin:\$PATH PYTHONUNBUFFERED=1
$(training_loop "$flags")
RUN
setsid nohup bash run.sh > train.log 2>&1 < /dev/null &
echo \$! > train.pid
END
)"
}

begin_again() {
  local now
  now=$(state)
  if [[ $opt_dry_run || $now != ACTIVE ]]; then
    [[ $now == GONE && -z $opt_dry_run ]] || delete
    create && setup || return 1
  else # the machines are there, a process was lost: none may be left that the new ones would meet
    on_workers "test ! -e ~/rmft/train.pid || kill -- -\$(cat ~/rmft/train.pid) 2>/dev/null || true"
  fi
  launch
}

watch() {
  local attempts=${opt_attempts:-100} code now misses=0
  if [[ $opt_dry_run ]]; then
    run "${TPU[@]}" queued-resources describe "$opt_name" "${place[@]}" --format='value(state.state)'
    on_workers "tail -n 1 ~/rmft/train.log"
    [[ -z $opt_resume ]] || begin_again
    return
  fi
  while true; do
    now=$(state) code=''
    [[ $now != ACTIVE ]] || code=$(ended on_workers "tail -n 1 ~/rmft/train.log")
    # one look that fails may be the fault of the way there
    if [[ $code == lost ]] && ((++misses < 3)); then
      say "$opt_name: a worker does not answer"
      sleep "$every"
      continue
    fi
    misses=0
    case $now/$code in
      ACTIVE/) say "$opt_name: training" ;;
      ACTIVE/0) say "$opt_name: done"; return 0 ;;
      ACTIVE/lost | ACTIVE/75 | ACTIVE/143 | ACTIVE/13[47] | SUSPEND* | FAILED/* | GONE/* | PREEMPTED/*)
        say "$opt_name: lost ($now${code:+, $code})"
        [[ $opt_resume ]] || { say "begin again with: tpu.sh resume, or watch --resume"; return 75; }
        ((attempts-- > 0)) || die "$opt_name was lost too often: raise --attempts, or take other capacity than --spot"
        begin_again || say "$opt_name: not yet"
        ;;
      ACTIVE/*) say "$opt_name: the training ended with exit code $code, see tpu.sh logs"; return "$code" ;;
      *) say "$opt_name: $now" ;;
    esac
    sleep "$every"
  done
}

logs() {
  local node
  for node in $(nodes); do
    run "${TPU[@]}" tpu-vm ssh "$node" "${place[@]}" --worker=all \
      --command="sed \"s/^/$node \$(hostname): /\" ~/rmft/train.log"
  done
}

sync() { run gcloud storage rsync --recursive "$opt_bucket/$opt_name" "${opt_to:-runs/$opt_name}"; }

delete() { run "${TPU[@]}" queued-resources delete "$opt_name" "${place[@]}" --force --quiet; }

VERB=${1:-}
case $VERB in
  --help | -h | '') usage; exit 0 ;;
  create | setup | launch | watch | resume | logs | sync | delete) shift ;;
  *) die "$VERB is no verb: create, setup, launch, watch, resume, logs, sync or delete" ;;
esac
read_options "name zone type slices runtime bucket project attempts every to jaxlib" "spot reserved resume no-xla-flags" "$@"
name_is_good
need zone
matches slices '[1-9][0-9]*' 'a number from 1 on'
matches every '[0-9]+' 'seconds'
matches attempts '[0-9]+' 'a number'
matches bucket 'gs://([^/]+/)*[^/]+' 'gs://BUCKET or gs://BUCKET/FOLDER, without a slash at the end'
not_both spot reserved
place=(--zone="$opt_zone")
[[ -z $opt_project ]] || place+=(--project="$opt_project")
slices=${opt_slices:-1} every=${opt_every:-60}
case $VERB in
  create) type_is_good ;;
  setup | sync) need bucket ;;
  launch) type_is_good; settings_are_good ;;
  resume) need bucket; type_is_good; settings_are_good; VERB=begin_again ;;
  watch) [[ -z $opt_resume ]] || { need bucket; type_is_good; settings_are_good; } ;;
esac
"$VERB"
