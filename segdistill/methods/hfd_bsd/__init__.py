"""HFD and BSD: a CNN and a transformer learn from each other, each where the other is the more reliable."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from segdistill.config import config
from segdistill.errors import UserError
from segdistill.geometry import finest, resize, resize_labels, size_of
from segdistill.losses.align import projection
from segdistill.losses.blocks import resized_in_one_block, sum_over_images
from segdistill.losses.masks import labelled_only, valid_mask
from segdistill.methods.hfd_bsd.operators import Borrowed
from segdistill.methods.hfd_bsd.selection import (
    feature_distances,
    labelled_regions,
    learners,
    mutual_divergences,
    pixel_errors,
    region_errors,
    region_means,
    selected_sum,
)
from segdistill.methods.method import Count, MethodConfig, NonNegative, OnlineMethod, Temperature
from segdistill.models.operators import loose_operators
from segdistill.models.outputs import ModelInfo, Outputs, Tap

REGION = 32  # image pixels a side of a region unless told otherwise: a cell of the stride-32 feature


@config
class HFDBSDConfig(MethodConfig):
    """Heterogeneous feature distillation and bidirectional selective distillation of a CNN and a transformer."""

    name: Literal["hfd_bsd"] = "hfd_bsd"
    weight: NonNegative = 1.0
    """Factor of all of the method's terms; 0 switches the method off."""
    hfd_weight: NonNegative = 1.0
    """Weight of the imitation of each other's low-level features; ours, the paper's is unknown; 0 is off."""
    region_weight: NonNegative = 1.0
    """Weight of the selective transfer of region features; ours, the paper's is unknown; 0 is off."""
    pixel_weight: NonNegative = 1.0
    """Weight of the selective transfer of pixels' predictions; ours, the paper's is unknown; 0 is off."""
    hfd: Literal["cross_op", "direct", "aux_op"] = "cross_op"
    """What low-level features go through: the transformer's own attention and MLP, nothing, or loose trainable ones."""
    hfd_tap: Tap = "stage1"
    """Where the low-level features are taken; cross_op knows the operators of stage1 only."""
    distance: Literal["cosine", "kl"] = "cosine"
    """Of low-level features: 1 - cos, or KL of softmax over channels."""
    region_tap: Tap = "last_feature"
    """Where the region features are taken."""
    region_grid: Count | None = None
    """Regions along each axis; null: one per 32 x 32 image pixels, as many as a stride-32 feature has cells."""
    region_distance: Literal["cosine", "l2", "kl"] = "cosine"
    """Of region features: 1 - cos, squared distance as they are, or KL of softmax over channels."""
    mask_region_features: bool = False
    """Average a region's feature over its labelled part only."""
    selection: bool = True
    """Only the less reliable student learns at a place; false: both do, everywhere."""
    normalize: Literal["per_direction", "all"] = "per_direction"
    """Divide a student's sum by the number of places where it learns, or by that of all labelled places."""
    temperature: Temperature = 1.0
    """Of the pixel term; divides both logits, squared it multiplies the loss."""
    upsample: bool = True
    """Judge and compare predictions at label size; false: at the finest student's logit size, far cheaper."""
    mask_ignore: bool = True
    """Leave ignored places out where selection is false; a selection needs labels and always does."""


