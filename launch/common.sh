# shellcheck shell=bash
# What tpu_vm.sh, xpk.sh and slurm.sbatch share. Keeps to bash 3.2, which macOS still has.

config="" workdir="" name="" dry_run=""
# shellcheck disable=SC2034  # read by name in parse_flags
list="" logs="" delete=""
environment=() extra=() action=launch

fail() {
  echo "error: $*" >&2
  exit 2
}

# quote WORD...: one line that a shell reads as these words.
quote() {
  local word line="" apostrophe="'" escaped="'\\''"
  for word in "$@"; do
    case $word in
      "" | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//$apostrophe/$escaped}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# parse_flags "VALUES" "SWITCHES" FLAG...: sets the variable named as the flag, beside those that
# all launchers have; the words after -- are for the program.
parse_flags() {
  local values="config workdir name env $1" switches="dry_run list logs delete help $2"
  local flag word variable other
  shift 2
  while [ $# -gt 0 ]; do
    word=$1 flag=${1%%=*}
    shift
    case $word in
      --)
        extra=("$@")
        break
        ;;
      --?*) ;;
      *) fail "unexpected argument $(quote "$word"); flags of the program go after --" ;;
    esac
    variable=${flag#--}
    variable=${variable//-/_}
    case " $switches " in
      *" $variable "*)
        [ "$word" = "$flag" ] || fail "$flag takes no value"
        [ "$variable" != help ] || usage
        printf -v "$variable" yes
        continue
        ;;
    esac
    case " $values " in
      *" $variable "*) ;;
      *) fail "unknown flag $flag; --help lists those known, flags of the program go after --" ;;
    esac
    if [ "$word" != "$flag" ]; then
      word=${word#*=}
    else
      word=${1-}
      case $word in --*) word="" ;; esac
      [ $# -eq 0 ] || shift
    fi
    [ -n "$word" ] || fail "$flag needs a value"
    if [ "$variable" = env ]; then
      case $word in
        [A-Za-z_]*=*) environment+=("$word") ;;
        *) fail "--env must be NAME=VALUE, got $(quote "$word")" ;;
      esac
    else
      printf -v "$variable" %s "$word"
    fi
  done
  for other in list logs delete; do
    [ -n "${!other}" ] || continue
    [ "$action" = launch ] || fail "--$action and --$other exclude each other"
    action=$other
  done
}

# The comment at the top of the launcher.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit 0
}

# need FLAG...: refuses to go on without them.
need() {
  local flag variable
  for flag in "$@"; do
    variable=${flag//-/_}
    [ -n "${!variable}" ] || fail "--$flag is needed; --help explains it"
  done
}

# A name that Cloud TPU, Kubernetes and Slurm all take.
check_name() {
  local LC_ALL=C  # else a-z may take in A-Z
  case $name in
    *[!a-z0-9-]* | [!a-z]* | *-)
      fail "--name must be of a-z, 0-9 and -, begin with a letter and not end in -, got" \
        "$(quote "$name")"
      ;;
  esac
  [ ${#name} -le 40 ] || fail "--name must have at most 40 letters, got ${#name}"
}

# Before anything is paid for: a misspelt file, or a folder that only this machine has.
check_config() {
  [ -f "${config%%:*}" ] || fail "--config: no file $(quote "${config%%:*}") in $PWD"
}

check_workdir() {
  case $workdir in
    /* | gs://?*) ;;
    *) fail "--workdir must be in a bucket, gs://..., or the absolute path of a folder that all" \
      "hosts share, got $workdir" ;;
  esac
}

# program PYTHON: the program's command line, the same on every machine.
program() {
  local words=("$1" -m liftplace_jax.main "--config=$config" "--workdir=$workdir")
  if [ ${#environment[@]} -gt 0 ]; then words=(env "${environment[@]}" "${words[@]}"); fi
  if [ ${#extra[@]} -gt 0 ]; then words+=("${extra[@]}"); fi
  quote "${words[@]}"
}

# carry_out PLAN: runs the commands, or prints them.
carry_out() {
  if [ -n "$dry_run" ]; then
    printf '%s\n' "$1"
  else
    bash -euo pipefail -xc "$1"
  fi
}
