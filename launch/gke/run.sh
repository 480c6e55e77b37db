#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as a JobSet: see usage below and README.md.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

usage() {
  cat <<'TEXT'
usage: launch/gke/run.sh --name NAME --image IMAGE --claim CLAIM [--accelerator A] [--topology T] [--chips-per-node N]
                         [--slices N] [--queue Q] [--spot] [--restarts N] [--dry-run] -- TRAIN...

  --name NAME          of the JobSet
  --image IMAGE        holds the project; launch/gke/Dockerfile makes one
  --claim CLAIM        of a volume that many nodes may write; mounted at /data, where the workdir belongs
  --accelerator A      as GKE labels its nodes (default tpu-v6e-slice)
  --topology T         of a slice (default 4x4)
  --chips-per-node N   (default 4)
  --slices N           (default 1)
  --queue Q            of Kueue, if the cluster has one
  --spot               on spot nodes
  --restarts N         at most (default 100)
  --dry-run            show the JobSet, submit nothing
  TRAIN                arguments of uhd-jax train; --workdir=/data/...
TEXT
}

NAME="" IMAGE="" CLAIM="" ACCELERATOR=tpu-v6e-slice TOPOLOGY=4x4 CHIPS=4 SLICES=1 QUEUE="" SPOT=0 RESTARTS=100
WORD='[A-Za-z0-9][A-Za-z0-9._/:@-]*'
split_arguments "$@"
set -- ${OWN[@]+"${OWN[@]}"}
while [ $# -gt 0 ]; do
  case "$1" in
    --name) require "$1" "${2-}" "a name" '[a-z][a-z0-9-]*' && NAME="$2" && shift 2 ;;
    --image) require "$1" "${2-}" "an image" "$WORD" && IMAGE="$2" && shift 2 ;;
    --claim) require "$1" "${2-}" "a name" "$WORD" && CLAIM="$2" && shift 2 ;;
    --accelerator) require "$1" "${2-}" "a name" "$WORD" && ACCELERATOR="$2" && shift 2 ;;
    --topology) require "$1" "${2-}" "sizes as 4x4 or 2x2x4" '[0-9]+x[0-9]+(x[0-9]+)?' && TOPOLOGY="$2" && shift 2 ;;
    --chips-per-node) require "$1" "${2-}" "a number from 1" '[1-9][0-9]*' && CHIPS="$2" && shift 2 ;;
    --slices) require "$1" "${2-}" "a number from 1" '[1-9][0-9]*' && SLICES="$2" && shift 2 ;;
    --queue) require "$1" "${2-}" "a name" "$WORD" && QUEUE="$2" && shift 2 ;;
    --restarts) require "$1" "${2-}" "a number" '[0-9]+' && RESTARTS="$2" && shift 2 ;;
    --spot) SPOT=1 && shift ;;
    --dry-run) DRY_RUN=1 && shift ;;
    *) usage >&2 && die "unknown argument: $1" ;;
  esac
done
for value in "--name $NAME" "--image $IMAGE" "--claim $CLAIM"; do
  [ -n "${value#* }" ] || die "${value% } is needed"
done
case "$WORKDIR" in /data/*) ;; *) die "--workdir=$WORKDIR is not below /data, where the claim is mounted" ;; esac
SIZE=$((${TOPOLOGY//x/*}))
[ $((SIZE % CHIPS)) = 0 ] || die "--topology $TOPOLOGY has $SIZE chips, which nodes of $CHIPS do not divide"
NODES=$((SIZE / CHIPS))
DEVICES=$((SLICES * SIZE))
case "$ACCELERATOR" in tpu7x*) DEVICES=$((2 * DEVICES)) ;; esac # each core is a device

COMMAND="$(quoted uhd-jax train "$RESTART_HUNG" "${TRAIN[@]}" "--processes=$((SLICES * NODES))" "--devices=$DEVICES")"
[[ "$COMMAND" != *$'\n'* ]] || die "an argument of more than one line"
CHECK="$(quoted test -e "$WORKDIR/trained.json")"

jobset() {
  cat <<EOT
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
EOT
  [ -z "$QUEUE" ] || printf '  labels:\n    kueue.x-k8s.io/queue-name: %s\n' "$QUEUE"
  cat <<EOT
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $RESTARTS
  replicatedJobs:
    - name: slice
      replicas: $SLICES
      template:
        spec:
          parallelism: $NODES
          completions: $NODES
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              # From a notice of preemption or maintenance to the end: all pods save the same step. Spot nodes get about
              # 25 s of it at most; where that is too few, what is lost is as much as train.checkpoint_every allows.
              terminationGracePeriodSeconds: 300
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
EOT
  [ "$SPOT" = 0 ] || cat <<'EOT'
                cloud.google.com/gke-spot: "true"
              tolerations:
                - key: cloud.google.com/gke-spot
                  operator: Equal
                  value: "true"
                  effect: NoSchedule
EOT
  cat <<EOT
              containers:
                - name: train
                  image: $IMAGE
                  ports:
                    - containerPort: 8471
                    - containerPort: 8482
                  env:
                    - name: JAX_PLATFORMS
                      value: tpu,cpu
                    - name: JAX_COMPILATION_CACHE_DIR
                      value: "${WORKDIR//\"/}/programs"
                  command:
                    - bash
                    - -c
                    - |
                      # Saved on a notice is status 0, but not the end: only a trained model ends the JobSet.
                      child=""
                      trap '[ -z "\$child" ] || kill -TERM "\$child"' TERM
                      $COMMAND &
                      child=\$!
                      status=0
                      wait "\$child" || status=\$?
                      while kill -0 "\$child" 2>/dev/null; do status=0; wait "\$child" || status=\$?; done
                      if [ "\$status" = 0 ]; then $CHECK || status=75; fi
                      exit "\$status"
                  resources:
                    limits:
                      google.com/tpu: $CHIPS
                  volumeMounts:
                    - name: data
                      mountPath: /data
                    - name: shm
                      mountPath: /dev/shm
              volumes:
                - name: data
                  persistentVolumeClaim:
                    claimName: $CLAIM
                - name: shm
                  emptyDir:
                    medium: Memory
EOT
}

if [ "$DRY_RUN" = 1 ]; then
  jobset
  exit
fi
command -v kubectl >/dev/null || die "kubectl is not there: install it, and get the cluster's credentials with gcloud"
# A JobSet is not changed in place; one of that name makes room, if it still trains by saving and leaving.
kubectl delete jobset "$NAME" --ignore-not-found
jobset | kubectl create -f -
echo "its log: kubectl logs --follow jobs/$NAME-slice-0"
