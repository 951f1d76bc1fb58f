#!/bin/bash
# DoReMi as a chain of jobs, each beginning when the one before has ended well:
#
#   reference run -> its losses -> proxy run -> weights [-> target run]
#   slurm/doremi.sh --gpus-per-node 8 --time 24:00:00 CONFIG [key=value ...]      (options: megamix launch --help)
#
# Run it again and it goes on: tasks that are done or in the queue are not submitted again.
set -euo pipefail
MEGAMIX_SLURM=$(cd "$(dirname "$0")" && pwd)
set +u # modules and venvs read variables that are not set
# shellcheck source=slurm/env.sh
source "${MEGAMIX_ENV:-$MEGAMIX_SLURM/env.sh}"
set -u
exec "${MEGAMIX_PYTHON:-python}" -m megamix launch --chain doremi "$@"
