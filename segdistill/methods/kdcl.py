"""Collaborative learning: co-trained students learn from one ensemble of their logits, built with the labels."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from segdistill.config import config
from segdistill.geometry import finest, resize_labels, size_of
from segdistill.losses.align import resize_logits
from segdistill.losses.blocks import resized_in_one_block, sum_over_images
from segdistill.losses.divergence import pixel_divergence
from segdistill.losses.masks import labelled_mask
from segdistill.losses.precision import in_float32
from segdistill.methods.method import Count, MethodConfig, NonNegative, OnlineMethod, Temperature
from segdistill.models.outputs import Outputs

TINY = 1e-12


@config
class KDCLConfig(MethodConfig):
    """Distillation of an ensemble of two or more students into each of them."""

    name: Literal["kdcl"] = "kdcl"
    weight: NonNegative = 1.0
    """Factor of every student's divergence from the ensemble; not confirmed in the authors' code."""
    ensemble: Literal["naive", "linear", "min_logit"] = "min_logit"
    """The best student, the best convex mixture, or the smallest margin of every class under the label's logit."""
    naive_per: Literal["pixel", "image"] = "pixel"
    """Where naive compares the students: at every pixel, or over the valid pixels of every image."""
    linear_steps: Count = 24
    """Steps of the search for linear's weights; logits that differ by dozens need more."""
    temperature: Temperature = 2.0
    """Divides all logits; the squared temperature multiplies the loss."""
    upsample: bool = False
    """Compare at label size and not at the size of the finest student's logits."""


@torch.no_grad()
@in_float32
def naive(logits: Tensor, labels: Tensor, valid: Tensor, *, per: Literal["pixel", "image"]) -> Tensor:
    """The logits of the student with the lowest cross-entropy, the first of them if several have it.

    Shape:
        logits: [S, B, K, h, w] of S students; labels, valid: [B, h, w]; returns [B, K, h, w].
    """
    loss = _pixel_losses(logits, labels, valid)
    if per == "image":
        loss = loss.mean((2, 3), keepdim=True).expand_as(loss)
    best = loss.argmin(0)[None, :, None]  # [1, B, 1, h, w]
    return logits.gather(0, best.expand_as(logits[:1]))[0]


