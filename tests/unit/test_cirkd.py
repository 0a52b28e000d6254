"""Cross-image relations: terms against the slow loop, the memory's laws, and what the released code gets wrong."""

import multiprocessing
import os
import socket
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import _reference as reference
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from segdistill.engine import checkpoint
from segdistill.errors import UserError
from segdistill.methods import cirkd, parse_method
from segdistill.methods.cirkd import CrossImageRelations, image_pair_kl, memory_kl
from segdistill.methods.cirkd.memory import ClassQueues, class_means, random_members
from segdistill.models.outputs import ModelInfo, Outputs

CLASSES = 4
STUDENT, TEACHER = (ModelInfo(CLASSES, (4,) * 4, (4, 8, 16, 32), width, 8, 8, "cnn") for width in (5, 7))
# Queues that take and show everything, so that chance has no say.
ALL = {"pixels_per_class": 100, "pixel_queue": 200, "region_queue": 50, "pixel_contrast": 1000, "region_contrast": 1000}
ALONE = {
    "minibatch": {"pixel_weight": 0.0, "region_weight": 0.0},
    "pixel": {"minibatch_weight": 0.0, "region_weight": 0.0},
    "region": {"minibatch_weight": 0.0, "pixel_weight": 0.0},
}


def build(student: ModelInfo = STUDENT, teacher: ModelInfo = TEACHER, **changes: Any) -> CrossImageRelations:
    torch.manual_seed(0)
    method, config = parse_method({"name": "cirkd"} | changes, "methods.0")
    return method(config, student, teacher).double()


def draw(channels: int, size: tuple[int, int] = (3, 4), seed: int = 0, images: int = 2) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    last = torch.randn(images, channels, *size, generator=generator, dtype=torch.float64)
    return Outputs(last[:, :CLASSES], (), last.requires_grad_())


