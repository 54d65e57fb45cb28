#!/usr/bin/env bash
# One run on all hosts of a Cloud TPU slice, each with the package installed and DIR mounted:
#   configs/launch/tpu_pod.sh NAME ZONE --config=FILE --workdir=DIR
# The hosts find each other by themselves. After a slice was preempted and recreated, run it again.
name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="python3 -m dpjax train $(printf '%q ' "$@")"
