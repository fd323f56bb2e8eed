"""Text in, rows of target tokens out: `source` reads documents, `tokens` encodes, `rows` packs."""
