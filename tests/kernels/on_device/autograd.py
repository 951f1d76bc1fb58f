"""The Triton path in autograd: what is overwritten, what notices it, and the loss from hidden states.

Run like numerics.py beside this file.

Shapes: N tokens, H hidden, V vocabulary, K domains.
"""

import math

import pytest
import torch
from loss_oracle import make_case, oracle

from megamix_kernels import DomainSums, domain_cross_entropy, linear_domain_cross_entropy
from megamix_kernels import triton_loss as implementation

DEVICE = "cpu" if implementation.INTERPRETED else "cuda"
SCALES = [None, 1.0]  # modes B and A


def loss_of(logits_NV, case, **options):
    labels_N, domain_N = (tensor.to(DEVICE) for tensor in case[1:])
    return domain_cross_entropy(logits_NV, labels_N, domain_N, 3, implementation="triton", **options).loss


def leaf_of(case):
    return case[0].to(DEVICE, copy=True).requires_grad_()


@pytest.mark.parametrize("scale", SCALES)
def test_the_gradient_is_written_over_the_logits(scale):
    case = make_case(3, 40)
    leaf_NV = leaf_of(case)
    logits_NV = leaf_NV * 1
    loss = loss_of(logits_NV, case, gradient_scale=scale)
    assert torch.equal(logits_NV, leaf_NV) == (scale is None)
    loss.backward()
    assert torch.equal(logits_NV, leaf_NV.grad)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("keep", [False, True])
def test_leaves_and_logits_to_keep_are_left_alone(keep, scale):
    case = make_case(3, 40)
    leaf_NV = leaf_of(case)
    # Neither a leaf nor a view of one is ours to write to.
    logits_NV = leaf_NV * 1 if keep else leaf_NV.view(3, 40)
    loss_of(logits_NV, case, gradient_scale=scale, keep_logits=keep).backward()
    assert torch.equal(logits_NV.cpu(), case[0])
    assert leaf_NV.grad.abs().sum() > 0


