"""Real models' fused layers: how many are found, and a block of each kind trained on the kernels against fp64."""

import copy
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastconv
from fastconv.benchmarks.models import torchvision
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.launch import record
from tests.marks import DEVICE

pytestmark = [
    pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
    *([] if interpreter.interpreting() else [pytest.mark.gpu]),
]

# name -> (batch norms fused, batch norms, those with an addition)
COUNTS = {
    "resnet18": (20, 20, 8),
    "resnet50": (53, 53, 16),
    "resnext50_32x4d": (53, 53, 16),
    "vgg16_bn": (13, 13, 0),
    "mobilenet_v2": (52, 52, 10),
    "mobilenet_v3_small": (34, 34, 6),
    "efficientnet_b0": (49, 49, 9),
    "regnet_y_400mf": (53, 53, 16),
    "inception_v3": (96, 96, 0),
    "googlenet": (59, 59, 0),
    # Each layer's first and each transition's batch norm are in front of a convolution.
    "densenet121": (59, 121, 0),
    "shufflenet_v2_x0_5": (56, 56, 0),
    "mnasnet0_5": (52, 52, 10),
    "s3d": (77, 77, 0),
    "r2plus1d_18": (37, 37, 8),
    "fcn_resnet50": (54, 54, 16),
    "timm resnet26d": (31, 31, 8),
    "timm efficientnet_b0": (49, 49, 9),
    "timm regnety_002": (44, 44, 13),
    "timm cspresnet50": (55, 55, 13),
    "timm dla34": (37, 37, 12),
    "timm hrnet_w18_small": (91, 91, 26),
    "timm darknet53": (52, 52, 23),
    "timm repvgg_a0": (44, 61, 22),
}


def build(name: str) -> nn.Module:
    """The model without values, if it can be built so."""
    models = torchvision().models
    # RegNet computes its widths with tensors.
    with torch.device("cpu" if "regnet_y" in name else "meta"):
        if name.startswith("timm "):
            import timm

            return timm.create_model(name.removeprefix("timm "))
        others = {"init_weights": False} if "ception" in name else {"weights_backbone": None} if "fcn" in name else {}
        return models.get_model(name, weights=None, **others)


@pytest.mark.parametrize("name", COUNTS)
def test_how_many_are_fused(name: str) -> None:
    if name.startswith("timm ") and find_spec("timm") is None:
        pytest.skip("timm is not installed")
    fused, norms, sums = COUNTS[name]
    # In training some models drop paths before they add.
    model = fastconv.convert(build(name)).eval()
    report = fastconv.report(model)
    assert (len(report.fused), len(report.norms)) == (fused, norms)
    assert sum("residual" in layer for layer in report.fused) == sums
    assert report.summary.endswith(f"{fused} of {norms} batch norms fused into them")
    assert len(report.fused) + len(report.unfused) == norms
    assert fastconv.report(fastconv.revert(model)).fused == []
    assert {type(m).__dict__.get("_fastconv_names") for m in model.modules()} == {None}


def test_names_of_a_resnets_fused_layers() -> None:
    model = fastconv.convert(build("resnet50"))
    fused = fastconv.report(model).fused
    assert fused[:5] == [
        "conv1 + bn1 + relu",
        "layer1.0.conv1 + bn1 + relu",
        "layer1.0.conv2 + bn2 + relu",
        "layer1.0.conv3 + bn3 + residual + relu",
        "layer1.0.downsample.0 + 1",
    ]
    assert "layer1.0.conv1 + bn1 + relu" in str(fastconv.report(model))


def vgg() -> nn.Module:
    return torchvision().models.vgg.make_layers([6, "M", 4], batch_norm=True)


def resnet(block: str, **arguments: Any) -> nn.Module:
    block = getattr(torchvision().models.resnet, block)
    expansion = block.expansion
    shortcut = nn.Sequential(nn.Conv2d(3, 4 * expansion, 1, 2, bias=False), nn.BatchNorm2d(4 * expansion))
    return block(3, 4, 2, shortcut, **arguments)


def inverted_v2() -> nn.Module:
    return torchvision().models.mobilenetv2.InvertedResidual(3, 3, 1, 2)


def inverted_v3() -> nn.Module:
    v3 = torchvision().models.mobilenetv3
    config = v3.InvertedResidualConfig(8, 3, 16, 8, True, "HS", 1, 1, 1.0)
    return v3.InvertedResidual(config, partial(nn.BatchNorm2d, eps=0.001, momentum=0.01))


def efficientnet(kind: str) -> nn.Module:
    module = torchvision().models.efficientnet
    config = getattr(module, f"{kind}Config")(2, 3, 1, 8, 8, 1)
    return getattr(module, kind)(config, 0.0, nn.BatchNorm2d)


