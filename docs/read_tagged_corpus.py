"""Read what `rmft prepare` wrote, with nothing of rmft_jax: python read_tagged_corpus.py runs/demo/data"""

import sys

import sentencepiece
import tensorflow_datasets as tfds

tokenizer = sentencepiece.SentencePieceProcessor(model_file=f"{sys.argv[1]}/tokenizer.model")
source = tfds.data_source("tagged_corpus", data_dir=sys.argv[1], split="train")
first, again = source[0], sum(int((record["span_rank"] > 0).sum()) for record in source)
print(f"{len(source)} documents, {again} repeated PII; the first has {len(first['tokens'])} tokens:")
print(tokenizer.decode(first["tokens"].tolist()))
