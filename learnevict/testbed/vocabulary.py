"""The words of the testbed and its tokenizer: one token per word, so that positions can be read by eye."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, BOS, END, USER, ASSISTANT = "<pad>", "<unk>", "<bos>", "<end>", "<user>", "<assistant>"
SPECIAL = (PAD, UNKNOWN, BOS, END, USER, ASSISTANT)

DIGITS = tuple("0123456789")
VARIABLES = tuple("ABCDEFGHIJKLMNOP")
LABELS = tuple(f"L{number}" for number in range(1, 13))
NAMES = tuple("ann bob carol dave erin frank gina hugo iris jack kate liam".split())
PLACES = tuple(
    "mill harbour chapel market tower forest meadow station library bakery castle school island museum valley theatre "
    "quarry orchard".split()
)
VALUES = tuple(
    "river stone lamp tree cloud key bridge candle garden window apple bread copper silver violin drum kettle basket "
    "ladder mirror pepper honey lemon cherry walnut clover thistle maple willow cedar otter heron falcon badger salmon "
    "beetle spider rabbit pony kitten amber coral pearl marble velvet linen cotton ribbon button needle hammer anchor "
    "compass lantern saddle wagon rocket comet planet meteor thunder breeze winter summer".split()
)

# The first word of a statement says whether it counts. Everything after it looks the same on both sides.
TRUE_FACT = ("fact", "set", "given")
FALSE_FACT = ("rumour", "old", "joke")
TRUE_LINE = ("do", "post", "apply")
FALSE_LINE = ("skip", "void", "drop")
TRUE_ROAD = ("open", "free", "clear")
FALSE_ROAD = ("shut", "closed", "blocked")

STRUCTURE = tuple("; , + - = to home ask run start answer noted thanks".split())
CHATTER = tuple(
    "page of double check and compare with near see the by met saw we asked about between again so next hm fine look "
    "at rest hello today talk was sold for".split()
)

CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for message in messages %}"
    "{{ ' <' + message['role'] + '> ' + message['content'] + ' <end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)


def words() -> list[str]:
    """Returns all words in the order of their token ids."""
    groups = (SPECIAL, DIGITS, VARIABLES, LABELS, NAMES, PLACES, VALUES, TRUE_FACT, FALSE_FACT, TRUE_LINE, FALSE_LINE)
    groups += (TRUE_ROAD, FALSE_ROAD, STRUCTURE, CHATTER)
    listed = [word for group in groups for word in group]
    assert len(listed) == len(set(listed)), "a word is listed twice"
    return listed


def unknown_words(text: str) -> list[str]:
    """Returns words of the text that the tokenizer would turn into <unk>, each once, in order of appearance."""
    known = set(words()) - {UNKNOWN}
    return [word for word in dict.fromkeys(text.split()) if word not in known]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the word-level tokenizer with its chat template; it adds no special tokens, since the template writes them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words())}, unk_token=UNKNOWN))
    core.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    settings: dict[str, Any] = dict(
        pad_token=PAD, unk_token=UNKNOWN, bos_token=BOS, eos_token=END, extra_special_tokens=[USER, ASSISTANT],
        padding_side="left", clean_up_tokenization_spaces=False, model_max_length=2048,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **settings)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
