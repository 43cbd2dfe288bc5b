#!/usr/bin/env bash
# GKE: a JobSet on TPU slices or GPU nodes, by kubectl or by xpk. It begins again by itself after a loss.
# shellcheck source-path=SCRIPTDIR source=lib.sh disable=SC2154  # read_options sets opt_...
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'END'
gke.sh VERB --name NAME [OPTION ...] [-- CONFIG key=value ...]

  create   a node pool for --accelerator in --cluster
  launch   submit the training; --by xpk has xpk write the JobSet
  watch    say how it goes until it has ended
  resume   submit it again: it goes on from its newest checkpoint
  logs     the logs of all pods, each line with its pod
  delete   the training; with --pool the node pool too

  --accelerator KIND   tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, or a GPU such as nvidia-h100-80gb
  --topology AxB[xC]   of a TPU slice, such as 4x8 (TPU)
  --machine TYPE       of a node, such as ct5lp-hightpu-4t, ct6e-standard-4t, a3-highgpu-8g (create)
  --chips N            TPU chips or GPUs of a node [4 of TPUs, 8 of GPUs]
  --nodes N            GPU nodes (GPU)
  --slices N           TPU slices [1]
  --image IMAGE        with rmft in it (launch, resume)
  --restarts N         how often the JobSet begins again [100]
  --cluster C --location L --project P   of gcloud (create, delete --pool; xpk)
  --namespace NS       [default]
  --by kubectl | xpk   [kubectl]
  --type TYPE          of xpk, such as v6e-256 (--by xpk)
  --spot               nodes that may be taken away
  --pool               (delete) the node pool too
  --every SECONDS      (watch) between two looks [60]
  --jaxlib VERSION     whose XLA flags (xla_flags.tsv) [the tested version]
  --no-xla-flags       none
  --dry-run            print what would be done, do nothing
Each value may stand in the environment instead: RMFT_CLUSTER for --cluster.
END
}

accelerator_is_good() {
  need accelerator
  case $opt_accelerator in
    tpu-v5-lite-podslice) kind=v5e ;;
    tpu-v5p-slice) kind=v5p ;;
    tpu-v6e-slice) kind=v6e ;;
    nvidia-*) kind=gpu ;;
    *) die "--accelerator is $opt_accelerator: it must be tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice or nvidia-..." ;;
  esac
  matches topology '[0-9]+x[0-9]+(x[0-9]+)?' 'AxB or AxBxC'
  local size chips=1
  if [[ $kind == gpu ]]; then
    [[ -z $opt_topology && -z $opt_slices ]] || die "--topology and --slices are of TPUs: give --nodes for $opt_accelerator"
    need nodes
    per_node=${opt_chips:-8} nodes=$opt_nodes slices=1
  else
    [[ -z $opt_nodes ]] || die "--nodes is of GPUs: the topology of a slice says how many nodes $opt_accelerator has"
    need topology
    per_node=${opt_chips:-4} slices=${opt_slices:-1}
    for size in ${opt_topology//x/ }; do chips=$((chips * size)); done
    ((chips % per_node == 0)) || die "--topology $opt_topology has $chips chips, which $per_node a node do not divide: set --chips"
    nodes=$((chips / per_node))
  fi
}

settings_are_good() {
  need image
  training_is_good
  ((nodes * slices == 1)) || shared_out
}

# The processes find each other by the JobSet's names: JAX_PROCESS_ID is the index of the pod in its job, see
# rmft_jax/processes.py. On TPU the device plugin sets what JAX needs; slices find each other by MEGASCALE_..., set by JobSet.
manifest() {
  local select resource flags loop
  flags=$(xla_flags "$kind")
  loop=$(training_loop "$flags")
  select="cloud.google.com/gke-accelerator: $opt_accelerator"
  resource=nvidia.com/gpu
  if [[ $kind != gpu ]]; then
    select="cloud.google.com/gke-tpu-accelerator: $opt_accelerator
                cloud.google.com/gke-tpu-topology: $opt_topology"
    resource=google.com/tpu
  fi
  [[ -z $opt_spot ]] || select+="
                cloud.google.com/gke-spot: \"true\""
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $opt_name
  namespace: ${opt_namespace:-default}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${opt_restarts:-100}
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $nodes
          completions: $nodes
          completionMode: Indexed
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              nodeSelector:
                $select
              containers:
                - name: rmft
                  image: $opt_image
                  command: ["bash", "-c"]
                  args:
                    - |
$(printf 'exec 2>&1\n%s\n' "$loop" | sed 's/^/                      /')
                  env:
                    - name: RMFT_JOBSET
                      value: $opt_name
                    - name: RMFT_JOBSET_PROCESSES
                      value: "$((nodes * slices))"
                  ports:
                    - containerPort: 8476
                  resources:
                    limits:
                      $resource: $per_node
END
}