def regnet() -> nn.Module:
    return torchvision().models.regnet.ResBottleneckBlock(3, 4, 2, nn.BatchNorm2d, nn.ReLU, 2, 1.0, 0.25)


def inception_v3() -> nn.Module:
    return torchvision().models.inception.InceptionA(3, pool_features=4)


def googlenet() -> nn.Module:
    torchvision()
    from torchvision.models.googlenet import Inception

    return Inception(3, 2, 3, 4, 2, 3, 2)


def densenet() -> nn.Module:
    return torchvision().models.densenet._DenseBlock(2, 3, 2, 2, 0.0)


def shufflenet() -> nn.Module:
    return torchvision().models.shufflenetv2.InvertedResidual(3, 8, 2)


def video() -> nn.Module:
    torchvision()
    from torchvision.models.video.s3d import TemporalSeparableConv

    return TemporalSeparableConv(3, 4, 3, 1, 1, nn.BatchNorm3d)


def dcgan() -> nn.Module:
    return nn.Sequential(
        *(nn.ConvTranspose2d(3, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(True)),
        *(nn.ConvTranspose2d(4, 2, 3, 2, 1, output_padding=1), nn.BatchNorm2d(2), nn.LeakyReLU(0.2)),
    )


class Up(nn.Module):
    """A decoder's block: what comes up is added to what the encoder had."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=(0, 1)), nn.BatchNorm2d(4))
        self.skip = nn.ConvTranspose2d(3, 4, (1, 2), 2)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.skip(x)
        return torch.relu(self.up(x) + skip)


def timm_conv_norm_act() -> nn.Module:
    torchvision()
    from timm.layers import ConvNormAct

    return ConvNormAct(3, 4, 3, stride=2, act_layer=nn.SiLU)


def timm_bottleneck() -> nn.Module:
    torchvision()
    from timm.models.resnet import Bottleneck, downsample_avg

    return Bottleneck(3, 2, stride=2, downsample=downsample_avg(3, 8, 1, 2))


def timm_inverted() -> nn.Module:
    torchvision()
    from timm.models._efficientnet_blocks import InvertedResidual

    return InvertedResidual(3, 3, exp_ratio=2.0, act_layer=nn.Hardswish)


def timm_regnet() -> nn.Module:
    torchvision()
    from timm.models.regnet import Bottleneck

    return Bottleneck(4, 4, stride=1, group_size=2, downsample="conv1x1")


def timm_dark() -> nn.Module:
    torchvision()
    from timm.models.cspnet import DarkBlock

    return DarkBlock(4, 4, act_layer=nn.LeakyReLU)


def conv2plus1d() -> nn.Module:
    torchvision()
    from torchvision.models.video.resnet import Conv2Plus1D

    return nn.Sequential(Conv2Plus1D(3, 4, 5), nn.BatchNorm3d(4), nn.ReLU(inplace=True))


def timm_dla() -> nn.Module:
    torchvision()
    from timm.models.dla import DlaBasic, DlaTree

    return DlaTree(1, DlaBasic, 3, 4, stride=2)


class Audio(nn.Module):
    """One-dimensional, with a PReLU, a bias and a shortcut that starts from the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(3, 4, 5, stride=2, padding=2), nn.BatchNorm1d(4)
        self.conv2, self.bn2 = nn.Conv1d(4, 4, 3, padding="same", dilation=2), nn.BatchNorm1d(4)
        self.act = nn.PReLU(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        return x + self.act(self.bn2(self.conv2(x)))


# name -> (block, batch norms fused, batch norms called, those with an addition)
BLOCKS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "ResNet basic": (partial(resnet, "BasicBlock"), 3, 3, 1),
    "ResNet bottleneck": (partial(resnet, "Bottleneck"), 4, 4, 1),
    "ResNeXt": (partial(resnet, "Bottleneck", groups=2, base_width=32), 4, 4, 1),
    "VGG": (vgg, 2, 2, 0),
    "MobileNetV2": (inverted_v2, 3, 3, 1),
    "MobileNetV3": (inverted_v3, 3, 3, 1),
    "EfficientNet": (partial(efficientnet, "MBConv"), 3, 3, 1),
    "EfficientNetV2": (partial(efficientnet, "FusedMBConv"), 2, 2, 1),
    "RegNet": (regnet, 4, 4, 1),
    "Inception": (inception_v3, 7, 7, 0),
    "GoogLeNet": (googlenet, 6, 6, 0),
    "DenseNet": (densenet, 2, 4, 0),
    "ShuffleNet": (shufflenet, 5, 5, 0),
    "S3D": (video, 2, 2, 0),
    "R(2+1)D": (conv2plus1d, 2, 2, 0),
    "DCGAN": (dcgan, 2, 2, 0),
    "U-Net": (Up, 1, 1, 1),
    "1-d": (Audio, 2, 2, 1),
    "timm ConvNormAct": (timm_conv_norm_act, 1, 1, 0),
    "timm Bottleneck": (timm_bottleneck, 4, 4, 1),
    "timm InvertedResidual": (timm_inverted, 3, 3, 1),
    "timm RegNet": (timm_regnet, 3, 3, 1),
    "timm DarkNet": (timm_dark, 2, 2, 1),
    "timm DLA": (timm_dla, 6, 6, 2),
}


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The block converted, the same in fp64 of PyTorch's, and an input."""
    make, fused, norms, sums = BLOCKS[name]
    if name.startswith("timm ") and find_spec("timm") is None:
        pytest.skip("timm is not installed")
    torch.manual_seed(0)
    plain = make().to(DEVICE)
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    model = fastconv.convert(copy.deepcopy(plain), memory_format=torch.channels_last)
    report = fastconv.report(model)
    with_sum = [layer for layer in fastconv.report(model.eval()).fused if "residual" in layer]
    assert (len(report.fused), len(report.norms), len(with_sum)) == (fused, norms, sums), report
    model.train()
    size = {"S3D": (3, 5, 5), "R(2+1)D": (3, 4, 4), "DCGAN": (4, 4), "1-d": (12,)}.get(name, (6, 6))
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd))
    return model, plain.double(), torch.randn(3, channels, *size, device=DEVICE)


