#!/usr/bin/env bash
# A Slurm of several nodes on this one machine, for tests: controller and daemons as this user, no systemd, no munge.
# usage: slurm_cluster.sh up DIR NODES       writes DIR/slurm.conf and waits until all nodes are idle
#        slurm_cluster.sh kill DIR NODE      ends one node's daemon with SIGKILL, NODE like 127.0.0.12
#        slurm_cluster.sh down DIR           cancels all jobs and ends all daemons
# Nodes are loopback addresses, so that their names resolve anywhere. SLURM_TEST_PORT: first of NODES + 1 ports.
set -euo pipefail
action=$1
dir=$(realpath -m "$2")
export SLURM_CONF=$dir/slurm.conf

alive() { local state; state=$(ps -o stat= -p "$1" 2>/dev/null) && [ "${state:0:1}" != Z ]; }

up() {
  local nodes=$1 port=${SLURM_TEST_PORT:-21800} me host n
  me=$(id -un) host=$(hostname -s)
  mkdir -p "$dir"/{save,spool,run}
  cat >"$SLURM_CONF" <<CONF
ClusterName=trainsystest
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
# Ranks meet on a port that follows from the job's id: two clusters on one machine have no id in common.
FirstJobId=$((port * 10))
SlurmUser=$me
SlurmdUser=$me
# Nobody but this user is on this cluster: no munge. Credentials must expire soon, for a job that is requeued
# waits for them.
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation=$dir/save
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=6
KillWait=5
MailProg=/bin/true
SlurmdParameters=config_overrides
NodeName=127.0.0.[11-$((10 + nodes))] NodeHostname=$host Port=$((port + 1))-$((port + nodes)) CPUs=2 State=UNKNOWN
PartitionName=work Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=9 PreemptMode=OFF
CONF
  sed -i -E 's/Port=([0-9]+)-([0-9]+) CPUs/Port=[\1-\2] CPUs/' "$SLURM_CONF"
  slurmctld -c
  for ((n = 11; n <= 10 + nodes; n++)); do slurmd -N "127.0.0.$n"; done
  for ((n = 0; n < 300; n++)); do
    [ "$(sinfo -h -N -p work -o %T 2>/dev/null | grep -cx idle)" = "$nodes" ] && return
    sleep 0.1
  done
  tail -n 5 "$dir"/*.log >&2
  return 1
}

down() {
  local pids pid n
  scancel --full --user "$(id -un)" 2>/dev/null || true
  for ((n = 0; n < 80; n++)); do [ -z "$(squeue -h 2>/dev/null)" ] && break; sleep 0.1; done
  pids=$(cat "$dir"/run/*.pid 2>/dev/null || true)
  for pid in $pids; do kill "$pid" 2>/dev/null || true; done
  for ((n = 0; n < 80; n++)); do
    for pid in $pids; do alive "$pid" && sleep 0.1 && continue 2; done
    return 0
  done
  for pid in $pids; do kill -KILL "$pid" 2>/dev/null || true; done
}

case $action in
  up) up "$3" ;;
  kill) kill -KILL "$(cat "$dir/run/$3.pid")" ;;
  down) down ;;
  *) echo "unknown action $action" >&2; exit 2 ;;
esac
