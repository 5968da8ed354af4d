"""How well descriptors tell classes apart: protocols, labels, the classifier, and its page."""
