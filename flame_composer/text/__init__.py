"""From text in any form to documents and tokens: sources, formats, tokenizers."""
