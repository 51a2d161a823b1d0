"""The word-level tokenizer: one id per word or punctuation mark."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from demo.tasks import VOCABULARY
from demo.words import BOS, EOS, PAD, UNK, WORD_PATTERN


def build_tokenizer(max_tokens: int) -> PreTrainedTokenizerFast:
    """Make the tokenizer; it puts BOS first, and decoding gives back the text (see words.to_text)."""
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    # A space before each word, none before punctuation or at the start.
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(Regex(r"^(?=\w)"), " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=max_tokens,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
