#!/usr/bin/env bash
# Runs on a Cloud TPU VM: one host or a pod. Makes it, installs there, starts every worker.
#
#   launch/tpu_vm.sh --name=lift --zone=us-west4-a --accelerator-type=v5litepod-16 --spot \
#       --config=configs/celeba64_unet.py:ratio=0.9 --workdir=gs://BUCKET/celeba-90 [-- FLAG...]
#
# The same command goes on after a preemption or a crash; it makes the TPU anew if need be.
#
#   --config FILE[:args]    as of liftplace_jax.main; the file is that of --ref
#   --workdir FOLDER        in a bucket, gs://..., or the absolute path of a disk that all workers
#                           mount (such as Filestore)
#   --name NAME             of the TPU (and of the queued resource)
#   --zone ZONE             such as us-west4-a
#   --accelerator-type TYPE such as v5litepod-16; its list: gcloud compute tpus accelerator-types
#   --runtime-version V     the VM's image (default: the one for the type, see
#                           https://cloud.google.com/tpu/docs/runtimes)
#   --project PROJECT       (default: gcloud's)
#   --spot                  cheaper, may be preempted
#   --queued                through a queued resource: waits until there is capacity
#   --ref REF               commit, branch or tag of this repository to run (default: HEAD)
#   --env NAME=VALUE        environment of the program; may be repeated
#   --dry-run               prints the commands and runs nothing
#   --list | --logs | --delete    TPUs of the zone; each worker's last lines; ends and removes it
#   -- FLAG...              flags of liftplace_jax.main

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR source=common.sh
source launch/common.sh

zone="" project="" accelerator_type="" runtime_version="" ref=HEAD spot="" queued=""
parse_flags "zone project accelerator_type runtime_version ref" "spot queued" "$@"

# Prints the image that goes with the accelerator.
runtime_for() {
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) fail "--runtime-version is needed for --accelerator-type=$1; the list is at" \
      "https://cloud.google.com/tpu/docs/runtimes" ;;
  esac
}

# Prints the commands that leave a TPU of this name ready; a preempted one is made anew.
make_tpu() {
  local options
  options=$(quote "--accelerator-type=$accelerator_type" ${spot:+--spot})
  if [ -n "$queued" ]; then
    cat <<PLAN
state=\$($queue describe $name $where --format='value(state.state)' 2> /dev/null || true)
case \$state in FAILED | SUSPENDED)
  $queue delete $name $where --force --quiet
  state= ;;
esac
[ -n "\$state" ] ||
  $queue create $name --node-id=$name $where $options --runtime-version=$runtime_version
while state=\$($queue describe $name $where --format='value(state.state)'); [ "\$state" != ACTIVE ]; do
  case \$state in FAILED | SUSPENDED) echo "the queued resource is \$state" >&2; false ;; esac
  sleep 60
done
PLAN
  else
    cat <<PLAN
state=\$($tpu describe $name $where --format='value(state)' 2> /dev/null || true)
[ "\$state" != PREEMPTED ] || $tpu delete $name $where --quiet
[ "\$state" = READY ] ||
  $tpu create $name $where $options --version=$runtime_version
PLAN
  fi
}

need zone
tpu="gcloud compute tpus tpu-vm" queue="gcloud compute tpus queued-resources"
where=$(quote "--zone=$zone" ${project:+"--project=$project"})
if [ "$action" != list ]; then
  need name
  check_name
fi

case $action in
  list) plan="$tpu list $where"$'\n'"$queue list $where" ;;
  logs)
    plan="$tpu ssh $name $where --worker=all --command='tail -n 20 liftplace/run.log'"
    ;;
  delete)
    plan="$tpu delete $name $where --quiet"
    [ -z "$queued" ] || plan="$queue delete $name $where --force --quiet"
    ;;
  launch)
    need config workdir accelerator-type
    check_config
    check_workdir
    [ -n "$runtime_version" ] || runtime_version=$(runtime_for "$accelerator_type")
    runtime_version=$(quote "$runtime_version")
    # The images have Python 3.10; uv brings a newer one. Code goes by copy: no worker needs a key.
    install="tar -xzf $name.tar.gz && cd liftplace && python3 -m pip install --quiet --user uv"
    install+=" && python3 -m uv venv --allow-existing --quiet --python 3.11"
    install+=" && python3 -m uv pip install --quiet -e '.[tpu]'"
    # shellcheck disable=SC2016  # for the worker's shell
    start='cd liftplace && if [ -f run.pid ] && kill -0 "$(cat run.pid)" 2> /dev/null;'
    start+=' then echo "runs already"; else nohup '"$(program .venv/bin/python)"
    start+=' >> run.log 2>&1 < /dev/null & echo $! > run.pid; fi'
    plan="mkdir -p build
git archive --format=tar.gz --prefix=liftplace/ --output=build/$name.tar.gz $(quote "$ref")
$(make_tpu)
$tpu scp build/$name.tar.gz $name: $where --worker=all
$tpu ssh $name $where --worker=all --command=$(quote "$install")
$tpu ssh $name $where --worker=all --command=$(quote "$start")"
    ;;
esac
if [ -z "$dry_run" ] && [ "$action" = launch ] && [ -n "$(git status --porcelain)" ]; then
  echo "note: uncommitted changes stay behind; $ref is what runs" >&2
fi
carry_out "$plan"
