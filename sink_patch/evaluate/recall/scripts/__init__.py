"""Texts with facts and questions, in token ids: lines, questions of a file, a chat."""