@pytest.mark.parametrize("scale", SCALES)
def test_rows_that_share_memory_are_not_overwritten(scale):
    case = make_case(3, 40)
    leaf_1V = case[0][:1].to(DEVICE, copy=True).requires_grad_()
    loss_of((leaf_1V * 1).expand(3, 40), case, gradient_scale=scale).backward()
    want_1V = case[0][:1].to(DEVICE, copy=True).requires_grad_()
    labels_N, domain_N = (tensor.to(DEVICE) for tensor in case[1:])
    domain_cross_entropy(want_1V.expand(3, 40), labels_N, domain_N, 3, implementation="torch").loss.backward()
    torch.testing.assert_close(leaf_1V.grad, want_1V.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", SCALES)
def test_rows_further_apart_than_those_of_the_gradient(scale):
    case = make_case(4, 40)
    case[1][[0, 2]] = -100
    leaf_NV = torch.full((4, 64), math.nan, device=DEVICE)
    leaf_NV[:, :40] = case[0].to(DEVICE)
    leaf_NV.requires_grad_()
    loss_of(leaf_NV[:, :40], case, gradient_scale=scale).backward()
    want_NV = leaf_of(case)
    loss_of(want_NV, case, gradient_scale=scale).backward()
    assert torch.equal(leaf_NV.grad[:, :40], want_NV.grad)
    assert not want_NV.grad[[0, 2]].any()


@pytest.mark.parametrize("scale", SCALES)
def test_a_graph_that_needs_the_overwritten_logits_raises(scale):
    case = make_case(3, 40)
    leaf_NV = leaf_of(case)
    # The backward step of tanh reads its output, which the loss has overwritten by then.
    loss = loss_of(torch.tanh(leaf_NV), case, gradient_scale=scale)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    kept = loss_of(torch.tanh(leaf_NV), case, gradient_scale=scale, keep_logits=True)
    kept.backward()
    want = leaf_NV.grad.clone()
    leaf_NV.grad = None
    domain_cross_entropy(
        torch.tanh(leaf_NV), *(tensor.to(DEVICE) for tensor in case[1:]), 3, implementation="torch"
    ).loss.backward()
    torch.testing.assert_close(leaf_NV.grad, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", SCALES)
def test_a_gradient_is_not_differentiated_again(scale):
    case = make_case(3, 40)
    leaf_NV = leaf_of(case)
    (first_NV,) = torch.autograd.grad(
        loss_of(leaf_NV.exp().log(), case, gradient_scale=scale, keep_logits=True), leaf_NV, create_graph=True
    )
    with pytest.raises(RuntimeError, match="first derivatives only"):
        first_NV.square().sum().backward()


def test_a_second_loss_of_the_same_logits_raises():
    case = make_case(3, 40)
    logits_NV = leaf_of(case) * 1
    loss = loss_of(logits_NV, case) + loss_of(logits_NV, case)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("scale", SCALES)
def test_a_second_backward_pass_raises(scale):
    case = make_case(3, 40)
    loss = loss_of(leaf_of(case) * 1, case, gradient_scale=scale)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|handed on by an earlier backward"):
        loss.backward()


@pytest.mark.parametrize("scale", SCALES)
def test_logits_changed_before_the_backward_pass_raise(scale):
    case = make_case(3, 40)
    logits_NV = leaf_of(case) * 1
    loss = loss_of(logits_NV, case, gradient_scale=scale)
    logits_NV.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_labels_changed_before_the_backward_pass_raise():
    case = make_case(3, 40)
    labels_N = case[1].to(DEVICE)
    loss = domain_cross_entropy(leaf_of(case), labels_N, case[2].to(DEVICE), 3, implementation="triton").loss
    labels_N.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_gradients_nothing_is_overwritten():
    case = make_case(3, 40)
    logits_NV = leaf_of(case) * 1
    with torch.no_grad():
        loss = loss_of(logits_NV, case, gradient_scale=1.0)
    assert not loss.requires_grad
    assert torch.equal(logits_NV.cpu(), case[0])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("scale", SCALES)
def test_the_host_never_waits(scale):
    case = make_case(64, 1000)
    leaf_NV, device_case = leaf_of(case), [tensor.to(DEVICE) for tensor in case]
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(leaf_NV * 1, device_case, gradient_scale=scale).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert leaf_NV.grad.isfinite().all()


def captured(step):
    """Returns the result of a step, and a function that takes it again: from a CUDA graph, or, on a CPU, by calling it
    and writing over the result."""
    if DEVICE == "cpu":
        result = step()
        return result, lambda: result.data.copy_(step().data)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles the kernels, which a capture may not
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return result, graph.replay


@pytest.mark.parametrize("form", ["A", "B", "linear"])
def test_a_graph_of_cuda_replays_with_other_inputs(form):
    """Loss, gradient and sums of a captured step are those of the logits, labels and domains that a replay finds."""
    cases = [make_case(4, 40, seed=seed) for seed in range(2)]
    leaf_NV, labels_N, domain_N = leaf_of(cases[0]), *(tensor.to(DEVICE) for tensor in cases[0][1:])
    eye_VV = torch.eye(40, device=DEVICE)
    sums = DomainSums(3, DEVICE)
    options = {"normaliser": 4.0, "sums": sums, "implementation": "triton"}
    options["gradient_scale"] = None if form == "B" else 1.0

    def step():
        leaf_NV.grad = None
        if form == "linear":
            loss = linear_domain_cross_entropy(leaf_NV * 1, eye_VV, labels_N, domain_N, 3, **options).loss
        else:
            loss = domain_cross_entropy(leaf_NV * 1, labels_N, domain_N, 3, **options).loss
        loss.backward()
        return loss

    loss, replay = captured(step)
    for case in cases[::-1]:
        sums.zero_()
        with torch.no_grad():
            leaf_NV.copy_(case[0])
        labels_N.copy_(case[1])
        domain_N.copy_(case[2])
        replay()
        want_loss, want_NV, _, _, tokens_K, _ = oracle(*case, 3, normaliser=4.0)
        torch.testing.assert_close(loss.detach().cpu().double(), want_loss, rtol=4e-6, atol=2e-6)
        torch.testing.assert_close(leaf_NV.grad.cpu().double(), want_NV, rtol=0, atol=2e-6 * want_NV.abs().max())
        assert torch.equal(sums.tokens.cpu(), tokens_K)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_the_loss_from_hidden_states_is_that_of_the_torch_path(scale, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(5, 16, generator=generator).to(dtype)
    weight_VH = torch.randn(70, 16, generator=generator).to(dtype)
    labels_N, domain_N = torch.tensor([1, 69, 5, -100, 7]), torch.tensor([0, 1, 2, 0, 1])
    results = []
    for name in ("triton", "torch"):
        hidden_leaf, weight_leaf = (x.to(DEVICE, copy=True).requires_grad_() for x in (hidden_NH, weight_VH))
        out = linear_domain_cross_entropy(
            *(hidden_leaf, weight_leaf, labels_N.to(DEVICE), domain_N.to(DEVICE), 3),
            gradient_scale=scale,
            softcap=20.0,
            label_smoothing=0.1,
            return_token_loss=True,
            chunk_rows=2,
            implementation=name,
        )
        (out.loss * 3.0).backward()
        results.append((out, hidden_leaf.grad, weight_leaf.grad))
    (ours, *our_grads), (theirs, *their_grads) = results
    torch.testing.assert_close(ours.token_loss_N, theirs.token_loss_N, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=2e-6, atol=2e-6)
    assert torch.equal(ours.stats.tokens, theirs.stats.tokens)
    step = {torch.float32: 2**-20, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
    for our_grad, their_grad in zip(our_grads, their_grads, strict=True):
        assert our_grad.dtype == dtype
        assert (our_grad - their_grad).abs().max() <= step * their_grad.abs().max()


def test_the_promise_reaches_hidden_states_and_weight():
    hidden_NH = torch.randn(3, 8, device=DEVICE).requires_grad_()
    weight_VH = torch.randn(20, 8, device=DEVICE).requires_grad_()
    labels_N = torch.tensor([1, 2, 3], device=DEVICE)
    out = linear_domain_cross_entropy(
        *(hidden_NH, weight_VH, labels_N, labels_N - 1, 3), gradient_scale=math.pi, implementation="triton"
    )
    (out.loss * math.pi).backward()
    first = hidden_NH.grad.clone(), weight_VH.grad.clone()
    hidden_NH.grad = weight_VH.grad = None
    loss = torch.nn.functional.cross_entropy(hidden_NH @ weight_VH.T, labels_N)
    (loss * math.pi).backward()
    torch.testing.assert_close(first, (hidden_NH.grad, weight_VH.grad), rtol=1e-4, atol=1e-6)
