"""Histories: tables of the last known input rows of each layer."""

from gas_triton.history.histories import Histories, ReadsHistory, attach_histories
from gas_triton.history.store import HistoryStore
from gas_triton.history.tiers import TIERS

__all__ = ["TIERS", "Histories", "HistoryStore", "ReadsHistory", "attach_histories"]
