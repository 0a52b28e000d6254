"""Structured knowledge distillation: how alike the places of an image are, and whether a critic is deceived."""

from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from segdistill.config import Beta, LearningRate, config
from segdistill.geometry import resize, size_of
from segdistill.losses.align import resize_logits
from segdistill.losses.blocks import sum_over_blocks
from segdistill.losses.precision import in_float32
from segdistill.methods.method import Channels, Count, MethodConfig, NonNegative, OfflineMethod
from segdistill.models.outputs import ModelInfo, Outputs, Tap

Grid = Literal["2x2", "stride2"]
Adversarial = Literal["hinge", "wgan_gp"]

# The weight that each grid was published with: the released script's, and that of CIRKD's port.
PUBLISHED = {"2x2": 0.5, "stride2": 10.0}


@config
class SKDConfig(MethodConfig):
    """Structured distillation: pair-wise, and optionally holistic; the defaults are the released script's."""

    name: Literal["skd"] = "skd"
    weight: NonNegative = 1.0
    """Factor of the pair-wise and holistic terms; 0 switches the method off."""
    pairwise_weight: NonNegative | None = None
    """Weight of the pair-wise term; null is the grid's published one, 0.5 for 2x2 and 10 for stride2; 0 is off."""
    holistic_weight: NonNegative = 0.0
    """Weight of deceiving the critic: 0.1 in SKD, 0.001 in IFVD, CWD and CIRKD; 0 is off, and builds no critic."""
    critic_weight: NonNegative = 0.1
    """Factor of the critic's own loss; 0 leaves the critic as it was drawn."""
    tap: Tap = "last_feature"
    """Where the features of the pair-wise term are taken."""
    grid: Grid = "2x2"
    """Nodes: about two by two whatever the size (released code), or one in four pixels (CIRKD's port)."""
    detach_norm: bool = True
    """Let no gradient through the length of a node's vector, as the released code does; CIRKD's port lets it."""
    block_rows: Count | None = 512
    """Nodes whose similarities are in memory at once, recomputed for the gradient; null makes none (large grids)."""
    adversarial: Adversarial = "hinge"
    """The critic's loss: hinge (CIRKD), or Wasserstein with a penalty on its gradient (SKD, IFVD)."""
    gradient_penalty: NonNegative = 10.0
    """Factor of wgan_gp's penalty; 0 leaves it out."""
    critic_channels: Channels = 64
    """Width of the critic's first layer; it doubles with each of the two after it."""
    critic_lr: LearningRate = 4e-4
    """Constant learning rate of the critic's Adam."""
    critic_betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Betas of the critic's Adam."""


@in_float32
def nodes(features: Tensor, *, grid: Grid, detach_norm: bool) -> Tensor:
    """Max-pooled features as unit vectors, a node a row; a dead node stays 0 and gets no gradient.

    Both grids keep what is left over at the border as windows of their own: 2x2 has up to 3 x 3 nodes on odd maps.

    Shape:
        features: [B, C, h, w]; returns [B, n, C].
    """
    window = (2, 2) if grid == "stride2" else tuple(max(size // 2, 1) for size in size_of(features))
    pooled = F.max_pool2d(features, window, stride=window, ceil_mode=True).flatten(2).mT  # [B, n, C]
    measured = pooled.detach() if detach_norm else pooled
    squares = (measured * measured).sum(-1, keepdim=True)
    return pooled * torch.where(squares > 1e-24, squares, torch.inf).rsqrt()


@in_float32
def pairwise_distance(student: Tensor, teacher: Tensor, *, block_rows: int | None) -> Tensor:
    """Mean over the images and the n^2 pairs of nodes of (a_student - a_teacher)^2, a the pair's inner product.

    The n x n differences are made a block of rows at a time. With ``block_rows`` None they are not made at all: the sum
    of (S S' - T T')^2 over pairs is |S'S|^2 - 2 |S'T|^2 + |T'T|^2, products of C x C channels.

    Shape:
        student: [B, n, C]; teacher: [B, n, C'].
    """
    teacher = teacher.detach()
    if block_rows is None:
        products = ((student, student), (student, teacher), (teacher, teacher))
        of_student, mixed, of_teacher = (torch.bmm(one.mT, other).square().sum() for one, other in products)
        total = of_student - 2 * mixed + of_teacher
    else:
        total = sum_over_blocks(_squared_differences, [student, teacher], student, teacher, block=block_rows, dim=1)
    return total / (len(student) * student.shape[1] ** 2)


class Critic(nn.Module):
    """Scores an image's class probabilities, one number each: three strided convolutions and a mean over places.

    The strided layers have spectral norm. The last has no bias: a constant cannot tell teacher from student.
    """

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        widths = [num_classes, channels, 2 * channels, 4 * channels]
        layers: list[nn.Module] = []
        for wide, wider in pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(wide, wider, 3, stride=2, padding=1)), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, kernel_size=1, bias=False))

    def forward(self, probabilities: Tensor) -> Tensor:  # [B, K, h, w] -> [B]
        return self.layers(probabilities).mean((1, 2, 3))


