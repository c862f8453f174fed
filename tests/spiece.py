"""A T5 tokenizer as older checkpoints ship it: sentencepiece's own file, and no tokenizer.json."""

import io
import json
import shutil
from pathlib import Path

import sentencepiece

# As in T5: <pad> 0, </s> 1, <unk> 2 and no <s>; the 100 <extra_id_…> are added by transformers, not by the model.
IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
EXTRA_IDS = 100


def write_spiece_tokenizer(folder: Path, texts: list[str]) -> sentencepiece.SentencePieceProcessor:
    """Replace `folder`/tokenizer_2 by a spiece.model trained on `texts`, and a tokenizer_config.json.

    Args:
        folder: a checkpoint of the test's own, whose T5 tells how many pieces there may be.
        texts: what the pieces are learnt from, T5's rows less the extra ids at most; other characters are <unk>.

    Returns:
        sentencepiece's own reader of the file: `encode(text)` and </s> are the ids that T5's tokenizer must give.
    """
    rows = json.loads((folder / "text_encoder_2" / "config.json").read_text())["vocab_size"]
    tokenizer, model = folder / "tokenizer_2", io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=rows - EXTRA_IDS,
        hard_vocab_limit=False,  # few texts have fewer pieces
        num_threads=1,
        minloglevel=2,
        **IDS,
    )
    shutil.rmtree(tokenizer, ignore_errors=True)
    tokenizer.mkdir(parents=True)
    (tokenizer / "spiece.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": 512,
        "extra_ids": EXTRA_IDS,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
