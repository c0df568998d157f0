#!/usr/bin/env bash
# Runs on TPUs of a GKE cluster, through xpk (pip install xpk; https://github.com/AI-Hypercomputer/xpk).
#
#   launch/xpk.sh --cluster=CLUSTER --name=lift --tpu-type=v5litepod-16 \
#       --config=configs/celeba64_unet.py:ratio=0.9 --workdir=gs://BUCKET/celeba-90 [-- FLAG...]
#
# Preempted or crashed workers are restarted by the cluster and go on from the last checkpoint; bad
# input (status 2) is not tried again.
#
#   --config FILE[:args]    as of liftplace_jax.main; the file is that of this folder, or the image
#   --workdir FOLDER        in a bucket, gs://..., or the absolute path of a volume that all pods mount
#   --name NAME             of the workload
#   --cluster CLUSTER       made by: xpk cluster create
#   --tpu-type TYPE         such as v5litepod-16
#   --num-slices N          (default: 1)
#   --zone ZONE, --project PROJECT    of the cluster (default: gcloud's)
#   --base-docker-image IMAGE    xpk copies this folder into it (default: python:3.11), and the
#                           package is installed when the workload starts
#   --docker-image IMAGE    instead: one that has the package, and this repository as its folder
#   --max-restarts N        (default: 50)
#   --env NAME=VALUE        environment of the program; may be repeated
#   --dry-run               prints the commands and runs nothing
#   --list | --logs | --delete    workloads; each pod's last lines; ends the workload
#   -- FLAG...              flags of liftplace_jax.main

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR source=common.sh
source launch/common.sh

cluster="" tpu_type="" num_slices=1 zone="" project="" max_restarts=50
base_docker_image="" docker_image=""
parse_flags "cluster tpu_type num_slices zone project max_restarts base_docker_image docker_image" \
  "" "$@"

need cluster
where=$(quote "--cluster=$cluster" ${zone:+"--zone=$zone"} ${project:+"--project=$project"})
if [ "$action" != list ]; then
  need name
  check_name
fi

case $action in
  list) plan="xpk workload list $where" ;;
  logs)
    plan="kubectl logs --selector=jobset.sigs.k8s.io/jobset-name=$name --all-containers --prefix"
    plan+=" --tail=20"
    ;;
  delete) plan="xpk workload delete $where --workload=$name --force" ;;
  launch)
    need config workdir tpu-type
    check_workdir
    # exec, so that the signal of a preemption reaches Python and not the shell around it.
    command="exec $(program python)"
    if [ -n "$docker_image" ]; then
      [ -z "$base_docker_image" ] || fail "--docker-image and --base-docker-image exclude each other"
      image="--docker-image=$docker_image"
    else
      check_config
      image="--base-docker-image=${base_docker_image:-python:3.11}"
      command="pip install --quiet '.[tpu]' && $command"
    fi
    case $command in
      *$'\n'*) fail "xpk takes no line break in the program's flags" ;;
    esac
    # The time that saving may take; Kubernetes' own 30 seconds are short for a large model. And xpk
    # starts again after 42 and 127 to 255; 75 is that of a bucket that could not be reached.
    plan="xpk workload create $where --workload=$name $(quote "--tpu-type=$tpu_type" \
      "--num-slices=$num_slices" "$image" "--max-restarts=$max_restarts") \\
  --termination-grace-period-seconds=120 --restart-on-exit-codes=75 --command=$(quote "$command")"
    ;;
esac
carry_out "$plan"
