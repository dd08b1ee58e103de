"""Text in any form turned into documents and tokens: sources, formats, tokenizers."""
