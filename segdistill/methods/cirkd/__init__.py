"""Cross-image relational distillation: how pixels relate to those of other images, in the batch and in a memory."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segdistill.config import config
from segdistill.errors import UserError
from segdistill.geometry import resize, resize_labels, size_of
from segdistill.losses.align import Projection
from segdistill.losses.masks import valid_mask
from segdistill.losses.precision import in_float32, is_half
from segdistill.losses.vectors import unit
from segdistill.methods.cirkd.memory import ClassQueues, class_means, gather_batches, random_members
from segdistill.methods.cirkd.relations import relation_kl
from segdistill.methods.method import Count, MethodConfig, NonNegative, OfflineMethod, Positive, Temperature
from segdistill.models.batch_norm import allow_single_values
from segdistill.models.outputs import ModelInfo, Outputs

# The released code averages windows of 4 x 4 before the relations in the batch where both sides have so many cells.
LARGE, LARGE_POOL = 256, 4


@config
class CIRKDConfig(MethodConfig):
    """Cross-image relations of last features; the defaults are the released code's for Cityscapes."""

    name: Literal["cirkd"] = "cirkd"
    minibatch_weight: NonNegative = 1.0
    """Weight of the relations between all pairs of images of the batch; 0 is off."""
    pixel_weight: NonNegative = 0.1
    """Weight of the relations to the memory's pixels; 0 is off. The authors use 0.01 on VOC."""
    region_weight: NonNegative = 0.1
    """Weight of the relations to the memory's regions; 0 is off. The authors use 0.01 on VOC."""
    temperature: Temperature = 0.1
    """Divides all cosines; the loss is not multiplied by its square."""
    pool: Count | None = None
    """Side of the windows averaged before the relations in the batch; null: 4 from 256 x 256 cells on, else none."""
    projector: Literal["mlp", "identity"] = "mlp"
    """What maps the student's feature to the memory's width; identity needs networks of equal width."""
    pixels_per_class: Count = 16
    """Teacher pixels that enter the memory, at most, per class and image."""
    pixel_queue: Count = 20000
    """Pixels that the memory keeps per class; the authors use 2000 for SegFormer."""
    region_queue: Count = 2000
    """Regions that the memory keeps per class; a region is the mean of one class in one image."""
    memory_mib: Positive = 1024.0
    """Both queues are shortened in proportion until all of them fit into so many MiB."""
    pixel_contrast: Count = 4096
    """Pixels an anchor is compared with: each class gives floor(this / classes) + 1 of those it has."""
    region_contrast: Count = 1024
    """Regions an anchor is compared with, likewise."""
    block_rows: Count = 1024
    """Pixels whose relations are in memory at a time; changes neither value nor gradient."""
    half_products: bool = True
    """Of networks in half precision, multiply vectors as bfloat16, summed in float32; false: all in float32."""


def image_pair_kl(
    student: Tensor, teacher: Tensor, *, temperature: float, block_rows: int, half_products: bool = False
) -> Tensor:
    """Mean over all ordered pairs of images, and the pixels of the first, of KL(teacher || student) over the second's.

    Each distribution is the softmax of the cosines of one pixel with all pixels of one image, itself included.

    Args:
        half_products: round the factors of products where both sides come in half precision.

    Shape:
        student: [B, C_s, h, w]; teacher: [B, C_t, h, w], detached here.
    """
    images, half = len(student), half_products and is_half(student, teacher)
    student, teacher = _unit_rows(student), _unit_rows(teacher.detach())  # [B * P, C]
    total = _relations(
        student, student, teacher, teacher, groups=images, temperature=temperature, block_rows=block_rows, half=half
    )
    return total / (len(student) * images)