create() {
  local -a more=(--machine-type="$opt_machine" --num-nodes="$nodes")
  [[ $kind == gpu ]] || more+=(--tpu-topology="$opt_topology")
  [[ $kind != gpu ]] || more+=(--accelerator="type=$opt_accelerator,count=$per_node")
  [[ -z $opt_spot ]] || more+=(--spot)
  local slice
  for ((slice = 0; slice < slices; slice++)); do
    run gcloud container node-pools create "$opt_name-$slice" "${cluster[@]}" "${more[@]}"
  done
}

launch() {
  if [[ ${opt_by:-kubectl} == xpk ]]; then
    local -a more=()
    [[ -z $opt_spot ]] || more+=(--spot)
    run xpk workload create --workload="$opt_name" --cluster="$opt_cluster" --project="$opt_project" --zone="$opt_location" \
      --tpu-type="$opt_type" --num-slices="$slices" --docker-image="$opt_image" --max-restarts="${opt_restarts:-100}" \
      ${more[@]+"${more[@]}"} --command="$(training_loop "$(xla_flags "$kind")")"
    return
  fi
  local text
  text=$(manifest)
  run_with "$text" kubectl apply -f -
}

watch() {
  local said now restarts
  while true; do
    if [[ $opt_dry_run ]]; then
      run kubectl get jobset "$opt_name" "${space[@]}" --ignore-not-found
      return
    fi
    said=$(kubectl get jobset "$opt_name" "${space[@]}" --ignore-not-found \
      -o 'jsonpath=is {.status.terminalState} {.status.restarts}') || said='is Unknown 0'
    read -r now restarts <<<"$(sed 's/^$/Gone/; s/^is  */Running /; s/^Running \([A-Z]\)/\1/' <<<"$said")"
    case $now in
      Completed) say "$opt_name: done, after ${restarts:-0} restarts"; return 0 ;;
      Failed) say "$opt_name: failed after ${restarts:-0} restarts, see gke.sh logs"; return 1 ;;
      Gone) say "$opt_name: there is none, see gke.sh resume"; return 1 ;;
      Unknown) say "$opt_name: kubectl cannot say" ;;
      *) say "$opt_name: training, ${restarts:-0} restarts" ;;
    esac
    sleep "${opt_every:-60}"
  done
}

logs() { run kubectl logs "${space[@]}" --selector="jobset.sigs.k8s.io/jobset-name=$opt_name" --prefix --tail=-1 --max-log-requests=1000; }

delete_training() { run kubectl delete jobset "$opt_name" "${space[@]}" --ignore-not-found; }

delete() {
  delete_training
  [[ $opt_pool ]] || return 0
  local slice
  for ((slice = 0; slice < slices; slice++)); do
    run gcloud container node-pools delete "$opt_name-$slice" "${cluster[@]}" --quiet
  done
}

VERB=${1:-}
case $VERB in
  --help | -h | '') usage; exit 0 ;;
  create | launch | watch | resume | logs | delete) shift ;;
  *) die "$VERB is no verb: create, launch, watch, resume, logs or delete" ;;
esac
read_options "name accelerator topology machine chips nodes slices image restarts cluster location project namespace by type every jaxlib" \
  "spot pool no-xla-flags" "$@"
name_is_good
for number in chips nodes slices; do matches "$number" '[1-9][0-9]*' 'a number from 1 on'; done
for number in restarts every; do matches "$number" '[0-9]+' 'a number'; done
matches by 'kubectl|xpk' 'kubectl or xpk'
space=(--namespace="${opt_namespace:-default}")
cluster=(--cluster="$opt_cluster" --location="$opt_location")
[[ -z $opt_project ]] || cluster+=(--project="$opt_project")
slices=${opt_slices:-1}
case $VERB in
  create) need cluster location machine; accelerator_is_good ;;
  delete) [[ -z $opt_pool ]] || need cluster location ;;
  launch | resume)
    accelerator_is_good
    settings_are_good
    if [[ ${opt_by:-} == xpk ]]; then
      need cluster location project type
      [[ $kind != gpu ]] || die "--by xpk is for TPUs here: leave it out for $opt_accelerator"
    fi
    ;;
esac
[[ $VERB != resume ]] || { delete_training; VERB=launch; }
"$VERB"
