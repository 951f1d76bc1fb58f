#!/bin/bash
# A Slurm controller in namespaces of its own, and what its nodes need. `cluster.py` starts this as the first process of a
# PID namespace: when it ends, whatever runs on the cluster ends with it. It ends when its standard input does.
#
#   cluster.sh DIR NODES MISSED     a node that is silent for MISSED seconds is down
#
# All files go to DIR, whose path is short: munge's socket has at most 108 characters.
set -euo pipefail
D=$1 nodes=$2 missed=$3 net=10.213.0
export SLURM_CONF=$D/etc/slurm.conf

# The controller is at .254, node i at .i, all on one bridge without a way out.
ip link set lo up
ip link add br0 type bridge
ip addr add $net.254/24 dev br0
ip link set br0 up
hostname head

mkdir -p "$D"/{etc,log,state,munge,dev}
chmod 755 "$D" "$D/munge"
for g in 0 1; do mknod "$D/dev/nvidia$g" c 1 3; done # a twin of /dev/null passes for a GPU
printf '%s\n' "127.0.0.1 localhost" "$net.254 head" >"$D/etc/hosts"
# linuxproc and cgroup/v1 (loaded, never used) need no cgroups. Waits are short: what a test waits for is the only load.
cat >"$SLURM_CONF" <<C
ClusterName=test
SlurmctldHost=head($net.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$D/munge/sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool.%n
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=20
SlurmdTimeout=$missed
MessageTimeout=10
MinJobAge=3600
GresTypes=gpu
C
echo "CgroupPlugin=cgroup/v1" >"$D/etc/cgroup.conf"
echo "Name=gpu File=$D/dev/nvidia[0-1]" >"$D/etc/gres.conf"
for ((i = 1; i <= nodes; i++)); do
  echo "$net.$i n$i" >>"$D/etc/hosts"
  echo "NodeName=n$i NodeAddr=$net.$i CPUs=16 RealMemory=100000 Gres=gpu:2" >>"$SLURM_CONF"
done
echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >>"$SLURM_CONF"
mount --bind "$D/etc/hosts" /etc/hosts

(
  umask 077
  head -c 128 /dev/urandom >"$D/munge/key"
)
munged --key-file="$D/munge/key" --socket="$D/munge/sock" --pid-file="$D/munge/pid" --log-file="$D/munge/log" \
  --seed-file="$D/munge/seed" --num-threads=4
slurmctld
echo up
cat >/dev/null
rm -rf "$D" # whoever held the other end may be gone