def close(ours: Tensor, theirs: Tensor, what: str, tolerance: float) -> None:
    """Close, compared with the largest value: gradients before a batch norm are differences."""
    assert ours.shape == theirs.shape
    error, scale = (ours.double() - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= tolerance * max(scale, 0.01), f"{what}: max error {error:.2e} of {scale:.2e}"


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    # A plain sum has no gradient behind a batch norm.
    y = model(x * 1)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("name", BLOCKS)
def test_one_step(name: str) -> None:
    model, plain, x = pair(name)
    with record() as launches:
        y, dx = step(model, x)
    names = [launch.name for launch in launches]
    assert names.count("combine_statistics_kernel") == BLOCKS[name][1]
    expected, expected_dx = step(plain, x.double())
    close(y, expected, "y", 1e-4)
    close(dx, expected_dx, "dx", 1e-3)
    for (what, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        close(ours.grad, theirs.grad, f"gradient of {what}", 1e-3)
    for (what, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        close(ours, theirs.double(), what, 1e-5)
    model.eval(), plain.eval()
    with torch.no_grad():
        close(model(x), plain(x.double()), "inference", 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_three_steps_of_sgd(name: str) -> None:
    model, plain, like = pair(name)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.005, momentum=0.9, weight_decay=1e-4) for m in (model, plain)]
    for number in range(3):
        x = torch.randn(like.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(number))
        for optimizer in optimizers:
            optimizer.zero_grad()
        step(model, x), step(plain, x.double())
        for optimizer in optimizers:
            optimizer.step()
    for (what, ours), theirs in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        close(ours, theirs.double(), what, 1e-3)


def test_timms_synchronised_batch_norms() -> None:
    if find_spec("timm") is None:
        pytest.skip("timm is not installed")
    torchvision()
    from timm.layers import convert_sync_batchnorm

    model, plain, x = pair("timm ConvNormAct")
    model = convert_sync_batchnorm(model)
    assert type(model.bn).__name__ == "SyncBatchNormAct"
    assert fastconv.report(model).fused == ["conv + bn"]
    with record() as launches:
        y, dx = step(model, x)
    assert "combine_statistics_kernel" in [launch.name for launch in launches]
    expected, expected_dx = step(plain, x.double())
    close(y, expected, "y", 1e-4)
    close(dx, expected_dx, "dx", 1e-3)


@pytest.mark.parametrize(
    ("how", "shared", "strict"),
    [("train", False, False), ("eval", True, False), ("no_grad", False, False), ("no_grad", True, True)],
    ids=lambda value: value if isinstance(value, str) else str(int(value)),
)
def test_exported(how: str, shared: bool, strict: bool) -> None:
    """The program holds the fused operators, and computes what the model does for another batch size."""
    model, _, x = pair("MobileNetV2")
    model = nn.Sequential(model, *[model] * shared).train(how == "train")
    sizes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    with torch.set_grad_enabled(how != "no_grad"):
        program = torch.export.export(model, (x,), dynamic_shapes=sizes, strict=strict)
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    names = [str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"]
    fused = "fastconv.conv_act.default" if how == "no_grad" else "fastconv.batch_norm_act.default"
    assert names.count(fused) == 3 * len(model)
    assert not [name for name in names if "aten.conv" in name or "aten.relu" in name or "aten.batch_norm" in name]
    with torch.no_grad():
        assert torch.equal(program.module()(x[:2]), model(x[:2]))
