"""Writing of labels into a store, by one process or by many that share the missing shards.

Under `accelerate launch` or `torchrun` all processes look which shards are missing, wait for each other, and take every n-th:
no two write the same one. A run that was killed is started again, with any number of processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel

from learnevict.data.documents import Collator
from learnevict.data.label_store import Document, LabelStore, Manifest, hash_documents
from learnevict.errors import LabelError, UsageError
from learnevict.hub import weight_hash
from learnevict.hub.run_record import Record, own_record
from learnevict.infer.model.supported import state_shape
from learnevict.infer.teacher_forcing import replay
from learnevict.oracle import PRESETS, Received, Repeating, full_trace, reconstruct, repeat_prompt
from learnevict.oracle.collect import layer_labels

STORED = ("golden", "kvzip", "kvzip+")
"""Labels that a store can hold, of learnevict.oracle.PRESETS: one for each kv head."""
NO_STATES = "keep no states: train with --store false, or make labels without --states"


@dataclass(frozen=True)
class Labelling:
    """Settings of labels and of the files that hold them.

    Attributes:
        data: what the documents are called.
        block: queries per label block; the event period of the policies they are meant for.
        batch_size: documents at a time.
        per_shard: documents in a file.
        pad: token id of padding.
        threads: of torch, in each process on a CPU: sums of another number of threads may differ in the last bit, and
            with one, labels do not depend on how many processes share the work; 0: as many as there are.
        reduce: how attention becomes labels, a name of learnevict.oracle.PRESETS.
        how: the repetition whose attention counts; None: the text's own later blocks do.
        states: keep what the attention of every layer reads, in float16.
    """

    data: str
    block: int = 16
    batch_size: int = 16
    per_shard: int = 200
    pad: int = 0
    threads: int = 1
    reduce: str = "golden"
    how: Repeating | None = None
    states: bool = False

    def __post_init__(self) -> None:
        if self.reduce not in STORED:
            raise UsageError(f"labels {self.reduce!r} are unknown, or not kept; choose {', '.join(STORED)}")
        if PRESETS[self.reduce].needs_queries != (self.how is not None):
            what = "a repetition" if self.how is None else "the text's own future"
            raise UsageError(f"labels {self.reduce!r} are of {what}; ask for that target, or for other labels")

    @classmethod
    def of_target(cls, target: str, labels: str, tokenizer: Any, **settings: Any) -> Labelling:
        """Returns the settings of a target, future or reconstruction, and its labels, by default golden or kvzip.

        Raises:
            UsageError: no such target, or labels of the other one.
        """
        if target not in ("future", "reconstruction"):
            raise UsageError(f"target {target!r} is unknown; choose future or reconstruction")
        how = Repeating(prompt=repeat_prompt(tokenizer)) if target == "reconstruction" else None
        return cls(
            **settings, pad=tokenizer.pad_token_id or 0, reduce=labels or ("kvzip" if how else "golden"), how=how
        )

    @property
    def repetition(self) -> str:
        """Returns how texts are repeated, in words; "" if they are not."""
        return "" if self.how is None else " ".join(f"{name}={value}" for name, value in vars(self.how).items())


@dataclass(frozen=True)
class Labelled:
    """The work of a run, all processes together.

    Attributes:
        num_shards: of the whole store.
        num_before: that were there before.
        num_tokens: of the whole store.
        num_labelled: tokens labelled now.
        seconds: until the last process was done.
        num_processes: that worked.
    """

    num_shards: int
    num_before: int
    num_tokens: int
    num_labelled: int
    seconds: float
    num_processes: int

    def __str__(self) -> str:
        done = f"{self.num_shards} shards, {self.num_before} done before"
        if not self.num_labelled:
            return done
        processes = "1 process" if self.num_processes == 1 else f"{self.num_processes} processes"
        speed = self.num_labelled / max(self.seconds, 1e-9)
        return f"{done}; {self.num_labelled} tokens in {self.seconds:.1f} s by {processes}: {speed:.0f} tokens/s"


def fill_store(
    folder: str | Path,
    model: PreTrainedModel,
    documents: list[Document],
    labelling: Labelling,
    *,
    config: Any = None,
    watch: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Labelled:
    """Writes the labels that are missing in a folder; processes of one launch share the work.

    Args:
        folder: of the store; made if there is none. Those of another run, another program or a running launch are refused.
        model: the base, on this process's device.
        documents: all of them, the same in every process.
        labelling: how.
        config: of the program, for the record.
        watch: wraps the shards of the main process, for a progress bar.
    """
    state = processes()
    own_record(folder, "oracle")
    manifest = describe(model, documents, labelling)
    store = LabelStore(Path(folder), manifest)
    missing = store.missing()
    state.wait_for_everyone()  # from here on shards appear
    mine = missing[state.process_index :: state.num_processes]
    num_before = manifest.num_shards - len(missing)
    record = Record(
        folder,
        "oracle",
        config,
        goes_on=num_before > 0,
        writes=state.is_main_process,
        base_hash=manifest.base_hash,
        data_hash=manifest.data_hash,
    )
    with record, threads(labelling.threads):
        began, num_labelled = time.monotonic(), 0
        for shard in watch(mine) if state.is_main_process else mine:
            part = [documents[index] for index in store.span(shard)]
            store.write(shard, label(model, part, labelling))
            num_labelled += sum(len(one.input_ids) for one in part)
        num_tokens, total = sum(len(one.input_ids) for one in documents), sum(gather_object([num_labelled]))
        seconds = time.monotonic() - began
        done = Labelled(manifest.num_shards, num_before, num_tokens, total, seconds, state.num_processes)
        if left := store.missing():
            raise LabelError(f"{len(left)} shards of {str(folder)!r} are still missing; run the same command again")
        if state.is_main_process:
            store.clean()
        figures = {"num_tokens": num_tokens, "num_labelled": total, "num_processes": done.num_processes}
        record.add(**figures, labelling_seconds=done.seconds)
    return done


@contextmanager
def threads(number: int) -> Generator[None]:
    """Sets the number of torch's threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def processes() -> PartialState:
    """Returns the processes of this launch; without an accelerator they use gloo, which is not accelerate's default."""
    return PartialState(cpu=not torch.accelerator.is_available())


