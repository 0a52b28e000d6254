"""Pixel-wise knowledge distillation: Hinton's loss at every pixel."""

from typing import Any, Literal

from torch import Tensor

from segdistill.config import config
from segdistill.losses.blocks import align_logits
from segdistill.losses.divergence import pixel_kl
from segdistill.losses.masks import counted_mask
from segdistill.methods.method import MethodConfig, NonNegative, OfflineMethod, Temperature
from segdistill.models.outputs import Outputs


@config
class KDConfig(MethodConfig):
    """Pixel-wise distillation of the logits."""

    name: Literal["kd"] = "kd"
    weight: NonNegative = 1.0
    """Factor of the mean over pixels of KL(teacher || student)."""
    temperature: Temperature = 1.0
    """Divides both logits; the squared temperature multiplies the loss."""
    mask_ignore: bool = True
    """Leave out ignored pixels; false reproduces CIRKD, which distils them too."""
    upsample: bool = False
    """Compare at label size (APD) and not at the teacher's logit size (CIRKD, IFVD; far cheaper)."""
    align_corners: bool = False
    """Interpolate coarser maps from corner cell to corner cell and not in place; finer ones are averaged anyway."""


class PixelWise(OfflineMethod[KDConfig]):
    """Pixel-wise knowledge distillation (KD).

    Example:
        kd_soft:
          students: {cnn: *cnn}
          methods: [{name: kd, temperature: 4.0}]

    Formula:
        L = T^2 / M * sum over the M valid pixels of KL(p_teacher || p_student), p = softmax(z / T) over classes.
        Every valid pixel counts the same, whatever its image; without a valid pixel L is 0.

    Weights:
        Published weights belong to other reductions of the same sum. For B images, K classes and logits of h x w, the
        weight here that equals a published w:

            CIRKD (batchmean over pixels)                               w          1 -> 1.0
            TorchDistiller, IFVD, APD (mean over elements)              w / K      10 -> 0.53 at K = 19
            structure_knowledge_distillation (sum / (h w))              w * B      10 -> 80 at B = 8
            mmrazor, batchmean on [B, K, h, w]                          w * h * w  1 -> 8192 at 64 x 128
            mmrazor, mean                                               w / K

        All of these use T = 1, and none masks ignored pixels (``mask_ignore: false``). mmrazor and CIRKD multiply
        by T^2; the KD terms of IFVD and TorchDistiller do not. The pixel-wise term of structure_knowledge_distillation
        (SKD) is a soft cross-entropy: to the divergence, whose gradient it has, its value adds the teacher's entropy,
        so that it is not 0 where student and teacher agree.

    Masks:
        Ignored pixels are left out unless ``mask_ignore`` is false. Images without labels are distilled like the
        others.

    Reference:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531. Defaults are those
        of CIRKD (Yang et al., CVPR 2022), with ignored pixels left out.
    """

    paper = "Hinton et al., 2015"
    needs = "logits"
    evidence = "public code"
    term = "kl"

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        config = self.config
        student_logits, teacher_logits, labels = align_logits(
            student.logits, teacher.logits, target, upsample=config.upsample, align_corners=config.align_corners
        )
        valid = counted_mask(labels, mask_ignore=config.mask_ignore)
        settings: dict[str, Any] = {"temperature": config.temperature, "align_corners": config.align_corners}
        return {"kl": pixel_kl(student_logits, teacher_logits, valid, **settings)}
