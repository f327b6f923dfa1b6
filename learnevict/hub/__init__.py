"""Gates as files: saved, loaded, tied to their base model, and shared on the Hub with a card that says what they can do."""

from learnevict.hub.card import make_card
from learnevict.hub.download import fetch, install
from learnevict.hub.gates import Gates, GatesConfig, locate
from learnevict.hub.repo import Address
from learnevict.hub.share import open_repository, pull_folder, push_folder, write_card
from learnevict.infer.model.catalogue import GATES_FOLDER
from learnevict.infer.model.supported import layout_of, weight_hash

__all__ = [
    "GATES_FOLDER",
    "Address",
    "Gates",
    "GatesConfig",
    "fetch",
    "install",
    "layout_of",
    "locate",
    "make_card",
    "open_repository",
    "pull_folder",
    "push_folder",
    "weight_hash",
    "write_card",
]
