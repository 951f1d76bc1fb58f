# What a job needs before `python -m megamix` works; every job script sources it. Copy it, change the copy, and name that:
#
#   export MEGAMIX_ENV=$HOME/megamix-env.sh

# module load cuda/12.8
# source "$HOME/megamix/.venv/bin/activate"

# Where data, tokenizers and models are on disk already, nothing is to be asked of the network.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

# NCCL: which network to use, and what it says.
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=WARN
