"""Text to token ids and back: the tokenizer, chat templates, the incremental detokenizer."""
