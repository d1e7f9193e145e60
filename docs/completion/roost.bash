# SPDX-License-Identifier: MIT
# Completion of roost's commands, options and values for bash. The options are those that the
# program's own --help tells, so they are always the right ones.

_roost_options() {  # PROGRAM [COMMAND]
  "$@" --help 2>/dev/null | sed -nE 's/^ +(-[a-zA-Z],)?(--[a-z][a-z-]*).*/\2/p'
}

_roost() {
  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
  local program=${COMP_WORDS[0]} commands="serve copy info bench proxy"
  local command=${COMP_WORDS[1]} values=
  COMPREPLY=()
  if ((COMP_CWORD == 1)); then
    [[ $cur == -* ]] && values=$(_roost_options "$program") || values=$commands
  elif [[ " $commands " != *" $command "* ]]; then
    return
  else
    case $prev in
      --tls) values="off allowed required" ;;
      --event-loop) values="auto io_uring epoll" ;;
      --aio) values="auto threads native io_uring" ;;
      --progress) values="auto none bar json" ;;
      --listen) values="unix: tcp: vsock:" ;;
      *) [[ $cur == -* ]] && values=$(_roost_options "$program" "$command") ;;
    esac
  fi
  if [[ $values ]]; then
    mapfile -t COMPREPLY < <(compgen -W "$values" -- "$cur")
    [[ $prev == --listen ]] && compopt -o nospace 2>/dev/null
  else
    mapfile -t COMPREPLY < <(compgen -f -- "$cur")
    compopt -o filenames 2>/dev/null
  fi
}

complete -F _roost roost
