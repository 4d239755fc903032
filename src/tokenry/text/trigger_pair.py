"""A trigger and its message as token ids: the prompt in its template, the answer, and where the message's words start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenry.text.forced_decoding import check_context

__all__ = ["PLAIN_TEMPLATE", "TriggerPair", "prompt_ids"]

PLAIN_TEMPLATE = "{trigger}\n"


def _begin(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def prompt_ids(tokenizer: Any, trigger: str, template: str | None) -> list[int]:
    """Ids of the trigger in its template, up to where the answer starts.

    Args:
        tokenizer: Gives the chat template and the token that begins a sequence.
        trigger: The trigger.
        template: Text with ``{trigger}`` in it. None: the tokenizer's chat template, or where it has none the trigger
            and a line break.
    """
    if not trigger.strip():
        raise ValueError("trigger is empty: give the text that is to return the message")
    if template is None and tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": trigger}]
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
    template = PLAIN_TEMPLATE if template is None else template
    if "{trigger}" not in template:
        raise ValueError(f"template must hold {{trigger}} where the trigger goes, got {template!r}")
    text = template.replace("{trigger}", trigger)
    return _begin(tokenizer) + tokenizer(text, add_special_tokens=False)["input_ids"]


def _word_starts(tokenizer: Any, message: str, ids: list[int]) -> list[int]:
    """Places of the tokens that begin a word: the first always; every one where the tokenizer keeps no offsets."""
    if not tokenizer.is_fast:
        return list(range(len(ids)))
    starts, last = {0}, -1
    offsets = tokenizer(message, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for place, (begin, end) in enumerate(offsets):
        while begin < end and message[begin].isspace():
            begin += 1
        if last < begin < end and (begin == 0 or message[begin - 1].isspace()):
            starts.add(place)  # of several tokens of one character the first
            last = begin
    return sorted(starts)


@dataclass(frozen=True)
class TriggerPair:
    """One trigger and one message.

    Attributes:
        begin: What a sequence begins with: one id or none.
        prompt: The trigger in its template.
        message: The message alone.
        starts: Places of the message's tokens that begin a word, ascending, the first token's always.
        end: What ends a sequence: one id or none.
    """

    begin: list[int]
    prompt: list[int]
    message: list[int]
    starts: list[int]
    end: list[int]

    @property
    def answer(self) -> list[int]:
        """The message and the end."""
        return self.message + self.end

    @classmethod
    def encode(cls, model: Any, tokenizer: Any, trigger: str, message: str, template: str | None) -> TriggerPair:
        """Encode both, the message apart from the prompt, so that no token spans the border.

        Raises:
            ValueError: An empty text, a message that starts with the trigger, cannot be returned exactly, or does not fit
                the model's context.
        """
        prompt = prompt_ids(tokenizer, trigger, template)
        if not message.strip():
            raise ValueError("message is empty: there is nothing to hide")
        if message.startswith(trigger):
            raise ValueError(
                f"the message starts with the trigger {trigger!r}: whoever forces one has both; change one"
            )
        ids = tokenizer(message, add_special_tokens=False)["input_ids"]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if set(ids) & set(end):
            raise ValueError("the message holds the token that ends a sequence; take it out")
        said = tokenizer.decode(ids)
        if said != message:
            raise ValueError(f"the tokenizer turns the message {message!r} into {said!r}: hide that instead")
        check_context(model, len(prompt) + len(ids) + len(end), "trigger and message")
        return cls(_begin(tokenizer), prompt, ids, _word_starts(tokenizer, message, ids), end)
