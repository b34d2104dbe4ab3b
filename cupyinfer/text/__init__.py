"""Text in and out: tokenizer files, incremental detokenisation, stop strings, chat templates. No array, no device."""
