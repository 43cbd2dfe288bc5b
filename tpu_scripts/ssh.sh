#!/usr/bin/env bash
# A few machines that take ssh: one process on each, started and watched from here.
# shellcheck source-path=SCRIPTDIR source=lib.sh disable=SC2154  # read_options sets opt_...
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'END'
ssh.sh VERB --name NAME --hosts A,B,... [OPTION ...] [-- CONFIG key=value ...]

  setup    put this checkout and its environment on every host
  launch   start `rmft train CONFIG key=value ...` on every host, out of reach of the connection
  watch    say how it goes until the training has ended; with --resume begin again after a lost host
  resume   end what is left and begin again: the training goes on from its newest checkpoint
  logs     the logs of all hosts, each line with its host
  delete   end the training on every host

  --hosts A,B,...      names for ssh; the first one coordinates and must be reachable from the others by that name
  --address HOST       of the first host for the others, if it is another one
  --port N             for the start [8476]
  --folder FOLDER      on the hosts [rmft]
  --extra NAME         what to install: cuda, tpu or none [cuda]
  --resume             (watch) begin again
  --attempts N         (watch) how often at most [100]
  --every SECONDS      (watch) between two looks [60]
  --interface NAME     network interface of NCCL (NCCL_SOCKET_IFNAME)
  --jaxlib VERSION     whose XLA flags (xla_flags.tsv) [the tested version]
  --no-xla-flags       none
  --dry-run            print what would be done, do nothing
Each value may stand in the environment instead: RMFT_HOSTS for --hosts.
END
}

SSH=(ssh -o BatchMode=yes -o ConnectTimeout=10)

settings_are_good() {
  training_is_good
  ((${#hosts[@]} == 1)) || shared_out
}

# on_hosts COMMAND: on all hosts at the same time; %process% in it is the number of the host.
on_hosts() {
  local place failed=0 process
  local -a processes=()
  for place in "${!hosts[@]}"; do
    if [[ $opt_dry_run ]]; then
      run "${SSH[@]}" "${hosts[place]}" "${1//%process%/$place}"
    else
      "${SSH[@]}" "${hosts[place]}" "${1//%process%/$place}" </dev/null &
      processes+=($!)
    fi
  done
  for process in ${processes[@]+"${processes[@]}"}; do wait "$process" || failed=1; done
  return "$failed"
}

setup() {
  git -C "$HERE/.." diff --quiet HEAD || say "what is not committed is left out"
  local host install='.'
  [[ ${opt_extra:-cuda} == none ]] || install=".[${opt_extra:-cuda}]"
  for host in "${hosts[@]}"; do
    run bash -c "git -C $(quoted "$HERE/..") archive --format=tar.gz HEAD | $(quoted "${SSH[@]}" "$host" "mkdir -p $folder && tar xzf - -C $folder")"
  done
  on_hosts "cd $folder && (test -x venv/bin/python || python3 -m venv venv) && venv/bin/pip install --quiet --constraint constraints.txt $(quoted "$install")"
}

launch() {
  local flags=''
  case ${opt_extra:-cuda} in cuda) flags=$(xla_flags gpu) ;; esac
  local start="export PATH=\$PWD/venv/bin:\$PATH PYTHONUNBUFFERED=1 NCCL_DEBUG=\${NCCL_DEBUG:-WARN}
export JAX_COORDINATOR_ADDRESS=${opt_address:-${hosts[0]#*@}}:${opt_port:-8476} JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=%process%"
  [[ -z $opt_interface ]] || start+="
export $(quoted NCCL_SOCKET_IFNAME="$opt_interface")"
  on_hosts "cd $folder || exit
cat > $opt_name.sh <<'RUN'
$start
$(training_loop "$flags")
RUN
setsid nohup bash $opt_name.sh > $opt_name.log 2>&1 < /dev/null &
echo \$! > $opt_name.pid"
}

delete() { on_hosts "cd $folder && test ! -e $opt_name.pid || kill -- -\$(cat $opt_name.pid) 2> /dev/null || true"; }

resume() {
  delete
  [[ $opt_dry_run ]] || sleep 1
  launch
}

watch() {
  local attempts=${opt_attempts:-100} code misses=0
  if [[ $opt_dry_run ]]; then
    on_hosts "tail -n 1 $folder/$opt_name.log"
    [[ -z $opt_resume ]] || resume
    return
  fi
  while true; do
    code=$(ended on_hosts "tail -n 1 $folder/$opt_name.log")
    # one look that fails may be the fault of the way there
    if [[ $code == lost ]] && ((++misses < 3)); then
      say "$opt_name: a host does not answer"
      sleep "${opt_every:-60}"
      continue
    fi
    misses=0
    case $code in
      '') say "$opt_name: training" ;;
      0) say "$opt_name: done"; return 0 ;;
      lost | 75 | 143 | 13[47])
        say "$opt_name: lost ($code)"
        [[ $opt_resume ]] || { say "begin again with: ssh.sh resume, or watch --resume"; return 75; }
        ((attempts-- > 0)) || die "$opt_name was lost too often: see ssh.sh logs, or raise --attempts"
        resume || say "$opt_name: not every host answers yet"
        ;;
      *) say "$opt_name: the training ended with exit code $code, see ssh.sh logs"; return "$code" ;;
    esac
    sleep "${opt_every:-60}"
  done
}

logs() {
  local host
  for host in "${hosts[@]}"; do run "${SSH[@]}" "$host" "sed 's/^/$host: /' $folder/$opt_name.log"; done
}

VERB=${1:-}
case $VERB in
  --help | -h | '') usage; exit 0 ;;
  setup | launch | watch | resume | logs | delete) shift ;;
  *) die "$VERB is no verb: setup, launch, watch, resume, logs or delete" ;;
esac
read_options "name hosts address port folder extra attempts every interface jaxlib" "resume no-xla-flags" "$@"
name_is_good
need hosts
matches hosts '[A-Za-z0-9_.@-]+(,[A-Za-z0-9_.@-]+)*' 'names, a comma between them'
matches port '[0-9]{1,5}' 'a port'
matches folder '[A-Za-z0-9_./~-]+' 'a path of letters, digits, _ . / ~ -'
matches extra 'cuda|tpu|none' 'cuda, tpu or none'
for number in attempts every; do matches "$number" '[0-9]+' 'a number'; done
IFS=, read -ra hosts <<<"$opt_hosts"
[[ -z $(printf '%s\n' "${hosts[@]}" | sort | uniq -d) ]] || die "--hosts names a host twice: one process runs on each"
folder=${opt_folder:-rmft}
case $VERB in launch | resume) settings_are_good ;; watch) [[ -z $opt_resume ]] || settings_are_good ;; esac
"$VERB"
