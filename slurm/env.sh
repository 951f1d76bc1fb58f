# Environment of every job. Copy it, change the copy, and set:
#
#   export MEGAMIX_ENV=$HOME/megamix-env.sh

# module load cuda/12.8
# source "$HOME/megamix/.venv/bin/activate"

# Data, tokenizers and models are on disk: no network requests.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

# NCCL: network interface and messages.
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=WARN