def memory_kl(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    memory: Tensor,
    there: Tensor,
    *,
    temperature: float,
    block_rows: int,
    half_products: bool = False,
) -> Tensor:
    """Mean over valid pixels of KL(teacher || student) between the softmaxes of their cosines with the memory.

    An empty memory gives a zero with a graph.

    Args:
        there: which rows of the memory exist; the others have probability 0.
        half_products: round the factors of products where both sides come in half precision.

    Shape:
        student, teacher: [B, C, h, w], the teacher's detached here; valid: [B, h, w] bool; memory: [M, C] unit
        vectors; there: [M] bool.
    """
    half = half_products and is_half(student, teacher)
    student, teacher = _unit_rows(student), _unit_rows(teacher.detach())
    memory = memory.to(student.dtype)
    total = _relations(
        student, memory, teacher, memory, counted=valid.flatten(), absent=~there, temperature=temperature,
        block_rows=block_rows, half=half,
    )  # fmt: skip
    return total / valid.sum().clamp_min(1)


@in_float32
def _relations(*sides: Tensor, **settings: Any) -> Tensor:
    return relation_kl(*sides, **settings)


class CrossImageRelations(OfflineMethod[CIRKDConfig]):
    """Cross-image relational knowledge distillation (CIRKD).

    Example:
        cirkd_kd:
          students: {cnn: *cnn}
          methods: [{name: kd}, {name: cirkd, pixel_queue: 2000, region_queue: 200}]

    Formula:
        With u = unit(last feature) at every pixel (the student's resized to the teacher's), v = unit(projector(last
        feature)) for the student and v = u for the teacher, and P = softmax of the cosines / temperature:

        minibatch     1 / N^2 * sum over ordered pairs of images (i, j) of mean over pixels x of i of
                      KL(P_teacher || P_student), P over the pixels of j, cosines <u_x, u_y>
        pixel         mean over valid pixels of KL(P_teacher || P_student), P over teacher pixels drawn from the memory,
                      cosines <v, row>
        region        the same over regions: unit mean of the teacher's u over one class in one image

        At every step, before the two memory terms, each image gives up to 16 random pixels and one region of every
        class it has to that class's queue, those of all processes alike, the newest over the oldest. An anchor is
        compared with floor(4096 / K) + 1 pixels and floor(1024 / K) + 1 regions of each of K classes, drawn anew at
        each step among those in the queue. The projector is 1x1 convolution, batch normalisation, ReLU, 1x1
        convolution, as wide as the teacher; it belongs to the method and not to the exported student.

    Weights:
        The released loss is the same mean over rows of each process's batch, without a squared temperature, so the
        published weights carry over: 1, 0.1 and 0.1 on Cityscapes, and 1, 0.01 and 0.01 on VOC, where 0.1 falls below
        the baseline. The paper's system adds ``kd`` with weight 1 and T = 1.

        The queues take K * (pixel_queue + region_queue) * teacher channels * 4 bytes, in memory and in the resume
        checkpoint: 408 MiB at K = 19 and 256 channels. K = 150 would need 3.1 GiB: ``memory_mib`` shortens the queues
        to 6355 pixels and 635 regions a class there, and leaves those of Cityscapes and VOC as published.

    Masks:
        The relations in the batch use no labels: ignored pixels take part, as in the released code. In the memory
        terms they are neither anchors nor queued; pixels of images without labels are anchors and are not queued.
        Ignored pixels do count in the projector's batch statistics (there too), so
        only ``projector: identity`` makes the terms independent of them. A batch without labels gives zeros there.

    Speed:
        The relations in the batch grow with the square of the cells: ``pool: 2`` makes them 16 times cheaper. As in the
        released code, maps of 256 x 256 cells and more are averaged over 4 x 4 windows first, and others are not;
        ``pool: 1`` never averages. Relations are made a block of rows at a time, with the gradient at once. Where both
        networks ran in half precision the products take bfloat16 factors and sum in float32 (``half_products``). On a
        GPU with Triton all that is not a product is one kernel.

    Inferred:
        A re-implementation that leaves out three faults of the released memory. It draws a class's pixels by their
        number within the class but takes them from the whole image, so that queues hold other classes; here they are
        the class's. At the end of a queue it overwrites the last rows and leaves stale ones; here the queue is a ring.
        It compares with random rows until the queues are full; here only rows once written are drawn, each class's
        independently, and places that are still empty have probability 0. Its outer temperature of 1 is left out.

    Reference:
        Yang et al.: Cross-Image Relational Knowledge Distillation for Semantic Segmentation, CVPR 2022,
        arXiv:2204.06986.
    """

    paper = "Yang et al., CVPR 2022"
    needs = "last feature; a projector and queues of the teacher's vectors by class"
    evidence = "official code"

    def __init__(self, config: CIRKDConfig, student: ModelInfo, teacher: ModelInfo) -> None:
        super().__init__(config, student, teacher)
        self.num_classes = student.num_classes
        if self.weights:
            teacher.require("last_feature")
        self.projector: nn.Module | None = None
        self.queues: dict[str, ClassQueues] = {}
        kept = {"pixel": config.pixel_queue, "region": config.region_queue}
        kept = {term: size for term, size in kept.items() if term in self.weights}
        if not kept:
            return
        width = teacher.last_channels
        self.projector = _projector(config.projector, student.last_channels, width)
        needed = sum(kept.values()) * self.num_classes * width * 4 / 2**20
        share = min(1.0, config.memory_mib / needed)
        for term, size in kept.items():
            self.queues[term] = ClassQueues(self.num_classes, max(int(size * share), 1), width)
        self._queues = nn.ModuleDict(self.queues)  # for registration; the dict is for reading

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if "minibatch" in self.weights:
            terms["minibatch"] = self._minibatch(student.last_feature, teacher.last_feature.detach())
        if self.queues:
            terms.update(self._memory(student.last_feature, teacher.last_feature.detach(), target))
        return terms

    def _minibatch(self, student: Tensor, teacher: Tensor) -> Tensor:
        config = self.config
        student = resize(student, size_of(teacher))
        pool = config.pool or (LARGE_POOL if min(size_of(teacher)) >= LARGE else 1)
        if pool > 1:
            student, teacher = (F.avg_pool2d(maps, pool, ceil_mode=True) for maps in (student, teacher))
        return image_pair_kl(student, teacher, **self._settings)

    @property
    def _settings(self) -> dict[str, Any]:
        """What all terms have in common."""
        return {name: getattr(self.config, name) for name in ("temperature", "block_rows", "half_products")}

    def _memory(self, student: Tensor, teacher: Tensor, target: Tensor) -> dict[str, Tensor]:
        config, size = self.config, size_of(teacher)
        assert self.projector is not None
        student, labels = resize(self.projector(student), size), resize_labels(target, size)
        if self.training:
            self._remember(teacher, labels)
        terms = {}
        for term, queues in self.queues.items():
            wanted = config.pixel_contrast if term == "pixel" else config.region_contrast
            memory, there = queues.sample(wanted // self.num_classes + 1)
            terms[term] = memory_kl(student, teacher, valid_mask(labels), memory, there, **self._settings)
        return terms

    @torch.no_grad()
    def _remember(self, teacher: Tensor, labels: Tensor) -> None:
        """Queues the vectors of this step: in every process those of all, so that their queues stay alike."""
        vectors = _unit_rows(teacher).unflatten(0, (len(teacher), -1))  # [B, P, C]
        labels = labels.flatten(1)
        for term, queues in self.queues.items():
            if term == "pixel":
                newest = random_members(vectors, labels, self.num_classes, self.config.pixels_per_class)
            else:
                newest = class_means(vectors, labels, self.num_classes)[:, :, None]
            queues.enqueue(gather_batches(newest).transpose(0, 1).flatten(1, 2))  # [K, E, C]


def _projector(kind: Literal["mlp", "identity"], in_channels: int, out_channels: int) -> nn.Module:
    if kind == "mlp":
        projector = nn.Sequential(
            Projection(in_channels, out_channels),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            Projection(out_channels, out_channels),
        )
        allow_single_values(projector)
        return projector
    if in_channels != out_channels:
        raise UserError(
            f"cirkd: projector: identity compares the student with the teacher's vectors as it is, which needs equal "
            f"widths, not {in_channels} and {out_channels}; use mlp, or pixel_weight: 0 and region_weight: 0"
        )
    return nn.Identity()


@in_float32
def _unit_rows(maps: Tensor) -> Tensor:
    """The pixels of all images as vectors of length one: [B * P, C] from [B, C, h, w]."""
    return unit(maps.flatten(2).transpose(1, 2).flatten(0, 1), dim=1)
