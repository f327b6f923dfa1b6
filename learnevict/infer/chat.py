"""A conversation with a model, turn by turn, through one cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from learnevict.infer.attach import attach
from learnevict.infer.generate import read_chat
from learnevict.infer.model.modules import device_of
from learnevict.policy import AnyPolicy


class Chat:
    """Asks a model turn by turn, and lets its cache read only what is new: `with Chat(model, tokenizer, policy) as chat`.

    A chat template may write earlier turns otherwise than they were read (it may drop what a model thought). The cache then
    forgets all and reads the conversation anew, as the template has it.

    Attributes:
        messages: the conversation so far, {"role", "content"}; a system message may be put in first.
        how: arguments of generate(), such as max_new_tokens.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, policy: AnyPolicy, **how: Any) -> None:
        self.model: Any = model
        self.tokenizer, self.how = tokenizer, how
        self.messages: list[dict[str, str]] = []
        self.attachment = attach(model, policy)
        self.cache: Any = self.attachment.cache
        self.cache.used = True  # it is handed on here, however little is asked

    def ask(self, text: str) -> str:
        """Returns the model's answer to the user's next words; if the template refuses them, the conversation is as it was."""
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = torch.tensor([read_chat(self.tokenizer, messages)], device=device_of(self.model))
        if not self.cache.starts_with(ids):
            self.cache.reset()
        given = {"attention_mask": torch.ones_like(ids), **self.how, "past_key_values": self.cache, "use_cache": True}
        found = self.model.generate(ids, **given)[0, ids.shape[1] :]
        answer: str = self.tokenizer.decode(found, skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.attachment.detach()