@torch.no_grad()
@in_float32
def min_logit(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """The smallest of the students' logits, each student's label logit subtracted first; 0 at the label.

    Shape:
        logits: [S, B, K, h, w]; labels, valid: [B, h, w]; returns [B, K, h, w].
    """
    return (logits - _label_logits(logits, labels, valid)).amin(0)


@torch.no_grad()
@in_float32
def linear_weights(logits: Tensor, labels: Tensor, valid: Tensor, *, steps: int) -> Tensor:
    """Weights on the simplex under which the mixture of logits has the lowest mean cross-entropy over the valid pixels.

    The cross-entropy is convex in the weights. Each step moves weight from the student with the steepest slope to the
    one with the lowest, by a Newton step shortened to log(1 + R n) / R, where n is Newton's and R the largest range of
    the difference of the two students' logits at a pixel. Along that line the third derivative is at most R times the
    second, so the step never passes the minimum, and no loss has to be tried out. If a single student is still better
    than the result, it is taken.

    Shape:
        logits: [S, B, K, h, w]; labels, valid: [B, h, w]; returns [S].
    """
    share = valid / valid.sum().clamp_min(1)  # [B, h, w], of each pixel in the mean
    at_label = _label_logits(logits, labels, valid)[:, :, 0]  # [S, B, h, w]
    students = torch.arange(len(logits), device=logits.device)
    weights = logits.new_full((len(logits),), 1 / len(logits))
    for _ in range(steps):
        belief = _mixture(weights, logits).softmax(1)  # [B, K, h, w]
        slopes = ((torch.einsum("bkhw,sbkhw->sbhw", belief, logits) - at_label) * share).sum((1, 2, 3))  # [S]
        gains = students == slopes.argmin()
        pays = students == slopes.masked_fill(weights <= 0, -torch.inf).argmax()
        edge = gains.to(logits.dtype) - pays.to(logits.dtype)
        difference = _mixture(edge, logits)
        centred = difference - (belief * difference).sum(1, keepdim=True)
        curvature = ((belief * centred**2).sum(1) * share).sum()
        reach = torch.where(valid, difference.amax(1) - difference.amin(1), 0.0).max().clamp_min(TINY)
        newton = -(edge * slopes).sum() / curvature.clamp_min(TINY)
        step = torch.log1p(reach * newton.clamp_min(0)) / reach
        weights = weights + edge * torch.minimum(step, (pays * weights).sum())
    candidates = torch.cat([weights[None], torch.eye(len(logits), dtype=logits.dtype, device=logits.device)])
    losses = [(_pixel_losses(_mixture(one, logits)[None], labels, valid) * share).sum() for one in candidates]
    return candidates.index_select(0, torch.stack(losses).argmin()[None])[0]


class CollaborativeEnsemble(OnlineMethod[KDCLConfig]):
    """Knowledge distillation via collaborative learning (KDCL) of S >= 2 students.

    Example:
        kdcl_image:
          students: {cnn: *cnn, vit: *vit}
          methods: [{name: kdcl, ensemble: naive, naive_per: image}]

    Formula:
        L_s = T^2 * mean over valid pixels of KL(p_ensemble || p_s), p = softmax(z / T). The ensemble's logits are
        detached and come from the students' logits z_s, all resized to the finest student's size, and the labels y:

        naive         z of the student with the lowest cross-entropy, at the pixel or over the image
        linear        sum_s w_s z_s, with the w on the simplex that minimise the batch's mean cross-entropy of the sum
        min_logit     min_s (z_s - z_s[y]) for every class: 0 at the label, which so gets at least the probability that
                      the best student gives it

        Cross-entropies are taken at temperature 1. Identical students are reproduced by each ensemble.

    Masks:
        Every ensemble reads the labels, so ignored pixels and images without labels are always left out; without a
        label all terms are 0.

    Inferred:
        A re-implementation from texts about the paper: T = 2 and the weight 1 are not confirmed by the authors' code.
        The paper classifies images; its sample is a pixel here (``naive_per: image`` takes the image), and linear has
        one set of weights for the batch of each process. Its fourth ensemble, general, weighs by the covariance of
        errors on held-out data and is left out: it needs a validation pass of its own at every epoch. The paper
        distorts the input of every student separately; here all see the same pixels.

    Reference:
        Guo et al.: Online Knowledge Distillation via Collaborative Learning, CVPR 2020.
    """

    paper = "Guo et al., CVPR 2020"
    needs = "logits of two or more students"
    evidence = "partly second-hand"
    term = "kl"

    def forward(self, peers: Mapping[str, Outputs], target: Tensor) -> dict[str, dict[str, Tensor]]:
        config, logits = self.config, [peers[peer].logits for peer in self.peers]
        size = size_of(target) if config.upsample else finest(map(size_of, logits))
        labels = resize_labels(target, size)
        valid = labelled_mask(labels)
        logits = resized_in_one_block(logits, size)
        weights = self._linear_weights(logits, labels, valid) if config.ensemble == "linear" else None

        def sums(*tensors: Tensor) -> tuple[Tensor, ...]:
            *logits, labels, valid = tensors
            ensemble = self._ensemble(torch.stack([each.detach() for each in logits]), labels, valid, weights)
            values = (pixel_divergence(each, ensemble, temperature=config.temperature) for each in logits)
            return tuple(torch.where(valid, each, 0.0).sum() for each in values)

        totals = sum_over_images(sums, logits, [labels, valid], size)
        count = valid.sum().clamp_min(1)
        return {
            peer: {"kl": total / count * config.temperature**2} for peer, total in zip(self.peers, totals, strict=True)
        }

    def _ensemble(self, logits: Tensor, labels: Tensor, valid: Tensor, weights: Tensor | None) -> Tensor:
        if weights is not None:
            return _mixture(weights, logits)
        if self.config.ensemble == "naive":
            return naive(logits, labels, valid, per=self.config.naive_per)
        return min_logit(logits, labels, valid)

    def _linear_weights(self, logits: list[Tensor], labels: Tensor, valid: Tensor) -> Tensor:
        """Of the whole batch, whose logits are all resized for it, without gradient."""
        whole = [resize_logits(each.detach(), size_of(labels)) for each in logits]
        return linear_weights(torch.stack(whole), labels, valid, steps=self.config.linear_steps)


def _mixture(weights: Tensor, logits: Tensor) -> Tensor:
    """[B, K, h, w] from weights [S] and logits [S, B, K, h, w]."""
    return (weights.view(-1, 1, 1, 1, 1) * logits).sum(0)


def _label_logits(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """[S, B, 1, h, w], each student's logit of the label; some other class's where there is none."""
    index = torch.where(valid, labels, 0)[None, :, None].expand(len(logits), -1, 1, -1, -1)
    return logits.gather(2, index)


def _pixel_losses(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropies [S, B, h, w], 0 without a label."""
    return torch.where(valid, -_label_logits(logits.log_softmax(2), labels, valid)[:, :, 0], 0.0)
