"""megamix: online data mixing for language-model pretraining."""

__version__ = "0.1.0"