def labels(size: tuple[int, int] = (6, 8), seed: int = 0, images: int = 2) -> Tensor:
    """Classes 0, 1 and 3 (2 never occurs), some pixels without label."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor([0, 1, 3, 255])[torch.randint(4, (images, *size), generator=generator)]


def rows(maps: Tensor) -> list[list[Tensor]]:
    """The unit vectors of every image, pixel by pixel."""
    return [
        [reference.l2norm(maps[b, :, i, j]) for i in range(maps.shape[2]) for j in range(maps.shape[3])]
        for b in range(len(maps))
    ]


def relation(anchor: Tensor, others: list[Tensor], temperature: float) -> Tensor:
    return torch.stack([anchor @ other for other in others]) / temperature


def slow_pairs(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    ours, theirs = rows(student), rows(teacher.detach())
    total, images = torch.zeros((), dtype=torch.float64), len(student)
    for i in range(images):
        for j in range(images):
            total = total + reference.mean(
                [
                    reference.kl(relation(their, theirs[j], temperature), relation(our, ours[j], temperature))
                    for our, their in zip(ours[i], theirs[i], strict=True)
                ]
            )
    return total / images**2


def slow_memory(student: Tensor, teacher: Tensor, target: Tensor, memory: list[Tensor], temperature: float) -> Tensor:
    anchors = [
        (our, their)
        for our, their, label in zip(
            chain(*rows(student)), chain(*rows(teacher.detach())), target.flatten(), strict=True
        )
        if label != 255
    ]
    return reference.mean(
        [
            reference.kl(relation(their, memory, temperature), relation(our, memory, temperature))
            for our, their in anchors
        ]
    )


def slow_pool(maps: Tensor, side: int) -> Tensor:
    lines = [
        torch.stack(
            [maps[:, :, i : i + side, j : j + side].mean((2, 3)) for j in range(0, maps.shape[3], side)],
            -1,
        )
        for i in range(0, maps.shape[2], side)
    ]
    return torch.stack(lines, -2)


def assert_same(fast: Tensor, slow: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)
    found, expected = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (fast, slow))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-11)


# -- the relations in the batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_rows", [5, 1000])
@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("size", [(3, 4), (2, 5)])
def test_relations_in_the_batch_equal_the_slow_loop_over_pairs_of_images(
    size: tuple[int, int], pool: int, block_rows: int
) -> None:
    student, teacher = draw(5, size, images=3), draw(7, seed=1, images=3)
    method = build(**ALONE["minibatch"], pool=pool, block_rows=block_rows, temperature=0.3)
    fast = method(student, teacher, labels(images=3))["minibatch"]
    fitted, theirs = reference.resized(student.last_feature, (3, 4), False), teacher.last_feature
    slow = slow_pairs(slow_pool(fitted, pool), slow_pool(theirs, pool), 0.3)
    assert_same(fast, slow, student.last_feature)


@pytest.mark.parametrize(("side", "pool"), [(256, 4), (255, 1)])
def test_maps_of_256_cells_a_side_are_averaged_over_four_as_in_the_released_code(
    side: int, pool: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    monkeypatch.setattr(cirkd, "image_pair_kl", lambda student, teacher, **_: compared.extend((student, teacher)))
    maps = torch.rand(1, 2, side, 300)
    build(**ALONE["minibatch"])._minibatch(maps, maps)
    for pooled in compared:
        torch.testing.assert_close(pooled, F.avg_pool2d(maps, pool, ceil_mode=True))


@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-4), (True, 1e-2)])
def test_rounded_products_leave_relations_and_their_gradients_within_a_percent_of_float64(
    half: bool, tolerance: float
) -> None:
    """Cosines of vectors of 64 at temperature 0.1; without rounding the inputs are still those of bfloat16."""
    theirs = torch.randn(2, 64, 6, 8).bfloat16()
    ours = (theirs + torch.randn(2, 64, 6, 8)).bfloat16()
    memory, there = F.normalize(torch.randn(40, 64), dim=1), torch.arange(40) < 33
    target, found = labels((6, 8)), {}
    for name, wide in (("rounded", torch.bfloat16), ("exact", torch.float64)):
        student, teacher = ours.to(wide).requires_grad_(), theirs.to(wide)
        settings = {"temperature": 0.1, "block_rows": 20, "half_products": half}
        values = (
            image_pair_kl(student, teacher, **settings),
            memory_kl(student, teacher, target != 255, memory, there, **settings),
        )
        found[name] = [(value.item(), torch.autograd.grad(value, student)[0].double()) for value in values]
    for (value, slope), (expected, expected_slope) in zip(*found.values(), strict=True):
        assert abs(value - expected) < tolerance * expected
        # The gradient itself is handed back in bfloat16.
        assert (slope - expected_slope).norm() < (tolerance + 2**-8) * expected_slope.norm()


def test_features_in_float32_are_never_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(cirkd, "relation_kl", lambda *sides, half, **_: asked.append(half) or sides[0].sum())
    maps = torch.randn(2, 5, 3, 4)
    for dtype, allowed in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)):
        image_pair_kl(maps.to(dtype), maps.to(dtype), temperature=1.0, block_rows=9, half_products=allowed)
    assert asked == [False, True, False]


def test_two_images_of_one_pixel_worked_by_hand() -> None:
    """With a single pixel each relation is a distribution over one: all of them are 1, and nothing is to be learnt.

    With two pixels at right angles in the teacher and equal in the student, the teacher's relation at temperature 1 is
    (e, 1) / (e + 1) and the student's (1/2, 1/2).
    """
    alone = image_pair_kl(torch.randn(2, 3, 1, 1), torch.randn(2, 3, 1, 1), temperature=0.1, block_rows=1)
    assert alone.item() == 0.0
    student = torch.tensor([[1.0, 2.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    teacher = torch.tensor([[3.0, 0.0], [0.0, 5.0]]).view(1, 2, 1, 2)
    found = image_pair_kl(student, teacher, temperature=1.0, block_rows=8)
    big = torch.e / (torch.e + 1)
    expected = torch.tensor(big).log() * big + torch.tensor(1 - big).log() * (1 - big) + torch.tensor(2.0).log()
    torch.testing.assert_close(found, expected)


def test_relations_in_the_batch_do_not_change_by_rotation_scale_or_empty_channels() -> None:
    student, teacher = draw(5).last_feature.detach(), draw(7, seed=1).last_feature
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    scale = torch.rand(2, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) + 0.5
    plain = image_pair_kl(student, teacher, temperature=0.1, block_rows=7)
    assert plain > 0.1
    for same in (
        torch.einsum("dc,bchw->bdhw", rotation, student),
        student * scale,
        F.pad(student, (0, 0, 0, 0, 0, 6)),
    ):
        torch.testing.assert_close(image_pair_kl(same, teacher, temperature=0.1, block_rows=7), plain)
    assert abs(image_pair_kl(teacher.detach(), teacher, temperature=0.1, block_rows=7).item()) < 1e-12


def test_dead_pixels_give_finite_gradients() -> None:
    student, teacher = draw(5).last_feature.detach(), draw(7, seed=1).last_feature.detach()
    student[0, :, 1], teacher[:, :, 2] = 0.0, 0.0
    student.requires_grad_()
    image_pair_kl(student, teacher, temperature=0.1, block_rows=7).backward()
    assert bool(student.grad.isfinite().all())


# -- the relations to the memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_rows", [5, 1000])
@pytest.mark.parametrize("size", [(3, 4), (2, 5)])
def test_memory_terms_and_their_gradients_equal_the_slow_loop_over_two_steps(
    size: tuple[int, int], block_rows: int
) -> None:
    wide = replace(TEACHER, last_channels=16)  # wide enough for no pixel to be dead behind the projector's ReLU
    method = build(STUDENT, wide, **ALL, minibatch_weight=0.0, block_rows=block_rows, temperature=0.3)
    memory: dict[str, list[Tensor]] = {"pixel": [], "region": []}
    for step in range(2):
        student, teacher = draw(5, size, seed=step), draw(16, seed=10 + step)
        target = labels(seed=step)
        small = reference.nearest(target, (3, 4))
        vectors = rows(teacher.last_feature.detach())
        for b, image in enumerate(vectors):
            classes = small[b].flatten().tolist()
            memory["pixel"] += [vector for vector, label in zip(image, classes, strict=True) if label != 255]
            memory["region"] += [
                reference.l2norm(reference.mean([v for v, label in zip(image, classes, strict=True) if label == c]))
                for c in sorted(set(classes) - {255})
            ]
        fast = method(student, teacher, target)
        projector = method.projector
        ours = reference.resized(projector(student.last_feature), (3, 4), False)
        for term, kept in memory.items():
            slow = slow_memory(ours, teacher.last_feature, small, kept, 0.3)
            assert_same(fast[term], slow, student.last_feature, *projector.parameters())


@pytest.mark.parametrize("term", ["pixel", "region"])
def test_a_memory_term_alone_is_the_one_beside_the_others_and_builds_only_its_queues(term: str) -> None:
    student, teacher, target = draw(5), draw(7, seed=1), labels()
    beside, alone = build(**ALL), build(**ALL, **ALONE[term])
    torch.testing.assert_close(alone(student, teacher, target)[term], beside(student, teacher, target)[term])
    assert list(alone.queues) == [term]
    assert not build(**ALONE["minibatch"]).state_dict()


def test_an_empty_memory_gives_a_zero_with_a_graph() -> None:
    student, teacher = draw(7), draw(7, seed=1)
    loss = memory_kl(
        student.last_feature,
        teacher.last_feature,
        torch.ones(2, 3, 4, dtype=torch.bool),
        torch.zeros(9, 7),
        torch.zeros(9, dtype=torch.bool),
        temperature=0.1,
        block_rows=5,
    )
    loss.backward()
    assert loss.item() == 0 and bool((student.last_feature.grad == 0).all())
    assert teacher.last_feature.grad is None


def test_what_is_not_in_the_memory_has_no_part_in_the_relations() -> None:
    student, teacher = draw(7).last_feature.detach(), draw(7, seed=1).last_feature
    memory = F.normalize(torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), dim=1)
    there = torch.arange(9) % 3 != 0
    everywhere = torch.ones(2, 3, 4, dtype=torch.bool)
    options = {"temperature": 0.1, "block_rows": 7}
    found = memory_kl(student, teacher, everywhere, memory, there, **options)
    shorter = memory_kl(student, teacher, everywhere, memory[there], there[there], **options)
    torch.testing.assert_close(found, shorter, rtol=1e-12, atol=0)


def test_ignored_pixels_are_neither_anchors_nor_queued() -> None:
    student, teacher, target = draw(7), draw(7, seed=1), labels((3, 4))
    ignored = (target == 255)[:, None]
    dirty = [outputs.last_feature.where(~ignored, -9.0) for outputs in (student, teacher)]
    methods = [build(TEACHER, TEACHER, **ALL, projector="identity", minibatch_weight=0.0) for _ in range(2)]
    plain = methods[0](student, teacher, target)
    spoiled = methods[1](Outputs(student.logits, (), dirty[0]), Outputs(student.logits, (), dirty[1]), target)
    for term, loss in plain.items():
        assert loss > 0
        torch.testing.assert_close(spoiled[term], loss)


def test_a_batch_meets_its_own_vectors_at_once() -> None:
    """With another order the memory would be empty at the first step, and the term zero."""
    method = build(**ALL, **ALONE["pixel"])
    assert method(draw(5), draw(7, seed=1), labels())["pixel"] > 0


def test_evaluation_leaves_the_memory_alone() -> None:
    method = build(**ALL).eval()
    method(draw(5), draw(7, seed=1), labels())
    assert not any(bool(queues.filled.any()) for queues in method.queues.values())


def test_no_gradient_reaches_the_queues_or_the_teacher() -> None:
    method = build(**ALL)
    student, teacher = draw(5), draw(7, seed=1)
    sum(method(student, teacher, labels()).values()).backward()
    assert teacher.last_feature.grad is None and student.last_feature.grad is not None
    assert not any(buffer.requires_grad for buffer in method.buffers())
    assert {name.partition(".")[0] for name, _ in method.named_parameters()} == {"projector"}


# -- what enters the memory -------------------------------------------------------------------------------------------


def test_a_vector_queued_for_a_class_is_a_teacher_vector_with_that_label() -> None:
    """The released code numbers the pixels of a class and looks them up among all pixels of the image: defect a."""
    method = build(**ALONE["pixel"], pixels_per_class=3, pixel_queue=9)
    size = (6, 8)
    for step in range(5):
        teacher, target = draw(7, size, seed=step), labels(size, seed=step)
        before = method.queues["pixel"].pointers.tolist()
        method(draw(5, size), teacher, target)
        queues = method.queues["pixel"]
        rings = queues.rows[:-1].view(CLASSES, 9, 7)
        for c in range(CLASSES):
            members = [
                vector
                for image, classes in zip(rows(teacher.last_feature.detach()), target.flatten(1), strict=True)
                for vector, label in zip(image, classes, strict=True)
                if label == c
            ]
            new = (queues.pointers[c].item() - before[c]) % 9
            assert new == (0 if c == 2 else 6)  # three from each of two images
            places = [(before[c] + k) % 9 for k in range(new)]
            matches = [[bool((rings[c, place] - each).abs().max() < 1e-12) for each in members] for place in places]
            assert all(sum(match) == 1 for match in matches)
            assert len({match.index(True) for match in matches}) == new


def test_every_pixel_of_a_class_can_be_drawn_and_none_is_drawn_twice() -> None:
    torch.manual_seed(0)
    vectors = torch.arange(1.0, 25).view(2, 12, 1)
    target = torch.tensor([[0] * 5 + [255] * 2 + [2] * 5, [2] * 12])
    seen: dict[tuple[int, int], set[float]] = {(b, c): set() for b in range(2) for c in range(3)}
    for _ in range(60):
        chosen = random_members(vectors, target, 3, 4)
        for (b, c), values in seen.items():
            drawn = [value for value in chosen[b, c, :, 0].tolist() if value]
            assert len(drawn) == len(set(drawn)) == min(4, int((target[b] == c).sum()))
            values.update(drawn)
    for (b, c), values in seen.items():
        assert values == set(vectors[b, target[b] == c, 0].tolist())


def test_a_class_with_fewer_pixels_gives_all_of_them() -> None:
    vectors = torch.arange(1.0, 7).view(1, 6, 1)
    chosen = random_members(vectors, torch.tensor([[1, 0, 255, 1, 255, 1]]), 3, 4)[0, :, :, 0]
    assert [sorted(one.tolist()) for one in chosen] == [[0, 0, 0, 2], [0, 1, 4, 6], [0, 0, 0, 0]]


def test_a_region_is_the_unit_mean_of_one_class_in_one_image() -> None:
    teacher, target = draw(7), labels((3, 4))
    vectors = torch.stack([torch.stack(image) for image in rows(teacher.last_feature.detach())])
    means = class_means(vectors, target.flatten(1), CLASSES)
    for b in range(2):
        expected = reference.prototypes(vectors.mT.view(2, 7, 3, 4), target, range(b, b + 1))
        for c in range(CLASSES):
            torch.testing.assert_close(means[b, c], expected.get(c, torch.zeros(7, dtype=torch.float64)))


def test_dead_teacher_pixels_are_not_queued() -> None:
    method = build(**ALL)
    teacher = draw(7, seed=1).last_feature.detach()
    teacher[:, :, 1:] = 0
    method(draw(5), Outputs(teacher, (), teacher), torch.zeros(2, 3, 4, dtype=torch.int64))
    assert method.queues["pixel"].filled.tolist() == [8, 0, 0, 0]


# -- the rings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("size", [1, 3, 5, 7, 16])
def test_rings_keep_the_newest_vectors_of_each_class_at_any_size(
    size: int, backwards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The released code puts what would pass the end on the last rows and starts over, which leaves stale rows: b.

    A device writes rows in any order, so the order must not matter.
    """
    plain = Tensor.index_copy_
    if backwards:
        monkeypatch.setattr(Tensor, "index_copy_", lambda rows, dim, at, new: plain(rows, dim, at.flip(0), new.flip(0)))
    generator = torch.Generator().manual_seed(size)
    queues = ClassQueues(3, size, 2)
    written: list[list[float]] = [[], [], []]
    value = 1.0
    for _ in range(25):
        vectors = torch.zeros(3, 6, 2)
        for c in range(3):
            for place in range(6):
                if c != 1 and torch.rand((), generator=generator) < 0.6:
                    vectors[c, place] = value
                    written[c].append(value)
                    value += 1
        queues.enqueue(vectors)
        for c in range(3):
            ring = queues.rows[c * size : (c + 1) * size, 0]
            assert queues.pointers[c] == len(written[c]) % size
            assert queues.filled[c] == min(len(written[c]), size)
            for place in range(min(len(written[c]), size)):
                number = len(written[c]) - 1 - place
                assert ring[number % size] == written[c][number]
    assert not queues.rows[-1].any()


