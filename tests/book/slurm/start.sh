#!/bin/sh
# Start a Slurm of one node, all of it in one folder, and let /etc/slurm/slurm.conf lead there: tests/slurm/start.sh FOLDER.
# Needs root and Debian's slurm-wlm and munge. It ends with: kill $(cat FOLDER/*.pid); rm /etc/slurm/slurm.conf
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1/state" "$1/spool" /etc/slurm
sed "s|FOLDER|$1|" "$here/slurm.conf" > "$1/slurm.conf"
head -c 1024 /dev/urandom > "$1/munge.key"
chmod 600 "$1/munge.key"
ln -s "$1/slurm.conf" /etc/slurm/slurm.conf  # fails where a Slurm is set up already
munged --force --socket="$1/munge.socket" --key-file="$1/munge.key" --seed-file="$1/munge.seed" \
  --pid-file="$1/munged.pid" --log-file="$1/munged.log"
slurmctld
slurmd -N localhost
for _ in $(seq 100); do
  sinfo --noheader --format=%T | grep -qx idle && exit 0
  sleep 0.2
done
sinfo >&2
exit 1
