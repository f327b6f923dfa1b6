"""Labels that lie on a disk: those that the user names, and those that a run makes because it reads texts more than once."""

from __future__ import annotations

import hashlib
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import track
from transformers import PreTrainedModel

from learnevict.config import Layout, readable_bytes
from learnevict.data.label_store import Document, LabelStore, Manifest
from learnevict.data.labelling import Labelling, describe, fill_store
from learnevict.errors import LabelError, UsageError
from learnevict.hub import Gates, weight_hash
from learnevict.infer.model.supported import layout_of
from learnevict.oracle import Repeating, repeat_prompt


def read_labelled(flags: Any, base: PreTrainedModel, gate: Any) -> list[Document]:
    """Returns the documents of a label store, checked against model, trainer and period."""
    folder, method = flags.common.labels, flags.trainable_method
    if not method.trainer.stored_labels:
        raise UsageError(f"mode {method.mode} does not learn from labels; drop --labels, and give --data")
    store = LabelStore(Path(folder))
    found = store.manifest
    if found.base_hash != weight_hash(base):
        raise LabelError(f"{folder!r} holds labels of another base model; make them anew with `learnevict oracle`")
    wanted, how = labels_of(flags, gate)
    if (found.reduce, bool(found.repetition)) != (wanted, how is not None):
        raise LabelError(
            f"{folder!r} holds {found.reduce} labels, but {wanted} labels are learned from; give --oracle or --target, or make "
            "them anew with `learnevict oracle`"
        )
    if how is None and found.block != flags.mode.period:
        raise LabelError(f"{folder!r} holds labels of block {found.block}; train with --period {found.block}")
    if how is not None:
        prompt = f"prompt={tuple(how.prompt)} "
        said = {"chunk": f"chunk={how.chunk} ", "tail": f"tail={how.tail} ", "repeat": prompt, "repeat_ids": prompt}
        if wrong := [name for name in said if name in flags.given and said[name] not in f"{found.repetition} "]:
            raise LabelError(
                f"{folder!r} holds labels of a repetition with {found.repetition}; drop --{wrong[0]}, or make them anew"
            )
    documents = store.documents()
    return documents if reads_states(flags, gate) else [replace(one, states=None) for one in documents]


def labels_of(flags: Any, gate: Any) -> tuple[str, Repeating | None]:
    """Returns which labels a run learns from, a name of learnevict.oracle.PRESETS, and the repetition they are of, if any."""
    mode = flags.mode
    if flags.trainable_method.mode != "stream" or mode.target == "future" or mode.along == "golden":
        return "golden", None
    return mode.oracle or gate.oracle, mode.repeating


def reads_states(flags: Any, gate: Any) -> bool:
    """Returns whether stored hidden states and labels are all that a run's batches have to show to its gate."""
    return flags.trainable_method.mode == "stream" and gate.from_hidden and flags.mode.along == "full"


def store_states(flags: Any, gates: Gates, base: PreTrainedModel, documents: Any) -> Any:
    """Returns documents that are read more than once with labels and hidden states, made once; others as they are.

    They lie below the output folder, where a run that is resumed finds them, and `--labels` of another run.

    Raises:
        UsageError: the disk has no room for them.
    """
    common, training, gate = flags.common, flags.training, gates.gate
    if common.labels or common.streaming or not reads_states(flags, gate) or not flags.mode.store:
        return documents
    batch = training.per_device_train_batch_size * training.world_size * training.gradient_accumulation_steps
    steps = -(-len(documents) // batch)
    passes = training.max_steps / steps if training.max_steps > 0 else training.num_train_epochs
    if passes + flags.mode.closed_form <= 1:
        return documents
    (reduce, how), rows = labels_of(flags, gate), training.per_device_train_batch_size
    labelling = Labelling(Path(common.data).name, flags.mode.period, rows, rows, 0, 0, reduce, how, states=True)
    manifest = describe(base, documents, labelling)
    folder = Path(training.output_dir, f"labels-{hashlib.sha256(repr(manifest).encode()).hexdigest()[:8]}")
    said = _check_room(folder, manifest, documents, layout_of(base.config))
    if training.process_index == 0:
        sys.stdout.write(f"{said} are read once; {reduce} labels and hidden states in {folder}\n")
        sys.stdout.flush()
    watch = partial(track, description="labelling", disable=training.disable_tqdm)
    fill_store(folder, base, documents, labelling, config=vars(common), watch=watch)
    return LabelStore(folder).documents()


def _check_room(folder: Path, manifest: Manifest, documents: list[Document], layout: Layout) -> str:
    """Makes the folder, and returns how many tokens there are and the bytes that their states take; a UsageError: no room."""
    tokens = sum(len(one.input_ids) for one in documents)
    size = 2 * tokens * layout.num_layers * layout.hidden_size
    folder.mkdir(parents=True, exist_ok=True)
    missing = size * len(LabelStore(folder, manifest).missing()) // manifest.num_shards
    if missing > (room := shutil.disk_usage(folder).free):
        raise UsageError(
            f"hidden states of {tokens:,} tokens take {readable_bytes(missing)}, but the disk of {str(folder)!r} has "
            f"{readable_bytes(room)}; learn from fewer --documents, or from all of them anew in every pass with --store false"
        )
    return f"{len(documents)} texts of {tokens:,} tokens ({readable_bytes(size)})"


def with_repeat_ids(flags: Any, tokenizer: Any) -> None:
    """Puts the token ids of what asks for a repetition into the trainer's config, unless they are given or not needed."""
    if getattr(flags.mode, "target", "future") == "reconstruction" and not flags.mode.repeat_ids:
        flags.mode = replace(flags.mode, repeat_ids=repeat_prompt(tokenizer, flags.mode.repeat))