@in_float32
def holistic_gain(student: Tensor, teacher: Tensor, critic: nn.Module) -> Tensor:
    """What the critic sees between the two: mean over images of D(teacher) - D(student), for the student to lower.

    The critic's weights count as constants, so nothing but the student learns. The published term is -D(student): the
    same gradient, but no value that tells how far the student is.

    Shape:
        student, teacher: [B, K, h, w] probabilities.
    """
    frozen = {name: parameter.detach() for name, parameter in critic.named_parameters()}
    fake, real = functional_call(critic, frozen, torch.cat([student, teacher.detach()])).chunk(2)
    return (real - fake).mean()


@in_float32
def critic_loss(
    student: Tensor, teacher: Tensor, critic: nn.Module, *, adversarial: Adversarial, gradient_penalty: float
) -> Tensor:
    """What the critic lowers to tell the two apart; nothing else learns from it.

    Shape:
        student, teacher: [B, K, h, w] probabilities.
    """
    student, teacher = student.detach(), teacher.detach()
    fake, real = critic(torch.cat([student, teacher])).chunk(2)
    if adversarial == "hinge":
        return (1 - real).relu().mean() + (1 + fake).relu().mean()
    loss = (fake - real).mean()
    if not gradient_penalty:
        return loss
    share = torch.rand(len(student), 1, 1, 1, device=student.device, dtype=student.dtype)
    return loss + gradient_penalty * slope_penalty(share * teacher + (1 - share) * student, critic)


@in_float32
def slope_penalty(probabilities: Tensor, critic: nn.Module) -> Tensor:
    """Mean over images of (length of the gradient of D at the image - 1)^2.

    Shape:
        probabilities: [B, K, h, w].
    """
    slopes = grad(lambda maps: critic(maps).sum())(probabilities).flatten(1)  # differentiable, also when compiled
    return ((torch.linalg.vector_norm(slopes, dim=1) - 1) ** 2).mean()


