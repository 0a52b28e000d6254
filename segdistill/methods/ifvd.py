"""Intra-class feature variation distillation: how far each pixel's feature is from the centre of its class."""

from typing import Literal

import torch
from torch import Tensor

from segdistill.config import config
from segdistill.geometry import resize, resize_labels, size_of
from segdistill.losses.masks import UNLABELLED, class_members, labelled_mask, masked_mean
from segdistill.losses.precision import in_float32
from segdistill.losses.vectors import unit
from segdistill.methods.method import MethodConfig, NonNegative, OfflineMethod
from segdistill.models.outputs import ModelInfo, Outputs, Tap


@config
class IFVDConfig(MethodConfig):
    """Distillation of the intra-class feature variation; the weight is the official code's."""

    name: Literal["ifvd"] = "ifvd"
    weight: NonNegative = 200.0
    """Factor of the mean squared difference of the cosines; CIRKD's port uses 20."""
    tap: Tap = "last_feature"
    """Where the features are taken."""
    keep_ignored_in_mean: bool = False
    """Divide by the count of all pixels, as the official code does, and not by that of the valid ones."""


@in_float32
def centre_similarity(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Cosine of each pixel's feature and the mean feature of its class in its image.

    Every class's sum and every pixel's product with every centre are one matrix product with the 0/1 membership, so
    there is no loop over classes; the pixel then takes its own class's product.

    Shape:
        features: [B, C, h, w]; labels: [B, h, w]; returns [B, h, w], without meaning at ignored pixels.
    """
    vectors = features.flatten(2)  # [B, C, P]
    belongs = class_members(labels, num_classes).to(vectors.dtype)  # [B, K, P]
    sums, counts = torch.bmm(vectors, belongs.mT).mT, belongs.sum(-1, keepdim=True)
    centres = unit(sums / counts.clamp_min(1), dim=-1)  # [B, K, C]
    own = labels.clamp_max(num_classes - 1).flatten(1)[:, None]  # [B, 1, P]
    products = torch.bmm(centres, vectors).gather(1, own)[:, 0]  # [B, P]
    squares = (vectors * vectors).sum(1)
    cosines = products * torch.where(squares > 1e-24, squares, torch.inf).rsqrt()  # a zero vector's is 0
    return cosines.view(labels.shape)


@in_float32
def variation_distance(student: Tensor, teacher: Tensor, labels: Tensor, *, keep_ignored: bool) -> Tensor:
    """Mean over labelled pixels of the squared difference; with ``keep_ignored`` their sum over the count of these and
    the ignored ones.

    Shape:
        student, teacher, labels: [B, h, w].
    """
    squared, labelled = (student - teacher.detach()) ** 2, labelled_mask(labels)
    if keep_ignored:
        return torch.where(labelled, squared, 0.0).sum() / (labels != UNLABELLED).sum().clamp_min(1)
    return masked_mean(squared, labelled)


class IntraClassVariation(OfflineMethod[IFVDConfig]):
    """Intra-class feature variation distillation (IFVD).

    Example:
        ifvd_kd: # the released code's three terms
          students: {cnn: *cnn}
          methods: [{name: kd}, {name: ifvd}, {name: skd, pairwise_weight: 0.0, holistic_weight: 0.001}]

    Formula:
        In each image, centre_c = mean of the features f over the pixels labelled c, labels brought to the feature's
        size by nearest neighbour. With s_v = cos(f_v, centre of v's class) for student and teacher:

        variation  mean over valid pixels of (s_student - s_teacher)^2

        Both widths may differ: only cosines are compared. The student learns through its centres, too.

    Weights:
        200 is the official code's, beside KD at 10 (an element mean: 10 / K of ``kd`` here) and an adversarial term at
        0.001 (``skd`` with ``pairwise_weight: 0``). CIRKD's port uses 20, beside ``kd`` at 1. The term needs KD
        beside it; alone it is reported to hurt.

        Both codes divide by the count of all pixels; by default we divide by that of the valid ones, which is the
        published loss over the valid share. ``keep_ignored_in_mean`` gives the published loss itself.

    Masks:
        Ignored pixels shape no centre and add nothing: in the published codes they are their own centre on both
        sides, cosine 1, and only the denominator counts them. Images without labels have no centres and count nowhere.

    Reference:
        Wang et al.: Intra-class Feature Variation Distillation for Semantic Segmentation, ECCV 2020. A
        re-implementation of the official code's loss; a zero feature has cosine 0 and no gradient instead of the code's
        division by an epsilon.
    """

    paper = "Wang et al., ECCV 2020"
    needs = "last feature, labels"
    evidence = "official code"
    term = "variation"

    def __init__(self, config: IFVDConfig, student: ModelInfo, teacher: ModelInfo) -> None:
        super().__init__(config, student, teacher)
        teacher.require(config.tap)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        config = self.config
        goal = teacher.tap(config.tap).detach()
        feature = resize(student.tap(config.tap), size_of(goal))
        labels = resize_labels(target, size_of(goal))
        student_cosine, teacher_cosine = (
            centre_similarity(features, labels, self.student_info.num_classes) for features in (feature, goal)
        )
        keep_ignored = config.keep_ignored_in_mean
        return {"variation": variation_distance(student_cosine, teacher_cosine, labels, keep_ignored=keep_ignored)}
