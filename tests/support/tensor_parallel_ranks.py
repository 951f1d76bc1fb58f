"""What four gloo ranks compute for test_tensor_parallel.py: the loss with the vocabulary over 1, 2 and 4 ranks, and the
sums of rows split over ranks. Run as ``python tensor_parallel_ranks.py FOLDER``; under TRITON_INTERPRET=1 also with the
Triton path. Writes FOLDER/rank_R.pt.

The ranks are forked from a process that has imported torch already, which saves three imports.

Shapes: N tokens, V logits a token, K domains, T ranks that share the vocabulary.
"""

import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from loss_oracle import make_case

from megamix_kernels import DomainSums, domain_cross_entropy, linear_domain_cross_entropy

WORLD = 4
N, V = 6, 88
# Of 4 ranks with 22 columns each, rank 2 ends in padding and rank 3 is nothing but padding.
VOCAB_SIZE = 60
OPTIONS = {
    "plain": {},
    "all": {
        "vocab_size": VOCAB_SIZE,
        "z_loss": 1e-2,
        "softcap": 5.0,
        "label_smoothing": 0.1,
        "loss_weights_K": torch.tensor([0.25, 1.0, 2.5]),
        "reference_loss_N": torch.linspace(0, 9, N),
        "normaliser": 17.5,
    },
}


def implementations():
    return ("torch", "triton") if os.environ.get("TRITON_INTERPRET") == "1" else ("torch",)


def case():
    logits_NV, labels_N, domain_N = make_case(N, V)
    labels_N = labels_N % VOCAB_SIZE
    labels_N[1] = -100
    logits_NV[2, :44] = -torch.inf  # nothing on the first rank or two, but not nothing
    labels_N[2] = 50
    logits_NV[1] = torch.nan
    return logits_NV, labels_N, domain_N


def over_ranks(group, implementation, options, mode):
    """This rank's outputs and the whole gradient."""
    logits_NV, labels_N, domain_N = case()
    columns = slice(group.rank() * V // group.size(), (group.rank() + 1) * V // group.size())
    leaf_NV = logits_NV[:, columns].contiguous().requires_grad_()
    sums = DomainSums(3)
    out = domain_cross_entropy(
        *(leaf_NV * 1, labels_N, domain_N, 3),
        process_group=group,
        sums=sums,
        return_token_loss=True,
        gradient_scale=0.5 if mode == "A" else None,
        implementation=implementation,
        **options,
    )
    (out.loss * 0.5).backward()
    grads = [torch.empty_like(leaf_NV) for _ in range(group.size())]
    dist.all_gather(grads, leaf_NV.grad, group=group)
    return out.loss.detach(), out.token_loss_N, sums.buffer, torch.cat(grads, dim=1)


def hidden_over_ranks(group, implementation):
    """The loss from hidden states and the whole gradients of hidden states and weight."""
    generator = torch.Generator().manual_seed(1)
    hidden_NH = torch.randn(N, 8, generator=generator).requires_grad_()
    weight_VH = torch.randn(V, 8, generator=generator)
    part_VH = weight_VH.chunk(group.size())[group.rank()].clone().requires_grad_()
    out = linear_domain_cross_entropy(
        *(hidden_NH, part_VH, *case()[1:], 3),
        vocab_size=VOCAB_SIZE,
        process_group=group,
        chunk_rows=4,
        implementation=implementation,
    )
    out.loss.backward()
    dist.all_reduce(hidden_NH.grad, group=group)
    grads = [torch.empty_like(part_VH) for _ in range(group.size())]
    dist.all_gather(grads, part_VH.grad, group=group)
    return out.loss.detach(), hidden_NH.grad, torch.cat(grads)


def rows_over_ranks(rank, implementation):
    """The sums of the world when every rank has some of the rows, and of all rows on one rank."""
    # Rows of 72 fp32 logits are a multiple of 16 bytes apart, so that their last bits do not depend on their place.
    batch = (*make_case(23, 72, num_domains=5, seed=7), torch.linspace(0, 9, 23))
    batch[0][3] = torch.nan
    owner_N = torch.arange(23) * 7 % 11 % WORLD
    buffers = []
    for rows in (owner_N == rank, slice(None)):
        logits_NV, labels_N, domain_N, reference_N = (tensor[rows] for tensor in batch)
        options = {"reference_loss_N": reference_N, "implementation": implementation}
        out = domain_cross_entropy(logits_NV, labels_N, domain_N, 5, **options)
        buffers.append(out.stats.buffer)
    dist.all_reduce(buffers[0])
    return buffers


def rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    singles = [dist.new_group([index]) for index in range(WORLD)]
    groups = {1: singles[rank], 2: pairs[rank // 2], 4: dist.group.WORLD}
    results = {}
    for implementation in implementations():
        results["rows", implementation] = rows_over_ranks(rank, implementation)
        for size, group in groups.items():
            results["hidden", implementation, size] = hidden_over_ranks(group, implementation)
            for name, options in OPTIONS.items():
                for mode in "AB":
                    key = (implementation, size, name, mode)
                    results[key] = over_ranks(group, implementation, options, mode)
    torch.save(results, f"{folder}/rank_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    processes = multiprocessing.get_context("fork")
    ranks = [processes.Process(target=rank_main, args=(rank, Path(sys.argv[1]))) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in ranks))
