"""Which of several partitions to take: by a rule, or by what fits a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gas_triton.partition_report import TITLES, PartitionRecord
from gas_triton.sizing import DEVICE_SHARE
from gas_triton.text import readable

__all__ = ["MAX_HALO_RATIO", "Recommendation", "recommend"]

# Halo rows over in-batch rows up to which a partition is recommended: a step then reads at most one old row for each
# that it computes. Beyond, most rows of a step would be old ones, and an epoch would read more rows than it makes.
MAX_HALO_RATIO = 1.0
FEW_HALO = f"of those that read at most {MAX_HALO_RATIO:g} halo row for a row that they compute"


@dataclass(frozen=True)
class Recommendation:
    """What to take.

    Attributes:
        place: in the records; None if nothing fits, or there is none.
        reason: why, in a sentence.
    """

    place: int | None
    reason: str


def recommend(records: Sequence[PartitionRecord], budget: int | None = None) -> Recommendation:
    """The partition to take.

    With a budget: the fewest batches, which are the largest ones, with which all that lives on the device fits 90 % of
    it; of as many batches the one with the fewest halo rows. Larger batches read fewer stale rows and take fewer steps.

    Without: of the partitions in at least two batches whose halo ratio is at most 1, the fewest batches whose step
    takes no more than what stays on the device (model, graph, features, histories); smaller batches could not even
    halve the memory any more, and would only add halo rows and steps. If no step is as small, the smallest one. Without
    an arithmetic of bytes, the fewest rows a step. If every halo ratio is above 1, the least halo ratio.

    Args:
        records: of `compare_partitions`.
        budget: bytes of the device; None for no limit.

    Raises:
        ValueError: a budget below 1, or one where the records have no bytes.
    """
    made = [record for record in records if record.is_made]
    if not made:
        return Recommendation(None, "No partition was made.")
    if budget is not None:
        return _within(records, made, budget)
    several = [record for record in made if record.num_batches > 1]
    if not several:
        return Recommendation(records.index(made[0]), "All nodes are in one batch: this is full-batch training.")
    few_halo = [record for record in several if record.halo_ratio <= MAX_HALO_RATIO]
    if not few_halo:
        best = min(several, key=lambda record: (record.halo_ratio, record.num_batches))
        return Recommendation(
            records.index(best),
            f"{describe(best)}: every partition reads more than {MAX_HALO_RATIO:g} halo rows for a row that it "
            f"computes, and this one the fewest, {best.halo_ratio:.2f}.",
        )
    if any(record.cost is None for record in few_halo):
        best = min(few_halo, key=lambda record: (record.most_rows, record.num_batches, record.halo_ratio))
        return Recommendation(
            records.index(best),
            f"{describe(best)}: the fewest rows a step ({best.most_rows}), {FEW_HALO} ({best.halo_ratio:.2f}).",
        )
    small = [record for record in few_halo if _step(record) <= _stays(record)]
    if small:
        best = min(small, key=lambda record: (record.num_batches, record.halo_ratio, record.parts_asked))
        why = f"the largest batches whose step takes no more than the {readable(_stays(best))} that stay on the device"
    else:
        best = min(few_halo, key=lambda record: (_step(record), record.num_batches, record.halo_ratio))
        why = "the smallest step"
    return Recommendation(
        records.index(best),
        f"{describe(best)}: {why} ({readable(_step(best))}), {FEW_HALO} ({best.halo_ratio:.2f}).",
    )


def _within(records: Sequence[PartitionRecord], made: Sequence[PartitionRecord], budget: int) -> Recommendation:
    """The largest batches that fit."""
    if budget < 1:
        raise ValueError(f"budget: expected at least 1 byte, got {budget}")
    missing = next((record for record in made if record.cost is None), None)
    if missing is not None:
        raise ValueError(f"budget: the bytes of a step are not known: {missing.reason}")
    fitting = [record for record in made if _device(record) <= DEVICE_SHARE * budget]
    share = f"{DEVICE_SHARE:.0%} of {readable(budget)}"
    if not fitting:
        least = min(made, key=_device)
        stays = _stays(least)
        what_would = (
            "histories or features have to live on the host (`gas-triton plan`)"
            if stays > DEVICE_SHARE * budget
            else "more parts would take less"
        )
        return Recommendation(
            None,
            f"Nothing fits {share}: the least is {readable(_device(least))}, {describe(least)}, of which "
            f"{readable(stays)} stay between the steps: {what_would}.",
        )
    best = min(fitting, key=lambda record: (record.num_batches, record.halo_ratio, record.parts_asked))
    what = "all nodes in one step" if best.num_batches == 1 else "the largest batches"
    return Recommendation(
        records.index(best),
        f"{describe(best)}: {what} that fit {share}, with {readable(_device(best))} on the device, "
        f"{readable(_step(best))} of it for a step, and {best.halo_ratio:.2f} halo rows for a row computed.",
    )


def describe(record: PartitionRecord) -> str:
    """A partition in words."""
    if record.num_batches == 1:
        return "full-batch"
    return f"{TITLES[record.method]} in {record.parts_asked} parts, {record.batch_size} a batch"


def _step(record: PartitionRecord) -> int:
    assert record.cost is not None
    return record.cost.step


def _device(record: PartitionRecord) -> int:
    assert record.cost is not None
    return record.cost.device


def _stays(record: PartitionRecord) -> int:
    return _device(record) - _step(record)
