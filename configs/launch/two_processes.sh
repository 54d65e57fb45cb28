#!/usr/bin/env bash
# Two processes on this machine, which start and agree as two hosts do:
#   configs/launch/two_processes.sh --config=quickstart --workdir=DIR
start() {
  python -m dpjax train "$@" --coordinator="localhost:${PORT:-29500}" --num_processes=2
}
start "$@" --process_id=1 &
start "$@" --process_id=0
code=$?
wait $! || code=$?
exit $code
