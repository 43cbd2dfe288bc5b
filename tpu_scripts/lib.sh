# shellcheck shell=bash disable=SC2154  # read_options sets opt_...
# What the scripts beside this file share: options, refusals, dry runs, XLA's flags, the training command.
# To be sourced. Options become variables: --node-count is $opt_node_count, empty where it is not given.

set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REST=()

# die WHAT: one line, exit code 2, as `rmft` does for what the user can mend.
die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

say() { printf '%s\n' "$*" >&2; }

# read_options VALUES SWITCHES ARGUMENT...: VALUES and SWITCHES are option names; what follows `--` goes into REST.
# A value that is not given is taken from the environment: --zone from RMFT_ZONE.
read_options() {
  local values=" $1 " switches=" $2 dry-run " name value
  shift 2
  for name in $values; do
    value=$(printf 'RMFT_%s' "$name" | tr 'a-z-' 'A-Z_')
    printf -v "opt_${name//-/_}" '%s' "${!value:-}"
  done
  for name in $switches; do printf -v "opt_${name//-/_}" ''; done
  while (($#)); do
    case $1 in
      --help | -h) usage; exit 0 ;;
      --) shift; REST=("$@"); return ;;
      --*) ;;
      *) die "$1 is no option of $(basename "$0") $VERB: settings of the training go behind --" ;;
    esac
    name=${1%%=*}
    name=${name#--}
    if [[ $switches == *" $name "* ]]; then
      [[ $1 != *=* ]] || die "--$name takes no value: leave $1 out or write --$name"
      printf -v "opt_${name//-/_}" yes
    elif [[ $values == *" $name "* ]]; then
      if [[ $1 == *=* ]]; then
        value=${1#*=}
      else
        (($# > 1)) || die "--$name has no value: write --$name VALUE"
        value=$2
        shift
      fi
      [[ -n $value ]] || die "--$name is empty: give a value or leave it out"
      printf -v "opt_${name//-/_}" '%s' "$value"
    else
      die "--$name is no option of $(basename "$0") $VERB: see $(basename "$0") --help"
    fi
    shift
  done
}

# need NAME...: refuse when an option is missing.
need() {
  local name variable
  for name; do
    variable=opt_${name//-/_}
    [[ -n ${!variable} ]] ||
      die "--$name is missing: give --$name VALUE, or set RMFT_$(printf %s "$name" | tr 'a-z-' 'A-Z_')"
  done
}

# not_both A B: refuse when both are given.
not_both() {
  local first=opt_${1//-/_} second=opt_${2//-/_}
  [[ -z ${!first} || -z ${!second} ]] || die "--$1 and --$2 contradict each other: give one of them"
}

# matches NAME PATTERN WHAT: refuse an option that is given and does not match.
matches() {
  local variable=opt_${1//-/_}
  [[ -z ${!variable} || ${!variable} =~ ^($2)$ ]] || die "--$1 is ${!variable}: it must be $3"
}

name_is_good() {
  need name
  matches name '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' 'lower-case letters, digits and hyphens, a letter first, 40 at most'
}

# quoted WORD...: one line that a shell reads as these words.
quoted() {
  local word line=''
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then line+=" $word"; else line+=" '${word//\'/\'\\\'\'}'"; fi
  done
  printf '%s' "${line# }"
}

# run WORD...: do it, or print it under --dry-run. What only looks is done through `look`.
run() {
  if [[ $opt_dry_run ]]; then
    quoted "$@"
    printf '\n'
  else
    "$@"
  fi
}

# run_with TEXT WORD...: the same with TEXT as standard input.
run_with() {
  local text=$1
  shift
  if [[ $opt_dry_run ]]; then
    printf "%s <<'END'\n%s\nEND\n" "$(quoted "$@")" "$text"
  else
    "$@" <<<"$text"
  fi
}

# The settings of a training behind `--`: CONFIG key=value ...
training_is_good() {
  ((${#REST[@]})) || die "no config: name it behind --, such as -- configs/enron_cpu.yaml training.steps=1000"
  [[ ${REST[0]} != *=* && ${REST[0]} != -* ]] || die "${REST[0]} is no config: the first word behind -- is a YAML file"
  local word
  for word in "${REST[@]:1}"; do
    [[ $word == *=* ]] || die "$word is no setting: write key.path=value behind the config"
  done
}

# setting KEY: the value that REST gives KEY, the last one counts; empty without one.
setting() {
  local word found=''
  for word in "${REST[@]:1}"; do [[ $word != "$1="* ]] || found=${word#*=}; done
  printf '%s' "$found"
}

# shared_out: refuse an out= that the processes of several machines cannot share.
shared_out() {
  local out
  out=$(setting out)
  [[ $out == gs://* || $out == /* ]] ||
    die "out=${out:-(not set)} is not shared by several machines: set out=gs://BUCKET/PATH or a path that all mount"
}

# below A B: whether version A comes before B; numbers parted by points.
below() {
  local IFS=. place
  local -a a b
  read -ra a <<<"$1"
  read -ra b <<<"$2"
  for place in 0 1 2; do
    ((10#${a[place]:-0} == 10#${b[place]:-0})) || { ((10#${a[place]:-0} < 10#${b[place]:-0})); return; }
  done
  return 1
}

# xla_flags ACCELERATOR: `NAME=VALUE`, the environment variable with the flags that xla_flags.tsv has for it and for
# --jaxlib (the tested version unless given). Nothing with --no-xla-flags; refuses a version that no row covers.
xla_flags() {
  [[ -z $opt_no_xla_flags ]] || return 0
  local version=${opt_jaxlib:-$(sed -n 's/^jaxlib==//p' "$HERE/../constraints.txt")}
  local accelerator variable from before flag names='' flags=''
  [[ $version =~ ^[0-9]+(\.[0-9]+){1,2}$ ]] || die "--jaxlib is ${version:-empty}: it must be a version such as 0.10.2"
  while IFS=$'\t' read -r accelerator variable from before flag _; do
    if [[ $accelerator == "$1" ]] && ! below "$version" "$from" && below "$version" "$before"; then
      names=$variable
      flags+=" $flag"
    fi
  done < <(grep -v '^#' "$HERE/xla_flags.tsv")
  [[ -n $names ]] || die "xla_flags.tsv has no flags for $1 and jaxlib $version: add rows that its parser knows (an unknown flag ends the process), or give --no-xla-flags"
  printf '%s=%s' "$names" "${flags# }"
}

# training_loop FLAGS: the shell text that runs the training where it is, again while that helps: after exit code 75 (another
# process of the run was lost) at once. 143 (told to stop: saved) and all others end it. Its last line says how it ended.
# SIGTERM is handed on: a container's first process gets it alone.
training_loop() {
  local flags=$1
  [[ -z $flags ]] || printf 'export %s\n' "$(quoted "$flags")"
  cat <<END
told= training= code=75
trap 'told=yes; [ -z "\$training" ] || kill -TERM \$training' TERM
while [ \$code = 75 ]; do
  $(quoted rmft train "${REST[@]}") & training=\$!
  [ -z "\$told" ] || kill -TERM \$training
  wait \$training; code=\$?
  while kill -0 \$training 2> /dev/null; do wait \$training; code=\$?; done
done
echo "training ended with exit code \$code"
exit \$code
END
}

# ended COMMAND...: prints the highest exit code once every process has ended, by the last lines of their logs, which COMMAND
# prints; nothing while one runs; lost when one cannot be asked.
ended() {
  local said
  said=$("$@" 2>/dev/null) || { echo lost; return; }
  if grep -qv '^training ended with exit code ' <<<"$said"; then return; fi
  awk '{ print $NF }' <<<"$said" | sort -n | tail -n 1
}
