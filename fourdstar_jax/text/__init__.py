"""Text as conditions: captions of objects, and the encoders of words and of FLAN-T5."""
