"""What the calls refuse with one clear error: second derivatives, transforms of torch.func, tensors spread over ranks,
settings of a wrong type.

Shapes: N tokens, H hidden, V vocabulary.
"""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from megamix_kernels import LossOptions, domain_cross_entropy, linear_domain_cross_entropy

LABELS_N, DOMAIN_N = torch.tensor([3, 9, 0, 7]), torch.tensor([0, 1, 1, 0])


def factors():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 6, generator=generator), torch.randn(10, 6, generator=generator)


def loss_of(form, hidden_NH, weight_VH, **settings):
    """The loss in mode A or B, or from hidden states."""
    settings = {"gradient_scale": 1.0 if form == "A" else None} | settings
    if form == "linear":
        return linear_domain_cross_entropy(hidden_NH, weight_VH, LABELS_N, DOMAIN_N, 2, **settings).loss
    return domain_cross_entropy(hidden_NH @ weight_VH.T, LABELS_N, DOMAIN_N, 2, **settings).loss


@pytest.mark.parametrize("form", ["A", "B", "linear"])
def test_a_gradient_is_not_differentiated_again(form):
    hidden_NH, weight_VH = (factor.requires_grad_() for factor in factors())
    (first_NH,) = torch.autograd.grad(loss_of(form, hidden_NH, weight_VH), hidden_NH, create_graph=True)
    want = torch.autograd.grad(torch.nn.functional.cross_entropy(hidden_NH @ weight_VH.T, LABELS_N), hidden_NH)[0]
    torch.testing.assert_close(first_NH.detach(), want)
    # The product's own second derivative, by the weight, exists; what is missing is that of the loss.
    with pytest.raises(RuntimeError, match="first derivatives only"):
        first_NH.square().sum().backward()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap], ids=["grad", "vmap"])
@pytest.mark.parametrize("form", ["A", "B", "linear"])
def test_transforms_of_functions_are_refused(form, transform):
    hidden_NH, weight_VH = factors()
    argument = hidden_NH if transform is torch.func.grad else hidden_NH[None]
    with pytest.raises(RuntimeError, match=r"do not work inside torch\.func"):
        transform(lambda hidden_NH: loss_of(form, hidden_NH, weight_VH))(argument)


@pytest.fixture
def mesh(tmp_path):
    """A mesh of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_tensors_spread_over_ranks_are_refused(mesh):
    hidden_NH, weight_VH = factors()
    logits_NV = distribute_tensor(hidden_NH @ weight_VH.T, mesh, [Shard(1)])
    with pytest.raises(TypeError, match=r"logits_NV is a DTensor.*logits_NV\.to_local\(\).*process_group="):
        domain_cross_entropy(logits_NV, LABELS_N, DOMAIN_N, 2)
    with pytest.raises(TypeError, match=r"weight_VH is a DTensor"):
        loss_of("linear", hidden_NH, distribute_tensor(weight_VH, mesh, [Shard(0)]))
    loss = domain_cross_entropy(logits_NV.to_local(), LABELS_N, DOMAIN_N, 2, process_group=mesh.get_group()).loss
    torch.testing.assert_close(loss, loss_of("B", hidden_NH, weight_VH))
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup or None, got DeviceMesh"):
        LossOptions(process_group=mesh)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normaliser": "4"}, "normaliser must be a number or a tensor with one element, got '4'"),
        ({"gradient_scale": 1j}, "gradient_scale must be a number or a tensor with one element, got 1j"),
        ({"softcap": None}, r"softcap must be a number \(0 is off\), got None"),
        ({"z_loss": "1e-4"}, r"z_loss must be a number \(0 is off\), got '1e-4'"),
        ({"label_smoothing": []}, r"label_smoothing must be a number \(0 is off\), got \[\]"),
        ({"vocab_size": 5.0}, "vocab_size must be an int, got 5.0"),
        ({"vocab_size": True}, "vocab_size must be an int, got True"),
        ({"ignore_index": None}, "ignore_index must be an int, got None"),
        ({"process_group": 3}, "process_group must be a ProcessGroup or None, got 3"),
        ({"options": {"z_loss": 1}}, r"options must be a LossOptions, got dict; settings can be keywords"),
        ({"softcapp": 1.0}, "unexpected keyword argument 'softcapp'; settings are ignore_index, z_loss"),
    ],
)
@pytest.mark.parametrize("form", ["B", "linear"])
def test_settings_of_a_wrong_type(form, settings, message):
    with pytest.raises(TypeError, match=message):
        loss_of(form, *factors(), **settings)


def test_options_are_checked_as_keywords_are():
    for settings in ({"softcap": None}, {"vocab_size": 5.0}, {"process_group": 3}):
        with pytest.raises(TypeError, match="must be a"):
            LossOptions(**settings)
    with pytest.raises(ValueError, match="implementation must be one of"):
        LossOptions().changed({"implementation": "cuda"})
