"""Bad input to the domain loss: an error names the value seen and the value wanted, before anything is summed."""

import math

import pytest
import torch

from megamix_kernels import DomainSums, domain_cross_entropy

# What to change in a good call of 6 rows, 5 columns and 3 domains; the error; its message.
REFUSED = {
    "3 dimensions": ({"logits_NV": torch.zeros(2, 3, 4)}, ValueError, r"\[2, 3, 4\]; reshape \[..., V\] to \[-1, V\]"),
    "no columns": ({"logits_NV": torch.zeros(6, 0)}, ValueError, r"at least one column, got shape \[6, 0\]"),
    "integer logits": ({"logits_NV": torch.zeros(6, 5).int()}, TypeError, "float32, .*; got int32"),
    "no tensor": ({"labels_N": [0] * 6}, TypeError, "labels_N must be a tensor of int64, int32; got list"),
    "short labels": ({"labels_N": torch.zeros(5).long()}, ValueError, r"labels_N must have shape \[6\].* got \[5\]"),
    "float labels": ({"labels_N": torch.zeros(6)}, TypeError, "labels_N .* int64, int32; got float32"),
    "wide domains": ({"domain_N": torch.zeros(6, 1).long()}, ValueError, r"domain_N .* \[6\].* got \[6, 1\]"),
    "float domains": ({"domain_N": torch.zeros(6)}, TypeError, "domain_N .* got float32"),
    "other device": ({"domain_N": torch.zeros(6, device="meta").int()}, ValueError, "is on meta, .* on cpu; move"),
    "domain high": (
        {"domain_N": torch.tensor([0, 1, 2, 3, 7, 0])},
        ValueError,
        r"domain_N\[3\] is 3; .* \[0, 3\).*2 such",
    ),
    "domain low": ({"domain_N": torch.tensor([0, -1, 2, 0, 0, 0])}, ValueError, r"domain_N\[1\] is -1"),
    "label high": (
        {"labels_N": torch.tensor([0, 1, 2, 3, 4, 5])},
        ValueError,
        r"labels_N\[5\] is 5; .* \[0, 5\), or -100",
    ),
    "label padded": (
        {"labels_N": torch.full((6,), 3), "vocab_size": 3},
        ValueError,
        r"labels_N\[0\] is 3; .* \[0, 3\)",
    ),
    "label low": ({"labels_N": torch.full((6,), -1)}, ValueError, r"labels_N\[0\] is -1"),
    "mask values": ({"mask_N": torch.full((6,), 0.5)}, ValueError, r"mask_N\[0\] is 0.5; it must be 0 or 1"),
    "mask shape": ({"mask_N": torch.ones(2, 3)}, ValueError, r"mask_N must have shape \[6\].* got \[2, 3\]"),
    "weights shape": (
        {"loss_weights_K": torch.ones(4)},
        ValueError,
        r"loss_weights_K .* \[3\], one entry a domain; got \[4\]",
    ),
    "weights list": ({"loss_weights_K": [1.0] * 3}, TypeError, "loss_weights_K .* got list"),
    "reference ints": ({"reference_loss_N": torch.ones(6).int()}, TypeError, "reference_loss_N .* got int32"),
    "no domains": ({"num_domains": 0}, ValueError, "num_domains must be from 1 to 65536, got 0"),
    "z_loss": ({"z_loss": -1.0}, ValueError, "z_loss must be finite and not negative .* got -1.0"),
    "softcap": ({"softcap": math.nan}, ValueError, "softcap must be finite .* got nan"),
    "smoothing": ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\), got 1.0"),
    "vocab_size": ({"vocab_size": 6}, ValueError, "vocab_size must be from 1 to 5, .* got 6"),
    "normaliser 0": ({"normaliser": 0}, ValueError, "normaliser must be finite and positive, got 0"),
    "normaliser tensor": ({"normaliser": torch.tensor(-2.0)}, ValueError, "positive, got -2.0"),
    "normaliser shape": ({"normaliser": torch.ones(2)}, ValueError, r"one element, got shape \[2\]"),
    "sums K": ({"sums": DomainSums(4)}, ValueError, "sums are for 4 domains on cpu; wanted 3 domains on cpu"),
    "sums type": ({"sums": torch.zeros(3, 4).long()}, TypeError, "sums must be a DomainSums, got Tensor"),
    "unknown": ({"z_los": 1.0}, TypeError, "unexpected keyword argument 'z_los'"),
    "implementation": ({"implementation": "cuda"}, ValueError, "auto, torch, triton; got 'cuda'"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_with_the_values(change, error, message):
    arguments = {
        "logits_NV": torch.zeros(6, 5),
        "labels_N": torch.zeros(6).long(),
        "domain_N": torch.zeros(6).long(),
        "num_domains": 3,
    }
    sums = DomainSums(3)
    with pytest.raises(error, match=message):
        domain_cross_entropy(**(arguments | {"sums": sums} | change))
    assert not sums.buffer.any()
