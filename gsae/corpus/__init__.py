"""Text: from files to documents, pieces and packed contexts."""