def describe(model: PreTrainedModel, documents: list[Document], labelling: Labelling) -> Manifest:
    """Returns the manifest of the store."""
    text = model.config.get_text_config(decoder=True)
    return Manifest(
        base_hash=weight_hash(model),
        data=labelling.data,
        data_hash=hash_documents(documents),
        block=labelling.block,
        reduce=labelling.reduce,
        repetition=labelling.repetition,
        states=labelling.states,
        num_layers=text.num_hidden_layers,
        num_heads=state_shape(text)[0],
        num_documents=len(documents),
        documents_per_shard=labelling.per_shard,
    )


def label(model: PreTrainedModel, documents: list[Document], labelling: Labelling) -> list[Document]:
    """Returns the same documents with labels float16 [L, H, T, M] and, if asked for, states float16 [L, T, E], on the host.

    Labels of a repetition have M = 1.
    """
    done: list[Document] = []
    collate = Collator(labelling.pad)
    for start in range(0, len(documents), labelling.batch_size):
        batch = documents[start : start + labelling.batch_size]
        inputs = collate(batch)
        ids, mask = (inputs[name].to(model.device) for name in ("input_ids", "attention_mask"))
        labels, states = _read(model, ids, mask, labelling)
        for row, document in enumerate(batch):
            size = len(document.input_ids)
            blocks = -(-size // labelling.block) if labelling.how is None else 1
            kept = None if states is None else states[:, row, -size:].contiguous()
            part = labels[:, row, :, -size:, :blocks].to(torch.float16).cpu()
            done.append(replace(document, labels=part, states=kept))
    return done


@torch.no_grad()
def _read(model: PreTrainedModel, ids: Tensor, mask: Tensor, labelling: Labelling) -> tuple[Tensor, Tensor | None]:
    """Returns labels [L, B, H, T, M], and states float16 [L, B, T, E] on the host if asked for; stock layers hold zeros."""
    reduce, valid = PRESETS[labelling.reduce], mask.bool()
    labels, states = dict[int, Tensor](), dict[int, Tensor]()

    def keep(layer: int, received: Received, found: Tensor) -> None:
        labels[layer] = found if found.ndim == 4 else found.unsqueeze(-1)
        if labelling.states:
            if received.hidden is None:
                raise LabelError(f"layer {layer} of {type(model).__name__} hides what its attention reads; {NO_STATES}")
            states[layer] = received.hidden.to("cpu", torch.float16)

    def see(layer: int, received: Received) -> None:
        keep(layer, received, layer_labels(model, layer, received, block=labelling.block, valid=valid, reduce=reduce))

    if labelling.how is None:
        replay(model, ids, full_trace(model, ids), mask, observe=see, logits_to_keep=1)
    else:
        reconstruct(model, ids, mask, how=labelling.how, reduce=reduce, visit=keep)
    layers = range(model.config.get_text_config(decoder=True).num_hidden_layers)
    like = next(iter(labels.values()))
    whole = torch.stack([labels.get(layer, torch.zeros_like(like)) for layer in layers])
    if not states:
        return whole, None
    if not all(bool(part.isfinite().all()) for part in states.values()):
        raise LabelError(f"hidden states of this model are too large for float16; {NO_STATES}")
    like = next(iter(states.values()))
    return whole, torch.stack([states.get(layer, torch.zeros_like(like)) for layer in layers])