def test_only_written_rows_are_drawn_each_once_and_of_every_class_its_share() -> None:
    """The released code starts with random rows and compares with them from the first step: defect c."""
    torch.manual_seed(0)
    queues = ClassQueues(3, 10, 2)
    assert not queues.sample(4)[1].any()
    vectors = torch.zeros(3, 7, 2)
    vectors[0] = torch.arange(1.0, 8)[:, None]  # seven vectors of class 0, two of class 1, none of class 2
    vectors[1, 2:4] = torch.tensor([11.0, 12.0])[:, None]
    queues.enqueue(vectors)
    seen = set()
    for _ in range(40):
        drawn, there = queues.sample(4)
        assert drawn.shape == (12, 2) and there.view(3, 4).sum(1).tolist() == [4, 2, 0]
        values = [[row[0].item() for row in drawn[4 * c : 4 * c + 4][there[4 * c : 4 * c + 4]]] for c in range(3)]
        assert len(set(values[0])) == 4 and set(values[0]) <= set(range(1, 8)) and sorted(values[1]) == [11, 12]
        seen.update(values[0])
    assert seen == set(range(1, 8))
    assert queues.sample(1000)[0].shape == (30, 2)


def test_drawn_rows_have_length_one_before_and_after_the_rings_wrap() -> None:
    method = build(pixel_queue=7, region_queue=3, pixel_contrast=20, region_contrast=7)
    for step in range(6):
        method(draw(5), draw(7, seed=step), labels(seed=step))
        for queues, share in zip(method.queues.values(), (6, 2), strict=True):
            drawn, there = queues.sample(share)
            assert drawn.shape == (CLASSES * share, 7) and there.any()
            lengths = drawn[there].norm(dim=1)
            torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_an_anchor_is_compared_with_the_published_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plain = ClassQueues.sample

    def sample(self: ClassQueues, count: int) -> tuple[Tensor, Tensor]:
        asked.append(count)
        return plain(self, count)

    monkeypatch.setattr(ClassQueues, "sample", sample)
    info = [ModelInfo(19, (4,) * 4, (4, 8, 16, 32), width, 8, 8, "cnn") for width in (5, 7)]
    build(*info)(draw(5), draw(7), labels())
    assert asked == [4096 // 19 + 1, 1024 // 19 + 1]


@pytest.mark.parametrize(
    ("classes", "channels", "sizes"),
    [(19, 256, (20000, 2000)), (21, 512, (20000, 2000)), (150, 256, (6355, 635)), (150, 2048, (794, 79))],
)
def test_queues_are_shortened_where_they_would_not_fit(classes: int, channels: int, sizes: tuple[int, int]) -> None:
    info = ModelInfo(classes, (4,) * 4, (4, 8, 16, 32), channels, 8, 8, "cnn")
    method, config = parse_method({"name": "cirkd"}, "methods.0")
    with torch.device("meta"):
        queues = method(config, info, info).queues
    assert tuple(queue.size for queue in queues.values()) == sizes
    assert sum(queue.rows[:-1].nbytes for queue in queues.values()) <= 1024 * 2**20


# -- state ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_restores_the_memory_bit_for_bit(tmp_path: Path) -> None:
    options = {"pixels_per_class": 2, "pixel_queue": 9, "region_queue": 5, "pixel_contrast": 12, "region_contrast": 8}

    def steps(method: CrossImageRelations, numbers: range) -> list[float]:
        batches = [(draw(5, seed=n), draw(7, seed=50 + n), labels(seed=n)) for n in numbers]
        return [loss.item() for batch in batches for loss in method(*batch).values()]

    method = build(**options)
    torch.manual_seed(5)
    steps(method, range(4))
    checkpoint.save(tmp_path / "resume", {"method": method.state_dict(), "rng": torch.get_rng_state()})
    expected = steps(method, range(4, 9))
    state, other = checkpoint.load(tmp_path / "resume"), build(**options)
    assert state is not None
    other.load_state_dict(state["method"])
    torch.set_rng_state(state["rng"])
    assert steps(other, range(4, 9)) == expected
    for name, value in method.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def _fill(rank: int, port: int, folder: Path) -> None:
    """One of two processes: three steps on its own batches, then its queues on disk."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    method = build(pixels_per_class=2, pixel_queue=11, region_queue=7)
    torch.manual_seed(rank)
    for step in range(3):
        method(draw(5), draw(7, seed=10 * rank + step), labels(seed=10 * rank + step))
    checkpoint.save(folder / str(rank), {name: queues.state_dict() for name, queues in method.queues.items()})
    dist.destroy_process_group()


def test_the_queues_of_two_processes_hold_the_vectors_of_both_and_stay_alike(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["segdistill.methods.cirkd", "segdistill.engine.checkpoint"])
    running = [context.Process(target=_fill, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=60)
    assert [process.exitcode for process in running] == [0, 0]
    first, second = (checkpoint.load(tmp_path / str(rank)) for rank in range(2))
    assert first is not None and second is not None
    alone = build(pixels_per_class=2, pixel_queue=11, region_queue=7)
    for step in range(3):  # the same images in one process
        teachers = torch.cat([draw(7, seed=10 * rank + step).last_feature for rank in range(2)])
        students = torch.cat([draw(5).last_feature] * 2)
        target = torch.cat([labels(seed=10 * rank + step) for rank in range(2)])
        alone(Outputs(students, (), students), Outputs(teachers, (), teachers), target)
    for name, queues in first.items():
        for key, value in queues.items():
            assert torch.equal(value, second[name][key]), f"{name}.{key}"
        assert torch.equal(queues["pointers"], alone.queues[name].pointers)
        assert torch.equal(queues["filled"], alone.queues[name].filled)
    torch.testing.assert_close(first["region"]["rows"], alone.queues["region"].rows)


# -- the projector ----------------------------------------------------------------------------------------------------


def test_the_projector_is_a_normalised_mlp_without_bias_as_wide_as_the_teacher() -> None:
    shapes = {name: tuple(value.shape) for name, value in build().projector.named_parameters()}
    assert shapes == {"0.weight": (7, 5, 1, 1), "1.weight": (7,), "1.bias": (7,), "3.weight": (7, 7, 1, 1)}


def test_a_batch_of_one_pixel_is_projected_with_running_statistics() -> None:
    method = build(**ALL)
    student, teacher = draw(5, (1, 1), images=1), draw(7, (1, 1), seed=1, images=1)
    before = method.projector[1].running_mean.clone()
    terms = method(student, teacher, torch.zeros(1, 4, 4, dtype=torch.int64))
    sum(terms.values()).backward()
    assert all(bool(loss.isfinite()) for loss in terms.values())
    assert bool(student.last_feature.grad.isfinite().all())
    assert torch.equal(method.projector[1].running_mean, before)
    two = draw(5, (1, 2), images=1).last_feature
    torch.testing.assert_close(
        method.projector[:2](two).mean((0, 2, 3)), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_an_identity_projector_between_unequal_widths_is_refused() -> None:
    with pytest.raises(UserError, match=r"cirkd: projector: identity .* not 5 and 7; use mlp"):
        build(projector="identity")
    assert build(projector="identity", **ALONE["minibatch"]).projector is None
