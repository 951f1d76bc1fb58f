#!/bin/bash
# One node of the cluster: slurmd in namespaces of its own, so that the end of this process is a power cut.
#
#   node.sh DIR NUMBER       to be started in the namespaces of cluster.sh; ends when its standard input does
set -euo pipefail
D=$1 i=$2 net=10.213.0
export SLURM_CONF=$D/etc/slurm.conf

if [ -z "${3:-}" ]; then
  # A kernel slow to clean up may still hold the link of a node that was cut off.
  ip link del "v$i" 2>/dev/null || :
  unshare --net --uts --mount --pid --fork --kill-child --mount-proc bash "$0" "$D" "$i" inside <&0 &
  child=$!
  until [ "$(readlink "/proc/$child/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.01; done
  ip link add "v$i" type veth peer name eth0 netns "$child"
  ip link set "v$i" master br0 up
  wait "$child"
  exit
fi

hostname "n$i"
until ip link show eth0 >/dev/null 2>&1; do sleep 0.01; done
ip link set lo up
ip addr add "$net.$i/24" dev eth0
ip link set eth0 up
slurmd -N "n$i"
cat >/dev/null