class CollaborativeLearning(OnlineMethod[HFDBSDConfig]):
    """HFD and BSD, CNN-transformer collaborative learning; a re-implementation of what is known of it.

    Example:
        hfd_bsd_ramp:
          students: {cnn: *cnn, vit: *vit} # one of each kind
          methods: [{name: hfd_bsd, ramp: 0.05}]

    Formula:
        With C the CNN and V the transformer, sg = no gradient, f1 and fL their features at ``hfd_tap`` and
        ``region_tap``, z their logits at label size, e their cross-entropies per pixel, phi, psi and W projections:

        C/hfd     mean over locations of d(Attn(phi(f1_C)), sg Attn(f1_V)), Attn with its weights frozen
        V/hfd     mean over locations of d(psi(MLP(f1_V)), sg f1_C), with Attn and MLP the last of V's first stage
        C/region  mean over regions r with E_V(r) < E_C(r) of d(g_C(r), sg g_V(r)); V/region is its mirror image
        C/pixel   T^2 * mean over pixels with e_V < e_C of KL(sg p_V || p_C), p = softmax(z / T); V/pixel likewise

        E(r) is the mean of e over the labelled pixels of r, g(r) the mean of fL over r, d = 1 - cos. Where errors are
        equal nobody learns. W projects the learning side's g where widths differ; the source stays as it is. All maps
        of ``hfd`` have the size of V's. ``hfd: direct`` leaves Attn and MLP out and has the finer student's size;
        ``aux_op`` puts loose trainable ones (PVTv2's, freshly drawn) on the learning side alone,
        C/hfd = d(Attn(phi(f1_C)), sg f1_V), and throws them away after training.

    Weights:
        The paper's are unknown. Ours are 1 each; rescale them once so that each weighted term is 5 to 30 % of the
        cross-entropy over the first hundred iterations. ``ramp: 0.05`` is our safeguard for decoders that both start
        random.

        At 1 each the method harms two beginners whose budget is short (three seeds of two small networks: -1.9 and -3.6
        points; region alone -1.2 and -1.9; at 5 to 30 % of the gradient -0.7 and -0.6, within noise). On the encoder of
        a CNN and a ViT of streets, one seed, over the first 60 iterations, hfd's gradient is 0.4 to 2 times as long as
        the cross-entropy's and at a right angle to it (cosine -0.15 to 0.13), region's 0.2 to 0.9 times (-0.25 to
        0.53); only pixel's, 0.5 to 1.2 times, points the same way (0.3 to 0.8). ``hfd_weight: 0.1``, ``region_weight:
        0.3``, ``pixel_weight: 0.3`` bring each to the 5 to 30 % above; that they gain is not shown. See
        docs/results/controls.md.

        What it cannot do: hfd and region never reach the classifier, so that without cross-entropy they name no class.
        And pixel does not fully ignore a peer that knows nothing: even predictions are the better ones wherever the
        student is sure and wrong, and with ``normalize: per_direction`` the fewer such places there are, the harder
        each pulls; ``normalize: all`` weighs every place alike.

    Masks:
        Pixels without a label select nothing and are no part of E; a region without any takes no part. Features are
        averaged over whole regions unless ``mask_region_features``. No label enters ``hfd``, which alone acts on images
        without labels; with ``selection: false`` region and pixel do too. Under several processes
        each selects and counts on its own.

    Inferred:
        The paper's equations were not available. Known, partly second-hand: what the three parts are, that attention
        serves transformer to CNN and MLP CNN to transformer, that cross-entropy to the labels decides the direction,
        and the mean per direction. Inferred, with confidence: the formula of HFD (0.5; direct and aux_op 0.25 each),
        cosine distances (0.4 to 0.45), a region is a cell of a grid (0.6), T = 1 (0.7); of the pixel term, which is
        told only to be of KL's kind, that it is KL(source || sink) summed over classes, and its mean over the selected
        pixels (0.65); the operators' branches without residual, and all weights, are ours.

    Reference:
        Zhu, Luo, Zheng, Wang, Wang: A Good Student is Cooperative and Reliable: CNN-Transformer Collaborative Learning
        for Semantic Segmentation, ICCV 2023, arXiv:2307.12574.
    """

    paper = "Zhu et al., ICCV 2023"
    needs = "logits, low-level and last features of a CNN and a ViT, 1x1 projections, the ViT's first attention and MLP"
    evidence = "reconstruction"

    def __init__(self, config: HFDBSDConfig, peers: Mapping[str, ModelInfo]) -> None:
        if len(peers) != 2:
            raise UserError(f"hfd_bsd is defined for exactly two students, a CNN and a transformer, not {list(peers)}")
        super().__init__(config, peers)
        self.cnn, self.vit = self.peers
        self._borrowed: tuple[Borrowed, Borrowed] | None = None
        if "hfd" in self.weights and config.hfd != "direct":
            self.cnn, self.vit = _cnn_and_vit(config, peers)
        for sink, source in (self.peers, self.peers[::-1]):
            helpers = self._build_helpers(sink, peers[sink], peers[source])
            if helpers:
                self.helpers[sink] = nn.ModuleDict(helpers)

    def attach(self, students: Mapping[str, nn.Module]) -> None:
        if "hfd" not in self.weights or self.config.hfd != "cross_op":
            return
        vit: Any = students[self.vit]
        try:
            self._borrowed = Borrowed(vit.attention), Borrowed(vit.mlp)
        except UserError as error:
            raise UserError(f"hfd_bsd: student '{self.vit}': {error}; or choose hfd: aux_op, or hfd: direct") from None

    def forward(self, peers: Mapping[str, Outputs], target: Tensor) -> dict[str, dict[str, Tensor]]:
        terms: dict[str, dict[str, Tensor]] = {}  # term -> student -> loss
        if "hfd" in self.weights:
            terms["hfd"] = self._hfd(peers)
        if not {"region", "pixel"}.isdisjoint(self.weights):
            terms.update(self._bsd(peers, target))
        return {sink: {term: losses[sink] for term, losses in terms.items()} for sink in self.peers} if terms else {}

    def _build_helpers(self, name: str, sink: ModelInfo, source: ModelInfo) -> dict[str, nn.Module]:
        """What one student learns through; projections without bias, so that the scale of a feature does not matter."""
        config = self.config
        helpers: dict[str, nn.Module] = {}
        if "hfd" in self.weights:
            helpers["hfd"] = projection(sink.channels(config.hfd_tap), source.channels(config.hfd_tap))
            if config.hfd == "aux_op":
                loose = loose_operators((source if name == self.cnn else sink).channels(config.hfd_tap))
                helpers["operator"] = loose.attention if name == self.cnn else loose.mlp
        if "region" in self.weights:
            helpers["region"] = projection(sink.channels(config.region_tap), source.channels(config.region_tap))
        return helpers

    def _helper(self, sink: str, kind: str) -> nn.Module:
        helpers: Any = self.helpers[sink]
        return helpers[kind]  # type: ignore[no-any-return]

    def _hfd(self, peers: Mapping[str, Outputs]) -> dict[str, Tensor]:
        features = {name: peers[name].tap(self.config.hfd_tap) for name in self.peers}
        if self.config.hfd == "direct":
            size = finest(size_of(feature) for feature in features.values())
            pairs = {
                sink: (resize(self._helper(sink, "hfd")(features[sink]), size), resize(features[source], size))
                for sink, source in (self.peers, self.peers[::-1])
            }
        else:
            pairs = self._through_operators(features[self.cnn], features[self.vit])
        return {sink: feature_distances(*pairs[sink], distance=self.config.distance).mean() for sink in self.peers}

    def _through_operators(self, cnn: Tensor, vit: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """What each student's feature becomes, and what it is to resemble, at the size of the transformer's."""
        size = size_of(vit)
        projected, psi = resize(self._helper(self.cnn, "hfd")(cnn), size), self._helper(self.vit, "hfd")
        if self.config.hfd == "aux_op":
            attention, mlp = self._helper(self.cnn, "operator"), self._helper(self.vit, "operator")
            attended, goal = attention(projected), vit
            mixed = mlp(vit)
        else:
            if self._borrowed is None:
                raise RuntimeError("hfd_bsd: attach the students before the first forward pass")
            borrowed_attention, borrowed_mlp = self._borrowed
            attended = borrowed_attention.frozen(projected)
            with torch.no_grad():
                goal = borrowed_attention.frozen(vit)
            mixed = borrowed_mlp(vit)
        return {self.cnn: (attended, goal), self.vit: (psi(mixed), resize(cnn.detach(), size))}

    def _bsd(self, peers: Mapping[str, Outputs], target: Tensor) -> dict[str, dict[str, Tensor]]:
        config = self.config
        logits = [peers[name].logits for name in self.peers]
        size = size_of(target) if config.upsample else finest(map(size_of, logits))
        labels = resize_labels(target, size)
        if config.selection:  # by errors, which need labels
            labels = labelled_only(labels)
        if "pixel" not in self.weights:  # the logits only judge: no graph, no memory
            logits = [each.detach() for each in logits]
        if config.selection or "pixel" in self.weights:
            logits = resized_in_one_block(logits, size)
        errors = []
        if config.selection:
            errors = [pixel_errors(each, labels) for each in logits]
        terms: dict[str, dict[str, Tensor]] = {}
        if "region" in self.weights:
            grid = self._grid(target)
            features = [peers[name].tap(config.region_tap) for name in self.peers]
            regional = [region_errors(each, labels, grid) for each in errors]
            distances = self._region_distances(features, labels, grid)
            learning, counts = self._learning(regional, labelled_regions(labels, grid))
            sums = map(selected_sum, distances, learning)
            terms["region"] = {sink: total / count for sink, total, count in zip(self.peers, sums, counts, strict=True)}
        if "pixel" in self.weights:
            learning, counts = self._learning(errors, valid_mask(labels))
            totals = sum_over_images(self._pixel_sums, logits, learning, size)
            terms["pixel"] = {
                sink: total / count for sink, total, count in zip(self.peers, totals, counts, strict=True)
            }
        return terms

    def _pixel_sums(self, first: Tensor, second: Tensor, *learning: Tensor) -> tuple[Tensor, ...]:
        divergences = mutual_divergences(first, second, temperature=self.config.temperature)
        return tuple(map(selected_sum, divergences, learning))

    def _region_distances(self, features: list[Tensor], labels: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        mask = labels if self.config.mask_region_features else None
        means = [region_means(feature, grid, mask) for feature in features]
        # Projected after averaging: the same, both being linear, and far cheaper.
        return [
            feature_distances(self._helper(sink, "region")(mean), goal.detach(), distance=self.config.region_distance)
            for sink, mean, goal in zip(self.peers, means, means[::-1], strict=True)
        ]

    def _learning(self, errors: list[Tensor], labelled: Tensor) -> tuple[Sequence[Tensor], list[Tensor]]:
        """The places where each student learns, and the number that the sum over them is divided by."""
        config = self.config
        counted = labelled if config.selection or config.mask_ignore else torch.ones_like(labelled)
        learning = learners(errors[0], errors[1], counted) if config.selection else (counted, counted)
        divisors = [counted if config.normalize == "all" else places for places in learning]
        return learning, [places.sum().clamp_min(1) for places in divisors]

    def _grid(self, target: Tensor) -> tuple[int, int]:
        count = self.config.region_grid
        height, width = size_of(target)
        return (count, count) if count else (-(-height // REGION), -(-width // REGION))


def _cnn_and_vit(config: HFDBSDConfig, peers: Mapping[str, ModelInfo]) -> tuple[str, str]:
    kinds = {info.kind: name for name, info in peers.items()}
    instead = "choose hfd: direct, or hfd_weight: 0"
    if set(kinds) != {"cnn", "vit"}:
        students = " and ".join(f"{name} ({info.kind})" for name, info in peers.items())
        raise UserError(
            f"hfd_bsd: hfd: {config.hfd} takes the features of a CNN through attention and those of a transformer"
            f" through an MLP, and the students are {students}; {instead}"
        )
    if config.hfd == "cross_op" and config.hfd_tap != "stage1":
        raise UserError(
            f"hfd_bsd: hfd: cross_op borrows the operators of the transformer's first stage, which do not fit"
            f" hfd_tap: {config.hfd_tap}; take stage1, or choose hfd: aux_op or hfd: direct"
        )
    return kinds["cnn"], kinds["vit"]