class Structured(OfflineMethod[SKDConfig]):
    """Structured knowledge distillation (SKD): pair-wise similarity, and optionally a critic (holistic).

    Example:
        skd_kd: # CIRKD's port
          students: {cnn: *cnn}
          methods:
            - {name: kd}
            - {name: skd, grid: stride2, detach_norm: false, block_rows: null, holistic_weight: 0.001}

    Formula:
        With q the max-pooled features, each node's vector of unit length, and A = q^T q in each image:

        pairwise  mean over images and pairs of nodes of (A_student - A_teacher)^2
        holistic  mean over images of D(p_teacher) - D(p_student), p = softmax of the logits at the teacher's size
        critic    hinge:   mean of relu(1 - D(p_teacher)) + relu(1 + D(p_student))
                  wgan_gp: mean of D(p_student) - D(p_teacher) + gradient_penalty * (|dD/dp at a random mixture| - 1)^2

        pairwise and holistic train the student; D's weights are constants there. critic trains D alone, with an Adam
        of its own, so one backward pass of the sum serves both. Widths may differ: A has no channels.

    Weights:
        The reduction is the published one. The two grids are different losses that share a name:

            2x2       released code: 4 nodes, 9 on odd maps; weight 0.5 in its script, 1.0 in its options
            stride2   CIRKD's port: h/2 x w/2 nodes, the norm in the graph (detach_norm: false); weight 10

        Both stand beside ``kd`` (1.0 in CIRKD) and holistic: 0.1 in SKD, 0.001 in IFVD, CWD and CIRKD, the critic's
        loss times 0.1. ``weight`` and ``ramp`` do not scale the critic's loss.

    Masks:
        None: no label enters, every pixel counts, also of images without labels.

    Speed:
        ``block_rows: null`` takes the same sum over pairs through C x C products of channels. On a grid with more nodes
        than channels (stride2 on full-size crops) it is several times faster and needs no n x n memory; subtracting
        large numbers costs it an absolute error of about 1e-6 in float32.

    Inferred:
        The critic is a small one of our own (re-implementation): the published ones are deeper, have self-attention,
        and some see the image, which a method here is not given. hinge with Adam is CIRKD's setting; SKD has wgan_gp
        with SGD. The published codes report NaN in this part; hence off by default.

    Reference:
        Liu et al.: Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019, arXiv:1903.04197.
    """

    paper = "Liu et al., CVPR 2019"
    needs = "last feature; holistic: logits, a critic with an optimiser of its own"
    evidence = "official code"
    helper_terms: ClassVar = {"critic": ("holistic",)}

    def __init__(self, config: SKDConfig, student: ModelInfo, teacher: ModelInfo) -> None:
        super().__init__(config, student, teacher)
        if "pairwise" in self.weights:
            teacher.require(config.tap)
        self.critic: Critic | None = None
        if "holistic" in self.weights:
            self.critic = Critic(student.num_classes, config.critic_channels)
            self.critic.requires_grad_("critic" in self.weights)

    def term_weights(self) -> dict[str, float]:
        weights = super().term_weights()
        if self.config.pairwise_weight is None:
            weights["pairwise"] = PUBLISHED[self.config.grid]
        return weights

    def own_optimizers(self) -> dict[str, tuple[list[nn.Parameter], Any]]:
        if self.critic is None or "critic" not in self.weights:
            return {}
        betas = list(self.config.critic_betas)
        settings = {"name": "adam", "lr": self.config.critic_lr, "betas": betas, "weight_decay": 0.0}
        return {"critic": (list(self.critic.parameters()), settings)}

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if "pairwise" in self.weights:
            terms["pairwise"] = self._pairwise(student.tap(self.config.tap), teacher.tap(self.config.tap).detach())
        if self.critic is not None:
            terms.update(self._adversarial_terms(student.logits, teacher.logits.detach(), self.critic))
        return terms

    def _pairwise(self, student: Tensor, teacher: Tensor) -> Tensor:
        config = self.config
        student, teacher = (
            nodes(features, grid=config.grid, detach_norm=config.detach_norm)
            for features in (resize(student, size_of(teacher)), teacher)
        )
        return pairwise_distance(student, teacher, block_rows=config.block_rows)

    def _adversarial_terms(self, student: Tensor, teacher: Tensor, critic: Critic) -> dict[str, Tensor]:
        config, size = self.config, size_of(teacher)
        student, teacher = (resize_logits(logits, size).softmax(1) for logits in (student, teacher))
        terms = {"holistic": holistic_gain(student, teacher, critic)}
        if "critic" in self.weights:
            terms["critic"] = critic_loss(
                student, teacher, critic, adversarial=config.adversarial, gradient_penalty=config.gradient_penalty
            )
        return terms


def _squared_differences(student: Tensor, teacher: Tensor, all_student: Tensor, all_teacher: Tensor) -> Tensor:
    """Sum over a block of nodes, and all nodes they are compared with, of the squared difference of similarities."""
    return (torch.bmm(student, all_student.mT) - torch.bmm(teacher, all_teacher.mT)).square().sum()
