"""A champion on other test data than it was registered with: tested there, beside the student that would replace it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdistill.engine.settings import InferenceConfig
from segdistill.errors import UserError

if TYPE_CHECKING:
    from segdistill.adapters.mlflow_registry import ChampionScore
    from segdistill.models.outputs import SegmentationNetwork
    from segdistill.report.results import Comparison


def evaluate_champion(
    champion: Path,
    *,
    segmenter: "SegmentationNetwork",
    results: "Comparison",
    prepared: Path,
    inference: InferenceConfig,
    device: str,
) -> "ChampionScore":
    """The champion's score on the present test split, and its paired difference to the student's.

    Both see the same images in the same way, that of the comparison, in one pass over the split.

    Args:
        champion: its exported program.
        segmenter: the student.
        results: the comparison that chose the student; its protocol says how images were shown, and its intervals.
        prepared: the data set.
        inference: how images are shown where the protocol does not say.
        device: see :func:`segdistill.engine.distributed.processes`.

    Raises:
        UserError: the champion cannot be loaded, or its scores are not finite.
    """
    from segdistill.adapters.mlflow_registry import ChampionScore
    from segdistill.data.shards import ShardDataset
    from segdistill.engine.distributed import processes as join
    from segdistill.engine.evaluate import evaluate_together
    from segdistill.engine.inference import Views
    from segdistill.models.outputs import Network
    from segdistill.models.portable import ProgramNetwork, load_program
    from segdistill.report.intervals import block_starts, differences

    protocol, test_set = results.protocol, ShardDataset(prepared, "test")
    program, _ = load_program(champion)
    with join(device) as processes:
        networks: dict[str, Network] = {
            "student": segmenter.to(processes.device),
            "champion": ProgramNetwork(program, processes.device),
        }
        evaluations = evaluate_together(
            networks, test_set, Views(protocol.inference or inference),
            num_classes=segmenter.info.num_classes, processes=processes,
        )  # fmt: skip
        segmenter.cpu()
    if not evaluations["champion"].finite:
        raise UserError("its scores are not finite")
    counts: dict[str, dict[int | None, Any]] = {
        name: {None: evaluation.counts} for name, evaluation in evaluations.items()
    }
    paired = ""
    sequences = [test_set.sequence(index) for index in range(len(test_set))]
    if len(block_starts(len(sequences), protocol.block, sequences)) > 1:
        difference = differences(
            counts, {"student": "champion"}, confidence=protocol.confidence, block=protocol.block, sequences=sequences
        )["student"]  # fmt: skip
        low, high = 100 * difference.low, 100 * difference.high
        paired = (
            f"over the same {len(test_set)} images the difference is {100 * difference.mean:+.2f} points, "
            f"[{low:+.2f}, {high:+.2f}] with {100 * protocol.confidence:g} %"
        )
    return ChampionScore(evaluations["champion"].miou, paired)
