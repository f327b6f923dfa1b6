"""LoRA adapters that ship with the package, merged into the model they were trained on."""

from __future__ import annotations

import json
from pathlib import Path

from learnevict.errors import ModelError
from learnevict.files import replacing_folder
from learnevict.infer.load import load
from learnevict.infer.model.supported import weight_hash


def merge(base: Path, adapter: Path, folder: Path, marker: str) -> None:
    """Merges an adapter of peft into a model and saves the result as a model of its own; the folder appears as a whole.

    Args:
        base: folder of the model.
        adapter: folder of the adapter with the run.json of its training (recipes/adapt.py).
        folder: new or empty.
        marker: name of the file that says what the model was made from.

    Raises:
        ModelError: peft is not installed, or the base has other weights than the adapter was trained on.
        DataError: the folder cannot be written or holds something.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError("an adapter needs peft to be merged: pip install 'learnevict[train]'") from error
    trained_on = json.loads((adapter / "run.json").read_text(encoding="utf-8"))["base_hash"]
    with replacing_folder(folder, (), marker, b"") as fresh:
        model, tokenizer = load(str(base))
        if (found := weight_hash(model)) != trained_on:
            raise ModelError(
                f"{str(base)!r} has the weights {found}, the adapter was trained on {trained_on}; remove the folder and fetch "
                "the model again"
            )
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()  # pyright: ignore[reportCallIssue]
        merged.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        note = {"adapter": adapter.name, "base_hash": trained_on}
        (fresh / marker).write_text(json.dumps(note, indent=1), encoding="utf-8")
