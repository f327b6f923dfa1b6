"""How much a token repeats others, by the cosine of keys (R-KV, SkipKV, G-KV)."""

from __future__ import annotations

import torch
from torch import Tensor

from learnevict.signals import EMPTY, Signals


def redundancy(signals: Signals, threshold: float = 0.5) -> Tensor:
    """Softmax over slots of the mean similarity to all others, float32 [B, H, N]; it sums to 1 over occupied slots.

    M_ij = cos(k_i, k_j), 0 for i = j; in every row i the newest j with M_ij > threshold is set to 0, so the newest
    member of a cluster is not called redundant; R = softmax over j of (1 / N) sum over i of M_ij (section 3.3 of arXiv
    2505.24133).

    Rows are visited a few at a time: nothing as large as N x N, or as the layer's keys, exists. A row without a
    neighbour above the threshold loses nothing (the authors' code zeroes its first column, an artefact).
    """
    position, occupied = signals.position, signals.occupied
    norm = signals.per_slot(lambda keys, _: torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)) + 1e-8
    total = torch.zeros_like(norm)
    there = position.unsqueeze(2)
    for part, keys, _ in signals.pieces(position.shape[-1]):
        rows = (keys.float() / norm[:, :, part, None]).to(keys.dtype)
        here = position[:, :, part].unsqueeze(3)
        alike = signals.slots.logits(rows).float() / norm.unsqueeze(2)
        alike = alike.masked_fill((here == EMPTY) | (there == EMPTY) | (here == there), 0.0)
        newest = torch.where(alike > threshold, there, EMPTY).amax(-1, keepdim=True)
        total += alike.masked_fill(there == newest, 0.0).sum(2)
    mean = total / occupied.sum(-1, keepdim=True).clamp_min(1)
    return mean.masked_fill(~occupied, torch.finfo(torch.float32).min).softmax(-1)
